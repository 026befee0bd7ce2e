# SPDX-License-Identifier: Apache-2.0
"""Separable linear maps of images: out = rows @ image @ cols^T, one pair of small matrices an image or for all.

Cropping with antialiased resizing and Gaussian blur are both such maps. Written as two batched matrix products they
treat every image of a batch with its own parameters at once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def resize_matrix(start: Tensor, length: Tensor, in_size: int, out_size: int) -> Tensor:
    """Weights [n, out_size, in_size] that resample ``[start, start + length)`` (pixels, float [n]) to ``out_size``.

    The triangle filter widens with the reduction (antialiased bilinear, as torchvision and Pillow do) and never looks
    outside the interval. Integer intervals give torchvision's ``resized_crop``.
    """
    scale = length / out_size  # [n] input pixels an output pixel
    support = scale.clamp(min=1.0)[:, None, None]
    index = torch.arange(out_size, dtype=torch.float32, device=start.device) + 0.5
    centre = start[:, None] + index * scale[:, None]  # [n, out_size]
    pixel = torch.arange(in_size, dtype=torch.float32, device=start.device) + 0.5  # [in_size]
    weights = (1 - (pixel - centre[:, :, None]).abs() / support).clamp(min=0.0)
    inside = (pixel > start[:, None]) & (pixel < (start + length)[:, None])  # [n, in_size]
    weights = weights * inside[:, None, :]
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)


def blur_matrix(sigma: Tensor, kernel_size: int, size: int) -> Tensor:
    """Weights [n, size, size] of a Gaussian blur with standard deviation ``sigma`` float [n] (pixels), edges reflected.

    The kernel has ``kernel_size`` (odd) taps; a size smaller than the kernel's reach is reflected more than once.
    """
    reach = kernel_size // 2
    taps = torch.arange(-reach, reach + 1, dtype=torch.float32, device=sigma.device)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)  # [n, kernel_size]
    kernel = kernel / kernel.sum(-1, keepdim=True)
    position = torch.arange(size, device=sigma.device)[:, None] + taps.to(torch.int64)  # [size, kernel_size]
    period = max(2 * (size - 1), 1)
    position = position.remainder(period)
    position = torch.minimum(position, period - position) if size > 1 else torch.zeros_like(position)
    weights = torch.zeros(len(sigma), size, size, device=sigma.device)
    index = position.expand(len(sigma), size, kernel_size)
    return weights.scatter_add_(2, index, kernel[:, None, :].expand_as(index))


def apply_separable(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Map float [B, C, H, W] to [B, C, S, T] by ``rows`` [B or 1, S, H] and ``cols`` [B or 1, T, W]."""
    B, C, H, W = x.shape
    if len(rows) == 1:
        return rows[0] @ (x @ cols[0].T)
    x = (x.reshape(B, C * H, W) @ cols.transpose(1, 2)).view(B, C, H, cols.shape[1])
    # channel by channel: broadcasting would first copy the matrices C times
    return torch.stack([rows @ x[:, c] for c in range(C)], dim=1)


def premultiply(x: Tensor) -> Tensor:
    """RGBA float [B, 4, H, W] in 0..255 with straight alpha -> colours multiplied by alpha; RGB passes unchanged.

    Averages of neighbouring pixels are right only so: a transparent pixel's colour must not bleed into its neighbour.
    """
    if x.shape[1] != 4:
        return x
    return _scale_colours(x, x[:, 3:] / 255.0)


def unpremultiply(x: Tensor) -> Tensor:
    """The inverse of ``premultiply``; where alpha is nil the colour is black."""
    if x.shape[1] != 4:
        return x
    return _scale_colours(x, 255.0 / x[:, 3:].clamp(min=1e-3))


def _scale_colours(x: Tensor, factor: Tensor) -> Tensor:
    """RGBA with its colours times ``factor`` [B, 1, H, W] and its alpha as it is."""
    out = x * factor
    out[:, 3] = x[:, 3]
    return out


def to_uint8(x: Tensor) -> Tensor:
    """Round float in 0..255 to the nearest uint8."""
    return (x + 0.5).clamp_(0, 255).to(torch.uint8)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [B, C, H, W] to (height, width), antialiased bilinear, alpha treated rightly."""
    x = images.to(torch.float32)
    maps = [whole_matrix(x, n, out) for n, out in zip(x.shape[-2:], size, strict=True)]
    return to_uint8(unpremultiply(apply_separable(premultiply(x), *maps)))


def whole_matrix(x: Tensor, in_size: int, out_size: int) -> Tensor:
    """The weights [1, out_size, in_size] that resize a whole side, on the device of ``x``."""
    return resize_matrix(x.new_zeros(1), x.new_full((1,), in_size), in_size, out_size)
