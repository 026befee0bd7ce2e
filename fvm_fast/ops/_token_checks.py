# SPDX-License-Identifier: Apache-2.0
"""What patch_embed and the token ops accept, as sentences about what they do not."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fvm_fast.ops._backend import autocast_dtype, on_cuda
from fvm_fast.ops._direct import is_plain

Statistics = Sequence[float] | Tensor | None


def as_rows(op: str, name: str, tensor: Tensor, D: int, rows: tuple[int, ...] | None) -> Tensor:
    """[n, D] or [1, n, D] as [n, D], with n among ``rows`` if given."""
    shape = tuple(tensor.shape)
    bare = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(bare) != 2 or bare[1] != D or (rows is not None and bare[0] not in rows):
        wanted = f"[P, {D}]" if rows is None else " or ".join(f"[{n}, {D}]" for n in dict.fromkeys(rows))
        raise ValueError(f"{op}: expected {name} {wanted} (a leading 1 is accepted), got {shape}")
    return tensor.reshape(bare)


def as_vector(op: str, name: str, tensor: Tensor, D: int) -> Tensor:
    """[D] or [1, 1, D] as [D]."""
    if tensor.dim() > 3 or tensor.numel() != D or tensor.shape[-1:] != (D,):
        raise ValueError(f"{op}: expected {name} [{D}] or [1, 1, {D}], got {tuple(tensor.shape)}")
    return tensor.reshape(D)


def check_tokens(op: str, name: str, x: Tensor) -> None:
    """Raise unless ``x`` is [B, L, D]."""
    if x.dim() != 3:
        raise ValueError(f"{op}: expected {name} [B, L, D], got {x.dim()} dimensions {tuple(x.shape)}")


def check_index(op: str, name: str, ids: Tensor, batch: int) -> None:
    """Raise unless ``ids`` is [batch, K] int64."""
    if ids.dim() != 2 or ids.shape[0] != batch or ids.dtype != torch.int64:
        raise ValueError(f"{op}: expected {name} [{batch}, K] int64, got {ids.dtype} {tuple(ids.shape)}")


# ---- patch_embed


def statistics(mean: Statistics, std: Statistics, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """``mean`` and ``std`` as float64 tensors [C] on the device of the images."""
    if (mean is None) != (std is None):
        raise ValueError("patch_embed: expected mean and std together, got one of them; pass both or neither")
    if mean is None:
        return None, None
    C = images.shape[1]
    for name, value in (("mean", mean), ("std", std)):
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"patch_embed: expected a constant {name}, got one that requires a gradient; detach() it")
        numbers = value.numel() if isinstance(value, Tensor) else len(value)
        if numbers != C:
            raise ValueError(f"patch_embed: expected {name} with {C} numbers (one a channel), got {numbers}")
    return tuple(
        (s.to(images.device, torch.float64) if isinstance(s, Tensor) else _constants(tuple(s), images))
        .reshape(C)
        .contiguous()
        for s in (mean, std)
    )


# By numbers and device. Numbers of the host get there by a copy that waits, so they are copied once.
_on_devices: dict[tuple, Tensor] = {}


def _constants(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    if not (on_cuda(like) and is_plain((like,))):  # what a tracer or a mode makes of them is nobody else's
        return torch.tensor(numbers, dtype=torch.float64, device=like.device)
    key = (numbers, like.device)
    if key not in _on_devices:
        with torch.inference_mode(False):  # else they could not be saved for a backward later
            _on_devices[key] = torch.tensor(numbers, dtype=torch.float64, device=like.device)
    return _on_devices[key]


def check_shapes(images, weight, bias, ids_keep, mask, mask_token) -> None:
    """Raise unless images, weight, bias, ids_keep and mask fit each other."""
    if images.dim() != 4:
        hint = "; add the batch with images[None]" if images.dim() == 3 else ""
        shape = f"{images.dim()} dimensions {tuple(images.shape)}"
        raise ValueError(f"patch_embed: expected images [B, C, H, W], got {shape}{hint}")
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or not weight.numel():
        raise ValueError(f"patch_embed: expected a weight [D, C, p, p] of square patches, got {tuple(weight.shape)}")
    (B, C, H, W), (D, in_chans, p, _) = images.shape, weight.shape
    if in_chans != C:
        raise ValueError(f"patch_embed: expected images of {in_chans} channels, as the weight has, got {C}")
    if H % p or W % p:
        raise ValueError(
            f"patch_embed: expected sides that are multiples of {p}, got {H} x {W}; pad or resize the images"
        )
    if bias is not None and tuple(bias.shape) != (D,):
        raise ValueError(f"patch_embed: expected bias [{D}], got {tuple(bias.shape)}")
    if ids_keep is not None:
        check_index("patch_embed", "ids_keep", ids_keep, B)
    if (mask is None) != (mask_token is None):
        raise ValueError("patch_embed: expected mask and mask_token together, got one of them; pass both or neither")
    L = (H // p) * (W // p)
    if mask is not None and (tuple(mask.shape) != (B, L) or mask.dtype != torch.bool):
        raise ValueError(f"patch_embed: expected mask [{B}, {L}] bool, got {mask.dtype} {tuple(mask.shape)}")


def check_dtypes(images: Tensor, weight: Tensor, **parameters: Tensor | None) -> None:
    """Raise unless the dtypes are one, or uint8 images or float32 parameters beside a 16-bit weight."""
    dtype, half = weight.dtype, weight.dtype in (torch.bfloat16, torch.float16)
    if not (half or dtype in (torch.float32, torch.float64)):
        raise TypeError(f"patch_embed: expected a floating weight of 16, 32 or 64 bits, got {dtype}")
    from_float32 = half and images.dtype == torch.float32 and autocast_dtype(images) is not None
    if images.dtype not in (torch.uint8, dtype) and not from_float32:
        raise TypeError(
            f"patch_embed: expected images of uint8 or of the weight's {dtype}, got {images.dtype}; "
            "cast one of them or use torch.autocast"
        )
    for name, t in parameters.items():
        if t is not None and t.dtype != dtype and not (half and t.dtype == torch.float32):
            raise TypeError(
                f"patch_embed: expected {name} of the weight's {dtype}{' or torch.float32' if half else ''}, "
                f"got {t.dtype}; cast it with .to({dtype})"
            )
