# SPDX-License-Identifier: Apache-2.0
"""LeViT's attention biases: one number per head for each distance (|dy|, |dx|) of two tokens, whatever the direction.

A window of w x w tokens has w * w distances, row by row in the table: distance (dy, dx) is column dy * w + dx.

LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference, https://arxiv.org/abs/2104.01136, section 4.2
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_ANTIALIAS = {"timm": True, "microsoft": False}
BIAS_RESIZE_RULES = tuple(_ANTIALIAS)


def attention_bias_index(window_size: int) -> Tensor:
    """[N, N] int64: the column of the table for each query and key of a window of N = ``window_size ** 2`` tokens."""
    places = torch.arange(window_size**2)
    rows, columns = places // window_size, places % window_size
    down, right = (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()
    return down * window_size + right


def resize_attention_biases(table: Tensor, window_size: int, rule: str = "timm") -> Tensor:
    """Carries a table of biases to a window of another size; an equal window changes nothing.

    Args:
        table: [heads, w * w].
        window_size: side of the window wanted.
        rule: ``timm`` (bicubic, antialiased) or ``microsoft`` (bicubic, as the TinyViT repository does on loading).

    Returns:
        [heads, window_size * window_size] in the dtype given; interpolated in float32 at least. Differentiable.
    """
    if rule not in _ANTIALIAS:
        raise ValueError(f"the resize rule should be one of {', '.join(BIAS_RESIZE_RULES)}, got {rule!r}")
    side = math.isqrt(table.shape[1])
    if side * side != table.shape[1]:
        raise ValueError(f"attention biases should be those of a square window, got {table.shape[1]} distances")
    if side == window_size:
        return table
    maps = table.unflatten(1, (side, side))[None]  # [1, heads, w, w]
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    maps = F.interpolate(maps, size=(window_size, window_size), mode="bicubic", antialias=_ANTIALIAS[rule])
    return maps[0].flatten(1).to(table.dtype)
