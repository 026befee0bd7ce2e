# SPDX-License-Identifier: Apache-2.0
"""Every model by name: ``create_model("vit_base_patch16_224")``, ``list_models("clip_*")``."""

from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

from torch import nn

_VIT = "fvm_fast.models.supervised_pretraining.vit.model"
_CLIP = "fvm_fast.models.contrastive_learning.clip.model"

# name -> "module:function". A module is imported when one of its models is first asked for.
MODELS: dict[str, str] = {
    "clip_vit_b_16": f"{_CLIP}:clip_vit_b_16",
    "clip_vit_b_32": f"{_CLIP}:clip_vit_b_32",
    "clip_vit_bigg_14": f"{_CLIP}:clip_vit_bigg_14",
    "clip_vit_emoji": f"{_CLIP}:clip_vit_emoji",
    "clip_vit_g_14": f"{_CLIP}:clip_vit_g_14",
    "clip_vit_h_14": f"{_CLIP}:clip_vit_h_14",
    "clip_vit_l_14": f"{_CLIP}:clip_vit_l_14",
    "clip_vit_l_14_336": f"{_CLIP}:clip_vit_l_14_336",
    "clip_vit_test": f"{_CLIP}:clip_vit_test",
    "vit_base_patch8_224": f"{_VIT}:vit_base_patch8_224",
    "vit_base_patch16_224": f"{_VIT}:vit_base_patch16_224",
    "vit_base_patch16_384": f"{_VIT}:vit_base_patch16_384",
    "vit_base_patch32_224": f"{_VIT}:vit_base_patch32_224",
    "vit_base_patch32_384": f"{_VIT}:vit_base_patch32_384",
    "vit_huge_patch14_224": f"{_VIT}:vit_huge_patch14_224",
    "vit_large_patch14_224": f"{_VIT}:vit_large_patch14_224",
    "vit_large_patch16_224": f"{_VIT}:vit_large_patch16_224",
    "vit_large_patch16_384": f"{_VIT}:vit_large_patch16_384",
    "vit_large_patch32_224": f"{_VIT}:vit_large_patch32_224",
    "vit_large_patch32_384": f"{_VIT}:vit_large_patch32_384",
    "vit_small_patch8_224": f"{_VIT}:vit_small_patch8_224",
    "vit_small_patch16_224": f"{_VIT}:vit_small_patch16_224",
    "vit_small_patch16_384": f"{_VIT}:vit_small_patch16_384",
    "vit_small_patch32_224": f"{_VIT}:vit_small_patch32_224",
    "vit_small_patch32_384": f"{_VIT}:vit_small_patch32_384",
    "vit_test_patch16_64": f"{_VIT}:vit_test_patch16_64",
    "vit_tiny_patch16_224": f"{_VIT}:vit_tiny_patch16_224",
    "vit_tiny_patch16_384": f"{_VIT}:vit_tiny_patch16_384",
}

_CLASSES = {"CLIP": _CLIP, "VisionTransformer": _VIT}

__all__ = ["CLIP", "MODELS", "VisionTransformer", "create_model", "list_models"]


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern such as ``"vit_*_384"``, sorted."""
    return sorted(name for name in MODELS if fnmatchcase(name, pattern))


def create_model(
    name: str,
    *,
    features_only: bool = False,
    out_indices: int | tuple[int, ...] = 3,
    **kwargs: Any,
) -> nn.Module:
    """Builds a model by name, with random weights (``fvm_fast.load_weights`` fills them in).

    Args:
        name: one of ``list_models()``.
        features_only: return a backbone whose forward gives a list of feature maps [B, D, rows, columns].
        out_indices: with ``features_only``, the last n blocks for an int, or the numbers of the blocks.
        **kwargs: override any size or argument of the model's constructor.

    Raises:
        ValueError: the name is unknown; the message suggests the nearest ones.
    """
    if name not in MODELS:
        nearest = get_close_matches(name, MODELS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, nearest))}?" if nearest else "list_models() names them all"
        raise ValueError(f"create_model: the name should be one of the {len(MODELS)} known, got {name!r}; {hint}")
    module, function = MODELS[name].split(":")
    model = getattr(import_module(module), function)(**kwargs)
    if not features_only:
        return model
    from fvm_fast.layers.feature_extractor import FeatureExtractor

    return FeatureExtractor(model, out_indices)


def __getattr__(name: str) -> Any:
    """Model classes on first use: ``from fvm_fast.models import VisionTransformer``."""
    if name in _CLASSES:
        return getattr(import_module(_CLASSES[name]), name)
    raise AttributeError(f"module 'fvm_fast.models' has no attribute {name!r}")
