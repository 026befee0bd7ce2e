# SPDX-License-Identifier: Apache-2.0
"""Attention in the windows of a map: ours against timm's order of operations, eager, by SDPA and under torch.compile.

python benchmarks/bench_window_attention.py
"""

import importlib.util
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import NamedTuple

import gpu
import torch
import torch.nn.functional as F
from harness import main
from problem import Floor, Problem, rivals_on
from torch import Tensor

from fvm_fast import backend, ops


class Size(NamedTuple):
    """B maps of ``side`` x ``side`` tokens with ``heads`` heads of d channels; windows of ``window`` x ``window``."""

    B: int
    side: int
    heads: int
    window: int
    shift: int
    d: int = 32

    @property
    def C(self) -> int:
        """Channels of a token."""
        return self.heads * self.d

    @property
    def N(self) -> int:
        """Tokens of a window."""
        return self.window**2

    def __str__(self) -> str:
        return f"{self.B} x {self.side} x {self.side}, C {self.C}, window {self.window}, shift {self.shift}"


# ---- the rivals; they get qkv [B, H, W, 3C], the bias [heads, N, N], Swin v2's scale [heads] and the mask


def ours(qkv: Tensor, attn_bias: Tensor, logit_scale: Tensor | None, mask: Tensor | None, size: Size) -> Tensor:
    sizes = {"num_heads": size.heads, "window_size": size.window, "shift_size": size.shift}
    with backend("native"):
        return ops.window_attention(qkv, attn_bias, logit_scale=logit_scale, **sizes)


def timm_order(qkv: Tensor, attn_bias: Tensor, logit_scale: Tensor | None, mask: Tensor | None, size: Size) -> Tensor:
    """timm's Swin: roll, partition, product, softmax, product, reverse, roll back; bias and mask are added as one."""
    q, k, v = cut(qkv, size)
    q, k = (q * size.d**-0.5, k) if logit_scale is None else cosine(q, k, logit_scale, size)
    weights = (q @ k.mT + bias_and_mask(attn_bias, mask, size)).softmax(-1)
    return join(weights.to(v.dtype) @ v, size)


def sdpa(qkv: Tensor, attn_bias: Tensor, logit_scale: Tensor | None, mask: Tensor | None, size: Size) -> Tensor:
    """The same with torch's fused attention."""
    q, k, v = cut(qkv, size)
    scale = size.d**-0.5
    if logit_scale is not None:
        (q, k), scale = cosine(q, k, logit_scale, size), 1.0
    added = bias_and_mask(attn_bias, mask, size).to(q.dtype)
    return join(F.scaled_dot_product_attention(q, k, v, added, scale=scale), size)


def xformers(qkv: Tensor, attn_bias: Tensor, logit_scale: Tensor | None, mask: Tensor | None, size: Size) -> Tensor:
    """The same with xformers' memory-efficient attention, which wants rows of the bias a multiple of 8 apart."""
    from xformers.ops import memory_efficient_attention

    q, k, v = (t.transpose(1, 2) for t in cut(qkv, size))
    scale = size.d**-0.5
    if logit_scale is not None:
        (q, k), scale = (t.transpose(1, 2) for t in cosine(*cut(qkv, size)[:2], logit_scale, size)), 1.0
    added = F.pad(bias_and_mask(attn_bias, mask, size).to(q.dtype), (0, -size.N % 8))[..., : size.N]
    out = memory_efficient_attention(q, k, v, added.expand(size.B, -1, -1, -1), scale=scale)
    return join(out.transpose(1, 2), size)


def rivals() -> dict[str, Callable[..., Tensor]]:
    """By name, ours first. flash-attn is not among them: it takes no bias."""
    functions = {"fvm_fast": ours, "timm's order": timm_order, "SDPA": sdpa}
    if gpu.is_used() and importlib.util.find_spec("xformers"):
        functions["xformers"] = xformers
    return functions


