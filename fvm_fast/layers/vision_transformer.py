# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer.

An image is cut into patches; each patch is one token, and a plain transformer encoder does the rest:

    z_0 = [cls; E x_1; ...; E x_N] + pos                       equation 1
    z'  = z + attention(norm(z)),  z = z' + mlp(norm(z'))      equations 2 and 3, ``layers.Block``
    y   = head(norm(z_L)[cls])                                 equation 4

An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale, https://arxiv.org/abs/2010.11929
Arguments and state-dict names are timm's, so its checkpoints load as they are.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fvm_fast import ops
from fvm_fast.layers.activation import activation_name
from fvm_fast.layers.backbone import Backbone, check_choice
from fvm_fast.layers.block import Block
from fvm_fast.layers.feature_extractor import take_indices
from fvm_fast.layers.patch_embed import PatchEmbed
from fvm_fast.layers.pos_embed import RESIZE_RULES, resize_pos_embed

_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.mean(dim=1),
    "max": lambda x: x.amax(dim=1),
    "avgmax": lambda x: 0.5 * (x.amax(dim=1) + x.mean(dim=1)),
}


class VisionTransformer(Backbone):
    """Vision Transformer.

    Args:
        img_size: side or (height, width) of the images in pixels.
        patch_size: side of a patch in pixels.
        in_chans: channels of an image.
        num_classes: width of the head; 0 leaves the head out and the model returns pooled features.
        global_pool: ``token`` (the class token), ``avg``, ``max``, ``avgmax`` (over patches), or ``""`` for all tokens.
        embed_dim, depth, num_heads, mlp_ratio: width of a token, blocks, heads, hidden width over ``embed_dim``.
        qkv_bias, qk_norm, proj_bias: see ``layers.Attention``.
        init_values: initial LayerScale; None leaves LayerScale out.
        class_token, reg_tokens: whether there is a class token, and how many register tokens follow it.
        pos_embed: ``learn`` or ``none``.
        no_embed_class: the prefix tokens have no rows in the position embedding (DeiT III).
        pre_norm: a norm before the blocks (CLIP); the patch projection then has no bias.
        final_norm, fc_norm: whether there is a norm at the end, and whether it comes after the pooling
            (None: when the pooling is over patches).
        pool_include_prefix: pool over the prefix tokens too.
        dynamic_img_size: take images of any size and resize the position embedding to them in the forward pass.
        dynamic_img_pad: pad images to whole patches.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout before the head, after the positions, after
            attention and MLP, of the attention probabilities.
        patch_drop_rate: share of the patches left out while training; they are not even embedded.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        weight_init: ``""`` for timm's initialisation, ``skip`` to leave torch's.
        norm_layer, act_layer: norm constructor (None: LayerNorm with ``norm_eps``) and activation, by name or class.
        norm_eps: epsilon of the default norm.
        pos_embed_resize: the rule of ``layers.resize_pos_embed``.
        image_mean, image_std: per channel for images in [0, 1]; with them the model takes uint8 images too.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        reg_tokens: int = 0,
        pos_embed: str = "learn",
        no_embed_class: bool = False,
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool | None = None,
        pool_include_prefix: bool = False,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        norm_layer: Callable[[int], nn.Module] | None = None,
        act_layer: str | Callable[[], nn.Module] | None = None,
        norm_eps: float = 1e-6,
        pos_embed_resize: str = "timm",
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check_pool(global_pool, class_token)
        check_choice("pos_embed", pos_embed, ("learn", "none"))
        check_choice("weight_init", weight_init, ("", "skip"))
        check_choice("pos_embed_resize", pos_embed_resize, RESIZE_RULES)
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=norm_eps)
        fc_norm = global_pool in _POOLS if fc_norm is None else fc_norm
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.has_class_token = class_token
        self.no_embed_class = no_embed_class
        self.pool_include_prefix = pool_include_prefix
        self.dynamic_img_size = dynamic_img_size
        self.patch_drop_rate = patch_drop_rate
        self.pos_embed_resize = pos_embed_resize

        self.patch_embed = PatchEmbed(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            bias=not pre_norm,
            strict_img_size=not dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
            image_mean=image_mean,
            image_std=image_std,
        )
        rows = self.patch_embed.num_patches + (0 if no_embed_class else self.num_prefix_tokens)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, embed_dim)) if pos_embed == "learn" else None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.norm_pre = norm_layer(embed_dim) if pre_norm else nn.Identity()

        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_norm=qk_norm,
                    proj_bias=proj_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    init_values=init_values,
                    drop_path=drop_path,
                    act_layer=act_layer,
                    norm_layer=norm_layer,
                )
                for drop_path in torch.linspace(0.0, drop_path_rate, depth, device="cpu").tolist()
            )
        )
        self.norm = norm_layer(embed_dim) if final_norm and not fc_norm else nn.Identity()

        self.fc_norm = norm_layer(embed_dim) if final_norm and fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        if weight_init != "skip":
            self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal of deviation 0.02 for Linears and positions, almost zero for the prefix tokens."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> normalised tokens [B, P + L, D], prefix first."""
        x = self.embed(images, self._kept_patches(images))
        for block in self.blocks:
            x = self.run_block(block, x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, P + L, D] -> logits [B, num_classes], or the pooled features [B, D] with ``pre_logits``."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def embed(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Equation 1: [B, C, H, W] -> tokens [B, P + L, D] with positions; of the patches, ids_keep [B, K] only."""
        positions = self._positions(self.patch_embed.feat_size(images.shape[-2:]))
        x = self.patch_embed(images, pos_embed=positions, prefix_tokens=self.prefix_tokens(), ids_keep=ids_keep)
        return self.norm_pre(self.pos_drop(x))

    def prefix_tokens(self) -> Tensor | None:
        """The tokens that stand before the patches [P, D]; None without any."""
        tokens = [token[0] for token in (self.cls_token, self.reg_token) if token is not None]
        return torch.cat(tokens) if tokens else None

    def pool(self, x: Tensor) -> Tensor:
        """Equation 4: tokens [B, P + L, D] -> [B, D] by ``global_pool``."""
        if self.global_pool == "token":
            return x[:, 0]
        if self.global_pool == "":
            return x
        return _POOLS[self.global_pool](x if self.pool_include_prefix else x[:, self.num_prefix_tokens :])

    def _positions(self, grid: tuple[int, int]) -> Tensor | None:
        if self.pos_embed is None or not self.dynamic_img_size:
            return self.pos_embed
        return self._resized_pos_embed(grid, self.patch_embed.grid_size)

    def _resized_pos_embed(self, new_grid: tuple[int, int], old_grid: tuple[int, int]) -> Tensor:
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        rule = self.pos_embed_resize
        return resize_pos_embed(self.pos_embed, new_grid, old_grid=old_grid, num_prefix_tokens=prefix, rule=rule)

    def _kept_patches(self, images: Tensor) -> Tensor | None:
        """Ids [B, K] of the patches that ``patch_drop_rate`` leaves; None for all."""
        if not self.training or self.patch_drop_rate == 0.0:
            return None
        rows, columns = self.patch_embed.feat_size(images.shape[-2:])
        ids_keep, _, _ = ops.random_masking(len(images), rows * columns, self.patch_drop_rate, device=images.device)
        return ids_keep

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """The tokens after chosen blocks.

        Args:
            images: [B, C, H, W].
            indices: blocks to return: the last n for an int, all for None, their numbers for a sequence.
            return_prefix_tokens: return pairs (patches, prefix tokens [B, P, D]).
            norm: apply the final norm to each.
            stop_early: skip the blocks after the last one asked for.
            output_fmt: ``NCHW`` for maps [B, D, rows, columns], ``NLC`` for [B, L, D].
            intermediates_only: leave out the final tokens.

        Returns:
            (final tokens [B, P + L, D], list of intermediates in the order of the blocks), or the list alone.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        wanted = take_indices(len(self.blocks), indices)
        blocks = self.blocks[: max(wanted) + 1] if stop_early else self.blocks
        x = self.embed(images)
        intermediates = []
        for i, block in enumerate(blocks):
            x = self.run_block(block, x)
            if i in wanted:
                intermediates.append(self.norm(x) if norm else x)

        P, grid = self.num_prefix_tokens, self.patch_embed.feat_size(images.shape[-2:])
        patches = [y[:, P:] for y in intermediates]  # [B, L, D]
        if output_fmt == "NCHW":
            patches = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in patches]
        if return_prefix_tokens and P:
            patches = list(zip(patches, (y[:, :P] for y in intermediates), strict=True))
        return patches if intermediates_only else (self.norm(x), patches)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks after the last one asked for, the norm and the head; returns the block numbers."""
        wanted = take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max(wanted) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return wanted

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for ``num_classes`` (0: none), and another pooling if given; the norms stay where they are."""
        if global_pool is not None:
            _check_pool(global_pool, self.has_class_token)
            self.global_pool = global_pool
        self.num_classes = num_classes
        weight = self.patch_embed.proj.weight
        self.head = (
            nn.Linear(self.embed_dim, num_classes, device=weight.device, dtype=weight.dtype)
            if num_classes > 0
            else nn.Identity()
        )

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Takes images of another side or (height, width) from now on; the position embedding is resized."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size)
        if self.pos_embed is not None:
            with torch.no_grad():
                resized = self._resized_pos_embed(self.patch_embed.grid_size, old_grid)
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimiser should not decay, beside biases and norms."""
        return {"cls_token", "dist_token", "pos_embed", "reg_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that assign parameters to depths, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|dist_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Name, channels and stride of the map after each block."""
        stride = self.patch_embed.patch_size[0]
        width = self.embed_dim
        return [{"module": f"blocks.{i}", "num_chs": width, "reduction": stride} for i in range(len(self.blocks))]

    @property
    def numerics(self) -> dict[str, Any]:
        """What must match for equal weights to give equal outputs; it travels with exported weights."""
        norm_eps = next((m.eps for m in self.modules() if isinstance(m, nn.LayerNorm)), None)
        act = next((activation_name(block.mlp.act) for block in self.blocks), None)
        return {name: value for name, value in (("norm_eps", norm_eps), ("act", act)) if value is not None}


def _check_pool(global_pool: str, class_token: bool) -> None:
    check_choice("global_pool", global_pool, ("token", *_POOLS, ""))
    if global_pool == "token" and not class_token:
        raise ValueError("global_pool='token' needs class_token=True; without one, pool with 'avg'")
