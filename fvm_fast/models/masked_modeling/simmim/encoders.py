# SPDX-License-Identifier: Apache-2.0
"""The networks that SimMIM pretrains: Swin, and BEiT's Vision Transformer, with a token in the place of hidden patches.

    x_i = mask_token if patch i is hidden, else embed(patch i)          then all patches go through all blocks

Nothing is left out, as a masked autoencoder would: windows need their whole map. Given (images, mask), each encoder
returns its last map [B, num_features, rows, columns]; given images alone, the map of the whole image.

SimMIM: a Simple Framework for Masked Image Modeling, https://arxiv.org/abs/2111.09886, section 3.2
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fvm_fast.layers.relative_position_attention import RelativePositionBias, RelativePositionBlock, rescale_blocks
from fvm_fast.layers.swin_transformer import SwinTransformer
from fvm_fast.layers.vision_transformer import VisionTransformer

INIT_STD = 0.02


class SwinTransformerForSimMIM(SwinTransformer):
    """Swin Transformer without a head, with a mask token that takes its place after the norm of the patches.

    Args:
        **kwargs: ``layers.SwinTransformer``'s, except for the classes.
    """

    def __init__(self, *, weight_init: str = "", **kwargs: Any) -> None:
        super().__init__(num_classes=0, weight_init=weight_init, **kwargs)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        if weight_init != "skip":
            nn.init.trunc_normal_(self.mask_token, std=INIT_STD)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, C, H, W] and which patches to hide [B, rows, columns] bool -> [B, num_features, H / 32, W / 32]."""
        x = self.embed(images)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        return self.forward_stages(x).permute(0, 3, 1, 2)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As ``SwinTransformer``'s; the mask token goes with the head."""
        if prune_head:
            del self.mask_token
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimiser should not decay, beside biases and norms."""
        return super().no_weight_decay() | {"mask_token"}


class VisionTransformerForSimMIM(VisionTransformer):
    """BEiT's Vision Transformer: one table of relative positions for all blocks, LayerScale, no absolute positions.

    Args:
        img_size, patch_size, in_chans: images of this side or (height, width), their patches and channels.
        embed_dim, depth, num_heads, mlp_ratio: width of a token, blocks, heads, hidden width over ``embed_dim``.
        qkv_bias: whether query and value have a bias; the key has none.
        init_values: initial LayerScale; None leaves LayerScale out.
        proj_drop_rate, attn_drop_rate, drop_path_rate: dropout after attention and MLP, of the attention
            probabilities, and stochastic depth of the last block, rising linearly from 0 at the first.
        norm_layer, act_layer, norm_eps, image_mean, image_std: as ``layers.VisionTransformer``'s.
        weight_init: ``""`` for the paper's initialisation, ``skip`` to leave torch's.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = 0.1,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] | None = None,
        act_layer: str | Callable[[], nn.Module] | None = None,
        norm_eps: float = 1e-6,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        weight_init: str = "",
    ) -> None:
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=norm_eps)
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            num_classes=0,
            embed_dim=embed_dim,
            depth=0,  # the blocks are of another kind
            num_heads=num_heads,
            pos_embed="none",
            norm_layer=norm_layer,
            image_mean=image_mean,
            image_std=image_std,
            weight_init="skip",
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.rel_pos_bias = RelativePositionBias(self.patch_embed.grid_size, num_heads)
        self.blocks = nn.Sequential(
            *(
                RelativePositionBlock(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias,
                    proj_drop_rate,
                    attn_drop_rate,
                    drop_path,
                    init_values,
                    act_layer,
                    norm_layer,
                )
                for drop_path in torch.linspace(0.0, drop_path_rate, depth, device="cpu").tolist()
            )
        )
        if weight_init != "skip":
            self.init_weights()

    def init_weights(self) -> None:
        """All within [-0.02, 0.02]; what block l adds to its input is divided by sqrt(2 l)."""
        within = partial(nn.init.trunc_normal_, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                within(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        within(self.cls_token)
        within(self.mask_token)
        rescale_blocks(self.blocks)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, C, H, W] and which patches to hide [B, rows, columns] bool -> [B, D, rows, columns]."""
        tokens = self.forward_features(images, mask)
        patches = tokens[:, self.num_prefix_tokens :]
        return patches.transpose(1, 2).unflatten(2, self.patch_embed.grid_size)

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> normalised tokens [B, 1 + L, D], the class token first; the mask as in ``forward``."""
        x, bias = self.embed(images) if mask is None else self.embed_masked(images, mask), self.rel_pos_bias()
        for block in self.blocks:
            x = self.run_block(block, x, bias)
        return self.norm(x)

    def embed_masked(self, images: Tensor, mask: Tensor) -> Tensor:
        """[B, C, H, W] and [B, rows, columns] bool -> tokens [B, 1 + L, D]; all in one call of the op."""
        hidden = {"mask": mask.flatten(1), "mask_token": self.mask_token}
        return self.patch_embed(images, prefix_tokens=self.prefix_tokens(), **hidden)

    def run_block(self, block: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """One block, with gradient checkpointing if it is on; the table is read if its bias is not given."""
        bias = self.rel_pos_bias() if bias is None else bias
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, bias, use_reentrant=False)
        return block(x, bias)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Takes images of another side or (height, width) from now on; the table is resized by BEiT's rule."""
        super().set_input_size(img_size)
        self.rel_pos_bias.set_window_size(self.patch_embed.grid_size)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As ``VisionTransformer``'s; the mask token goes with the head."""
        if prune_head:
            del self.mask_token
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimiser should not decay, beside biases and norms."""
        return {"cls_token", "mask_token", "rel_pos_bias.relative_position_bias_table"}
