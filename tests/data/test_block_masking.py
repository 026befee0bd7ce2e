# SPDX-License-Identifier: Apache-2.0
"""Block-wise masks: their number, their shape, and that a generator gives them again."""

import random

import pytest
import torch

from fvm_fast.data.block_masking import BlockMasking


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "grid, num_masked, expected",
    [((14, 14), None, 75), ((24, 24), None, 220), ((8, 20), 100, 100), ((3, 3), 0, 0), ((3, 3), 9, 9), ((1, 7), 3, 3)],
    ids=["paper", "384_px", "rectangular", "none", "all", "one_row"],
)
def test_every_mask_hides_as_many(grid, num_masked, expected):
    masks = BlockMasking(grid, num_masked)(40, generator())
    assert masks.shape == (40, grid[0] * grid[1]) and masks.dtype == torch.bool
    assert masks.sum(dim=1).tolist() == [expected] * 40


def test_a_generator_gives_the_same_masks_again():
    masking = BlockMasking()
    first, again, other = (masking(5, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({tuple(mask.tolist()) for mask in first}) == 5, "each image should have a mask of its own"
    source = generator()
    assert not torch.equal(masking(5, source), masking(5, source)), "a generator moves on"
    torch.manual_seed(3)
    default = masking(5)
    torch.manual_seed(3)
    assert torch.equal(masking(5), default)


def test_neighbours_are_hidden_together():
    """Of a hidden patch's right neighbour, far more are hidden than of patches drawn singly (75 of 196)."""
    masks = BlockMasking()(300, generator()).view(-1, 14, 14).float()
    together = (masks[:, :, :-1] * masks[:, :, 1:]).sum() / masks[:, :, :-1].sum()
    assert together > 0.75 > 0.4 > 75 / 196


def test_the_middle_is_hidden_more_often_than_the_corner_and_none_is_spared():
    share = BlockMasking()(1000, generator()).float().mean(dim=0).view(14, 14)
    assert abs(float(share.mean()) - 75 / 196) < 1e-6
    assert share[6:8, 6:8].mean() > share[[0, 0, -1, -1], [0, -1, 0, -1]].mean() > 0.02


def test_first_blocks_keep_to_area_and_aspect():
    masking = BlockMasking((30, 30), 60, min_block=20, min_aspect=0.3)
    for seed in range(200):
        mask = bytearray(900)
        added = masking._add_block(mask, 60, random.Random(seed))
        block = torch.tensor(list(mask)).view(30, 30)
        height, width = int(block.any(dim=1).sum()), int(block.any(dim=0).sum())
        assert added == int(block.sum()) == height * width <= 60, "one full rectangle"
        assert added >= 15 and 0.2 < height / width < 5.0  # sides are rounded


def test_max_block_bounds_every_block():
    masking = BlockMasking((30, 30), 200, min_block=4, max_block=9)
    assert all(0 < masking._add_block(bytearray(900), 9, random.Random(seed)) <= 9 for seed in range(100))
    assert masking(3, generator()).sum(dim=1).tolist() == [200] * 3


def test_single_patches_make_up_the_number():
    """In a row of seven no rectangle of sixteen fits."""
    assert BlockMasking((1, 7), 6)(10, generator()).sum(dim=1).tolist() == [6] * 10


def test_empty_batch():
    assert BlockMasking()(0, generator()).shape == (0, 196)


BAD = {
    "too_many": (dict(grid=(3, 3), num_masked=10), "num_masked should be 0 to 9 for a grid of \\(3, 3\\), got 10"),
    "negative": (dict(num_masked=-1), "num_masked should be 0 to 196"),
    "aspect": (dict(min_aspect=1.5), "min_aspect should be in \\(0, 1\\], got 1.5"),
    "block": (dict(min_block=0), "min_block should be at least 1"),
}


@pytest.mark.parametrize("kwargs, message", BAD.values(), ids=BAD.keys())
def test_bad_arguments_say_what_was_expected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        BlockMasking(**kwargs)
