# SPDX-License-Identifier: Apache-2.0
"""Cases of window_attention and its oracle, which looks up token by token where a window finds it on the map."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import EPS, value_and_grads
from torch import Tensor

from fvm_fast.ops import backend, window_attention
from fvm_fast.ops.window_attention._dropout import keep_mask

NAMES = ("qkv", "attn_bias", "logit_scale", "pad_qkv")


@dataclass(frozen=True)
class Case:
    """Sizes and options of a call."""

    B: int = 2
    H: int = 6
    W: int = 9
    heads: int = 3
    d: int = 5
    window: tuple[int, int] = (3, 3)
    shift: tuple[int, int] = (1, 2)
    bias: bool = True
    pad: bool = True
    cosine: bool = False
    scale: float | None = None
    mask_value: float = -100.0
    pad_order: str = "roll_pad"
    qkv_layout: str = "3hd"
    dropout_p: float = 0.0
    seed: int = 0x1234_5678_9ABC_DEF0
    size_of_q: float = 1.0

    @property
    def N(self) -> int:
        """Tokens of a window."""
        return self.window[0] * self.window[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        return -(-self.H // self.window[0]), -(-self.W // self.window[1])


def make(c: Case) -> list[Tensor | None]:
    """qkv, attn_bias, logit_scale and pad_qkv in float64."""
    channels = 3 * c.heads * c.d
    qkv = torch.randn(c.B, c.H, c.W, channels, dtype=torch.float64)
    if c.size_of_q != 1:
        assert c.qkv_layout == "3hd"
        qkv[..., : channels // 3] *= c.size_of_q
    attn_bias = torch.randn(c.heads, c.N, c.N, dtype=torch.float64) if c.bias else None
    logit_scale = torch.linspace(0.5, 12, c.heads, dtype=torch.float64) if c.cosine else None
    return [qkv, attn_bias, logit_scale, torch.randn(channels, dtype=torch.float64) if c.pad else None]


def output_gradient(c: Case) -> Tensor:
    """Noise in the shape of the output, float64."""
    return torch.randn(c.B, c.H, c.W, c.heads * c.d, dtype=torch.float64)


def options(c: Case) -> dict:
    """The keyword arguments that are no floating tensors."""
    return {
        "num_heads": c.heads,
        "window_size": c.window,
        "shift_size": c.shift,
        "scale": c.scale,
        "mask_value": c.mask_value,
        "pad_order": c.pad_order,
        "qkv_layout": c.qkv_layout,
        "dropout_p": c.dropout_p,
        "seed": torch.tensor(c.seed) if c.dropout_p else None,
    }


def ours(c: Case, op: Callable[..., Tensor] = window_attention) -> Callable[..., Tensor]:
    """``op`` as a function of the floating arguments."""
    more = options(c)

    def call(qkv, attn_bias, logit_scale, pad_qkv):
        return op(qkv, attn_bias, logit_scale=logit_scale, pad_qkv=pad_qkv, **more)

    return call


def look_up(c: Case) -> tuple[Tensor, Tensor]:
    """Where the tokens of each window lie on the flat map (H * W for padding), and which way the roll carried them.

    Returns:
        [windows, N] and [windows, N], both int64.
    """
    (rows, columns), (wh, ww), (sh, sw) = c.grid, c.window, c.shift
    index, carried = [], []
    for n in range(rows * columns):
        for i in range(wh * ww):
            y, x = n // columns * wh + i // ww, n % columns * ww + i % ww
            if c.pad_order == "roll_pad":
                inside, u, v = y < c.H and x < c.W, (y + sh) % c.H, (x + sw) % c.W
            else:
                u, v = (y + sh) % (rows * wh), (x + sw) % (columns * ww)
                inside = u < c.H and v < c.W
            index.append(u * c.W + v if inside else c.H * c.W)
            carried.append(2 * (y + sh >= rows * wh) + (x + sw >= columns * ww))
    return tuple(torch.tensor(numbers).view(rows * columns, wh * ww) for numbers in (index, carried))


def by_look_up(c: Case) -> Callable[..., Tensor]:
    """Attention in the dtype of qkv by indexing and scattering, as a function of the floating arguments."""
    index, carried = look_up(c)
    apart = (carried[:, :, None] != carried[:, None, :])[:, None]  # [windows, 1, N, N]

    def call(qkv, attn_bias, logit_scale, pad_qkv):
        B, dtype = len(qkv), qkv.dtype
        pad = qkv.new_zeros(qkv.shape[-1]) if pad_qkv is None else pad_qkv.to(dtype)
        tokens = torch.cat([qkv.flatten(1, 2), pad.expand(B, 1, -1)], dim=1)[:, index]  # [B, windows, N, 3C]
        if c.qkv_layout == "3hd":
            q, k, v = (t.unflatten(-1, (c.heads, c.d)).transpose(2, 3) for t in tokens.chunk(3, dim=-1))
        else:
            q, k, v = tokens.unflatten(-1, (c.heads, 3, c.d)).transpose(2, 3).unbind(-2)
        if logit_scale is None:
            logits = (q * (c.d**-0.5 if c.scale is None else c.scale)) @ k.mT
        else:
            q, k = (t / t.norm(dim=-1, keepdim=True).clamp(min=1e-12) for t in (q, k))
            logits = q @ k.mT * logit_scale[:, None, None].to(dtype)
        if attn_bias is not None:
            logits = logits + attn_bias.to(dtype)
        logits = logits + torch.zeros(apart.shape, dtype=dtype).masked_fill(apart, c.mask_value)
        weights = logits.softmax(-1)
        if c.dropout_p:
            keep = keep_mask(torch.tensor(c.seed), c.dropout_p, B * len(index), c.heads, c.N)
            weights = weights * keep.view(weights.shape) / (1 - c.dropout_p)
        out = (weights @ v).transpose(2, 3).flatten(3)  # [B, windows, N, C]
        back = index.flatten().argsort(stable=True)[: c.H * c.W]  # padding has the greatest index
        return out.flatten(1, 2)[:, back].unflatten(1, (c.H, c.W))

    return call


# ---- accuracy


def floor(dtype: torch.dtype) -> float:
    """Error that is no error, relative to the greatest value; in float64 the oracle errs as much as we do."""
    return (256 if dtype == torch.float64 else 1) * EPS[dtype]


def results_three_times(
    c: Case, args: list[Tensor | None], dtype: torch.dtype, op: Callable[..., Tensor] = window_attention
) -> list[list[Tensor | None]]:
    """Output and the four gradients: of ``op`` and of the oracle in ``dtype``, and of the oracle in float64."""
    args, dout = [a if a is None else a.to(dtype) for a in args], output_gradient(c).to(dtype)
    results = []
    for f, computed_in in ((ours(c, op), dtype), (by_look_up(c), dtype), (by_look_up(c), torch.float64)):
        with backend("native"):
            value, grads = value_and_grads(f, args, computed_in, dout)
        results.append([value, *grads])
    return results


def check_against_look_up(
    c: Case, args: list[Tensor | None], dtype: torch.dtype, op: Callable[..., Tensor] = window_attention
) -> None:
    """The root-mean-square errors of ``op`` are at most twice the oracle's in the same dtype, and none stands out.

    The largest error is that of a few large logits, which the softmax magnifies, and it is luck which of two equally
    good sums gets those right: it may be eight times the oracle's. The gradient of logit_scale is a handful of numbers
    altogether, so that there only gross errors show.
    """
    for name, a, b, exact in zip(("out", *NAMES), *results_three_times(c, args, dtype, op), strict=True):
        if exact is None:
            continue
        assert a.dtype == dtype and a.shape == exact.shape, name
        few, least = name == "logit_scale", floor(dtype) * float(exact.abs().max())
        error, allowed = (a.double() - exact).abs(), (b.double() - exact).abs()
        for what, size, times in (
            ("root-mean-square", lambda e: e.square().mean().sqrt(), 2),
            ("largest", Tensor.max, 8),
        ):
            got, limit = float(size(error)), times * float(size(allowed)) + (32 if few else 1) * least
            assert got <= limit, (
                f"{name}: {what} error {got:.3e}, expected at most {limit:.3e} (torch makes {float(size(allowed)):.3e})"
            )
