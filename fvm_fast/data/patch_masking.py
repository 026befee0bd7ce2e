# SPDX-License-Identifier: Apache-2.0
"""Random masks of large squares: each hides several of a model's patches, so that its neighbours do not give it away.

SimMIM: a Simple Framework for Masked Image Modeling, https://arxiv.org/abs/2111.09886, section 3.2: squares of 32
pixels, 60 % of them hidden, rounded up.
"""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor


class PatchMasking:
    """Draws masks for a model's patches, each with as many squares hidden, deterministic under a generator.

    Args:
        img_size: side or (height, width) of the images in pixels.
        mask_patch_size: side of a square in pixels.
        model_patch_size: side of a patch of the model in pixels; it divides ``mask_patch_size``.
        mask_ratio: share of the squares to hide, rounded up.

    Raises:
        ValueError: sizes that do not divide one another, or a ratio that no mask can have.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 192,
        mask_patch_size: int = 32,
        model_patch_size: int = 4,
        mask_ratio: float = 0.6,
    ) -> None:
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % mask_patch_size or width % mask_patch_size:
            raise ValueError(
                f"PatchMasking: mask_patch_size should divide the images' height and width, got {mask_patch_size} for "
                f"{height} x {width}"
            )
        if mask_patch_size % model_patch_size:
            raise ValueError(
                f"PatchMasking: mask_patch_size should be a multiple of model_patch_size {model_patch_size}, got "
                f"{mask_patch_size}"
            )
        if not 0.0 <= mask_ratio <= 1.0:
            raise ValueError(f"PatchMasking: mask_ratio should be in [0, 1], got {mask_ratio}")
        self.squares = (height // mask_patch_size, width // mask_patch_size)
        self.scale = mask_patch_size // model_patch_size
        self.num_hidden = math.ceil(self.squares[0] * self.squares[1] * mask_ratio)  # squares of an image

    def __call__(self, batch: int, generator: Generator | None = None) -> Tensor:
        """``batch`` masks [batch, rows * columns] bool, true where a patch of the model is hidden.

        They are on the generator's device; on the CPU without one.
        """
        device = "cpu" if generator is None else generator.device
        rows, columns = self.squares
        noise = torch.rand(batch, rows * columns, generator=generator, device=device)
        places = noise.argsort(dim=1)[:, : self.num_hidden]
        hidden = torch.zeros(batch, rows * columns, dtype=torch.bool, device=device).scatter_(1, places, True)
        hidden = hidden.view(batch, rows, columns)
        return hidden.repeat_interleave(self.scale, 1).repeat_interleave(self.scale, 2).flatten(1)
