# SPDX-License-Identifier: Apache-2.0
"""Images to tokens: patches, positions and prefix tokens in one call of ``ops.patch_embed``."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvm_fast import ops


def to_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """An int n as (n, n), a pair as a tuple."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _row(values: tuple[float, ...] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values)


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects each to a token.

    Args:
        img_size: side or (height, width) in pixels that is expected; None takes any size.
        patch_size: side of a patch in pixels.
        in_chans: channels of an image.
        embed_dim: width of a token.
        bias: whether the projection has one.
        strict_img_size: refuse images of another size than ``img_size``.
        dynamic_img_pad: pad the bottom and the right with zeros to whole patches.
        image_mean, image_std: per channel, for images in [0, 1]; needed for uint8 images, which are then normalised
            inside the op. Float images are taken as normalised already.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] | None = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = to_pair(patch_size)
        if self.patch_size[0] != self.patch_size[1]:
            raise ValueError(f"patch_size should be square, got {self.patch_size}")
        if (image_mean is None) != (image_std is None):
            raise ValueError(f"image_mean and image_std go together, got {image_mean} and {image_std}")
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.image_mean = None if image_mean is None else tuple(map(float, image_mean))
        self.image_std = None if image_std is None else tuple(map(float, image_std))
        self.register_buffer("mean", _row(self.image_mean), persistent=False)
        self.register_buffer("std", _row(self.image_std), persistent=False)
        self.set_input_size(img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias)

    def set_input_size(self, img_size: int | Sequence[int] | None) -> None:
        """Expects images of this side or (height, width) from now on."""
        self.img_size = None if img_size is None else to_pair(img_size)
        self.grid_size = None if img_size is None else self.feat_size(self.img_size)
        self.num_patches = None if img_size is None else self.grid_size[0] * self.grid_size[1]

    def feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of patches in an image of (height, width)."""
        p = self.patch_size[0]
        up = p - 1 if self.dynamic_img_pad else 0
        return (img_size[0] + up) // p, (img_size[1] + up) // p

    def forward(
        self,
        images: Tensor,
        pos_embed: Tensor | None = None,
        prefix_tokens: Tensor | None = None,
        ids_keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Embeds a batch.

        Args:
            images: [B, C, H, W], float (normalised) or uint8.
            pos_embed: [1, P + L, D] or, without rows for the prefix, [1, L, D].
            prefix_tokens: [P, D], put in front of the patches.
            ids_keep: [B, K], embeds these patches only.
            mask: [B, L] bool, where ``mask_token``, of D elements, stands in the place of the patch.

        Returns:
            [B, P + L, D], or [B, P + K, D] with ``ids_keep``.
        """
        self._check(images)
        mean, std = (self.mean, self.std) if images.dtype == torch.uint8 else (None, None)
        if self.dynamic_img_pad and self._padding(images) != (0, 0):
            images, mean, std = self._pad(images), None, None
        parameters = self.proj.weight, self.proj.bias, pos_embed, prefix_tokens
        return ops.patch_embed(images, *parameters, ids_keep, mean=mean, std=std, mask=mask, mask_token=mask_token)

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4:
            raise ValueError(
                f"PatchEmbed: images should be [B, C, H, W], got {images.ndim} dimensions {tuple(images.shape)}; "
                "add the batch to a single image with images[None]"
            )
        H, W = images.shape[-2:]
        if self.strict_img_size and self.img_size is not None and self.img_size != (H, W):
            raise ValueError(
                f"PatchEmbed: images should be {self.img_size[0]} x {self.img_size[1]}, got {H} x {W}; resize them, "
                "call set_input_size on the model, or build it with dynamic_img_size=True"
            )
        p = self.patch_size[0]
        if not self.dynamic_img_pad and (H % p or W % p):
            raise ValueError(
                f"PatchEmbed: height and width should be multiples of the patch size {p}, got {H} x {W}; "
                "resize the images or build the model with dynamic_img_pad=True"
            )
        if images.dtype == torch.uint8 and self.image_mean is None:
            raise ValueError(
                "PatchEmbed: uint8 images need a mean and a standard deviation; build the model with image_mean=... "
                "and image_std=..., or pass normalised float images"
            )

    def _padding(self, images: Tensor) -> tuple[int, int]:
        p = self.patch_size[0]
        return -images.shape[-2] % p, -images.shape[-1] % p

    def _pad(self, images: Tensor) -> Tensor:
        """Pads with the zeros of a normalised image, hence normalises uint8 images here instead of in the op."""
        if images.dtype == torch.uint8:
            images = (images.to(self.proj.weight.dtype) / 255 - self.mean[:, None, None]) / self.std[:, None, None]
        bottom, right = self._padding(images)
        return F.pad(images, (0, right, 0, bottom))
