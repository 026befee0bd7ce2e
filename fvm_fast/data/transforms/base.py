# SPDX-License-Identifier: Apache-2.0
"""What a transform is: a function of a uint8 batch and a generator, and how several become one.

A transform works on float images in 0..255 (``apply``); rounding to uint8 happens once, at the end of a call. So a
``Compose`` of ten geometry and colour transforms rounds once too. Random parameters are drawn per image from the
generator given, on its device, in the order of the transforms: the same generator state gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fvm_fast.data.transforms.separable import to_uint8


class Transform:
    """Base of all transforms: ``t(images, generator=None)``.

    images: uint8 [B, C, H, W]. Returns uint8 [B, C', H', W'], or float32 for those that end in floats (``ToFloat``,
    ``Normalize``). Without a generator torch's default one is used.
    """

    returns_float = False

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise ValueError(
                f"{type(self).__name__}: images should be uint8 [B, C, H, W], got {images.dtype} "
                f"{tuple(images.shape)}" + ("; add the batch with images[None]" if images.ndim == 3 else "")
            )
        x = self.apply(images.to(torch.float32), generator)
        return x if self.returns_float else to_uint8(x)

    def apply(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Map float [B, C, H, W] in 0..255 to the same, without changing ``x`` in place."""
        raise TypeError(f"{type(self).__name__} should define apply(x, generator)")

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


class Compose(Transform):
    """Transforms in a row. Any callable ``f(uint8 batch) -> uint8 batch`` may stand among them (torchvision's do)."""

    def __init__(self, transforms: Sequence[Transform | Callable[[Tensor], Tensor]]) -> None:
        self.transforms = list(transforms)
        floats = [getattr(transform, "returns_float", False) for transform in self.transforms]
        if any(floats[:-1]):
            last = self.transforms[floats.index(True)]
            raise ValueError(f"Compose: {last!r} returns floats, so it should be the last of the transforms")
        self.returns_float = any(floats)

    def apply(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        for transform in self.transforms:
            if isinstance(transform, Transform):
                x = transform.apply(x, generator)
            else:
                x = transform(to_uint8(x)).to(torch.float32)
        return x


class ToFloat(Transform):
    """uint8 to float32 in 0..1."""

    returns_float = True

    def apply(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        return x / 255.0


class Normalize(Transform):
    """``(x / 255 - mean) / std`` per channel, as float32."""

    returns_float = True

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(mean), tuple(std)
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError(f"Normalize: expected as many means as positive stds, got {self.mean} and {self.std}")

    def apply(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if x.shape[1] != len(self.mean):
            raise ValueError(f"Normalize: expected {len(self.mean)} channels, got images {tuple(x.shape)}")
        scale = 1 / (255 * torch.tensor(self.std, device=x.device))
        shift = -torch.tensor(self.mean, device=x.device) / torch.tensor(self.std, device=x.device)
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None])


def uniform(n: int, low: float, high: float, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """``n`` uniform floats in [low, high), drawn on the generator's device and moved to ``device``."""
    source = generator.device if generator is not None else "cpu"
    return (torch.rand(n, generator=generator, device=source) * (high - low) + low).to(device)


def chosen(n: int, p: float, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A bool [n], each true with probability ``p``."""
    return uniform(n, 0.0, 1.0, generator, device) < p


def check_probability(owner: str, p: float) -> float:
    """``p`` if it lies in 0..1; ValueError otherwise."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{owner}: p should be a probability in [0, 1], got {p!r}")
    return p


def as_pair(owner: str, size: int | Sequence[int]) -> tuple[int, int]:
    """``size`` as (height, width); ValueError unless both are positive."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{owner}: size should be a positive int or (height, width), got {size!r}")
    return pair


def as_range(owner: str, name: str, value: Sequence[float], low: float = 0.0) -> tuple[float, float]:
    """``value`` as (low, high) with low <= high; ValueError otherwise."""
    bounds = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(bounds) != 2 or not low <= bounds[0] <= bounds[1]:
        raise ValueError(f"{owner}: {name} should be (low, high) with {low} <= low <= high, got {value!r}")
    return bounds
