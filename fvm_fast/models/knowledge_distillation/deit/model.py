# SPDX-License-Identifier: Apache-2.0
"""DeiT: a Vision Transformer that learns from a teacher through a token of its own, and DeiT III, which needs none.

The distillation token stands beside the class token, reads the same patches, and has its own head:

    z_0 = [cls; dist; E x_1; ...; E x_N] + pos
    y_cls = head(norm(z_L)[0]),   y_dist = head_dist(norm(z_L)[1])

While training the labels teach ``y_cls`` and the teacher ``y_dist`` (``objectives.Distillation``); afterwards the
prediction is the mean of both. The undistilled DeiT is ViT's network, trained better. DeiT III adds LayerScale and adds
the positions to the patches only.

Training data-efficient image transformers & distillation through attention, https://arxiv.org/abs/2012.12877
DeiT III: Revenge of the ViT, https://arxiv.org/abs/2204.07118
"""

from typing import Any

import torch
from torch import Tensor, nn

from fvm_fast.layers.backbone import IMAGENET_MEAN, IMAGENET_STD
from fvm_fast.layers.vision_transformer import VisionTransformer

TEST = {"embed_dim": 64, "depth": 3, "num_heads": 4}
TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
MEDIUM = {"embed_dim": 512, "depth": 12, "num_heads": 8}
BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16}

# timm's LayerScale; the paper's code starts at 1e-4, which init_values=1e-4 gives.
DEIT3 = {"no_embed_class": True, "init_values": 1e-6}


class VisionTransformerDistilled(VisionTransformer):
    """Vision Transformer with a distillation token (at index 1) and a second head.

    Takes the arguments of ``VisionTransformer``. The class token must be there and be what is pooled, without register
    tokens and without ``fc_norm``.

    Raises:
        ValueError: an argument that leaves the two heads nothing to read.
    """

    def __init__(self, *args: Any, weight_init: str = "", **kwargs: Any) -> None:
        super().__init__(*args, weight_init="skip", **kwargs)
        _check_tokens(self)
        self.num_prefix_tokens = 2
        rows = self.patch_embed.num_patches + (0 if self.no_embed_class else self.num_prefix_tokens)
        self.dist_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        if self.pos_embed is not None:
            self.pos_embed = nn.Parameter(torch.zeros(1, rows, self.embed_dim))
        self.head_dist = nn.Linear(self.embed_dim, self.num_classes) if self.num_classes > 0 else nn.Identity()
        self.distilled_training = False
        if weight_init != "skip":
            self.init_weights()

    def init_weights(self) -> None:
        """As ``VisionTransformer``; the distillation token gets a truncated normal of deviation 0.02."""
        super().init_weights()
        nn.init.trunc_normal_(self.dist_token, std=0.02)

    def prefix_tokens(self) -> Tensor:
        """Class and distillation token [2, D]."""
        return torch.cat([self.cls_token[0], self.dist_token[0]])

    def set_distilled_training(self, enable: bool = True) -> None:
        """Return both predictions while training, as ``objectives.Distillation`` needs them."""
        self.distilled_training = enable

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens [B, 2 + L, D] -> the mean of both heads' logits [B, num_classes].

        In training mode, after ``set_distilled_training()``, the pair (class logits, distillation logits) instead;
        with ``pre_logits`` the mean of the two tokens [B, D].
        """
        cls, dist = self.head_drop(x[:, 0]), self.head_drop(x[:, 1])
        if pre_logits:
            return (cls + dist) / 2
        cls, dist = self.head(cls), self.head_dist(dist)
        return (cls, dist) if self.training and self.distilled_training else (cls + dist) / 2

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """The heads of the class and of the distillation token."""
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Two fresh heads for ``num_classes`` (0: none); the pooling can only be the two tokens."""
        if global_pool not in (None, "", "token"):
            raise ValueError(f"global_pool should stay 'token', which both heads read, got {global_pool!r}")
        super().reset_classifier(num_classes)
        weight = self.patch_embed.proj.weight
        self.head_dist = (
            nn.Linear(self.embed_dim, num_classes, device=weight.device, dtype=weight.dtype)
            if num_classes > 0
            else nn.Identity()
        )

    @property
    def default_cfg(self) -> dict[str, Any]:
        """What the data pipeline should know, under timm's keys; there are two classifiers."""
        return super().default_cfg | {"classifier": ("head", "head_dist")}


def _check_tokens(model: VisionTransformer) -> None:
    demands = {
        "global_pool": ("token", model.global_pool),
        "class_token": (True, model.has_class_token),
        "reg_tokens": (0, model.num_prefix_tokens - int(model.has_class_token)),
        "fc_norm": (False, not isinstance(model.fc_norm, nn.Identity)),
    }
    for name, (expected, got) in demands.items():
        if got != expected:
            raise ValueError(
                f"VisionTransformerDistilled: {name} should be {expected!r}, since its heads read the class and the "
                f"distillation token after the final norm, got {got!r}"
            )


