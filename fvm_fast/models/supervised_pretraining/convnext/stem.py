# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt's stems: an image to the first map, a quarter as high and as wide."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fvm_fast import ops
from fvm_fast.layers.image_normalize import ImageNormalize

STEMS = ("patch", "overlap", "overlap_tiered", "overlap_act")


class PatchStem(nn.Sequential):
    """Patches of the image, each projected and normed: a convolution whose stride is its kernel.

    Args:
        in_chans, dim: channels before and after.
        patch_size: side of a patch in pixels.
        bias: whether the projection has one.
        norm_layer: constructor of a norm over the last dimension.
    """

    def __init__(
        self, in_chans: int, dim: int, patch_size: int, bias: bool, norm_layer: Callable[[int], nn.Module]
    ) -> None:
        super().__init__(nn.Conv2d(in_chans, dim, patch_size, patch_size, bias=bias), norm_layer(dim))
        self.stride = patch_size

    def forward(self, images: Tensor, normalize: ImageNormalize) -> Tensor:
        """[B, in_chans, H, W] -> [B, dim, H / patch_size, W / patch_size], rounded down; uint8 is normalised inside."""
        (proj, norm), p = self, self.stride
        mean, std = normalize.statistics(images)
        rows, columns = images.shape[2] // p, images.shape[3] // p
        tokens = ops.patch_embed(images[..., : rows * p, : columns * p], proj.weight, proj.bias, mean=mean, std=std)
        return norm(tokens).unflatten(1, (rows, columns)).permute(0, 3, 1, 2)


class OverlapStem(nn.Sequential):
    """Two 3 x 3 convolutions of stride 2, then the norm.

    Args:
        in_chans, dim: channels before and after.
        stem_type: ``overlap``, ``overlap_tiered`` or ``overlap_act``.
        bias: whether the convolutions have one.
        act_layer: activation of ``overlap_act``.
        norm_layer: constructor of a norm over the last dimension.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        stem_type: str,
        bias: bool,
        act_layer: Callable[[], nn.Module],
        norm_layer: Callable[[int], nn.Module],
    ) -> None:
        middle = _half_in_eights(dim) if stem_type == "overlap_tiered" else dim
        super().__init__(
            nn.Conv2d(in_chans, middle, 3, 2, 1, bias=bias),
            *([act_layer()] if stem_type == "overlap_act" else []),
            nn.Conv2d(middle, dim, 3, 2, 1, bias=bias),
            norm_layer(dim),
        )
        self.stride = 4

    def forward(self, images: Tensor, normalize: ImageNormalize) -> Tensor:
        """[B, in_chans, H, W] -> [B, dim, H / 4, W / 4], rounded up."""
        *convolutions, norm = self
        x = normalize(images).contiguous(memory_format=torch.channels_last)
        for layer in convolutions:
            x = layer(x)
        return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _half_in_eights(dim: int) -> int:
    """About half of ``dim``: the nearest multiple of 8, one more where that would lose over a tenth."""
    half = dim // 2
    nearest = max(8, (half + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * half else nearest
