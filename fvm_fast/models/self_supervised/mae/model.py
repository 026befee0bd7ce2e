# SPDX-License-Identifier: Apache-2.0
"""The masked autoencoder.

Three quarters of an image are hidden, the encoder sees the rest, and a small decoder paints the hidden pixels:

    keep, restore, mask = random masking of the patches
    z    = encoder(patches[keep] + pos)                        a Vision Transformer on a quarter of the tokens
    pred = decoder(restore(W z, mask_token) + decoder_pos)     all tokens again, narrower and shallower
    loss = mean over hidden patches of |pred - pixels|^2

Masked Autoencoders Are Scalable Vision Learners, https://arxiv.org/abs/2111.06377
State-dict names are those of the paper's code, so its checkpoints load as they are.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from fvm_fast import ops
from fvm_fast.layers.backbone import IMAGENET_MEAN, IMAGENET_STD
from fvm_fast.layers.block import Block
from fvm_fast.layers.pos_embed import resize_pos_embed
from fvm_fast.layers.sincos_pos_embed import sincos_pos_embed
from fvm_fast.layers.vision_transformer import VisionTransformer

_DECODER_PARTS = ("decoder_embed", "mask_token", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred")


class MaskedAutoencoderViT(VisionTransformer):
    """Masked autoencoder with a Vision Transformer as encoder: ``loss, pred, mask = mae(images)``.

    The encoder is a ``VisionTransformer`` without a head, and everything that it offers works on whole images:
    ``forward_features``, ``forward_intermediates``, ``set_input_size``, ``set_grad_checkpointing``. To fine-tune, load
    the weights of a masked autoencoder into a ``VisionTransformer``: ``load_weights`` takes what is the encoder's.

    Args:
        img_size: side or (height, width) of the images in pixels.
        patch_size: side of a patch in pixels.
        in_chans: channels of an image.
        embed_dim, depth, num_heads: width, blocks and heads of the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: those of the decoder.
        mlp_ratio: hidden width of every MLP over the width of its tokens.
        norm_pix_loss: predict pixels normalised within each patch, which the paper found to give better features.
        mask_ratio: share of the patches to hide; ``forward`` may override it.
        qkv_bias, norm_layer, act_layer, norm_eps, pos_embed_resize, image_mean, image_std: as ``VisionTransformer``'s,
            for encoder and decoder.
        weight_init: ``""`` for the paper's initialisation, ``skip`` to leave torch's.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
        mask_ratio: float = 0.75,
        *,
        qkv_bias: bool = True,
        norm_layer: Callable[[int], nn.Module] | None = None,
        act_layer: str | Callable[[], nn.Module] | None = None,
        norm_eps: float = 1e-6,
        pos_embed_resize: str = "timm",
        weight_init: str = "",
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        if not 0.0 <= mask_ratio <= 1.0:
            raise ValueError(f"mask_ratio should be in [0, 1], got {mask_ratio}")
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=norm_eps)
        shared = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "norm_layer": norm_layer, "act_layer": act_layer}
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            num_classes=0,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            pos_embed_resize=pos_embed_resize,
            weight_init="skip",
            image_mean=image_mean,
            image_std=image_std,
            **shared,
        )
        self.norm_pix_loss = norm_pix_loss
        self.mask_ratio = mask_ratio
        self.pos_embed = _fixed_positions(embed_dim, self.patch_embed.grid_size)

        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = _fixed_positions(decoder_embed_dim, self.patch_embed.grid_size)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.decoder_blocks = nn.Sequential(
            *(Block(decoder_embed_dim, decoder_num_heads, **shared) for _ in range(decoder_depth))
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        if weight_init != "skip":
            self.init_weights()

    def init_weights(self) -> None:
        """Xavier for every Linear, the patch projection taken as one; normal of deviation 0.02 for the two tokens."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.detach().flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        images: Tensor,
        mask_ratio: float | None = None,
        *,
        noise: Tensor | None = None,
        generator: Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hides patches, paints them, and compares.

        Args:
            images: [B, C, H, W], float and normalised; or uint8 when the model has ``image_mean`` and ``image_std``,
                and then the pixels to predict are normalised in the same way.
            mask_ratio: instead of the model's own.
            noise: [B, L] that orders the patches: those with the smallest are kept. Drawn from ``generator`` if None.
            generator: source of the noise, on the device of the images; torch's default if None.

        Returns:
            loss (0-d, at least float32), pred [B, L, p * p * C] (``unpatchify`` makes images of it) and mask [B, L]
            float32 (0 kept, 1 hidden).

        Raises:
            ValueError: ``mask_ratio`` hides no patch, so that there is nothing to predict.
        """
        latent, mask, ids_restore = self.forward_encoder(images, mask_ratio, noise=noise, generator=generator)
        num_patches = ids_restore.shape[1]
        if latent.shape[1] - 1 == num_patches:
            ratio = self.mask_ratio if mask_ratio is None else mask_ratio
            raise ValueError(
                f"mask_ratio should hide one patch or more of {num_patches}, got {ratio}, which hides none; "
                "for features of whole images call forward_features"
            )
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(images, pred, mask), pred, mask

    def forward_encoder(
        self,
        images: Tensor,
        mask_ratio: float | None = None,
        *,
        noise: Tensor | None = None,
        generator: Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, C, H, W] -> tokens [B, 1 + K, D] of the kept patches, mask [B, L] and ids_restore [B, L]."""
        rows, columns = self.patch_embed.feat_size(images.shape[-2:])
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        ids_keep, ids_restore, mask = ops.random_masking(
            images.shape[0], rows * columns, ratio, generator=generator, device=images.device, noise=noise
        )
        x = self.embed(images, ids_keep)
        for block in self.blocks:
            x = self.run_block(block, x)
        return self.norm(x), mask, ids_restore

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Tokens [B, 1 + K, D] and ids_restore [B, L] -> predicted pixels [B, L, p * p * C]."""
        x = ops.restore_tokens(
            self.decoder_embed(latent), ids_restore, self.mask_token, self.decoder_pos_embed, num_prefix_tokens=1
        )
        for block in self.decoder_blocks:
            x = self.run_block(block, x)
        return self.decoder_pred(self.decoder_norm(x[:, 1:]))

    def forward_loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Squared error of the hidden patches (``mask`` 1), averaged over their pixels; 0-d, at least float32."""
        wide = torch.promote_types(pred.dtype, torch.float32)
        error = F.mse_loss(pred.to(wide), self.target(images).to(wide), reduction="none").mean(dim=-1)  # [B, L]
        return (error * mask).sum() / mask.sum()

    def target(self, images: Tensor) -> Tensor:
        """What the decoder should predict: [B, C, H, W] -> [B, L, p * p * C]."""
        pixels = self.patchify(images)
        if pixels.dtype == torch.uint8:
            pixels = self._normalise(pixels)
        if not self.norm_pix_loss:
            return pixels
        variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)  # unbiased
        return (pixels - mean) / (variance + 1e-6).sqrt()

    def patchify(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, L, p * p * C]: patches row by row, in each its pixels row by row, channels last."""
        p = self.patch_embed.patch_size[0]
        x = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, C, rows, p, columns, p]
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, pixels: Tensor) -> Tensor:
        """[B, L, p * p * C] -> [B, C, H, W], back from ``patchify``."""
        p, grid = self.patch_embed.patch_size[0], self.patch_embed.grid_size
        x = pixels.unflatten(2, (p, p, -1)).unflatten(1, grid)  # [B, rows, columns, p, p, C]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [..., p * p * C] as ``patch_embed`` normalises them, in one pass."""
        mean, std = self.patch_embed.mean, self.patch_embed.std
        wide = torch.promote_types(mean.dtype, torch.float32)
        mean, std = mean.to(wide), std.to(wide)
        pixels = pixels.to(wide).unflatten(-1, (-1, len(mean)))
        return torch.addcmul(-mean / std, pixels, 1 / (255 * std)).flatten(-2)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Takes images of another side or (height, width) from now on; both tables of positions are resized."""
        old_grid = self.patch_embed.grid_size
        super().set_input_size(img_size)
        resized = resize_pos_embed(
            self.decoder_pos_embed, self.patch_embed.grid_size, old_grid=old_grid, rule=self.pos_embed_resize
        )
        self.decoder_pos_embed = nn.Parameter(resized, requires_grad=False)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As ``VisionTransformer``'s; the decoder goes with the head."""
        if prune_head:
            for name in _DECODER_PARTS:
                delattr(self, name)
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimiser should not decay, beside biases and norms."""
        return super().no_weight_decay() | {"mask_token", "decoder_pos_embed"}


def _fixed_positions(embed_dim: int, grid: tuple[int, int]) -> nn.Parameter:
    return nn.Parameter(sincos_pos_embed(embed_dim, grid, num_prefix_tokens=1), requires_grad=False)


def _mae(overrides: dict[str, Any], **sizes: Any) -> MaskedAutoencoderViT:
    if overrides.get("in_chans", 3) == 3:
        sizes = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD} | sizes
    return MaskedAutoencoderViT(**sizes | overrides)


def mae_vit_test_patch8(**kwargs: Any) -> MaskedAutoencoderViT:
    """A size for tests and laptops: 64 px, 0.24 M parameters."""
    encoder = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}
    return _mae(kwargs, **encoder, decoder_embed_dim=48, decoder_depth=2, decoder_num_heads=4)


def mae_vit_base_patch16(**kwargs: Any) -> MaskedAutoencoderViT:
    """ViT-B/16, 224 px: 85.8 M parameters and 26.1 M in the decoder."""
    return _mae(kwargs, patch_size=16, embed_dim=768, depth=12, num_heads=12)


def mae_vit_large_patch16(**kwargs: Any) -> MaskedAutoencoderViT:
    """ViT-L/16, 224 px: 303.3 M parameters and 26.2 M in the decoder."""
    return _mae(kwargs, patch_size=16, embed_dim=1024, depth=24, num_heads=16)


def mae_vit_huge_patch14(**kwargs: Any) -> MaskedAutoencoderViT:
    """ViT-H/14, 224 px: 630.8 M parameters and 26.3 M in the decoder."""
    return _mae(kwargs, patch_size=14, embed_dim=1280, depth=32, num_heads=16)