def _deit(
    overrides: dict[str, Any],
    img_size: int,
    patch_size: int,
    model_class: type[VisionTransformer] = VisionTransformer,
    **sizes: Any,
) -> VisionTransformer:
    sizes |= {"img_size": img_size, "patch_size": patch_size}
    if overrides.get("in_chans", 3) == 3:
        sizes |= {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    return model_class(**sizes | overrides)


def _distilled(overrides: dict[str, Any], img_size: int, patch_size: int, **sizes: Any) -> VisionTransformerDistilled:
    return _deit(overrides, img_size, patch_size, VisionTransformerDistilled, **sizes)


def deit_test_patch16_64(**kwargs: Any) -> VisionTransformer:
    """A size for tests and laptops: 0.27 M parameters."""
    return _deit(kwargs, 64, 16, **TEST)


def deit_test_distilled_patch16_64(**kwargs: Any) -> VisionTransformerDistilled:
    """A size for tests and laptops, distilled: 0.33 M parameters."""
    return _distilled(kwargs, 64, 16, **TEST)


def deit3_test_patch16_64(**kwargs: Any) -> VisionTransformer:
    """A size for tests and laptops, DeiT III: 0.27 M parameters."""
    return _deit(kwargs, 64, 16, **TEST, **DEIT3)


def deit_tiny_patch16_224(**kwargs: Any) -> VisionTransformer:
    """DeiT-Ti/16, 224 px, 5.7 M parameters."""
    return _deit(kwargs, 224, 16, **TINY)


def deit_small_patch16_224(**kwargs: Any) -> VisionTransformer:
    """DeiT-S/16, 224 px, 22.1 M parameters."""
    return _deit(kwargs, 224, 16, **SMALL)


def deit_base_patch16_224(**kwargs: Any) -> VisionTransformer:
    """DeiT-B/16, 224 px, 86.6 M parameters."""
    return _deit(kwargs, 224, 16, **BASE)


def deit_base_patch16_384(**kwargs: Any) -> VisionTransformer:
    """DeiT-B/16, 384 px, 86.9 M parameters."""
    return _deit(kwargs, 384, 16, **BASE)


def deit_tiny_distilled_patch16_224(**kwargs: Any) -> VisionTransformerDistilled:
    """DeiT-Ti/16 distilled, 224 px, 5.9 M parameters."""
    return _distilled(kwargs, 224, 16, **TINY)


def deit_small_distilled_patch16_224(**kwargs: Any) -> VisionTransformerDistilled:
    """DeiT-S/16 distilled, 224 px, 22.4 M parameters."""
    return _distilled(kwargs, 224, 16, **SMALL)


def deit_base_distilled_patch16_224(**kwargs: Any) -> VisionTransformerDistilled:
    """DeiT-B/16 distilled, 224 px, 87.3 M parameters."""
    return _distilled(kwargs, 224, 16, **BASE)


def deit_base_distilled_patch16_384(**kwargs: Any) -> VisionTransformerDistilled:
    """DeiT-B/16 distilled, 384 px, 87.6 M parameters."""
    return _distilled(kwargs, 384, 16, **BASE)


def deit3_small_patch16_224(**kwargs: Any) -> VisionTransformer:
    """DeiT III S/16, 224 px, 22.1 M parameters."""
    return _deit(kwargs, 224, 16, **SMALL, **DEIT3)


def deit3_small_patch16_384(**kwargs: Any) -> VisionTransformer:
    """DeiT III S/16, 384 px, 22.2 M parameters."""
    return _deit(kwargs, 384, 16, **SMALL, **DEIT3)


def deit3_medium_patch16_224(**kwargs: Any) -> VisionTransformer:
    """DeiT III M/16, 224 px, 38.8 M parameters."""
    return _deit(kwargs, 224, 16, **MEDIUM, **DEIT3)


def deit3_base_patch16_224(**kwargs: Any) -> VisionTransformer:
    """DeiT III B/16, 224 px, 86.6 M parameters."""
    return _deit(kwargs, 224, 16, **BASE, **DEIT3)


def deit3_base_patch16_384(**kwargs: Any) -> VisionTransformer:
    """DeiT III B/16, 384 px, 86.9 M parameters."""
    return _deit(kwargs, 384, 16, **BASE, **DEIT3)


def deit3_large_patch16_224(**kwargs: Any) -> VisionTransformer:
    """DeiT III L/16, 224 px, 304.4 M parameters."""
    return _deit(kwargs, 224, 16, **LARGE, **DEIT3)


def deit3_large_patch16_384(**kwargs: Any) -> VisionTransformer:
    """DeiT III L/16, 384 px, 304.8 M parameters."""
    return _deit(kwargs, 384, 16, **LARGE, **DEIT3)


def deit3_huge_patch14_224(**kwargs: Any) -> VisionTransformer:
    """DeiT III H/14, 224 px, 632.1 M parameters."""
    return _deit(kwargs, 224, 14, **HUGE, **DEIT3)