def cut(qkv: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, windows * heads, N, d]."""
    B, side, w = size.B, size.side, size.window
    x = qkv.roll((-size.shift, -size.shift), dims=(1, 2)) if size.shift else qkv
    x = x.reshape(B, side // w, w, side // w, w, 3, size.heads, size.d).permute(5, 0, 1, 3, 6, 2, 4, 7)
    return x.reshape(3, B, -1, size.N, size.d).unbind(0)


def join(out: Tensor, size: Size) -> Tensor:
    """The inverse of :func:`cut` for one of the three."""
    rows, w = size.side // size.window, size.window
    x = out.reshape(size.B, rows, rows, size.heads, w, w, size.d).permute(0, 1, 4, 2, 5, 3, 6)
    x = x.reshape(size.B, size.side, size.side, size.C)
    return x.roll((size.shift, size.shift), dims=(1, 2)) if size.shift else x


def cosine(q: Tensor, k: Tensor, logit_scale: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Unit vectors, those of q times the scale of their head."""
    scale = logit_scale.to(q.dtype).repeat(q.shape[1] // size.heads)[:, None, None]
    return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)


def bias_and_mask(attn_bias: Tensor, mask: Tensor | None, size: Size) -> Tensor:
    """[windows * heads, N, N]."""
    if mask is None:
        return attn_bias.repeat((size.side // size.window) ** 2, 1, 1)
    return (mask[:, None] + attn_bias).flatten(0, 1)


def shift_mask(size: Size) -> Tensor | None:
    """[windows, N, N]: -100 between tokens that the roll brought together; made beforehand, as timm's buffer."""
    if not size.shift:
        return None
    w, rows = size.window, size.side // size.window
    carried = (torch.arange(size.side) >= size.side - size.shift).long()
    region = (2 * carried[:, None] + carried).view(rows, w, rows, w).transpose(1, 2).reshape(rows**2, w**2)
    return (region[:, :, None] != region[:, None, :]).float() * -100.0


# ---- problems


def problem(title: str, size: Size, dtype: torch.dtype, v2: bool = False) -> Problem:
    """Windows of one size: forward alone, and with the gradients of qkv, the bias and Swin v2's scale."""
    qkv = torch.randn(size.B, size.side, size.side, 3 * size.C).to(dtype).requires_grad_()
    attn_bias = torch.randn(size.heads, size.N, size.N, requires_grad=True)
    logit_scale = torch.full((size.heads,), 10.0, requires_grad=True) if v2 else None
    products = 2 * size.N * size.B * size.side**2 * size.C  # FLOP of one of the products, of all windows and heads
    tokens = size.B * size.side**2 * size.C * dtype.itemsize  # bytes of q, k, v or the output
    return Problem(
        f"{title}, {size}",
        rivals_on(
            [qkv, attn_bias, logit_scale, shift_mask(size), size],
            rivals(),
            {"timm's, torch.compile": timm_order},
        ),
        dtype,
        forward=Floor(2 * products, 4 * tokens + attn_bias.nbytes),
        backward=Floor(5 * products, 7 * tokens + 2 * attn_bias.nbytes),
    )


SWIN_TINY = [Size(8, 56, 3, 7, 3), Size(8, 28, 6, 7, 3), Size(8, 14, 12, 7, 3), Size(8, 7, 24, 7, 0)]
SWIN_V2 = [Size(8, 64, 3, 8, 4), Size(8, 64, 3, 16, 8)]
ONE_IMAGE = Size(1, 14, 12, 7, 3)


def problems(args: Namespace) -> Iterator[Problem]:
    """The four stages of Swin-T at 224 px, a single image, and the first stage of both Swin v2-T at 256 px."""
    for dtype in args.dtypes:
        for stage, size in enumerate(SWIN_TINY, start=1):
            if not args.quick or stage == 3:
                yield problem(f"Swin-T stage {stage}", size, dtype)
        yield problem("Swin-T stage 3", ONE_IMAGE, dtype)
        for size in SWIN_V2:
            yield problem("Swin v2-T stage 1", size._replace(B=1) if args.quick else size, dtype, v2=True)


if __name__ == "__main__":
    main(__file__, __doc__, problems)
