# SPDX-License-Identifier: Apache-2.0
"""The first step of a model that takes the uint8 images of a decoder as they are."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ImageNormalize(nn.Module):
    """``(images / 255 - mean) / std`` for uint8 images; float images are taken as normalised already.

    Args:
        mean, std: per channel, for images in [0, 1]; without them uint8 images are refused.
    """

    def __init__(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise ValueError(f"image_mean and image_std go together, got {mean} and {std}")
        self.image_mean = None if mean is None else tuple(map(float, mean))
        self.image_std = None if std is None else tuple(map(float, std))
        self.register_buffer("mean", None if mean is None else torch.tensor(self.image_mean), persistent=False)
        self.register_buffer("std", None if std is None else torch.tensor(self.image_std), persistent=False)

    def statistics(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(mean, std) [C] for an op that normalises these images itself; (None, None) if they are float.

        Raises:
            ValueError: the images are uint8 and there is no mean.
        """
        if images.dtype != torch.uint8:
            return None, None
        if self.mean is None:
            raise ValueError(
                "uint8 images need a mean and a standard deviation; build the model with image_mean=... and "
                "image_std=..., or pass normalised float images"
            )
        return self.mean, self.std

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W], float."""
        mean, std = self.statistics(images)
        if mean is None:
            return images
        return (images.to(mean.dtype) / 255 - mean[:, None, None]) / std[:, None, None]
