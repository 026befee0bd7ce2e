# SPDX-License-Identifier: Apache-2.0
"""Attention within the windows of a map, shifted or not, straight from the projection and back to the map.

The map of H x W tokens is rolled by ``-shift``, padded to whole windows of N = wh * ww tokens, cut up, attended to,
put together, cropped and rolled back. In each window and head::

    logits[i, j] = scale * q[i] . k[j]  +  attn_bias[i, j]  +  (mask_value where the regions of i and j differ)
    out[i]       = sum_j dropout(softmax(logits[i]))[j] * v[j]

or with ``logit_scale * cos(q[i], k[j])`` for the first term. Regions are what the roll brought together from opposite
borders: on an axis of padded length L with shift s > 0, the rolled coordinates below L - w, below L - s, and the rest.

This is the attention of Swin (Liu et al. 2021, https://arxiv.org/abs/2103.14030), of Swin v2 with its cosines
(https://arxiv.org/abs/2111.09883) and of TinyViT (https://arxiv.org/abs/2207.10666). Roll, padding, windows and mask
are index arithmetic inside the kernel: no copy of the map, no N x N matrix between the passes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fvm_fast.ops._backend import (
    accumulation_dtype,
    autocast_dtype,
    call,
    check_same_device,
    on_cuda,
    use_native,
    workspace,
)
from fvm_fast.ops._register import register_op
from fvm_fast.ops.window_attention._checks import (
    as_pair,
    check_choices,
    check_dropout,
    check_logits,
    check_parameters,
    check_qkv,
    check_window,
)
from fvm_fast.ops.window_attention._dropout import keep_mask
from fvm_fast.ops.window_attention._geometry import Geometry


def window_attention_reference(
    qkv: Tensor,
    attn_bias: Tensor | None = None,
    *,
    num_heads: int,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    mask_value: float = -100.0,
    pad_qkv: Tensor | None = None,
    pad_order: str = "roll_pad",
    qkv_layout: str = "3hd",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """:func:`window_attention` by roll, pad, partition, product, softmax, product and all the way back."""
    window, shift = as_pair("window_size", window_size), as_pair("shift_size", shift_size)
    geometry = Geometry((qkv.shape[1], qkv.shape[2]), window, shift, pad_order == "pad_roll")
    q, k, v = _split_heads(geometry.cut(qkv, pad_qkv), num_heads, qkv_layout)  # [B, windows, heads, N, d] each
    wide = accumulation_dtype(qkv.dtype)
    if logit_scale is None:
        logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT
    else:
        q, k = (F.normalize(t.to(wide), dim=-1, eps=1e-12).to(t.dtype) for t in (q, k))
        logits = (q @ k.mT) * logit_scale[:, None, None]
    logits = logits.to(wide)
    if attn_bias is not None:
        logits = logits + attn_bias
    if shift != (0, 0):
        apart = geometry.apart(qkv.device)[:, None]
        logits = logits + torch.where(apart, mask_value, logits.new_zeros(()))
    weights = logits.softmax(-1)
    if dropout_p:
        weights = _dropout(weights, dropout_p, seed)
    out = weights.to(v.dtype) @ v
    return geometry.join(out.transpose(2, 3).flatten(3))


def _split_heads(windows: Tensor, num_heads: int, qkv_layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, windows, heads, N, d] of [B, windows, N, 3C]."""
    B, count, N, channels = windows.shape
    d = channels // (3 * num_heads)
    if qkv_layout == "3hd":
        parts = windows.reshape(B, count, N, 3, num_heads, d).permute(3, 0, 1, 4, 2, 5)
    else:
        parts = windows.reshape(B, count, N, num_heads, 3, d).permute(4, 0, 1, 3, 2, 5)
    return parts.unbind(0)


