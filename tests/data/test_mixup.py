# SPDX-License-Identifier: Apache-2.0
"""Mixup and CutMix against timm with the same draws, and the distribution of the draws."""

import numpy as np
import pytest
import timm.data.mixup as timm_mixup
import torch
from torch.testing import assert_close

from fvm_fast.data.transforms import Mixup
from fvm_fast.data.transforms.mixup import Mix, cutmix_boxes, mix_images, mix_targets

CLASSES = 6
LABELS = torch.tensor([0, 5, 2, 2, 1, 3])
KINDS = {
    "mixup": dict(mixup_alpha=0.8, cutmix_alpha=0.0),
    "cutmix": dict(mixup_alpha=0.0, cutmix_alpha=1.0),
    "both": dict(mixup_alpha=0.8, cutmix_alpha=1.0),
    "minmax": dict(mixup_alpha=0.8, cutmix_alpha=0.0, cutmix_minmax=(0.2, 0.8)),
    "sometimes": dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.5),
    "uncorrected": dict(mixup_alpha=0.8, cutmix_alpha=1.0, correct_lam=False),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 6, dtype: torch.dtype = torch.float64, size: tuple[int, int] = (9, 14)) -> torch.Tensor:
    images = torch.rand(n, 3, *size, generator=seeded(1), dtype=torch.float64) * 255
    return images.to(dtype)


