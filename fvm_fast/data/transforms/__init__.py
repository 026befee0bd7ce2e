# SPDX-License-Identifier: Apache-2.0
"""Transforms of uint8 image batches: ``t(images [B, C, H, W], generator)``, deterministic under the generator."""

from fvm_fast.data.transforms.base import Compose, Normalize, ToFloat, Transform
from fvm_fast.data.transforms.blur import GaussianBlur
from fvm_fast.data.transforms.color import ColorJitter, Composite, RandomGrayscale
from fvm_fast.data.transforms.geometry import CenterResize, Place, RandomAffine, RandomHorizontalFlip, RandomResizedCrop
from fvm_fast.data.transforms.mixup import Mixup
from fvm_fast.data.transforms.presets import Aligned, Anywhere, clip_train

__all__ = [
    "Aligned",
    "Anywhere",
    "CenterResize",
    "ColorJitter",
    "Compose",
    "Composite",
    "GaussianBlur",
    "Mixup",
    "Normalize",
    "Place",
    "RandomAffine",
    "RandomGrayscale",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "ToFloat",
    "Transform",
    "clip_train",
]
