# SPDX-License-Identifier: Apache-2.0
"""Learned position embeddings carried to another grid of patches.

The ecosystems resize by different rules, and the results differ at 1e-2: weights should be resized by the rule of the
code that will be compared with.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_INTERPOLATION = {
    "timm": {"mode": "bicubic", "antialias": True},
    "transformers": {"mode": "bicubic", "align_corners": False},
    "torchvision": {"mode": "bicubic", "align_corners": True},
    "dino": {"mode": "bicubic"},
}
RESIZE_RULES = tuple(_INTERPOLATION)


def square_grid(num_patches: int) -> tuple[int, int]:
    """The (rows, columns) of a square grid of ``num_patches``.

    Raises:
        ValueError: the number is not a square.
    """
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(
            f"pos_embed should cover a square grid, got {num_patches} patches; say which with old_grid=(rows, columns)"
        )
    return side, side


def resize_pos_embed(
    pos_embed: Tensor,
    new_grid: tuple[int, int],
    *,
    old_grid: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
    rule: str = "timm",
) -> Tensor:
    """Resizes the patch rows of a position embedding; prefix rows stay, an equal grid changes nothing.

    Args:
        pos_embed: [1, P + rows * columns, D], prefix rows first.
        new_grid: (rows, columns) wanted.
        old_grid: (rows, columns) given; a square when None.
        num_prefix_tokens: P, the rows that belong to no patch.
        rule: ``timm`` (bicubic, antialiased), ``transformers`` (bicubic), ``torchvision`` (bicubic, corners aligned) or
            ``dino`` (bicubic by a factor of (new + 0.1) / old, as the DINO repository does against rounding).

    Returns:
        [1, P + new rows * new columns, D] in the dtype given; interpolated in float32 at least. Differentiable.
    """
    if rule not in _INTERPOLATION:
        raise ValueError(f"the resize rule should be one of {', '.join(RESIZE_RULES)}, got {rule!r}")
    prefix, patches = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    old_grid = old_grid or square_grid(patches.shape[1])
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    image = patches.unflatten(1, old_grid).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    if rule == "dino":
        target = {"scale_factor": tuple((new + 0.1) / old for new, old in zip(new_grid, old_grid, strict=True))}
    else:
        target = {"size": tuple(new_grid)}
    image = F.interpolate(image, **target, **_INTERPOLATION[rule]).to(pos_embed.dtype)
    return torch.cat([prefix, image.flatten(2).transpose(1, 2)], dim=1)
