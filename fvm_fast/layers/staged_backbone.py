# SPDX-License-Identifier: Apache-2.0
"""A classifier made of stages, each of which halves the map: what ConvNeXt and TinyViT have in common."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fvm_fast.layers.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone
from fvm_fast.layers.classifier_head import ClassifierHead
from fvm_fast.layers.feature_extractor import take_indices
from fvm_fast.layers.image_normalize import ImageNormalize
from fvm_fast.layers.patch_embed import to_pair


class StagedBackbone(Backbone):
    """``head(norm_pre(stages(embed(images))))`` on maps [B, C, rows, columns] in channels_last memory.

    A model sets the attributes below and defines ``embed``; it calls ``set_input_size`` once. Each stage is called with
    a map and with ``run_block``.
    """

    first_conv: str  # names of modules, as timm's default_cfg has them
    crop_pct: float
    default_out_indices = 4

    in_chans: int
    num_classes: int
    num_features: int  # channels of the last map
    feature_info: list[dict[str, Any]]  # num_chs, reduction and module of each stage

    normalize: ImageNormalize
    embed: Callable[[Tensor], Tensor]  # [B, in_chans, H, W] -> the map that the first stage reads
    stages: nn.Sequential
    norm_pre: nn.Module  # over the last dimension; Identity where the norm comes after the pooling
    head: ClassifierHead

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> the last map [B, num_features, rows, columns]."""
        x = self.embed(images)
        for stage in self.stages:
            x = stage(x, self.run_block)
        return self._normed(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits [B, num_classes], or with ``pre_logits`` the features that they come from."""
        return self.head(x, pre_logits)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps after chosen stages.

        Args:
            images: [B, in_chans, H, W].
            indices: stages to return: the last n for an int, all for None, their numbers for a sequence.
            norm: apply ``norm_pre`` to the map of the last stage, the only one that it fits.
            stop_early: skip the stages after the last one asked for.
            output_fmt: ``NCHW`` or ``NHWC``.
            intermediates_only: leave out the final map.

        Returns:
            (final map, list of maps in the order of the stages), or the list alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt should be 'NCHW' or 'NHWC', got {output_fmt!r}")
        wanted, last = take_indices(len(self.stages), indices), len(self.stages) - 1
        x, maps = self.embed(images), []
        for i, stage in enumerate(self.stages[: max(wanted) + 1] if stop_early else self.stages):
            x = stage(x, self.run_block)
            if i in wanted:
                maps.append(self._normed(x) if norm and i == last else x)
        maps = [y.permute(0, 2, 3, 1) for y in maps] if output_fmt == "NHWC" else maps
        if intermediates_only:
            return maps
        return self._normed(x) if i == last else x, maps

    def _normed(self, x: Tensor) -> Tensor:
        return self.norm_pre(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last one asked for, the norm and the head; returns the stage numbers."""
        wanted = take_indices(len(self.stages), indices)
        shorter = max(wanted) < len(self.stages) - 1
        self.stages = self.stages[: max(wanted) + 1]
        self.num_features = self.feature_info[max(wanted)]["num_chs"]
        if prune_norm or shorter:
            self.norm_pre = nn.Identity()
        if prune_head or shorter:
            self.reset_classifier(0, "", reset_other=True)
        return wanted

    def get_classifier(self) -> nn.Module:
        """The last Linear; Identity without classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """A fresh classifier.

        Args:
            num_classes: 0 for none.
            global_pool: another pooling; None leaves it.
            reset_other: remove the head's norm and hidden layer.
        """
        in_features = self.num_features if reset_other else None
        self.head.reset(num_classes, global_pool, like=next(self.parameters()), in_features=in_features)
        self.num_classes = num_classes

    @property
    def head_hidden_size(self) -> int:
        """Width of what the classifier reads."""
        return self.head.num_features

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Reports another side or (height, width) in ``default_cfg``; images of any size are taken anyway."""
        self.img_size = to_pair(img_size)

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimiser should not decay, beside biases and norms."""
        return set()

    @property
    def default_cfg(self) -> dict[str, Any]:
        """What the data pipeline should know, under timm's keys."""
        return {
            "input_size": (self.in_chans, *self.img_size),
            "interpolation": "bicubic",
            "crop_pct": 1.0 if self.img_size[0] >= 384 else self.crop_pct,
            "mean": self.normalize.image_mean or IMAGENET_MEAN,
            "std": self.normalize.image_std or IMAGENET_STD,
            "num_classes": self.num_classes,
            "first_conv": self.first_conv,
            "classifier": "head.fc",
        }


def check_images(images: Tensor, smallest: int = 1) -> None:
    """Raises unless images are [B, C, H, W] of at least ``smallest`` x ``smallest``."""
    if images.ndim != 4:
        raise ValueError(
            f"images should be [B, C, H, W], got {images.ndim} dimensions {tuple(images.shape)}; "
            "add the batch to a single image with images[None]"
        )
    H, W = images.shape[-2:]
    if min(H, W) < smallest:
        raise ValueError(f"images should be at least {smallest} x {smallest}, got {H} x {W}; enlarge them")
