# SPDX-License-Identifier: Apache-2.0
"""Biases by relative position within a window: which pair of tokens reads which row, and windows of another size.

Two tokens of a window of h x w lie at most h - 1 rows and w - 1 columns apart, in either direction, so a bias by
relative position is a table of (2h - 1)(2w - 1) rows, one column a head (Swin, https://arxiv.org/abs/2103.14030,
section 3.2).
"""

import math
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

Window = tuple[int, int]

TABLE_RESIZE_RULES = ("timm", "microsoft")


def relative_position_index(window: Window) -> Tensor:
    """[N, N] int64: the row of the table for each query and key of a window (height, width); N = height * width.

    Tokens are counted row by row; the rows of the table by the query's row minus the key's, then by columns.
    """
    height, width = window
    rows, columns = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    down = rows[:, None] - rows + height - 1
    right = columns[:, None] - columns + width - 1
    return down * (2 * width - 1) + right


def log_spaced_coordinates(window: Window, pretrained_window: Window = (0, 0)) -> Tensor:
    """Swin v2's coordinates of each relative position: [1, 2h - 1, 2w - 1, 2], float32, (vertical, horizontal).

    ``sign(x) log2(1 + |x|) / log2(8)`` of the offset x, scaled so that the border of the window is at 8: a window twice
    as large asks the network of biases for values not far outside what it has seen
    (https://arxiv.org/abs/2111.09883, equation 4).

    Args:
        window: (height, width).
        pretrained_window: the window whose border is at 8; ``window`` itself where it is 0.
    """
    axes = []
    for size, pretrained in zip(window, pretrained_window, strict=True):
        offsets = 8 * torch.arange(1 - size, size, dtype=torch.float32) / max((pretrained or size) - 1, 1)
        axes.append(offsets.sign() * torch.log2(offsets.abs() + 1) / math.log2(8))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)[None]


def resize_relative_position_bias(
    table: Tensor, new_window: Window, *, old_window: Window | None = None, rule: str = "timm"
) -> Tensor:
    """Carries a table of biases to a window of another size; an equal window changes nothing.

    Args:
        table: [(2h - 1)(2w - 1), heads].
        new_window: (height, width) wanted.
        old_window: (h, w) given; a square when None.
        rule: ``timm`` (near offsets keep their place, far ones spread out: BEiT's geometric grid, read linearly) or
            ``microsoft`` (bicubic, as the Swin repository does on loading).

    Returns:
        [(2 height - 1)(2 width - 1), heads] in the dtype given; interpolated in float32 at least. Differentiable.
    """
    if rule not in TABLE_RESIZE_RULES:
        raise ValueError(f"the resize rule should be one of {', '.join(TABLE_RESIZE_RULES)}, got {rule!r}")
    old_window = old_window or square_window(len(table))
    if tuple(old_window) == tuple(new_window):
        return table
    old_sides, new_sides = ([2 * side - 1 for side in window] for window in (old_window, new_window))
    maps = table.unflatten(0, old_sides).permute(2, 0, 1)  # [heads, 2h - 1, 2w - 1]
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if rule == "microsoft":
        maps = F.interpolate(maps[None], size=new_sides, mode="bicubic", align_corners=False)[0]
    else:
        vertical, horizontal = (
            _geometric_resize_matrix(old, new).to(maps) for old, new in zip(old_sides, new_sides, strict=True)
        )
        maps = vertical @ maps @ horizontal.mT
    return maps.flatten(1).mT.to(table.dtype).contiguous()


def square_window(rows: int) -> Window:
    """The square window of a table with so many rows.

    Raises:
        ValueError: there is none.
    """
    side = math.isqrt(rows)
    if side * side != rows or side % 2 == 0:
        raise ValueError(
            f"a table of relative positions should have (2w - 1)^2 rows for a square window, got {rows}; say the "
            "window with old_window=(height, width)"
        )
    return (side + 1) // 2, (side + 1) // 2


def _geometric_resize_matrix(old: int, new: int) -> Tensor:
    """[new, old] float64: reads ``old`` values, at places that spread out from the middle, at ``new`` whole places."""
    if old == 1:
        return torch.ones(new, 1, dtype=torch.float64)
    distances = _geometric_distances(old // 2, new // 2)
    places = torch.tensor([-d for d in reversed(distances)] + [0.0] + distances, dtype=torch.float64)
    targets = torch.arange(new, dtype=torch.float64) - new // 2
    right = torch.searchsorted(places, targets).clamp(1, old - 1)
    share = ((targets - places[right - 1]) / (places[right] - places[right - 1])).clamp(0, 1)[:, None]
    return F.one_hot(right - 1, old) * (1 - share) + F.one_hot(right, old) * share


def _geometric_distances(count: int, reach: int) -> list[float]:
    """``count`` distances whose steps 1, q, q^2, ... end at ``reach``; q is kept in [1.01, 1.5], as BEiT keeps it."""
    low, high, q = 1.01, 1.5, 1.01
    while high - low > 1e-6:
        q = (low + high) / 2
        if sum(q**i for i in range(count)) > reach:
            high = q
        else:
            low = q
    return list(accumulate(q**i for i in range(count)))
