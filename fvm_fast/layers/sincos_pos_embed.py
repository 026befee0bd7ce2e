# SPDX-License-Identifier: Apache-2.0
"""Fixed sine-cosine positions of a grid of patches (Attention Is All You Need, https://arxiv.org/abs/1706.03762, 3.5).

With ``w_i = temperature ** (-i / (D / 4))`` the patch in row r and column c has, in quarters of D / 4 numbers::

    [sin(c w_i), cos(c w_i), sin(r w_i), cos(r w_i)]

The column comes first, as in masked autoencoders (https://arxiv.org/abs/2111.06377), whose weights rely on it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def sincos_pos_embed(
    embed_dim: int,
    grid_size: int | Sequence[int],
    *,
    num_prefix_tokens: int = 0,
    temperature: float = 10_000.0,
) -> Tensor:
    """The table of positions of a grid.

    Args:
        embed_dim: D, width of a token, a multiple of 4.
        grid_size: side or (rows, columns) of the grid in patches.
        num_prefix_tokens: P rows of zeros in front, for tokens that have no place in the grid.
        temperature: ratio of the longest to the shortest wavelength.

    Returns:
        [1, P + rows * columns, D] in torch's default dtype, computed in float64; rows of patches one after the other.

    Raises:
        ValueError: ``embed_dim`` is no multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"sincos_pos_embed: embed_dim should be a multiple of 4 (two coordinates), got {embed_dim}")
    rows, columns = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    quarter = embed_dim // 4
    frequencies = temperature ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    of_rows, of_columns = (torch.arange(n, dtype=torch.float64)[:, None] * frequencies for n in (rows, columns))
    angles = torch.stack(
        [of_columns.expand(rows, columns, quarter), of_rows[:, None].expand(rows, columns, quarter)], dim=2
    )  # [rows, columns, 2, D / 4]
    patches = torch.stack([angles.sin(), angles.cos()], dim=3).reshape(1, rows * columns, embed_dim)
    table = torch.cat([patches.new_zeros(1, num_prefix_tokens, embed_dim), patches], dim=1)
    return table.to(torch.get_default_dtype())
