# SPDX-License-Identifier: Apache-2.0
"""Swin Transformer, v1 and v2: attention in windows, on maps that halve from stage to stage.

Tokens of 4 x 4 pixels attend within windows, so the cost is linear in the size of the image; every second block shifts
the windows by half their size, so that neighbours of different windows meet; between stages 2 x 2 tokens become one.

Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, https://arxiv.org/abs/2103.14030
Swin Transformer V2: Scaling Up Capacity and Resolution, https://arxiv.org/abs/2111.09883
Arguments and state-dict names are timm's, so its checkpoints load as they are.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from fvm_fast.layers.backbone import check_choice
from fvm_fast.layers.relative_position import TABLE_RESIZE_RULES
from fvm_fast.layers.swin_backbone import SwinBackbone, per_stage
from fvm_fast.layers.swin_block import PatchMerging, PatchMergingV2, SwinTransformerBlock, SwinTransformerV2Block

PAD_ORDERS = ("roll_pad", "pad_roll")


class SwinTransformer(SwinBackbone):
    """Swin Transformer.

    Args:
        img_size: side or (height, width) of the images in pixels.
        patch_size: side of a patch in pixels.
        in_chans: channels of an image.
        num_classes: width of the head; 0 leaves it out and the model returns pooled features.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``""`` for a map.
        embed_dim: channels of the first stage; each further one has twice as many.
        depths, num_heads: blocks and heads of each stage.
        head_dim: channels of a head, one number or one a stage; the channels over the heads if None.
        window_size: side or (height, width) of the windows, or one of these a stage.
        always_partition: keep windows larger than their map, and pad it; otherwise they shrink to it, unshifted.
        strict_img_size: refuse images of another size than ``img_size``.
        dynamic_img_size: the same as ``strict_img_size=False``.
        mlp_ratio: hidden width of the MLP over the channels, one number or one a stage.
        qkv_bias: whether q, k and v have biases.
        drop_rate, proj_drop_rate, attn_drop_rate: dropout before the head, after attention and MLP, of the attention
            weights.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        weight_init: ``""`` for timm's initialisation, ``skip`` to leave torch's.
        norm_layer, act_layer: norm constructor (None: LayerNorm with ``norm_eps``) and activation, by name or class.
        norm_eps: epsilon of the default norm.
        pad_order: ``roll_pad`` (timm) or ``pad_roll`` (torchvision, transformers): they differ where shifted windows do
            not divide a map.
        table_resize: ``timm`` or ``microsoft``, the rule of ``layers.resize_relative_position_bias``.
        image_mean, image_std: per channel for images in [0, 1]; with them the model takes uint8 images too.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        head_dim: int | Sequence[int] | None = None,
        window_size: int | Sequence[int] | Sequence[Sequence[int]] = 7,
        *,
        always_partition: bool = False,
        strict_img_size: bool = True,
        dynamic_img_size: bool = False,
        mlp_ratio: float | Sequence[float] = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        weight_init: str = "",
        norm_layer: Callable[[int], nn.Module] | None = None,
        act_layer: str | Callable[[], nn.Module] | None = None,
        norm_eps: float = 1e-5,
        pad_order: str = "roll_pad",
        table_resize: str = "timm",
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        check_choice("weight_init", weight_init, ("", "skip"))
        check_choice("pad_order", pad_order, PAD_ORDERS)
        check_choice("table_resize", table_resize, TABLE_RESIZE_RULES)
        stages = len(depths)
        make_block = [
            partial(
                SwinTransformerBlock,
                head_dim=stage_head_dim,
                mlp_ratio=stage_mlp_ratio,
                qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                act_layer=act_layer,
                pad_order=pad_order,
                table_resize=table_resize,
            )
            for stage_head_dim, stage_mlp_ratio in zip(
                per_stage("head_dim", head_dim, stages), per_stage("mlp_ratio", mlp_ratio, stages), strict=True
            )
        ]
        super().__init__(
            make_block=make_block,
            merging=PatchMerging,
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            always_partition=always_partition,
            strict_img_size=strict_img_size and not dynamic_img_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            norm_layer=norm_layer or partial(nn.LayerNorm, eps=norm_eps),
            image_mean=image_mean,
            image_std=image_std,
        )
        self.table_resize = table_resize
        if weight_init != "skip":
            _init_linears(self)

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimiser should not decay, beside biases and norms."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}


class SwinTransformerV2(SwinBackbone):
    """Swin Transformer V2: norms after the branches, cosine attention, biases from a network of the offset.

    Args:
        pretrained_window_sizes: for each stage, the window of the pretraining by which offsets are scaled; 0 for the
            window itself.
        img_size, patch_size, in_chans, num_classes, global_pool, embed_dim, depths, num_heads, window_size,
        always_partition, strict_img_size, dynamic_img_size, qkv_bias, drop_rate, proj_drop_rate, attn_drop_rate,
        drop_path_rate, norm_layer, act_layer, norm_eps, pad_order, image_mean, image_std: see ``SwinTransformer``.
        mlp_ratio: hidden width of the MLP over the channels.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] | Sequence[Sequence[int]] = 7,
        *,
        always_partition: bool = False,
        strict_img_size: bool = True,
        dynamic_img_size: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        act_layer: str | Callable[[], nn.Module] | None = None,
        norm_layer: Callable[[int], nn.Module] | None = None,
        pretrained_window_sizes: int | Sequence[int] = 0,
        norm_eps: float = 1e-5,
        pad_order: str = "roll_pad",
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        check_choice("pad_order", pad_order, PAD_ORDERS)
        make_block = [
            partial(
                SwinTransformerV2Block,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                act_layer=act_layer,
                pretrained_window_size=pretrained_window_size,
                pad_order=pad_order,
            )
            for pretrained_window_size in per_stage("pretrained_window_sizes", pretrained_window_sizes, len(depths))
        ]
        super().__init__(
            make_block=make_block,
            merging=PatchMergingV2,
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            always_partition=always_partition,
            strict_img_size=strict_img_size and not dynamic_img_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            norm_layer=norm_layer or partial(nn.LayerNorm, eps=norm_eps),
            image_mean=image_mean,
            image_std=image_std,
        )
        _init_linears(self)
        for stage in self.layers:
            for block in stage.blocks:
                nn.init.zeros_(block.norm1.weight)  # the network begins as the identity
                nn.init.zeros_(block.norm2.weight)

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimiser should not decay, beside biases and norms."""
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if ".cpb_mlp." in name or name.endswith(".logit_scale")}


def _init_linears(model: nn.Module) -> None:
    """Truncated normal of deviation 0.02 for the weights of Linears, zeros for their biases."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