def _dropout(weights: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    B, count, num_heads, N, _ = weights.shape
    keep = keep_mask(seed, dropout_p, B * count, num_heads, N).view(weights.shape)
    factor = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
    return torch.where(keep, weights * factor, 0.0)


MOST_CHANNELS_ON_CUDA = 128  # kMostChannels of cuda/window_attention.cuh


# ---- the native op: window and shift are pairs, scale is 1 beside logit_scale, a seed comes with dropout only


class _Options(NamedTuple):
    """The arguments of the op that are no tensors, in the order of its schema."""

    num_heads: int
    window: Sequence[int]
    shift: Sequence[int]
    scale: float
    mask_value: float
    pad_first: bool
    heads_outermost: bool
    dropout_p: float

    def sizes(self, qkv: Tensor) -> tuple[int, ...]:
        """B, H, W, heads, d, wh, ww."""
        return *qkv.shape[:3], self.num_heads, qkv.shape[3] // (3 * self.num_heads), *self.window

    def scalars(self, qkv: Tensor, seed: Tensor | None) -> tuple:
        """What stands behind the workspace in ``csrc/kernels.h``."""
        numbers = (self.scale, self.mask_value, self.dropout_p, _seed(qkv, seed), self.pad_first, self.heads_outermost)
        return *numbers, *self.sizes(qkv), *self.shift, qkv.dtype


def _seed(qkv: Tensor, seed: Tensor | None) -> int | Tensor | None:
    """The seed as a number; on CUDA as it is, for to read it would wait for the device."""
    if on_cuda(qkv):
        return seed
    return 0 if seed is None else int(seed) & (2**63 - 1)


def _wide(qkv: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """Parameters in the accumulation dtype."""
    return [None if t is None else t.to(accumulation_dtype(qkv.dtype)).contiguous() for t in parameters]


def _kernel(qkv, attn_bias, logit_scale, pad_qkv, seed, *options) -> Tensor:
    out, options = _fake(qkv), _Options(*options)
    if out.numel():
        parameters = _wide(qkv, attn_bias, logit_scale, pad_qkv)
        space = workspace("window_attention_fwd_workspace", *options.sizes(qkv), qkv.dtype, like=qkv)
        call("window_attention_fwd", qkv.contiguous(), *parameters, out, space, *options.scalars(qkv, seed))
    return out


def _fake(qkv, *_) -> Tensor:
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))


def _bwd_kernel(dout, want, qkv, attn_bias, logit_scale, pad_qkv, seed, *options) -> tuple[Tensor, ...]:
    grads, options = _bwd_fake(dout, want, qkv, attn_bias, logit_scale, pad_qkv), _Options(*options)
    if dout.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    parameters = _wide(qkv, attn_bias, logit_scale, pad_qkv)
    outputs = (grad if wanted else None for grad, wanted in zip(grads, want, strict=True))
    space = workspace("window_attention_bwd_workspace", *options.sizes(qkv), want[1], qkv.dtype, like=qkv)
    call(
        "window_attention_bwd", dout.contiguous(), qkv.contiguous(), *parameters, *outputs, space,
        *options.scalars(qkv, seed),
    )  # fmt: skip
    return grads


def _bwd_fake(dout, want, qkv, attn_bias, logit_scale, pad_qkv, *_) -> tuple[Tensor, ...]:
    """Gradients of qkv in its dtype and of the parameters in the accumulation dtype; empty if not wanted."""
    wide = accumulation_dtype(qkv.dtype)
    inputs = ((qkv, qkv.dtype), (attn_bias, wide), (logit_scale, wide), (pad_qkv, wide))
    return tuple(
        qkv.new_empty(t.shape if wanted else (0,), dtype=dtype) for (t, dtype), wanted in zip(inputs, want, strict=True)
    )


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _backward(ctx, dout: Tensor):
    want = list(ctx.needs_input_grad[:4])
    saved = ctx.saved_tensors  # once: under checkpointing they can be read no second time
    grads = torch.ops.fvm_fast.window_attention_bwd(dout, want, *saved, *ctx.options)
    grads = (g.to(t.dtype) if wanted else None for g, t, wanted in zip(grads, saved[:4], want, strict=True))
    return *grads, None, *(None for _ in ctx.options)


_ARGUMENTS = (
    "Tensor qkv, Tensor? attn_bias, Tensor? logit_scale, Tensor? pad_qkv, Tensor? seed, SymInt num_heads, "
    "SymInt[] window, SymInt[] shift, float scale, float mask_value, bool pad_first, bool heads_outermost, "
    "float dropout_p"
)
register_op(
    f"window_attention_bwd(Tensor dout, bool[] want, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_bwd_kernel,
    fake=_bwd_fake,
)
register_op(
    f"window_attention({_ARGUMENTS}) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
)


# ---- the public function


