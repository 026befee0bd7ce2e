# SPDX-License-Identifier: Apache-2.0
"""TinyViT: a small hierarchical transformer, made to be pretrained with the stored answers of a large one.

    x = two 3 x 3 convolutions of stride 2 (image)              stem
    x = inverted bottlenecks(x)                                 stage 0, convolutional
    x = transformer blocks(merge(x))                            stages 1 to 3, see ``block.py``
    y = fc(norm(mean of x over all places))                     head

TinyViT: Fast Pretraining Distillation for Small Vision Transformers, https://arxiv.org/abs/2207.10666
Arguments and state-dict names are timm's, so its checkpoints load as they are.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fvm_fast.layers.activation import activation_name, get_act_layer
from fvm_fast.layers.backbone import IMAGENET_MEAN, IMAGENET_STD
from fvm_fast.layers.classifier_head import ClassifierHead
from fvm_fast.layers.image_normalize import ImageNormalize
from fvm_fast.layers.staged_backbone import StagedBackbone, check_images
from fvm_fast.models.knowledge_distillation.tinyvit.block import TinyVitBlock
from fvm_fast.models.knowledge_distillation.tinyvit.convolution import (
    MBConv,
    PatchEmbed,
    PatchMerging,
    frozen_statistics,
)

RunBlock = Callable[[nn.Module, Tensor], Tensor]


class TinyVit(StagedBackbone):
    """TinyViT.

    Args:
        in_chans: channels of an image.
        num_classes: width of the head; 0 leaves the classifier out and the model returns pooled features.
        global_pool: ``avg``, ``max``, ``avgmax``, or ``""``: then the head works on every place of the last map.
        embed_dims, depths: channels and blocks of each stage; the first stage is convolutional.
        num_heads, window_sizes: heads and side of the windows of each stage; the first number of each is not used.
        mlp_ratio: hidden width of the MLPs over their channels.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout of the MLPs.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        use_checkpoint: start with gradient checkpointing on.
        mbconv_expand_ratio: channels inside a block of the first stage over those outside.
        local_conv_size: kernel of the convolution between attention and MLP.
        act_layer: activation, by name or class.
        norm_eps: epsilon of the layer norms.
        img_size: side or (height, width) that ``default_cfg`` reports; images of any size are taken.
        image_mean, image_std: per channel for images in [0, 1]; with them the model takes uint8 images too.
    """

    first_conv = "patch_embed.conv1.conv"
    crop_pct = 0.95

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_sizes: Sequence[int] = (7, 7, 14, 7),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        use_checkpoint: bool = False,
        mbconv_expand_ratio: float = 4.0,
        local_conv_size: int = 3,
        act_layer: str | Callable[[], nn.Module] = "gelu",
        *,
        norm_eps: float = 1e-5,
        img_size: int | Sequence[int] = 224,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check(embed_dims, depths, num_heads, window_sizes, local_conv_size)
        act_layer = get_act_layer(act_layer)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = embed_dims[-1]
        self.grad_checkpointing = use_checkpoint
        self.set_input_size(img_size)

        self.normalize = ImageNormalize(image_mean, image_std)
        self.patch_embed = PatchEmbed(in_chans, embed_dims[0], act_layer)

        drop_path = torch.linspace(0.0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        convolutions = (MBConv(embed_dims[0], mbconv_expand_ratio, act_layer, p) for p in drop_path[0].tolist())
        self.stages = nn.Sequential(ConvStage(convolutions))
        for i in range(1, len(depths)):
            block = partial(
                TinyVitBlock,
                embed_dims[i],
                num_heads[i],
                window_sizes[i],
                mlp_ratio,
                proj_drop_rate,
                local_conv_size=local_conv_size,
                act_layer=act_layer,
                norm_eps=norm_eps,
            )
            merge = PatchMerging(embed_dims[i - 1], embed_dims[i], act_layer)
            self.stages.append(TinyVitStage(merge, (block(drop_path=p) for p in drop_path[i].tolist())))
        self.feature_info = [
            {"num_chs": dim, "reduction": self.patch_embed.stride << i, "module": f"stages.{i}"}
            for i, dim in enumerate(embed_dims)
        ]

        self.norm_pre = nn.Identity()
        self.head = ClassifierHead(
            self.num_features,
            num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=partial(nn.LayerNorm, eps=norm_eps),
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal of deviation 0.02 for Linears; convolutions keep torch's, the biases of attention zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def embed(self, images: Tensor) -> Tensor:
        """[B, in_chans, H, W], float and normalised or uint8 -> [B, embed_dims[0], H / 4, W / 4], rounded up."""
        check_images(images)
        return self.patch_embed(self.normalize(images).contiguous(memory_format=torch.channels_last))

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        """``block(x)``, with gradient checkpointing if it is on; batch statistics are counted once all the same."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            contexts = partial(_contexts_of_both_passes, block)
            return checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return block(x)

    def set_input_size(
        self, img_size: int | Sequence[int], window_sizes: Sequence[int] | None = None, rule: str = "timm"
    ) -> None:
        """Reports another side or (height, width) in ``default_cfg``, and attends within other windows if given.

        Args:
            img_size: side or (height, width); images of any size are taken anyway.
            window_sizes: side of the windows of each stage, the first of which has none; the biases are resized.
            rule: of ``layers.resize_attention_biases``.
        """
        super().set_input_size(img_size)
        if window_sizes is None:
            return
        if len(window_sizes) != len(self.stages):
            raise ValueError(f"window_sizes should be one for each of {len(self.stages)} stages, got {window_sizes}")
        for stage, window_size in list(zip(self.stages, window_sizes, strict=True))[1:]:
            for block in stage.blocks:
                block.attn.set_window_size(window_size, rule)

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimiser should not decay, beside biases and norms."""
        return {name for name, _ in self.named_parameters() if name.endswith("attention_biases")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that assign parameters to depths, for layer-wise learning rates."""
        blocks = [(r"^stages\.(\d+).downsample", (0,)), (r"^stages\.(\d+)\.\w+\.(\d+)", None)]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @property
    def numerics(self) -> dict[str, Any]:
        """What must match for equal weights to give equal outputs; it travels with exported weights."""
        norm_eps = next((m.eps for m in self.modules() if isinstance(m, nn.LayerNorm)), None)
        values = {"norm_eps": norm_eps, "act": activation_name(self.patch_embed.act)}
        return {name: value for name, value in values.items() if value is not None}


