# SPDX-License-Identifier: Apache-2.0
"""Masks of random squares: their number, their shape, and that a generator gives them again."""

import math

import pytest
import torch

from fvm_fast.data.patch_masking import PatchMasking


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CASES = {
    "paper_swin": (dict(), 22, 64, 48 * 48),
    "paper_vit": (dict(img_size=224, model_patch_size=16), 30, 4, 14 * 14),
    "rectangular": (dict(img_size=(96, 160)), 9, 64, 24 * 40),
    "square_is_a_patch": (dict(img_size=32, mask_patch_size=8, model_patch_size=8, mask_ratio=0.5), 8, 1, 16),
    "rounded_up": (dict(img_size=96, mask_ratio=0.01), 1, 64, 576),
    "nothing": (dict(img_size=96, mask_ratio=0.0), 0, 64, 576),
    "everything": (dict(img_size=96, mask_ratio=1.0), 9, 64, 576),
}


@pytest.mark.parametrize("kwargs, squares, patches_each, patches", CASES.values(), ids=CASES.keys())
def test_every_mask_hides_as_many_squares(kwargs, squares, patches_each, patches):
    masks = PatchMasking(**kwargs)(20, generator())
    assert masks.shape == (20, patches) and masks.dtype == torch.bool
    assert masks.sum(dim=1).tolist() == [squares * patches_each] * 20


@pytest.mark.parametrize("img_size, model_patch", [((64, 96), 4), (224, 16)])
def test_a_square_is_hidden_or_seen_as_a_whole(img_size, model_patch):
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    masks = PatchMasking(img_size, 32, model_patch)(10, generator())
    scale = 32 // model_patch
    squares = masks.view(10, height // 32, scale, width // 32, scale).float().mean(dim=(2, 4))
    assert set(squares.flatten().tolist()) == {0.0, 1.0}
    assert squares.sum(dim=(1, 2)).tolist() == [math.ceil(0.6 * squares[0].numel())] * 10


def test_every_square_is_hidden_as_often():
    share = PatchMasking()(3000, generator()).float().mean(dim=0)
    assert (share - 22 / 36).abs().max() < 0.04  # more than four standard deviations


def test_a_generator_gives_the_same_masks_again():
    masking = PatchMasking()
    first, again, other = (masking(5, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({tuple(mask.tolist()) for mask in first}) == 5, "each image should have a mask of its own"
    source = generator()
    assert not torch.equal(masking(5, source), masking(5, source)), "a generator moves on"
    torch.manual_seed(3)
    default = masking(5)
    torch.manual_seed(3)
    assert torch.equal(masking(5), default)


def test_empty_batch():
    assert PatchMasking()(0, generator()).shape == (0, 48 * 48)


BAD = {
    "images": (dict(img_size=(192, 200)), "should divide the images' height and width, got 32 for 192 x 200"),
    "patches": (dict(model_patch_size=12), "should be a multiple of model_patch_size 12, got 32"),
    "ratio": (dict(mask_ratio=1.2), "mask_ratio should be in \\[0, 1\\], got 1.2"),
}


@pytest.mark.parametrize("kwargs, message", BAD.values(), ids=BAD.keys())
def test_bad_arguments_say_what_was_expected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PatchMasking(**kwargs)
