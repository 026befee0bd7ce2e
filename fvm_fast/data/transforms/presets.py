# SPDX-License-Identifier: Apache-2.0
"""Whole chains with a name: what evaluation and training do to a batch of pictures."""

from __future__ import annotations

from collections.abc import Sequence

from fvm_fast.data.transforms.base import Compose, Normalize, Transform
from fvm_fast.data.transforms.blur import GaussianBlur
from fvm_fast.data.transforms.color import ColorJitter, Composite, RandomGrayscale
from fvm_fast.data.transforms.geometry import CenterResize, Place, RandomHorizontalFlip, RandomResizedCrop

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Aligned(Compose):
    """The picture fills the canvas, on white: uint8 [B, 3, S, S]."""

    def __init__(self, size: int | Sequence[int]) -> None:
        super().__init__([CenterResize(size, fit="stretch"), Composite("white")])


class Anywhere(Compose):
    """The picture anywhere on a canvas of one random colour: uint8 [B, 3, S, S].

    Size uniform in 50-100 % of the canvas, rotation in +-30 degrees, place uniform over all at which the unrotated
    square fits, mirrored half of the time, background a uniform random RGB. Evaluation and training share it.
    For training: ``after``, further transforms (colour jitter, blur), and ``white_share``, white among the backgrounds.
    """

    def __init__(self, size: int | Sequence[int], after: Sequence[Transform] = (), white_share: float = 0.0) -> None:
        super().__init__([Place(size, (0.5, 1.0), 30.0, 0.5), Composite("random", white_share), *after])


def clip_train(
    size: int | Sequence[int],
    scale: Sequence[float] = (0.9, 1.0),
    flip: float = 0.0,
    color_jitter: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    color_jitter_p: float = 0.8,
    grayscale_p: float = 0.0,
    blur_p: float = 0.0,
    normalize: bool = False,
) -> Compose:
    """CLIP's training augmentation: random resized crop, with the stronger options that open_clip offers off.

    Stays uint8 unless ``normalize``, since models built with image_mean and image_std normalise in the first kernel.
    """
    steps: list[Transform] = [RandomResizedCrop(size, scale), Composite("white")]
    if flip > 0:
        steps.append(RandomHorizontalFlip(flip))
    if any(color_jitter):
        steps.append(ColorJitter(*color_jitter, p=color_jitter_p))
    if grayscale_p > 0:
        steps.append(RandomGrayscale(grayscale_p))
    if blur_p > 0:
        steps.append(GaussianBlur(p=blur_p))
    if normalize:
        steps.append(Normalize(CLIP_MEAN, CLIP_STD))
    return Compose(steps)
