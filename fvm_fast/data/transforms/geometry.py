# SPDX-License-Identifier: Apache-2.0
"""Crops, flips and affine maps, one random choice an image, all images at once.

RGBA is resampled on premultiplied alpha, so that transparent pixels lend no colour to their neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fvm_fast.data.transforms.base import Transform, as_pair, as_range, check_probability, chosen, uniform
from fvm_fast.data.transforms.separable import apply_separable, premultiply, resize_matrix, unpremultiply, whole_matrix


class RandomHorizontalFlip(Transform):
    """Mirror each image with probability ``p``."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = check_probability("RandomHorizontalFlip", p)

    def apply(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        flip = chosen(len(x), self.p, generator, x.device)
        return torch.where(flip[:, None, None, None], x.flip(-1), x)


class CenterResize(Transform):
    """Resize the shorter side (antialiased) and crop the centre: what evaluation does.

    With ``fit="stretch"`` the whole image fills the canvas, whatever its shape.
    """

    def __init__(self, size: int | Sequence[int], fit: str = "crop") -> None:
        if fit not in ("crop", "stretch"):
            raise ValueError(f"CenterResize: fit should be 'crop' or 'stretch', got {fit!r}")
        self.size = as_pair("CenterResize", size)
        self.fit = fit

    def apply(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        (H, W), (S, T) = x.shape[-2:], self.size
        scale = min(H / S, W / T)  # input pixels an output pixel
        whole = (max(S, int(H / scale)), max(T, int(W / scale))) if self.fit == "crop" else (S, T)
        top, left = round((whole[0] - S) / 2), round((whole[1] - T) / 2)
        rows = whole_matrix(x, H, whole[0])[:, top : top + S]
        cols = whole_matrix(x, W, whole[1])[:, left : left + T]
        return unpremultiply(apply_separable(premultiply(x), rows, cols))


class RandomResizedCrop(Transform):
    """Inception's crop: a random part of the area, of a random aspect ratio, resized (antialiased) to ``size``.

    Sizes are drawn once and cut to the image, where torchvision tries up to ten times: the same for nearly all draws.
    Crop edges lie on whole pixels, and pixels outside the crop are never seen.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
    ) -> None:
        self.size = as_pair("RandomResizedCrop", size)
        self.scale = as_range("RandomResizedCrop", "scale", scale)
        self.ratio = as_range("RandomResizedCrop", "ratio", ratio, low=1e-6)

    def boxes(self, n: int, H: int, W: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """``n`` crops: float [4, n] of whole numbers (top, left, height, width)."""
        area = uniform(n, *self.scale, generator, device) * (H * W)
        ratio = uniform(n, math.log(self.ratio[0]), math.log(self.ratio[1]), generator, device).exp()
        width = (area * ratio).sqrt().round().clamp(1, W)
        height = (area / ratio).sqrt().round().clamp(1, H)
        top = (uniform(n, 0.0, 1.0, generator, device) * (H - height + 1)).floor()
        left = (uniform(n, 0.0, 1.0, generator, device) * (W - width + 1)).floor()
        return torch.stack([top, left, height, width])

    def apply(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        B, _, H, W = x.shape
        return crop_resize(x, self.boxes(B, H, W, generator, x.device), self.size)


class RandomAffine(Transform):
    """Rotation, translation, scaling and shear about the centre, bilinear, in torchvision's parameters.

    degrees: rotation (low, high); translate: largest shift as fractions (x, y) of width and height; scale: (low, high);
    shear: x-axis shear in degrees (low, high); fill: value outside the image (RGBA: transparent where it is 0).
    """

    def __init__(
        self,
        degrees: Sequence[float] = (0.0, 0.0),
        translate: Sequence[float] = (0.0, 0.0),
        scale: Sequence[float] = (1.0, 1.0),
        shear: Sequence[float] = (0.0, 0.0),
        fill: float = 0.0,
    ) -> None:
        self.degrees = as_range("RandomAffine", "degrees", degrees, low=-math.inf)
        self.translate = tuple(translate)
        self.scale = as_range("RandomAffine", "scale", scale, low=1e-6)
        self.shear = as_range("RandomAffine", "shear", shear, low=-math.inf)
        self.fill = fill

    def apply(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        B, _, H, W = x.shape
        angle = uniform(B, *self.degrees, generator, x.device)
        shift = [
            uniform(B, -part * side, part * side, generator, x.device).round()
            for part, side in zip(self.translate, (W, H), strict=True)
        ]
        scale = uniform(B, *self.scale, generator, x.device)
        shear = uniform(B, *self.shear, generator, x.device)
        linear = rotation_shear(angle, shear) / scale[:, None, None]
        centre = torch.stack([shift[0] + W / 2, shift[1] + H / 2], dim=1)
        sampled = affine_sample(premultiply(x) - self.fill, linear, centre, (H, W)) + self.fill
        return unpremultiply(sampled)


class Place(Transform):
    """Put the whole picture somewhere on an empty canvas: random size, rotation, place and mirror image. Returns RGBA.

    size: the canvas; scale: size of the picture as a part of the largest that fits; degrees: rotation is uniform in
    +-degrees; flip: probability of mirroring. The place is uniform over all at which the unrotated picture fits.
    With ``antialias`` strongly reduced pictures are sampled from a pre-averaged half-size copy (a mip map).
    RGB images are placed as opaque ones.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        scale: Sequence[float] = (0.5, 1.0),
        degrees: float = 30.0,
        flip: float = 0.5,
        antialias: bool = True,
    ) -> None:
        self.size = as_pair("Place", size)
        self.scale = as_range("Place", "scale", scale, low=1e-6)
        self.degrees = degrees
        self.flip = check_probability("Place", flip)
        self.antialias = antialias

    def apply(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        (B, C, H, W), (S, T) = x.shape, self.size
        scale = uniform(B, *self.scale, generator, x.device) * min(S / H, T / W)  # output pixels an input pixel
        angle = uniform(B, -self.degrees, self.degrees, generator, x.device)
        free = torch.stack([T - scale * W, S - scale * H], dim=1)  # [B, 2] room left, (x, y)
        where = torch.stack([uniform(B, 0.0, 1.0, generator, x.device) for _ in range(2)], dim=1)
        centre = where * free + scale[:, None] * torch.tensor([W / 2, H / 2], device=x.device)
        mirror = torch.where(chosen(B, self.flip, generator, x.device), -1.0, 1.0)
        linear = rotation_shear(angle) / scale[:, None, None]
        linear = torch.stack([linear[:, 0] * mirror[:, None], linear[:, 1]], dim=1)
        if C == 3:
            x = torch.cat([x, x.new_full((B, 1, H, W), 255.0)], dim=1)
        if self.antialias:
            return mip_sample(x, linear, centre, self.size)
        return unpremultiply(affine_sample(premultiply(x), linear, centre, self.size))


def crop_resize(x: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut ``boxes`` float [4, B] (top, left, height, width) out of float [B, C, H, W] and resize them to ``size``."""
    top, left, height, width = boxes
    rows = resize_matrix(top, height, x.shape[2], size[0])
    cols = resize_matrix(left, width, x.shape[3], size[1])
    return unpremultiply(apply_separable(premultiply(x), rows, cols))


def rotation_shear(angle: Tensor, shear: Tensor | None = None) -> Tensor:
    """Inverse linear maps [B, 2, 2] (output offset -> input offset, (x, y) with y down) of torchvision's ``affine``.

    ``angle`` and ``shear`` (along x) in degrees, [B]; a positive angle turns the picture clockwise.
    """
    a = torch.deg2rad(angle)
    inverse = torch.stack([a.cos(), a.sin(), -a.sin(), a.cos()], dim=1).view(-1, 2, 2)
    if shear is None:
        return inverse
    s = torch.deg2rad(shear)
    upper = torch.stack([torch.ones_like(s), s.tan(), torch.zeros_like(s), torch.ones_like(s)], dim=1).view(-1, 2, 2)
    return upper @ inverse


def affine_sample(x: Tensor, linear: Tensor, centre: Tensor, size: tuple[int, int]) -> Tensor:
    """Sample float [B, C, H, W] bilinearly at ``linear @ (output pixel - centre) + image centre``; zeros outside.

    linear: [B, 2, 2]; centre: [B, 2], where the image's centre goes, in output pixels (x, y).
    """
    H, W = x.shape[-2:]
    S, T = size
    if len(x) == 0:
        return x.new_empty(0, x.shape[1], S, T)
    # align_corners=False coordinates: pixel p of n has 2 (p + 1/2) / n - 1, so that the image spans -1..1
    to_unit = torch.tensor([2.0 / W, 2.0 / H], device=x.device)
    to_pixels = torch.tensor([T / 2.0, S / 2.0], device=x.device)
    matrix = linear * to_unit[:, None] * to_pixels
    offset = (linear @ (to_pixels - centre)[:, :, None])[:, :, 0] * to_unit
    grid = F.affine_grid(torch.cat([matrix, offset[:, :, None]], dim=2), [len(x), 1, S, T], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def mip_sample(x: Tensor, linear: Tensor, centre: Tensor, size: tuple[int, int]) -> Tensor:
    """``affine_sample`` of RGBA (straight alpha in and out) without aliasing.

    An image reduced by 1.7 or more is sampled from a copy of half its size, by 3.4 or more from a quarter, and so on:
    a mip map of which each image uses one level.
    """
    reduction = torch.linalg.det(linear).abs().sqrt()  # input pixels an output pixel, along one side
    levels = (reduction.log2() + 0.25).floor().clamp(min=0).long()
    out = x.new_empty(len(x), 4, *size)
    for level in levels.unique().tolist():
        for picked in (levels == level).nonzero()[:, 0].split(32):  # a few images at a time stay in the cache
            reduced = reduce(premultiply(x[picked]), 2**level)
            kept = x.new_tensor([reduced.shape[3] / x.shape[3], reduced.shape[2] / x.shape[2]])
            sampled = affine_sample(reduced, linear[picked] * kept[:, None], centre[picked], size)
            out[picked] = unpremultiply(sampled)
    return out


def reduce(x: Tensor, factor: int) -> Tensor:
    """Float [B, C, H, W] resized to [B, C, ceil(H / factor), ceil(W / factor)], antialiased."""
    if factor == 1:
        return x
    H, W = x.shape[-2:]
    return apply_separable(x, whole_matrix(x, H, -(-H // factor)), whole_matrix(x, W, -(-W // factor)))
