# SPDX-License-Identifier: Apache-2.0
"""Swin Transformer v1 and v2 in the sizes of the papers and of timm.

``layers.SwinTransformer`` and ``layers.SwinTransformerV2`` are the models themselves; here are their sizes, under
timm's names.

Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, https://arxiv.org/abs/2103.14030
Swin Transformer V2: Scaling Up Capacity and Resolution, https://arxiv.org/abs/2111.09883
"""

from typing import Any

from fvm_fast.layers.backbone import IMAGENET_MEAN, IMAGENET_STD
from fvm_fast.layers.swin_transformer import SwinTransformer, SwinTransformerV2

TEST = {"embed_dim": 16, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 4, 8)}
TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
SMALL = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
LARGE = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}

# Pretrained at 192 px with windows of 12; the last map, of 6 x 6, is one window.
FROM_192 = {"pretrained_window_sizes": (12, 12, 12, 6)}


def _with_statistics(overrides: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    if overrides.get("in_chans", 3) == 3:
        sizes = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD} | sizes
    return sizes | overrides


def _swin(overrides: dict[str, Any], img_size: int, window_size: int, **sizes: Any) -> SwinTransformer:
    sizes |= {"img_size": img_size, "window_size": window_size}
    return SwinTransformer(**_with_statistics(overrides, sizes))


def _swinv2(overrides: dict[str, Any], img_size: int, window_size: int, **sizes: Any) -> SwinTransformerV2:
    sizes |= {"img_size": img_size, "window_size": window_size}
    return SwinTransformerV2(**_with_statistics(overrides, sizes))


def swin_test_patch4_window4_64(**kwargs: Any) -> SwinTransformer:
    """A size for tests and laptops: 0.5 M parameters."""
    return _swin(kwargs, 64, 4, **TEST)


def swin_tiny_patch4_window7_224(**kwargs: Any) -> SwinTransformer:
    """Swin-T, 224 px, 28.3 M parameters."""
    return _swin(kwargs, 224, 7, **TINY)


def swin_small_patch4_window7_224(**kwargs: Any) -> SwinTransformer:
    """Swin-S, 224 px, 49.6 M parameters."""
    return _swin(kwargs, 224, 7, **SMALL)


def swin_base_patch4_window7_224(**kwargs: Any) -> SwinTransformer:
    """Swin-B, 224 px, 87.8 M parameters."""
    return _swin(kwargs, 224, 7, **BASE)


def swin_base_patch4_window12_384(**kwargs: Any) -> SwinTransformer:
    """Swin-B, 384 px, 87.9 M parameters."""
    return _swin(kwargs, 384, 12, **BASE)


def swin_large_patch4_window7_224(**kwargs: Any) -> SwinTransformer:
    """Swin-L, 224 px, 196.5 M parameters."""
    return _swin(kwargs, 224, 7, **LARGE)


def swin_large_patch4_window12_384(**kwargs: Any) -> SwinTransformer:
    """Swin-L, 384 px, 196.7 M parameters."""
    return _swin(kwargs, 384, 12, **LARGE)


def swinv2_test_window4_64(**kwargs: Any) -> SwinTransformerV2:
    """A size for tests and laptops: 0.5 M parameters."""
    return _swinv2(kwargs, 64, 4, **TEST)


def swinv2_tiny_window8_256(**kwargs: Any) -> SwinTransformerV2:
    """SwinV2-T, 256 px, windows of 8, 28.3 M parameters."""
    return _swinv2(kwargs, 256, 8, **TINY)


def swinv2_tiny_window16_256(**kwargs: Any) -> SwinTransformerV2:
    """SwinV2-T, 256 px, windows of 16, 28.3 M parameters."""
    return _swinv2(kwargs, 256, 16, **TINY)


def swinv2_small_window8_256(**kwargs: Any) -> SwinTransformerV2:
    """SwinV2-S, 256 px, windows of 8, 49.7 M parameters."""
    return _swinv2(kwargs, 256, 8, **SMALL)


def swinv2_small_window16_256(**kwargs: Any) -> SwinTransformerV2:
    """SwinV2-S, 256 px, windows of 16, 49.7 M parameters."""
    return _swinv2(kwargs, 256, 16, **SMALL)


def swinv2_base_window8_256(**kwargs: Any) -> SwinTransformerV2:
    """SwinV2-B, 256 px, windows of 8, 87.9 M parameters."""
    return _swinv2(kwargs, 256, 8, **BASE)


def swinv2_base_window16_256(**kwargs: Any) -> SwinTransformerV2:
    """SwinV2-B, 256 px, windows of 16, 87.9 M parameters."""
    return _swinv2(kwargs, 256, 16, **BASE)


def swinv2_base_window12to16_192to256(**kwargs: Any) -> SwinTransformerV2:
    """SwinV2-B pretrained with windows of 12 at 192 px, for windows of 16 at 256 px, 87.9 M parameters."""
    return _swinv2(kwargs, 256, 16, **BASE, **FROM_192)


def swinv2_base_window12to24_192to384(**kwargs: Any) -> SwinTransformerV2:
    """SwinV2-B pretrained with windows of 12 at 192 px, for windows of 24 at 384 px, 87.9 M parameters."""
    return _swinv2(kwargs, 384, 24, **BASE, **FROM_192)


def swinv2_large_window12to16_192to256(**kwargs: Any) -> SwinTransformerV2:
    """SwinV2-L pretrained with windows of 12 at 192 px, for windows of 16 at 256 px, 196.7 M parameters."""
    return _swinv2(kwargs, 256, 16, **LARGE, **FROM_192)


def swinv2_large_window12to24_192to384(**kwargs: Any) -> SwinTransformerV2:
    """SwinV2-L pretrained with windows of 12 at 192 px, for windows of 24 at 384 px, 196.7 M parameters."""
    return _swinv2(kwargs, 384, 24, **LARGE, **FROM_192)
