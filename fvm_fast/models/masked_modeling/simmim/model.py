# SPDX-License-Identifier: Apache-2.0
"""SimMIM: hide random squares of an image, and read the pixels that were there from the encoder's map with one layer.

    z    = encoder(images, mask)                                       hidden patches are the mask token
    pred = PixelShuffle(W z)                                           the whole decoder: a 1 x 1 convolution
    loss = sum over hidden pixels of |pred - pixels| / (their number + 1e-5) / C

SimMIM: a Simple Framework for Masked Image Modeling, https://arxiv.org/abs/2111.09886
State-dict names are those of the paper's code (``encoder.*``, ``decoder.0.*``).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fvm_fast.layers.backbone import IMAGENET_MEAN, IMAGENET_STD
from fvm_fast.models.masked_modeling.simmim.encoders import SwinTransformerForSimMIM, VisionTransformerForSimMIM


class SimMIM(nn.Module):
    """An encoder and the layer that paints hidden pixels: ``loss, pred = simmim(images, mask)``.

    ``forward_features``, ``forward_intermediates``, ``set_input_size`` and ``set_grad_checkpointing`` are those of the
    encoder. To fine-tune, load the weights into a ``SwinTransformer`` or a ``Beit``: ``load_weights`` takes the
    encoder's.

    Args:
        encoder: maps (images, mask [B, rows, columns] bool) to a map [B, num_features, H / stride, W / stride], and has
            ``patch_embed``, ``feature_info``, ``num_features`` and ``in_chans``.
        encoder_stride: pixels of the image per cell of that map, along a side; None asks the encoder.
        in_chans: channels of an image; None asks the encoder.

    Raises:
        ValueError: the encoder has another stride or other channels.
    """

    def __init__(self, encoder: nn.Module, encoder_stride: int | None = None, in_chans: int | None = None) -> None:
        super().__init__()
        stride = encoder.feature_info[-1]["reduction"]
        encoder_stride = stride if encoder_stride is None else encoder_stride
        in_chans = encoder.in_chans if in_chans is None else in_chans
        if (encoder_stride, in_chans) != (stride, encoder.in_chans):
            raise ValueError(
                f"SimMIM: the encoder has encoder_stride={stride} and in_chans={encoder.in_chans}, got "
                f"{encoder_stride} and {in_chans}; leave them out to take the encoder's"
            )
        self.encoder = encoder
        self.encoder_stride = encoder_stride
        self.in_chans = in_chans
        self.decoder = nn.Sequential(
            nn.Conv2d(encoder.num_features, encoder_stride**2 * in_chans, kernel_size=1),
            nn.PixelShuffle(encoder_stride),
        )

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Paints the hidden patches, and compares.

        Args:
            images: [B, C, H, W], float and normalised; or uint8 when the encoder has ``image_mean`` and ``image_std``,
                and then the pixels to predict are normalised in the same way.
            mask: [B, L] or [B, rows, columns], 1 or true where a patch of the encoder is hidden.

        Returns:
            loss (0-d, at least float32; 0 where nothing is hidden) and pred [B, C, H, W], normalised like the input.

        Raises:
            ValueError: the mask is of another shape, or the encoder's stride does not divide the images.
        """
        mask = self._grid(images, mask)
        pred = self.reconstruct(images, mask)
        return self.forward_loss(images, pred, mask), pred

    def reconstruct(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, C, H, W] and a mask as in ``forward``, or None to hide nothing -> predicted pixels [B, C, H, W]."""
        mask = None if mask is None else self._grid(images, mask)
        pred = self.decoder(self.encoder(images, mask))
        if pred.shape[2:] != images.shape[2:]:
            stride, (H, W) = self.encoder_stride, images.shape[2:]
            raise ValueError(
                f"SimMIM: height and width should be multiples of encoder_stride {stride}, got {H} x {W}; resize the "
                "images"
            )
        return pred

    def forward_loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Absolute error of the hidden patches, averaged over their pixels; 0-d, at least float32."""
        wide, p = torch.promote_types(pred.dtype, torch.float32), self.patch_embed.patch_size[0]
        mask = self._grid(images, mask)
        hidden = mask.repeat_interleave(p, 1).repeat_interleave(p, 2)[:, None]  # [B, 1, H, W]
        error = (pred.to(wide) - self.target(images).to(wide)).abs()
        return (error * hidden).sum() / ((mask.sum() * p**2).to(wide) + 1e-5) / self.in_chans

    def target(self, images: Tensor) -> Tensor:
        """What the decoder should predict: the images, normalised if they are uint8."""
        if images.dtype != torch.uint8:
            return images
        mean, std = (row[:, None, None] for row in (self.patch_embed.mean, self.patch_embed.std))
        wide = torch.promote_types(mean.dtype, torch.float32)
        return (images.to(wide) / 255 - mean.to(wide)) / std.to(wide)

    def _grid(self, images: Tensor, mask: Tensor) -> Tensor:
        """A mask as [B, rows, columns] bool."""
        grid = self.patch_embed.feat_size(images.shape[-2:])
        shape = (images.shape[0], *grid)
        if mask.shape == (shape[0], grid[0] * grid[1]):
            mask = mask.unflatten(1, grid)
        if mask.shape != shape:
            raise ValueError(
                f"SimMIM: mask should be {list(shape)} or {[shape[0], grid[0] * grid[1]]}, one value a patch of the "
                f"encoder, got {list(mask.shape)}"
            )
        return mask.bool()

    # ---- the encoder's, on whole images

    @property
    def patch_embed(self) -> nn.Module:
        """The encoder's, which knows the images' size and statistics."""
        return self.encoder.patch_embed

    def forward_features(self, images: Tensor) -> Tensor:
        """What the encoder makes of whole images: a map of Swin, tokens of a Vision Transformer."""
        return self.encoder.forward_features(images)

    def forward_intermediates(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The encoder's maps after chosen blocks or stages, of whole images."""
        return self.encoder.forward_intermediates(images, *args, **kwargs)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As the encoder's; mask token and decoder go with the head."""
        if prune_head:
            del self.decoder
        return self.encoder.prune_intermediate_layers(indices, prune_norm, prune_head)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.encoder.set_grad_checkpointing(enable)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Takes images of another side or (height, width) from now on; the encoder's tables are resized."""
        self.encoder.set_input_size(img_size)

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimiser should not decay, beside biases and norms."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    @property
    def default_out_indices(self) -> int:
        """How many last maps ``features_only`` gives if not told."""
        return self.encoder.default_out_indices

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Name, channels and stride of the map after each block or stage."""
        return [info | {"module": f"encoder.{info['module']}"} for info in self.encoder.feature_info]

    @property
    def default_cfg(self) -> dict[str, Any]:
        """What the data pipeline should know, under timm's keys."""
        return self.encoder.default_cfg | {"first_conv": "encoder.patch_embed.proj", "classifier": None}

    @property
    def numerics(self) -> dict[str, Any]:
        """What must match for equal weights to give equal outputs; it travels with exported weights."""
        return self.encoder.numerics


def _simmim(encoder: type[nn.Module], overrides: dict[str, Any], **sizes: Any) -> SimMIM:
    if overrides.get("in_chans", 3) == 3:
        sizes = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD} | sizes
    return SimMIM(encoder(**{"drop_path_rate": 0.0} | sizes | overrides))


def simmim_swin_test(**kwargs: Any) -> SimMIM:
    """A size for tests and laptops: 64 px, three stages, 0.2 M parameters."""
    sizes = {"img_size": 64, "embed_dim": 16, "depths": (2, 2, 2), "num_heads": (1, 2, 4), "window_size": 4}
    return _simmim(SwinTransformerForSimMIM, kwargs, **sizes)


def simmim_swin_base_192(**kwargs: Any) -> SimMIM:
    """Swin-B, 192 px, windows of 6, 89.9 M parameters."""
    sizes = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    return _simmim(SwinTransformerForSimMIM, kwargs, img_size=192, window_size=6, **sizes)


def simmim_vit_test(**kwargs: Any) -> SimMIM:
    """A size for tests and laptops: 64 px, 0.2 M parameters."""
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}
    return _simmim(VisionTransformerForSimMIM, kwargs, **sizes)


def simmim_vit_base_patch16_224(**kwargs: Any) -> SimMIM:
    """ViT-B/16, 224 px, 86.3 M parameters."""
    return _simmim(VisionTransformerForSimMIM, kwargs, embed_dim=768, depth=12, num_heads=12)
