# SPDX-License-Identifier: Apache-2.0
"""What users of timm expect of every classifier, written once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

INCEPTION_MEAN = INCEPTION_STD = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """A classifier in two halves, ``forward_features`` and ``forward_head``, which a model defines.

    A model also sets ``patch_embed`` (a ``PatchEmbed``), ``head`` and ``num_classes``.
    """

    grad_checkpointing = False
    default_out_indices = 3  # how many last maps ``features_only`` gives if not told; models of stages give all

    def forward(self, images: Tensor) -> Tensor:
        """Classifies a batch.

        Args:
            images: [B, C, H, W], float and normalised; or uint8 when the model has ``image_mean`` and ``image_std``.

        Returns:
            Logits [B, num_classes]; features [B, D] when ``num_classes`` is 0.
        """
        return self.forward_head(self.forward_features(images))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        """``block(x)``, with gradient checkpointing if it is on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def get_classifier(self) -> nn.Module:
        """The head: a Linear, or Identity without classes."""
        return self.head

    @property
    def default_cfg(self) -> dict[str, Any]:
        """What the data pipeline should know, under timm's keys."""
        height, width = self.patch_embed.img_size
        return {
            "input_size": (self.patch_embed.proj.in_channels, height, width),
            "interpolation": "bicubic",
            "crop_pct": 1.0 if height >= 384 else 0.9,
            "mean": self.patch_embed.image_mean or INCEPTION_MEAN,
            "std": self.patch_embed.image_std or INCEPTION_STD,
            "num_classes": self.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """``default_cfg`` under its newer name: ``timm.data.resolve_model_data_config(model)`` reads it."""
        return self.default_cfg


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless the value of the argument ``name`` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} should be one of {', '.join(map(repr, choices))}, got {value!r}")
