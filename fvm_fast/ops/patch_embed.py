# SPDX-License-Identifier: Apache-2.0
"""Images to tokens in one pass: pixels are normalised, projected, given their position and put behind the prefix.

With ``patch(b, l)`` the C * p * p values of patch l, after ``x / 255`` for uint8 and ``(x - mean) / std`` if given::

    out[b, i]     = prefix_tokens[i] + pos_embed[i]                                          i < P
    out[b, P + k] = weight @ patch(b, id) + bias + pos_embed[P + id],   id = ids_keep[b, k]   (k without ids_keep)

This is the first layer of vision transformers (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929). Only kept
patches are embedded (masked autoencoders, https://arxiv.org/abs/2111.06377), and where ``mask`` is set the mask token
stands for ``weight @ patch + bias`` (BEiT, https://arxiv.org/abs/2106.08254). The batch is never unfolded.
"""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from fvm_fast.ops._backend import (
    accumulation_dtype,
    autocast_dtype,
    call,
    check_ids,
    check_same_device,
    use_native,
    workspace,
)
from fvm_fast.ops._register import register_op
from fvm_fast.ops._token_checks import Statistics, as_rows, as_vector, check_dtypes, check_shapes, statistics


def patch_embed_reference(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    ids_keep: Tensor | None = None,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
) -> Tensor:
    """:func:`patch_embed` by reshape, linear, where, add and cat."""
    (B, C, H, W), (D, p) = images.shape, weight.shape[::3]
    L = (H // p) * (W // p)
    pixels = _normalised(images, mean, std, weight.dtype).reshape(B, C, H // p, p, W // p, p)
    patches = pixels.permute(0, 2, 4, 1, 3, 5).reshape(B, L, C * p * p)
    if ids_keep is not None:
        patches = patches.gather(1, ids_keep[..., None].expand(-1, -1, C * p * p))
        mask = None if mask is None else mask.gather(1, ids_keep)
    tokens = F.linear(patches, weight.flatten(1))
    tokens = tokens if bias is None else tokens + bias
    tokens = tokens if mask is None else torch.where(mask[..., None], mask_token.reshape(D), tokens)
    prefix = None if prefix_tokens is None else prefix_tokens.reshape(-1, D)
    if pos_embed is not None:
        pos_embed = pos_embed.reshape(-1, D)
        P = pos_embed.shape[0] - L  # 0 when the prefix has no positions
        tokens = tokens + (pos_embed[P:] if ids_keep is None else pos_embed[P:][ids_keep])
        prefix = prefix + pos_embed[:P] if P else prefix
    return tokens if prefix is None else torch.cat([prefix.expand(B, -1, -1), tokens], dim=1)


def _normalised(images: Tensor, mean: Statistics, std: Statistics, dtype: torch.dtype) -> Tensor:
    """uint8 to [0, 1], then (x - mean) / std, in float32 (float64 for float64), rounded to ``dtype`` once."""
    if images.dtype == torch.uint8 or mean is not None:
        wide = accumulation_dtype(dtype)
        images = images.to(wide) / 255 if images.dtype == torch.uint8 else images.to(wide)
        if mean is not None:
            mean, std = (torch.as_tensor(s, dtype=wide, device=images.device).reshape(-1, 1, 1) for s in (mean, std))
            images = (images - mean) / std
    return images.to(dtype)


# ---- the native op: statistics are float64 tensors [C], parameters 2-d or 1-d without a leading 1


def _is_channels_last(images: Tensor) -> bool:
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def _in_memory_order(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1) if _is_channels_last(images) else images.contiguous()


def _out_dtype(weight: Tensor, *parameters: Tensor | None) -> torch.dtype:
    return reduce(torch.promote_types, [t.dtype for t in parameters if t is not None], weight.dtype)


def _dense(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()


def _kernel(images, weight, bias, pos_embed, prefix_tokens, ids_keep, mean, std, mask, mask_token) -> Tensor:
    out = _fake(images, weight, bias, pos_embed, prefix_tokens, ids_keep, mean, std, mask, mask_token)
    (B, C, H, W), (D, p), P = images.shape, weight.shape[::3], 0 if prefix_tokens is None else prefix_tokens.shape[0]
    K = out.shape[1] - P
    if B == 0 or K == 0:
        return out.copy_(_prefix_rows(prefix_tokens, pos_embed, H // p * (W // p))) if out.numel() else out
    wide = accumulation_dtype(weight.dtype)
    ids_keep = _dense(ids_keep)
    space = workspace("patch_embed_fwd_workspace", weight.dtype, C, p, D, like=images)
    bad = call(
        "patch_embed_fwd", _in_memory_order(images), images.dtype, _is_channels_last(images), weight.contiguous(),
        weight.dtype, _dense(bias, wide), _dense(pos_embed, wide), _dense(prefix_tokens, wide), ids_keep, mean, std,
        _dense(mask), _dense(mask_token, wide), out, out.dtype, space, B, C, H, W, p, D, P, K,
        0 if pos_embed is None else pos_embed.shape[0],
    )  # fmt: skip
    if ids_keep is not None:
        check_ids("patch_embed", "ids_keep", ids_keep, H // p * (W // p), bad)
    return out


def _prefix_rows(prefix_tokens: Tensor, pos_embed: Tensor | None, L: int) -> Tensor:
    has_position = pos_embed is not None and pos_embed.shape[0] > L
    return prefix_tokens + pos_embed[: len(prefix_tokens)] if has_position else prefix_tokens


def _fake(images, weight, bias, pos_embed, prefix_tokens, ids_keep, mean, std, mask, mask_token) -> Tensor:
    (B, _, H, W), (D, p) = images.shape, weight.shape[::3]
    P = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    K = (H // p) * (W // p) if ids_keep is None else ids_keep.shape[1]
    dtype = _out_dtype(weight, bias, pos_embed, prefix_tokens, mask_token)
    return images.new_empty((B, P + K, D), dtype=dtype)


def _bwd_kernel(dout, images, weight, ids_keep, mean, std, mask, P, pos_rows, want) -> tuple[Tensor, ...]:
    grads = _bwd_fake(dout, images, weight, ids_keep, mean, std, mask, P, pos_rows, want)
    (B, C, H, W), (D, p), K = images.shape, weight.shape[::3], dout.shape[1] - P
    dimages, dweight, dbias, dpos_embed, dprefix_tokens, dmask_token = grads
    if B == 0 or K == 0:
        for grad in grads:
            grad.zero_()
        of_prefix = dout[:, :P].sum(0, dtype=dbias.dtype)
        if want[3] and pos_rows > H // p * (W // p):
            dpos_embed[:P] = of_prefix
        if want[4]:
            dprefix_tokens.copy_(of_prefix)
        return grads
    channels_last, in_order = _is_channels_last(images), _in_memory_order(images)
    dimages_in_order = _in_memory_order(dimages) if want[0] else None
    dweight_in_order = dweight.new_empty(D, p, p, C) if channels_last and want[1] else dweight
    outputs = (dimages_in_order, dweight_in_order, dbias, dpos_embed, dprefix_tokens, dmask_token)
    outputs = (grad if wanted else None for grad, wanted in zip(outputs, want, strict=True))
    space = workspace("patch_embed_bwd_workspace", weight.dtype, B, C, H, W, p, D, P, K, like=images)
    call(
        "patch_embed_bwd", dout.contiguous(), dout.dtype, in_order, images.dtype, channels_last, weight.contiguous(),
        weight.dtype, _dense(ids_keep), mean, std, _dense(mask), *outputs, space, B, C, H, W, p, D, P, K, pos_rows,
    )  # fmt: skip
    if channels_last and want[1]:
        dweight.copy_(dweight_in_order.permute(0, 3, 1, 2))
    return grads


def _bwd_fake(dout, images, weight, ids_keep, mean, std, mask, P, pos_rows, want) -> tuple[Tensor, ...]:
    """Gradients of images (as they lie), weight, bias, pos_embed, prefix_tokens and mask_token; empty if not wanted."""
    D, wide = weight.shape[0], accumulation_dtype(weight.dtype)
    shapes = (weight.shape, (D,), (pos_rows, D), (P, D), (D,))
    layout = torch.channels_last if _is_channels_last(images) else torch.contiguous_format
    dimages = torch.empty_like(images, memory_format=layout) if want[0] else images.new_empty(0)
    return (
        dimages,
        *(dout.new_empty(s if wanted else (0,), dtype=wide) for s, wanted in zip(shapes, want[1:], strict=True)),
    )


_PARAMETERS = (0, 1, 2, 3, 4, 9)  # positions of the floating arguments of the op


def _setup(ctx, inputs, output) -> None:
    images, weight, _, pos_embed, prefix_tokens, ids_keep, mean, std, mask, _ = inputs
    ctx.save_for_backward(images, weight, ids_keep, mean, std, mask)
    ctx.rows = tuple(0 if t is None else t.shape[0] for t in (prefix_tokens, pos_embed))
    ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in _PARAMETERS]


def _backward(ctx, dout: Tensor):
    want = [ctx.needs_input_grad[i] for i in _PARAMETERS]
    grads = torch.ops.fvm_fast.patch_embed_bwd(dout, *ctx.saved_tensors, *ctx.rows, want)
    by_argument: list[Tensor | None] = [None] * 10
    for i, grad, dtype, wanted in zip(_PARAMETERS, grads, ctx.dtypes, want, strict=True):
        by_argument[i] = grad.to(dtype) if wanted else None
    return tuple(by_argument)


register_op(
    "patch_embed_bwd(Tensor dout, Tensor images, Tensor weight, Tensor? ids_keep, Tensor? mean, Tensor? std, "
    "Tensor? mask, SymInt P, SymInt pos_rows, bool[] want) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_bwd_kernel,
    fake=_bwd_fake,
)
register_op(
    "patch_embed(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix_tokens, "
    "Tensor? ids_keep, Tensor? mean, Tensor? std, Tensor? mask, Tensor? mask_token) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
)


# ---- the public function


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    ids_keep: Tensor | None = None,
    *,
    mean: Statistics = None,
    std: Statistics = None,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
) -> Tensor:
    """Embed the patches of images as tokens.

    Args:
        images: [B, C, H, W], contiguous or channels_last (other layouts are copied); H and W multiples of p. uint8,
            which is divided by 255, or of the dtype of ``weight``.
        weight: [D, C, p, p] floating, as of a convolution with stride p.
        bias: [D].
        pos_embed: [P + L, D], or [L, D] for the patches alone (L = H/p * W/p); with or without a leading 1.
        prefix_tokens: [P, D] or [1, P, D] put in front of the patches (class, distillation and register tokens).
        ids_keep: [B, K] int64 in [0, L): embeds only these patches, in this order. An id may occur twice.
        mean, std: C constants each: images are normalised by ``(x - mean) / std``, after the division of uint8.
        mask: [B, L] bool: where true, ``mask_token`` [D] (or [1, 1, D]) takes the place of the embedding.
        mask_token: see ``mask``.

    Returns:
        [B, P + L, D], or [B, P + K, D] with ``ids_keep``, in the widest dtype of weight, bias, pos_embed, prefix_tokens
        and mask_token. Beside a 16-bit weight these four may be float32; nothing else may be mixed. Under autocast
        images and weight take its dtype and the others keep theirs.

    Raises:
        ValueError: wrong rank, size or device. TypeError: dtypes that cannot be mixed. IndexError: an id out of range.
    """
    check_shapes(images, weight, bias, ids_keep, mask, mask_token)
    D, P = weight.shape[0], 0
    if prefix_tokens is not None:
        prefix_tokens = as_rows("patch_embed", "prefix_tokens", prefix_tokens, D, None)
        P = prefix_tokens.shape[0]
    if pos_embed is not None:
        L = images.shape[2] // weight.shape[2] * (images.shape[3] // weight.shape[2])
        pos_embed = as_rows("patch_embed", "pos_embed", pos_embed, D, (P + L, L))
    mask_token = None if mask is None else as_vector("patch_embed", "mask_token", mask_token, D)
    check_same_device(
        "patch_embed", images=images, weight=weight, bias=bias, pos_embed=pos_embed, prefix_tokens=prefix_tokens,
        ids_keep=ids_keep, mask=mask, mask_token=mask_token,
    )  # fmt: skip
    mean, std = statistics(mean, std, images)
    images, weight = _autocast(images, weight)
    check_dtypes(images, weight, bias=bias, pos_embed=pos_embed, prefix_tokens=prefix_tokens, mask_token=mask_token)
    args = (images, weight, bias, pos_embed, prefix_tokens, ids_keep)
    if use_native("patch_embed", *args, mask, mask_token):
        return torch.ops.fvm_fast.patch_embed(*args, mean, std, mask, mask_token)
    return patch_embed_reference(*args, mean=mean, std=std, mask=mask, mask_token=mask_token)


def _autocast(images: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = autocast_dtype(images)
    if dtype is None or weight.dtype == torch.float64:
        return images, weight
    # float32 images are rounded while they are read
    images = images.to(dtype) if images.dtype in (torch.bfloat16, torch.float16) else images
    return images, weight.to(dtype)
