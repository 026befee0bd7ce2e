# SPDX-License-Identifier: Apache-2.0
"""Colour: jitter, greyscale, and laying RGBA on a background. Alpha, where present, passes through unchanged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fvm_fast.data.transforms.base import Transform, check_probability, chosen, uniform

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, the weights of torchvision and Pillow's "L"


class Composite(Transform):
    """Lay RGBA images on a background and drop the alpha: [B, 4, H, W] -> [B, 3, H, W]. RGB passes unchanged.

    background: ``"white"``, ``"random"`` (one uniform colour an image) or an (r, g, b) in 0..255.
    white_share: probability that an image's random background is white instead.
    """

    def __init__(self, background: str | Sequence[float] = "white", white_share: float = 0.0) -> None:
        named = isinstance(background, str) and background in ("white", "random")
        if not named and (isinstance(background, str) or len(background) != 3):
            raise ValueError(f"Composite: background should be 'white', 'random' or (r, g, b), got {background!r}")
        self.background = background
        self.white_share = check_probability("Composite", white_share)

    def colours(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """The backgrounds, float [n or 1, 3, 1, 1]."""
        if self.background == "random":
            random = uniform(3 * n, 0.0, 255.0, generator, device).view(n, 3, 1, 1)
            if not self.white_share:
                return random
            white = chosen(n, self.white_share, generator, device)[:, None, None, None]
            return torch.where(white, 255.0, random)
        colour = (255.0, 255.0, 255.0) if self.background == "white" else self.background
        return torch.tensor(colour, dtype=torch.float32, device=device).view(1, 3, 1, 1)

    def apply(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        colours = self.colours(len(x), generator, x.device)
        if x.shape[1] == 3:
            return x
        return torch.lerp(colours, x[:, :3], x[:, 3:] / 255.0)


class RandomGrayscale(Transform):
    """Replace colours by their luma with probability ``p`` an image; three channels stay."""

    def __init__(self, p: float = 0.1) -> None:
        self.p = check_probability("RandomGrayscale", p)

    def apply(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        gray = chosen(len(x), self.p, generator, x.device)[:, None, None, None]
        return _with_rgb(x, torch.where(gray, luma(x), x[:, :3]))


class ColorJitter(Transform):
    """Random brightness, contrast, saturation (factors in 1 +- value) and hue (turns, +- value) for each image.

    The four steps come in an order drawn once a batch. ``p``: probability that an image is jittered at all.
    """

    def __init__(
        self,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        p: float = 1.0,
    ) -> None:
        if min(brightness, contrast, saturation) < 0 or not 0 <= hue <= 0.5:
            raise ValueError(
                "ColorJitter: brightness, contrast and saturation should be >= 0 and hue in [0, 0.5], got "
                f"{(brightness, contrast, saturation, hue)}"
            )
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue
        self.p = check_probability("ColorJitter", p)

    def apply(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        n, device = len(x), x.device
        jittered = chosen(n, self.p, generator, device)
        rgb = x[:, :3]
        order = torch.rand(4, generator=generator, device=generator.device if generator is not None else "cpu")
        for step in order.argsort().tolist():
            function, amount, neutral = (
                (adjust_brightness, self.brightness, 1.0),
                (adjust_contrast, self.contrast, 1.0),
                (adjust_saturation, self.saturation, 1.0),
                (adjust_hue, self.hue, 0.0),
            )[step]
            if amount > 0:
                low = neutral - amount if neutral == 0.0 else max(neutral - amount, 0.0)
                drawn = uniform(n, low, neutral + amount, generator, device)
                rgb = function(rgb, torch.where(jittered, drawn, neutral))
        return _with_rgb(x, rgb)


def luma(x: Tensor) -> Tensor:
    """Grey [B, 1, H, W] of RGB [B, 3+, H, W]."""
    return LUMA[0] * x[:, 0:1] + LUMA[1] * x[:, 1:2] + LUMA[2] * x[:, 2:3]


def adjust_brightness(rgb: Tensor, factor: Tensor) -> Tensor:
    """``factor [B] * rgb``, cut to 0..255."""
    return (rgb * factor[:, None, None, None]).clamp_(0.0, 255.0)


def adjust_contrast(rgb: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean grey: 0 is flat, 1 the image."""
    mean = luma(rgb).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, rgb, factor[:, None, None, None]).clamp_(0.0, 255.0)


def adjust_saturation(rgb: Tensor, factor: Tensor) -> Tensor:
    """Blend with each pixel's grey: 0 is grey, 1 the image."""
    return torch.lerp(luma(rgb), rgb, factor[:, None, None, None]).clamp_(0.0, 255.0)


def adjust_hue(rgb: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by ``shift [B]`` turns in HSV space; value and saturation stay.

    With the hue h in sixths of a turn, a channel is ``value - chroma * (1 - f)``, where f is ``|h - 3| - 1`` for red,
    ``2 - |h - 2|`` for green and ``2 - |h - 4|`` for blue, cut to 0..1.
    """
    r, g, b = rgb.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    unit = 1 / chroma.clamp(min=1e-6)
    h = torch.where(value == r, (g - b) * unit, torch.where(value == g, (b - r) * unit + 2.0, (r - g) * unit + 4.0))
    h = (h + 6.0 * shift[:, None, None]).remainder_(6.0)
    red = (h - 3.0).abs_().sub_(1.0)
    green = 2.0 - (h - 2.0).abs_()
    blue = 2.0 - (h - 4.0).abs_()
    out = torch.stack([red, green, blue], dim=1).clamp_(0.0, 1.0).sub_(1.0)
    return out.mul_(chroma[:, None]).add_(value[:, None])


def _with_rgb(x: Tensor, rgb: Tensor) -> Tensor:
    """``x`` with its colours replaced and its alpha, if any, kept."""
    return rgb if x.shape[1] == 3 else torch.cat([rgb, x[:, 3:]], dim=1)
