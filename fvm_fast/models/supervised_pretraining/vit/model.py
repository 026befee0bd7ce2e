# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer in the sizes of the paper and of timm.

``layers.VisionTransformer`` is the model itself; here are its sizes, under timm's names.

An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale, https://arxiv.org/abs/2010.11929
"""

from typing import Any

from fvm_fast.layers.backbone import IMAGENET_MEAN, IMAGENET_STD, INCEPTION_MEAN, INCEPTION_STD
from fvm_fast.layers.vision_transformer import VisionTransformer

TEST = {"embed_dim": 64, "depth": 3, "num_heads": 4}
TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16}


def _vit(overrides: dict[str, Any], img_size: int, patch_size: int, **sizes: Any) -> VisionTransformer:
    sizes |= {"img_size": img_size, "patch_size": patch_size}
    if overrides.get("in_chans", 3) == 3:
        sizes = {"image_mean": INCEPTION_MEAN, "image_std": INCEPTION_STD} | sizes
    return VisionTransformer(**sizes | overrides)


def vit_test_patch16_64(**kwargs: Any) -> VisionTransformer:
    """A size for tests and laptops: 0.27 M parameters."""
    return _vit(kwargs, 64, 16, **TEST)


def vit_tiny_patch16_224(**kwargs: Any) -> VisionTransformer:
    """ViT-Ti/16, 224 px, 5.7 M parameters."""
    return _vit(kwargs, 224, 16, **TINY)


def vit_tiny_patch16_384(**kwargs: Any) -> VisionTransformer:
    """ViT-Ti/16, 384 px, 5.8 M parameters."""
    return _vit(kwargs, 384, 16, **TINY)


def vit_small_patch8_224(**kwargs: Any) -> VisionTransformer:
    """ViT-S/8, 224 px, 22.1 M parameters; as DINO trained it, with ImageNet's mean and deviation."""
    return _vit(kwargs, 224, 8, **SMALL, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)


def vit_small_patch16_224(**kwargs: Any) -> VisionTransformer:
    """ViT-S/16, 224 px, 22.1 M parameters."""
    return _vit(kwargs, 224, 16, **SMALL)


def vit_small_patch16_384(**kwargs: Any) -> VisionTransformer:
    """ViT-S/16, 384 px, 22.2 M parameters."""
    return _vit(kwargs, 384, 16, **SMALL)


def vit_small_patch32_224(**kwargs: Any) -> VisionTransformer:
    """ViT-S/32, 224 px, 22.9 M parameters."""
    return _vit(kwargs, 224, 32, **SMALL)


def vit_small_patch32_384(**kwargs: Any) -> VisionTransformer:
    """ViT-S/32, 384 px, 22.9 M parameters."""
    return _vit(kwargs, 384, 32, **SMALL)


def vit_base_patch8_224(**kwargs: Any) -> VisionTransformer:
    """ViT-B/8, 224 px, 86.6 M parameters."""
    return _vit(kwargs, 224, 8, **BASE)


def vit_base_patch16_224(**kwargs: Any) -> VisionTransformer:
    """ViT-B/16, 224 px, 86.6 M parameters."""
    return _vit(kwargs, 224, 16, **BASE)


def vit_base_patch16_384(**kwargs: Any) -> VisionTransformer:
    """ViT-B/16, 384 px, 86.9 M parameters."""
    return _vit(kwargs, 384, 16, **BASE)


def vit_base_patch32_224(**kwargs: Any) -> VisionTransformer:
    """ViT-B/32, 224 px, 88.2 M parameters."""
    return _vit(kwargs, 224, 32, **BASE)


def vit_base_patch32_384(**kwargs: Any) -> VisionTransformer:
    """ViT-B/32, 384 px, 88.3 M parameters."""
    return _vit(kwargs, 384, 32, **BASE)


def vit_large_patch14_224(**kwargs: Any) -> VisionTransformer:
    """ViT-L/14, 224 px, 304.2 M parameters."""
    return _vit(kwargs, 224, 14, **LARGE)


def vit_large_patch16_224(**kwargs: Any) -> VisionTransformer:
    """ViT-L/16, 224 px, 304.3 M parameters."""
    return _vit(kwargs, 224, 16, **LARGE)


def vit_large_patch16_384(**kwargs: Any) -> VisionTransformer:
    """ViT-L/16, 384 px, 304.7 M parameters."""
    return _vit(kwargs, 384, 16, **LARGE)


def vit_large_patch32_224(**kwargs: Any) -> VisionTransformer:
    """ViT-L/32, 224 px, 305.5 M parameters."""
    return _vit(kwargs, 224, 32, **LARGE)


def vit_large_patch32_384(**kwargs: Any) -> VisionTransformer:
    """ViT-L/32, 384 px, 306.6 M parameters."""
    return _vit(kwargs, 384, 32, **LARGE)


def vit_huge_patch14_224(**kwargs: Any) -> VisionTransformer:
    """ViT-H/14, 224 px, 632.0 M parameters."""
    return _vit(kwargs, 224, 14, **HUGE)
