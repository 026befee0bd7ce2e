# SPDX-License-Identifier: Apache-2.0
"""What window_attention accepts, as sentences about what it does not."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PAD_ORDERS = ("roll_pad", "pad_roll")
QKV_LAYOUTS = ("3hd", "h3d")


def as_pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """An integer, or a pair of them, as (vertical, horizontal)."""
    pair = (value, value) if isinstance(value, int) else value
    if isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(v, int) for v in pair):
        return pair[0], pair[1]
    raise ValueError(f"window_attention: expected {name} to be an integer or (height, width), got {value!r}")


def check_qkv(qkv: Tensor, num_heads: int) -> int:
    """The head dim d of ``qkv`` [B, H, W, 3 * num_heads * d]; raises unless it has one."""
    if qkv.dim() != 4:
        hint = "; add the batch with qkv[None]" if qkv.dim() == 3 else ""
        shape = f"{qkv.dim()} dimensions {tuple(qkv.shape)}"
        raise ValueError(f"window_attention: expected qkv [B, H, W, 3C], got {shape}{hint}")
    channels = qkv.shape[3]
    if num_heads < 1 or channels == 0 or channels % (3 * num_heads):
        raise ValueError(
            f"window_attention: expected qkv with 3 * num_heads * head_dim channels, got {channels} channels and "
            f"num_heads {num_heads}"
        )
    return channels // (3 * num_heads)


def check_window(window: tuple[int, int], shift: tuple[int, int]) -> None:
    """Raise unless the window has a size and the shift stays inside it."""
    if min(window) < 1:
        raise ValueError(f"window_attention: expected a window_size of 1 or more on each axis, got {window}")
    if not all(0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(
            f"window_attention: expected 0 <= shift_size < window_size on each axis, got shift {shift} and window "
            f"{window}; where the window covers the map, shrink it to the map and pass shift 0"
        )


def check_parameters(
    qkv: Tensor, num_heads: int, N: int, attn_bias: Tensor | None, logit_scale: Tensor | None, pad_qkv: Tensor | None
) -> None:
    """Raise unless shapes and dtypes of the parameters fit ``qkv`` and windows of N tokens."""
    dtype, half = qkv.dtype, qkv.dtype in (torch.bfloat16, torch.float16)
    if not (half or dtype in (torch.float32, torch.float64)):
        raise TypeError(f"window_attention: expected a floating qkv of 16, 32 or 64 bits, got {dtype}")
    parameters = (
        ("attn_bias", attn_bias, (num_heads, N, N)),
        ("logit_scale", logit_scale, (num_heads,)),
        ("pad_qkv", pad_qkv, (qkv.shape[3],)),
    )
    for name, t, shape in parameters:
        if t is None:
            continue
        if tuple(t.shape) != shape:
            hint = "; reshape it" if t.numel() == math.prod(shape) else ""
            raise ValueError(f"window_attention: expected {name} {list(shape)}, got {tuple(t.shape)}{hint}")
        if t.dtype != dtype and not (half and t.dtype == torch.float32):
            raise TypeError(
                f"window_attention: expected {name} of qkv's {dtype}{' or torch.float32' if half else ''}, "
                f"got {t.dtype}; cast it with .to({dtype})"
            )


def check_logits(scale: float | None, logit_scale: Tensor | None, mask_value: float) -> None:
    """Raise unless the logits are scaled in one way, by numbers, and masked by a number below infinity."""
    if isinstance(scale, Tensor):
        raise TypeError("window_attention: expected scale to be a number, got a tensor; multiply q by it beforehand")
    if scale is not None and logit_scale is not None:
        raise ValueError(
            "window_attention: expected scale or logit_scale, got both; logit_scale alone multiplies the cosines"
        )
    if not mask_value < math.inf:
        raise ValueError(
            f"window_attention: expected a mask_value below infinity, got {mask_value}; -100.0 is Swin's, "
            "-inf shuts other regions off"
        )


def check_choices(pad_order: str, qkv_layout: str) -> None:
    """Raise unless the two words are known."""
    for name, got, known in (("pad_order", pad_order, PAD_ORDERS), ("qkv_layout", qkv_layout, QKV_LAYOUTS)):
        if got not in known:
            raise ValueError(f"window_attention: expected {name} to be {' or '.join(map(repr, known))}, got {got!r}")


def check_dropout(dropout_p: float, seed: Tensor | None, windows: int, num_heads: int) -> None:
    """Raise unless ``dropout_p`` is a share, with a seed where it is needed."""
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"window_attention: expected dropout_p in [0, 1], got {dropout_p}")
    if dropout_p == 0:
        return
    if seed is None:
        raise ValueError(
            f"window_attention: expected a seed beside dropout_p {dropout_p}, got None; draw one a call with "
            "torch.randint(2**62, ())"
        )
    if seed.dtype != torch.int64 or tuple(seed.shape) not in ((), (1,)):
        raise ValueError(f"window_attention: expected seed [] or [1] int64, got {seed.dtype} {tuple(seed.shape)}")
    if windows * num_heads >= 2**32:
        raise ValueError(
            f"window_attention: expected fewer than 2**32 windows times heads with dropout, got {windows} * "
            f"{num_heads}; split the batch and give each part its own seed"
        )