class ConvStage(nn.Module):
    """The first stage: blocks of convolutions.

    Args:
        blocks: modules from a map [B, C, H, W] to one of that shape.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor, run_block: RunBlock | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; ``run_block(block, x)`` runs a block."""
        for block in self.blocks:
            x = block(x) if run_block is None else run_block(block, x)
        return x


class TinyVitStage(nn.Module):
    """A later stage: half the side, then transformer blocks.

    Args:
        downsample: module from [B, C, H, W] to a map half as high and wide.
        blocks: modules from a map [B, H, W, C] to one of that shape.
    """

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor, run_block: RunBlock | None = None) -> Tensor:
        """[B, C, H, W] -> [B, dim, H / 2, W / 2], rounded up; ``run_block(block, x)`` runs a block."""
        x = self.downsample(x).permute(0, 2, 3, 1)  # [B, H, W, C]
        for block in self.blocks:
            x = block(x) if run_block is None else run_block(block, x)
        return x.permute(0, 3, 1, 2)


def _contexts_of_both_passes(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """For the forward pass and for its repetition, which must not count the batch a second time."""
    return nullcontext(), frozen_statistics(block)


def _check(
    embed_dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    window_sizes: Sequence[int],
    local_conv_size: int,
) -> None:
    per_stage = {"embed_dims": embed_dims, "depths": depths, "num_heads": num_heads, "window_sizes": window_sizes}
    if len({len(values) for values in per_stage.values()}) > 1:
        got = ", ".join(f"{name} {tuple(values)}" for name, values in per_stage.items())
        raise ValueError(f"there should be one number per stage in each, got {got}")
    if local_conv_size % 2 == 0:
        raise ValueError(f"local_conv_size should be odd, so that a map keeps its size, got {local_conv_size}")


TEST = {"embed_dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4)}
M5 = {"embed_dims": (64, 128, 160, 320), "depths": (2, 2, 6, 2), "num_heads": (2, 4, 5, 10)}
M11 = {"embed_dims": (64, 128, 256, 448), "depths": (2, 2, 6, 2), "num_heads": (2, 4, 8, 14)}
M21 = {"embed_dims": (96, 192, 384, 576), "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 18)}


def _tiny_vit(overrides: dict[str, Any], sizes: dict[str, Any], **more: Any) -> TinyVit:
    if overrides.get("in_chans", 3) == 3:
        more |= {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    return TinyVit(**sizes | more | overrides)


def tiny_vit_test(**kwargs: Any) -> TinyVit:
    """A size for tests and laptops: 0.2 M parameters."""
    return _tiny_vit(kwargs, TEST, window_sizes=(4, 4, 4, 2), drop_path_rate=0.0, img_size=64)


def tiny_vit_5m_224(**kwargs: Any) -> TinyVit:
    """TinyViT-5M, 224 px, 5.4 M parameters."""
    return _tiny_vit(kwargs, M5, window_sizes=(7, 7, 14, 7), drop_path_rate=0.0)


def tiny_vit_11m_224(**kwargs: Any) -> TinyVit:
    """TinyViT-11M, 224 px, 11.0 M parameters."""
    return _tiny_vit(kwargs, M11, window_sizes=(7, 7, 14, 7), drop_path_rate=0.1)


def tiny_vit_21m_224(**kwargs: Any) -> TinyVit:
    """TinyViT-21M, 224 px, 21.2 M parameters."""
    return _tiny_vit(kwargs, M21, window_sizes=(7, 7, 14, 7), drop_path_rate=0.2)


def tiny_vit_21m_384(**kwargs: Any) -> TinyVit:
    """TinyViT-21M, 384 px, 21.2 M parameters."""
    return _tiny_vit(kwargs, M21, window_sizes=(12, 12, 24, 12), drop_path_rate=0.1, img_size=384)


def tiny_vit_21m_512(**kwargs: Any) -> TinyVit:
    """TinyViT-21M, 512 px, 21.3 M parameters."""
    return _tiny_vit(kwargs, M21, window_sizes=(16, 16, 32, 16), drop_path_rate=0.1, img_size=512)
