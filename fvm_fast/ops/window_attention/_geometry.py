# SPDX-License-Identifier: Apache-2.0
"""A map cut into windows by roll and pad, and put together again: what the kernels do with indices."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Geometry(NamedTuple):
    """Windows of a map, each of N tokens; all pairs are (vertical, horizontal).

    Attributes:
        size: of the map, H x W.
        window: wh x ww, of any size: a map is padded to whole windows.
        shift: how far the map is rolled up and to the left.
        pad_first: pad, then roll the padded map (torchvision); else roll the map, then pad (timm).
    """

    size: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]
    pad_first: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        (H, W), (wh, ww) = self.size, self.window
        return -(-H // wh), -(-W // ww)

    @property
    def padded(self) -> tuple[int, int]:
        """Size of the padded map."""
        return self.grid[0] * self.window[0], self.grid[1] * self.window[1]

    def cut(self, x: Tensor, pad: Tensor | None) -> Tensor:
        """[B, H, W, channels] as [B, windows, N, channels], with ``pad`` [channels] or zeros outside the map."""
        up_left = (-self.shift[0], -self.shift[1])
        x = _roll(self._pad(x, pad), up_left) if self.pad_first else self._pad(_roll(x, up_left), pad)
        (B, _, _, channels), (rows, columns), (wh, ww) = x.shape, self.grid, self.window
        x = x.reshape(B, rows, wh, columns, ww, channels).transpose(2, 3)
        return x.reshape(B, rows * columns, wh * ww, channels)

    def join(self, windows: Tensor) -> Tensor:
        """The inverse of :meth:`cut`: [B, windows, N, channels] as [B, H, W, channels]; what was padded is dropped."""
        (B, _, _, channels), (H, W), (rows, columns), (wh, ww) = windows.shape, self.size, self.grid, self.window
        x = windows.reshape(B, rows, columns, wh, ww, channels).transpose(2, 3).reshape(B, *self.padded, channels)
        x = _roll(x, self.shift)[:, :H, :W] if self.pad_first else _roll(x[:, :H, :W], self.shift)
        return x.contiguous()

    def apart(self, device: torch.device) -> Tensor:
        """[windows, N, N] bool: pairs that only the roll brought together, from opposite borders of the padded map."""
        vertical, horizontal = (
            _regions(length, w, s, device) for length, w, s in zip(self.padded, self.window, self.shift, strict=True)
        )
        regions = (3 * vertical[:, None] + horizontal)[None, ..., None]  # [1, Hp, Wp, 1]
        regions = self._replace(size=self.padded, shift=(0, 0)).cut(regions, None)[0, ..., 0]  # [windows, N]
        return regions[:, :, None] != regions[:, None, :]

    def _pad(self, x: Tensor, pad: Tensor | None) -> Tensor:
        (H, W), (Hp, Wp) = self.size, self.padded
        x = F.pad(x, (0, 0, 0, Wp - W, 0, Hp - H))
        if pad is None:
            return x
        outside = torch.ones(Hp, Wp, 1, dtype=torch.bool, device=x.device)
        outside[:H, :W] = False
        return torch.where(outside, pad.to(x.dtype), x)


def _roll(x: Tensor, by: tuple[int, int]) -> Tensor:
    return x if by == (0, 0) else x.roll(by, dims=(1, 2))


def _regions(length: int, window: int, shift: int, device: torch.device) -> Tensor:
    """[length]: the region of each rolled coordinate; 1 and 2 share the last window, 2 came from the other border."""
    place = torch.arange(length, device=device)
    if shift == 0:
        return torch.zeros_like(place)
    return (place >= length - window).long() + (place >= length - shift).long()
