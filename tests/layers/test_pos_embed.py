# SPDX-License-Identifier: Apache-2.0
"""Position embeddings resized by each ecosystem's rule."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch.testing import assert_close

from fvm_fast.layers import resize_pos_embed
from fvm_fast.layers.pos_embed import RESIZE_RULES

# Growing, shrinking, rectangular, one axis only, a single row.
GRIDS = [(7, 7), (3, 2), (4, 9), (9, 4), (1, 5)]


def table(rows: int = 4, columns: int = 4, prefix: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, prefix + rows * columns, 6, dtype=dtype, generator=generator)


def cubic_weights(positions: torch.Tensor, size: int) -> torch.Tensor:
    """Keys' cubic convolution (a = -0.75) with repeated borders: [n] positions -> [n, size] weights."""
    taps = positions.floor().long()[:, None] + torch.arange(-1, 3)
    t = (positions[:, None] - taps).abs()
    near, far = 1.25 * t**3 - 2.25 * t**2 + 1, -0.75 * t**3 + 3.75 * t**2 - 6 * t + 3
    weights = torch.where(t <= 1, near, far)
    return (F.one_hot(taps.clamp(0, size - 1), size).to(weights) * weights[..., None]).sum(1)


def positions(rule: str, old: int, new: int) -> torch.Tensor:
    """Where the new cells lie on the old axis."""
    cells = torch.arange(new, dtype=torch.float64)
    if rule == "torchvision":
        return cells * (old - 1) / max(new - 1, 1)
    factor = (new + 0.1) / old if rule == "dino" else new / old
    return (cells + 0.5) / factor - 0.5


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rule", ["transformers", "torchvision", "dino"])
def test_equals_the_dense_bicubic_formula(rule, grid):
    pos = table()
    down, across = (cubic_weights(positions(rule, 4, new), 4) for new in grid)
    expected = torch.einsum("rh,cw,hwd->rcd", down, across, pos[0, 1:].view(4, 4, 6)).flatten(0, 1)
    resized = resize_pos_embed(pos, grid, rule=rule)
    assert_close(resized[0, 1:], expected, atol=1e-9, rtol=1e-9)
    assert torch.equal(resized[:, :1], pos[:, :1])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_timm_rule_equals_timm(grid, prefix):
    pos = table(3, 5, prefix, torch.float32)
    expected = resample_abs_pos_embed(pos, grid, old_size=(3, 5), num_prefix_tokens=prefix)
    resized = resize_pos_embed(pos, grid, old_grid=(3, 5), num_prefix_tokens=prefix)
    assert_close(resized, expected, atol=1e-6, rtol=1e-6)


def test_the_rules_differ():
    results = [resize_pos_embed(table(), (3, 6), rule=rule) for rule in RESIZE_RULES]
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize("rule", RESIZE_RULES)
def test_gradient_and_dtype(rule):
    pos = table().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: resize_pos_embed(p, (3, 5), rule=rule), pos)
    half = table(dtype=torch.bfloat16)
    expected = resize_pos_embed(half.float(), (3, 5), rule=rule).bfloat16()
    assert torch.equal(resize_pos_embed(half, (3, 5), rule=rule), expected)
    assert torch.equal(resize_pos_embed(half, (4, 4), rule=rule), half)


def test_bad_input():
    with pytest.raises(ValueError, match="should cover a square grid, got 15 patches; say which with old_grid"):
        resize_pos_embed(table(3, 5), (4, 4))
    with pytest.raises(ValueError, match="should be one of timm, transformers, torchvision, dino, got 'area'"):
        resize_pos_embed(table(), (3, 3), rule="area")