def as_timm_draws(monkeypatch: pytest.MonkeyPatch, mix: Mix, mode: str) -> None:
    """Lets timm take our draws: ``lam``, which kind, and CutMix's box, as it asks for them."""
    draws = {"batch": 1, "pair": (len(mix.lam) + 1) // 2, "elem": len(mix.lam)}[mode]
    lam, cut, boxes = mix.lam[:draws], mix.cut[:draws], mix.boxes[mix.cut & (mix.lam < 1)]  # timm asks for no empty box
    taken = iter([(box[0], box[1], box[2], box[3]) for box in boxes])
    box_and_lam = lambda shape, drawn, **_: (next(taken), drawn)  # noqa: E731 (a stand-in for timm's function)
    monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", box_and_lam)
    monkeypatch.setattr(timm_mixup.Mixup, "_params_per_batch", lambda self: (float(lam[0]), bool(cut[0])))
    monkeypatch.setattr(timm_mixup.Mixup, "_params_per_elem", lambda self, n: (lam.copy(), cut))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_timm_with_the_same_draws(kind, mode, monkeypatch):
    ours = Mixup(CLASSES, mode=mode, **KINDS[kind])
    theirs = timm_mixup.Mixup(num_classes=CLASSES, mode=mode, label_smoothing=0.0)
    changed = 0
    for seed in range(8):
        images, targets = ours(pictures(), LABELS, seeded(seed))
        mix = ours.draw(6, (9, 14), seeded(seed))
        as_timm_draws(monkeypatch, mix, mode)
        expected, expected_targets = theirs(pictures(), LABELS)
        assert_close(images, expected, atol=1e-9, rtol=0.0)
        assert_close(targets, expected_targets.to(targets), atol=1e-6, rtol=0.0)
        changed += int(not torch.equal(images, pictures()))
    assert changed >= (2 if kind == "sometimes" else 6)


@pytest.mark.parametrize("kind", ["mixup", "both"])
def test_uint8_equals_timms_collate(kind, monkeypatch):
    ours, images = Mixup(CLASSES, mode="elem", **KINDS[kind]), pictures(dtype=torch.uint8)
    theirs = timm_mixup.FastCollateMixup(num_classes=CLASSES, mode="elem", label_smoothing=0.0)
    got, targets = ours(images, LABELS, seeded(3))
    as_timm_draws(monkeypatch, ours.draw(6, (9, 14), seeded(3)), "elem")
    expected, expected_targets = theirs([(image, int(label)) for image, label in zip(images, LABELS, strict=True)])
    assert got.dtype == torch.uint8
    assert_close(got.float(), expected.float(), atol=1.0, rtol=0.0)  # a tie rounds up here, to even there
    assert (got != expected).double().mean() < 0.01
    assert_close(targets, expected_targets.to(targets), atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("size", [(9, 14), (32, 32), (1, 5)])
def test_boxes_equal_timms(lam, size, monkeypatch):
    for centre in (0, 0), (size[0] - 1, size[1] - 1), (size[0] // 2, size[1] // 3):
        drawn = iter(centre)
        monkeypatch.setattr(timm_mixup.np.random, "randint", lambda *_, drawn=drawn, **__: next(drawn))
        expected = timm_mixup.rand_bbox((3, *size), lam)
        shares = (np.array([centre]) + 0.5) / np.array(size)
        assert cutmix_boxes(np.array([lam]), size, shares)[0].tolist() == [int(side) for side in expected]


def test_the_formula_by_hand():
    images = torch.arange(2.0 * 4).reshape(2, 1, 2, 2)
    mix = Mix(np.array([0.25, 0.75]), np.array([[0, 0, 0, 0], [0, 1, 1, 2]]), np.array([False, True]))
    mixed = mix_images(images, mix)
    assert_close(mixed[0], 0.25 * images[0] + 0.75 * images[1])
    assert mixed[1, 0].tolist() == [[4.0, 1.0], [6.0, 7.0]]
    assert mix_targets(torch.tensor([1, 0]), mix, 3).tolist() == [[0.75, 0.25, 0.0], [0.75, 0.25, 0.0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_draws_are_consistent(kind, mode):
    mix = Mixup(CLASSES, mode=mode, **KINDS[kind]).draw(201, (24, 32), seeded())
    top, bottom, left, right = mix.boxes.T
    assert (top >= 0).all() and (top <= bottom).all() and (bottom <= 24).all()
    assert (left >= 0).all() and (left <= right).all() and (right <= 32).all()
    assert not mix.boxes[~mix.cut].any() and ((mix.lam >= 0) & (mix.lam <= 1)).all()
    if kind != "uncorrected":
        area = ((bottom - top) * (right - left))[mix.cut]
        assert_close(mix.lam[mix.cut], 1 - area / (24 * 32))
    different = {"batch": 1, "pair": 101, "elem": 201}[mode]
    assert len({(lam, *box) for lam, box in zip(mix.lam, map(tuple, mix.boxes), strict=True)}) <= different
    if mode == "pair":
        assert np.array_equal(mix.lam, mix.lam[::-1]) and np.array_equal(mix.boxes, mix.boxes[::-1])


def test_draws_have_the_right_distribution():
    n = 20_000
    for alpha in (0.2, 0.8, 1.0):
        lam = Mixup(CLASSES, alpha, 0.0, mode="elem").draw(n, (8, 8), seeded()).lam
        assert lam.mean() == pytest.approx(0.5, abs=0.01)
        assert lam.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.005)
    mix = Mixup(CLASSES, 0.8, 1.0, prob=0.7, switch_prob=0.4, mode="elem").draw(n, (64, 64), seeded())
    assert mix.cut.mean() == pytest.approx(0.7 * 0.4, abs=0.01)
    assert (mix.lam == 1.0).mean() == pytest.approx(0.3, abs=0.02)
    sides = Mixup(CLASSES, 0.0, 0.0, cutmix_minmax=(0.25, 0.75), mode="elem").draw(n, (64, 32), seeded()).boxes
    heights, widths = sides[:, 1] - sides[:, 0], sides[:, 3] - sides[:, 2]
    assert (heights.min(), heights.max(), widths.min(), widths.max()) == (16, 47, 8, 23)


def test_the_generator_decides_and_nothing_is_changed_in_place():
    mixup, images, labels = Mixup(CLASSES, mode="elem"), pictures(dtype=torch.uint8), LABELS.clone()
    kept = images.clone()
    first, again, other = (mixup(images, labels, seeded(seed)) for seed in (7, 7, 8))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(images, kept) and torch.equal(labels, LABELS)
    torch.manual_seed(5)
    default = mixup(images, labels)[0]
    torch.manual_seed(5)
    assert torch.equal(default, mixup(images, labels)[0])


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_odd_and_empty_batches(n, mode):
    labels = torch.arange(n) % CLASSES
    images, targets = Mixup(CLASSES, mode=mode)(pictures(n, torch.float32), labels, seeded())
    assert images.shape == (n, 3, 9, 14) and targets.shape == (n, CLASSES)
    assert_close(targets.sum(1), torch.ones(n))
    if n % 2:  # the image in the middle is its own partner
        assert_close(images[n // 2], pictures(n, torch.float32)[n // 2])


def test_soft_labels_are_mixed_too():
    soft = torch.rand(6, CLASSES, generator=seeded(2)).softmax(1)
    mixup = Mixup(CLASSES, mode="elem")
    _, targets = mixup(pictures(), soft, seeded(4))
    lam = torch.from_numpy(mixup.draw(6, (9, 14), seeded(4)).lam).float()[:, None]
    assert_close(targets, lam * soft + (1 - lam) * soft.flip(0))


BAD = {
    "mode": (lambda: Mixup(3, mode="half"), "mode should be one of batch, pair, elem, got 'half'"),
    "nothing_on": (lambda: Mixup(3, 0.0, 0.0), "one of them positive, got 0.0 and 0.0"),
    "negative": (lambda: Mixup(3, -0.1), "should be 0 or more"),
    "minmax": (lambda: Mixup(3, cutmix_minmax=(0.5, 0.5)), "0 <= low < high <= 1, got \\(0.5, 0.5\\)"),
    "prob": (lambda: Mixup(3, prob=1.5), "p should be a probability"),
    "no_batch": (lambda: Mixup(3)(torch.zeros(3, 8, 8), torch.zeros(3)), "should be \\[n, C, H, W\\] with n labels"),
    "too_few": (lambda: Mixup(3)(pictures(), LABELS[:4]), "labels \\(4,\\)"),
    "width": (
        lambda: Mixup(3)(pictures(), torch.zeros(6, 4)),
        "floating targets \\[n, 3\\], got torch.float32 \\(6, 4\\)",
    ),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD.keys())
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
