# SPDX-License-Identifier: Apache-2.0
"""Gaussian blur with its own strength for each image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fvm_fast.data.transforms.base import Transform, as_range, check_probability, chosen, uniform
from fvm_fast.data.transforms.separable import apply_separable, blur_matrix, premultiply, unpremultiply


class GaussianBlur(Transform):
    """Blur with probability ``p``; the standard deviation is uniform in ``sigma`` (pixels), edges are reflected.

    kernel_size: taps, odd; None takes 3 standard deviations on both sides of the largest sigma.
    """

    def __init__(self, sigma: Sequence[float] = (0.1, 2.0), p: float = 0.5, kernel_size: int | None = None) -> None:
        self.sigma = as_range("GaussianBlur", "sigma", sigma, low=1e-6)
        self.p = check_probability("GaussianBlur", p)
        self.kernel_size = 2 * max(1, round(3 * self.sigma[1])) + 1 if kernel_size is None else kernel_size
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"GaussianBlur: kernel_size should be odd and positive, got {kernel_size!r}")

    def apply(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        picked = chosen(len(x), self.p, generator, x.device).nonzero()[:, 0]
        sigma = uniform(len(x), *self.sigma, generator, x.device)[picked]
        if len(picked) == 0:
            return x
        return x.index_copy(0, picked, gaussian_blur(x[picked], sigma, self.kernel_size))


def gaussian_blur(x: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Blur float [B, C, H, W] by ``sigma`` float [B]."""
    H, W = x.shape[-2:]
    rows = blur_matrix(sigma, kernel_size, H)
    cols = rows if H == W else blur_matrix(sigma, kernel_size, W)
    return unpremultiply(apply_separable(premultiply(x), rows, cols))
