# SPDX-License-Identifier: Apache-2.0
"""Mixup and CutMix: a batch blended with itself in reverse order, and its labels to match.

With ``w`` the share that image ``i`` keeps at each pixel and ``lam`` its mean (``j = n - 1 - i``):

    x'_i = w x_i + (1 - w) x_j          t'_i = lam t_i + (1 - lam) t_j

Mixup: ``w = lam`` everywhere, drawn from Beta(alpha, alpha). CutMix: ``w = 0`` in a box of about ``1 - lam`` of the
area and 1 outside; ``lam`` is then the exact share outside.

mixup: Beyond Empirical Risk Minimization, https://arxiv.org/abs/1710.09412
CutMix: Regularization Strategy to Train Strong Classifiers, https://arxiv.org/abs/1905.04899
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fvm_fast.data.transforms.base import check_probability
from fvm_fast.data.transforms.separable import to_uint8

MODES = ("batch", "pair", "elem")


@dataclass(frozen=True)
class Mix:
    """How the images of a batch are mixed.

    Attributes:
        lam: float64 [n], the share of its own label that each image keeps.
        boxes: int64 [n, 4], (top, bottom, left, right) of what CutMix replaces; all zero where there is no box.
        cut: bool [n], CutMix rather than mixup.
    """

    lam: np.ndarray
    boxes: np.ndarray
    cut: np.ndarray


class Mixup:
    """Mixes a batch: ``mixup(images, labels, generator) -> (images, targets)``. The arguments are timm's.

    Label smoothing is the loss's (``objectives.Classification``); it commutes with mixing.

    Args:
        num_classes: width C of the targets.
        mixup_alpha, cutmix_alpha: of the Beta distribution of ``lam``; 0 switches that kind off.
        cutmix_minmax: draw the sides of CutMix's box uniformly between these shares of the image's instead.
        prob: probability that a batch, pair or image is mixed at all.
        switch_prob: probability of CutMix where both are on.
        mode: one draw for the whole ``batch``, for each ``pair`` (i, n - 1 - i), or for each image (``elem``).
        correct_lam: let ``lam`` be the box's true area after clipping.
    """

    def __init__(
        self,
        num_classes: int,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        *,
        cutmix_minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        correct_lam: bool = True,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"Mixup: mode should be one of {', '.join(MODES)}, got {mode!r}")
        if min(mixup_alpha, cutmix_alpha) < 0 or not (mixup_alpha or cutmix_alpha or cutmix_minmax):
            raise ValueError(
                "Mixup: mixup_alpha and cutmix_alpha should be 0 or more, and one of them positive, got "
                f"{mixup_alpha} and {cutmix_alpha}"
            )
        if cutmix_minmax is not None and not 0 <= cutmix_minmax[0] < cutmix_minmax[1] <= 1:
            raise ValueError(f"Mixup: cutmix_minmax should be shares 0 <= low < high <= 1, got {cutmix_minmax}")
        self.num_classes = num_classes
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = 1.0 if cutmix_minmax is not None else cutmix_alpha
        self.cutmix_minmax = cutmix_minmax
        self.prob = check_probability("Mixup", prob)
        self.switch_prob = check_probability("Mixup", switch_prob)
        self.mode = mode
        self.correct_lam = correct_lam

    def __call__(
        self, images: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mixes one batch.

        Args:
            images: [n, C, H, W], uint8 (rounded once) or floating.
            labels: class numbers [n] int64, or targets [n, num_classes].
            generator: makes the same mix again; torch's default one when None.

        Returns:
            Images as they were given, and float32 targets [n, num_classes] (or float as given). Neither in place.
        """
        if images.ndim != 4 or len(labels) != len(images):
            raise ValueError(
                "Mixup: images should be [n, C, H, W] with n labels, got images "
                f"{tuple(images.shape)} and labels {tuple(labels.shape)}"
            )
        mix = self.draw(len(images), images.shape[-2:], generator)
        return mix_images(images, mix), mix_targets(labels, mix, self.num_classes)

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator | None = None) -> Mix:
        """Draws how a batch of ``n`` images of (height, width) is mixed."""
        draws = {"batch": min(n, 1), "pair": (n + 1) // 2, "elem": n}[self.mode]
        random = _numpy_generator(generator)
        cut = random.random(draws) < (self.switch_prob if self.mixup_alpha else 1.0)
        cut &= self.cutmix_alpha > 0
        lam = np.where(cut, _beta(random, self.cutmix_alpha, draws), _beta(random, self.mixup_alpha, draws))
        lam[random.random(draws) >= self.prob] = 1.0
        cut &= lam < 1.0
        boxes = np.where(cut[:, None], self._boxes(lam, size, random), 0)
        if self.correct_lam or self.cutmix_minmax is not None:
            area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
            lam = np.where(cut, 1.0 - area / max(size[0] * size[1], 1), lam)
        order = self._order(n)
        return Mix(lam[order], boxes[order], cut[order])

    def _order(self, n: int) -> np.ndarray:
        """Which draw each image takes."""
        numbers = np.arange(n)
        return {"batch": numbers * 0, "pair": np.minimum(numbers, numbers[::-1]), "elem": numbers}[self.mode]

    def _boxes(self, lam: np.ndarray, size: tuple[int, int], random: np.random.Generator) -> np.ndarray:
        if self.cutmix_minmax is None:
            return cutmix_boxes(lam, size, random.random((len(lam), 2)))
        low, high = (np.array([int(side * share) for side in size]) for share in self.cutmix_minmax)
        sides = random.integers(low, np.maximum(high, low + 1), (len(lam), 2))
        first = random.integers(0, np.array(size) - sides + 1)
        return np.stack([first, first + sides], axis=2).reshape(-1, 4)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


def cutmix_boxes(lam: np.ndarray, size: tuple[int, int], centres: np.ndarray) -> np.ndarray:
    """Boxes of about ``1 - lam`` of the area, of the image's shape, clipped at its edges.

    Args:
        lam: [n] in 0..1.
        size: (height, width).
        centres: [n, 2] in [0, 1), (vertical, horizontal) as shares of the image.

    Returns:
        int64 [n, 4], (top, bottom, left, right); bottom and right are exclusive.
    """
    size = np.array(size)
    sides = (size * np.sqrt(1.0 - lam)[:, None]).astype(np.int64)
    centres = (centres * size).astype(np.int64)
    first = np.clip(centres - sides // 2, 0, size)
    last = np.clip(centres + (sides + 1) // 2, 0, size)
    return np.stack([first, last], axis=2).reshape(-1, 4)


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """``w x_i + (1 - w) x_j`` for images [n, C, H, W], in their dtype."""
    dtype = torch.promote_types(images.dtype, torch.float32) if images.is_floating_point() else torch.float32
    weights = _weights(mix, images.shape[-2:], images.device).to(dtype)
    x = images.to(dtype)
    mixed = x * weights + x.flip(0) * (1 - weights)
    return to_uint8(mixed) if images.dtype == torch.uint8 else mixed.to(images.dtype)


def mix_targets(labels: Tensor, mix: Mix, num_classes: int) -> Tensor:
    """``lam t_i + (1 - lam) t_j`` [n, num_classes] for class numbers [n] or targets [n, num_classes]."""
    if labels.ndim == 1:
        targets = torch.zeros(len(labels), num_classes, device=labels.device)
        targets.scatter_(1, labels.long()[:, None], 1.0)
    elif labels.ndim == 2 and labels.shape[1] == num_classes and labels.is_floating_point():
        targets = labels
    else:
        raise ValueError(
            f"Mixup: labels should be class numbers [n] or floating targets [n, {num_classes}], got {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    lam = torch.from_numpy(mix.lam).to(targets)[:, None]
    return targets * lam + targets.flip(0) * (1 - lam)


def _weights(mix: Mix, size: tuple[int, int], device: torch.device) -> Tensor:
    """``w``, float64 [n, 1, H, W], or [n, 1, 1, 1] when nothing is cut."""
    lam = torch.from_numpy(np.where(mix.cut, 1.0, mix.lam)).to(device)[:, None, None, None]
    if not mix.cut.any():
        return lam
    top, bottom, left, right = (side[:, None] for side in torch.from_numpy(mix.boxes).to(device).unbind(1))
    row, column = (torch.arange(side, device=device) for side in size)
    rows, columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(inside, 0.0, lam)


def _beta(random: np.random.Generator, alpha: float, n: int) -> np.ndarray:
    """``n`` draws of Beta(alpha, alpha), float64; ones when alpha is 0."""
    return random.beta(alpha, alpha, n) if alpha > 0 else np.ones(n)


def _numpy_generator(generator: torch.Generator | None) -> np.random.Generator:
    """A NumPy generator seeded by torch's, which has no Beta distribution of its own."""
    device = generator.device if generator is not None else "cpu"
    return np.random.default_rng(torch.randint(2**63 - 1, (), generator=generator, device=device).item())