def window_attention(
    qkv: Tensor,
    attn_bias: Tensor | None = None,
    *,
    num_heads: int,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    mask_value: float = -100.0,
    pad_qkv: Tensor | None = None,
    pad_order: str = "roll_pad",
    qkv_layout: str = "3hd",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention within the windows of a map, with the gradient of every floating tensor given.

    Args:
        qkv: [B, H, W, 3C] as the linear layer leaves it, in the order of the map; C = num_heads * d. Other layouts
            than contiguous are copied.
        attn_bias: [heads, N, N], added to the logits of every window; tokens of a window are counted row by row.
        num_heads: heads. On CUDA those of more than 128 channels take the torch path.
        window_size: wh x ww, an integer or (height, width); N = wh * ww.
        shift_size: 0 <= shift < window on each axis. Neither is made to fit the map: a window larger than the map
            attends to padding.
        scale: of the products q . k; d ** -0.5 if None.
        logit_scale: [heads], the multiplier itself (Swin v2's parameter after exp and clamp): cosines take the place of
            the products, with q / max(|q|, 1e-12), and there is no ``scale``.
        mask_value: added where the regions of a shifted window differ; -100 in all known checkpoints, or -inf.
        pad_qkv: [3C], what a token outside the map projects to; zeros if None. Layers that pad before the projection
            (all do) pass its bias. Padding is attended to as any token.
        pad_order: "roll_pad", the map is rolled, then padded (Swin in timm); "pad_roll", padded, then rolled
            (torchvision and detection code). They differ where a shifted map has no whole number of windows.
        qkv_layout: order of the 3C channels. "3hd": all q, all k, all v, each head by head (Swin); "h3d": q, k and v of
            the first head, then of the next (TinyViT).
        dropout_p: share of the attention weights that is dropped, the others being divided by ``1 - dropout_p``.
        seed: int64 [] or [1], needed for dropout; each call takes a new one. One seed drops the same weights on every
            backend and device: a weight's fate hangs on (seed, window, head, query, key).

    Returns:
        [B, H, W, C] in the dtype of qkv, heads side by side. Beside a 16-bit qkv, attn_bias, logit_scale and pad_qkv
        may be float32; nothing else may be mixed. Under autocast qkv takes its dtype and the others keep theirs.

    Raises:
        ValueError: a shape, size, device or option that does not fit. TypeError: dtypes that cannot be mixed.
    """
    window, shift = as_pair("window_size", window_size), as_pair("shift_size", shift_size)
    d = check_qkv(qkv, num_heads)
    check_window(window, shift)
    check_choices(pad_order, qkv_layout)
    check_logits(scale, logit_scale, mask_value)
    check_same_device(
        "window_attention", qkv=qkv, attn_bias=attn_bias, logit_scale=logit_scale, pad_qkv=pad_qkv, seed=seed
    )
    rows, columns = Geometry((qkv.shape[1], qkv.shape[2]), window, shift, False).grid
    check_dropout(dropout_p, seed, qkv.shape[0] * rows * columns, num_heads)
    seed = seed if dropout_p else None
    qkv = _autocast(qkv)
    check_parameters(qkv, num_heads, window[0] * window[1], attn_bias, logit_scale, pad_qkv)
    not_on_cuda = None
    if d > MOST_CHANNELS_ON_CUDA:
        not_on_cuda = f"its CUDA kernels take heads of at most {MOST_CHANNELS_ON_CUDA} channels, and these have {d}"
    if not use_native("window_attention", qkv, attn_bias, logit_scale, pad_qkv, seed, not_on_cuda=not_on_cuda):
        return window_attention_reference(
            qkv, attn_bias, num_heads=num_heads, window_size=window, shift_size=shift, scale=scale,
            logit_scale=logit_scale, mask_value=mask_value, pad_qkv=pad_qkv, pad_order=pad_order, qkv_layout=qkv_layout,
            dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
    if scale is None:
        scale = d**-0.5 if logit_scale is None else 1.0
    options = _Options(
        num_heads, window, shift, scale, mask_value, pad_order == "pad_roll", qkv_layout == "h3d", dropout_p
    )
    return torch.ops.fvm_fast.window_attention(qkv, attn_bias, logit_scale, pad_qkv, seed, *options)


def _autocast(qkv: Tensor) -> Tensor:
    dtype = autocast_dtype(qkv)
    return qkv if dtype is None or qkv.dtype == torch.float64 else qkv.to(dtype)
