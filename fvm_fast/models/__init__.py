# SPDX-License-Identifier: Apache-2.0
"""Every model by name: ``create_model("vit_base_patch16_224")``, ``list_models("clip_*")``."""

from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

from torch import nn

_TINYVIT = "fvm_fast.models.knowledge_distillation.tinyvit.model"
_BEIT = "fvm_fast.models.masked_modeling.beit.model"
_BEIT_PRETRAINING = "fvm_fast.models.masked_modeling.beit.pretraining"
_VIT = "fvm_fast.models.supervised_pretraining.vit.model"
_CLIP = "fvm_fast.models.contrastive_learning.clip.model"
_CONVNEXT = "fvm_fast.models.supervised_pretraining.convnext.model"
_DEIT = "fvm_fast.models.knowledge_distillation.deit.model"
_MAE = "fvm_fast.models.self_supervised.mae.model"
_SIMMIM = "fvm_fast.models.masked_modeling.simmim.model"
_SWIN = "fvm_fast.models.supervised_pretraining.swin.model"

# name -> "module:function". A module is imported when one of its models is first asked for.
MODELS: dict[str, str] = {
    "beit_base_patch16_224": f"{_BEIT}:beit_base_patch16_224",
    "beit_base_patch16_224_8k_vocab": f"{_BEIT_PRETRAINING}:beit_base_patch16_224_8k_vocab",
    "beit_base_patch16_224_8k_vocab_cls_pt": f"{_BEIT_PRETRAINING}:beit_base_patch16_224_8k_vocab_cls_pt",
    "beit_base_patch16_384": f"{_BEIT}:beit_base_patch16_384",
    "beit_large_patch16_224": f"{_BEIT}:beit_large_patch16_224",
    "beit_large_patch16_224_8k_vocab": f"{_BEIT_PRETRAINING}:beit_large_patch16_224_8k_vocab",
    "beit_large_patch16_224_8k_vocab_cls_pt": f"{_BEIT_PRETRAINING}:beit_large_patch16_224_8k_vocab_cls_pt",
    "beit_large_patch16_384": f"{_BEIT}:beit_large_patch16_384",
    "beit_large_patch16_512": f"{_BEIT}:beit_large_patch16_512",
    "beit_test_patch16_64": f"{_BEIT}:beit_test_patch16_64",
    "beit_test_patch16_64_64_vocab": f"{_BEIT_PRETRAINING}:beit_test_patch16_64_64_vocab",
    "beitv2_base_patch16_224": f"{_BEIT}:beitv2_base_patch16_224",
    "beitv2_large_patch16_224": f"{_BEIT}:beitv2_large_patch16_224",
    "clip_vit_b_16": f"{_CLIP}:clip_vit_b_16",
    "clip_vit_b_32": f"{_CLIP}:clip_vit_b_32",
    "clip_vit_bigg_14": f"{_CLIP}:clip_vit_bigg_14",
    "clip_vit_emoji": f"{_CLIP}:clip_vit_emoji",
    "clip_vit_g_14": f"{_CLIP}:clip_vit_g_14",
    "clip_vit_h_14": f"{_CLIP}:clip_vit_h_14",
    "clip_vit_l_14": f"{_CLIP}:clip_vit_l_14",
    "clip_vit_l_14_336": f"{_CLIP}:clip_vit_l_14_336",
    "clip_vit_test": f"{_CLIP}:clip_vit_test",
    "convnext_atto": f"{_CONVNEXT}:convnext_atto",
    "convnext_base": f"{_CONVNEXT}:convnext_base",
    "convnext_femto": f"{_CONVNEXT}:convnext_femto",
    "convnext_large": f"{_CONVNEXT}:convnext_large",
    "convnext_nano": f"{_CONVNEXT}:convnext_nano",
    "convnext_pico": f"{_CONVNEXT}:convnext_pico",
    "convnext_small": f"{_CONVNEXT}:convnext_small",
    "convnext_test": f"{_CONVNEXT}:convnext_test",
    "convnext_tiny": f"{_CONVNEXT}:convnext_tiny",
    "convnext_xlarge": f"{_CONVNEXT}:convnext_xlarge",
    "convnextv2_atto": f"{_CONVNEXT}:convnextv2_atto",
    "convnextv2_base": f"{_CONVNEXT}:convnextv2_base",
    "convnextv2_femto": f"{_CONVNEXT}:convnextv2_femto",
    "convnextv2_huge": f"{_CONVNEXT}:convnextv2_huge",
    "convnextv2_large": f"{_CONVNEXT}:convnextv2_large",
    "convnextv2_nano": f"{_CONVNEXT}:convnextv2_nano",
    "convnextv2_pico": f"{_CONVNEXT}:convnextv2_pico",
    "convnextv2_small": f"{_CONVNEXT}:convnextv2_small",
    "convnextv2_test": f"{_CONVNEXT}:convnextv2_test",
    "convnextv2_tiny": f"{_CONVNEXT}:convnextv2_tiny",
    "deit3_base_patch16_224": f"{_DEIT}:deit3_base_patch16_224",
    "deit3_base_patch16_384": f"{_DEIT}:deit3_base_patch16_384",
    "deit3_huge_patch14_224": f"{_DEIT}:deit3_huge_patch14_224",
    "deit3_large_patch16_224": f"{_DEIT}:deit3_large_patch16_224",
    "deit3_large_patch16_384": f"{_DEIT}:deit3_large_patch16_384",
    "deit3_medium_patch16_224": f"{_DEIT}:deit3_medium_patch16_224",
    "deit3_small_patch16_224": f"{_DEIT}:deit3_small_patch16_224",
    "deit3_small_patch16_384": f"{_DEIT}:deit3_small_patch16_384",
    "deit3_test_patch16_64": f"{_DEIT}:deit3_test_patch16_64",
    "deit_base_distilled_patch16_224": f"{_DEIT}:deit_base_distilled_patch16_224",
    "deit_base_distilled_patch16_384": f"{_DEIT}:deit_base_distilled_patch16_384",
    "deit_base_patch16_224": f"{_DEIT}:deit_base_patch16_224",
    "deit_base_patch16_384": f"{_DEIT}:deit_base_patch16_384",
    "deit_small_distilled_patch16_224": f"{_DEIT}:deit_small_distilled_patch16_224",
    "deit_small_patch16_224": f"{_DEIT}:deit_small_patch16_224",
    "deit_test_distilled_patch16_64": f"{_DEIT}:deit_test_distilled_patch16_64",
    "deit_test_patch16_64": f"{_DEIT}:deit_test_patch16_64",
    "deit_tiny_distilled_patch16_224": f"{_DEIT}:deit_tiny_distilled_patch16_224",
    "deit_tiny_patch16_224": f"{_DEIT}:deit_tiny_patch16_224",
    "mae_vit_base_patch16": f"{_MAE}:mae_vit_base_patch16",
    "mae_vit_huge_patch14": f"{_MAE}:mae_vit_huge_patch14",
    "mae_vit_large_patch16": f"{_MAE}:mae_vit_large_patch16",
    "mae_vit_test_patch8": f"{_MAE}:mae_vit_test_patch8",
    "simmim_swin_base_192": f"{_SIMMIM}:simmim_swin_base_192",
    "simmim_swin_test": f"{_SIMMIM}:simmim_swin_test",
    "simmim_vit_base_patch16_224": f"{_SIMMIM}:simmim_vit_base_patch16_224",
    "simmim_vit_test": f"{_SIMMIM}:simmim_vit_test",
    "swin_base_patch4_window7_224": f"{_SWIN}:swin_base_patch4_window7_224",
    "swin_base_patch4_window12_384": f"{_SWIN}:swin_base_patch4_window12_384",
    "swin_large_patch4_window7_224": f"{_SWIN}:swin_large_patch4_window7_224",
    "swin_large_patch4_window12_384": f"{_SWIN}:swin_large_patch4_window12_384",
    "swin_small_patch4_window7_224": f"{_SWIN}:swin_small_patch4_window7_224",
    "swin_test_patch4_window4_64": f"{_SWIN}:swin_test_patch4_window4_64",
    "swin_tiny_patch4_window7_224": f"{_SWIN}:swin_tiny_patch4_window7_224",
    "swinv2_base_window8_256": f"{_SWIN}:swinv2_base_window8_256",
    "swinv2_base_window12to16_192to256": f"{_SWIN}:swinv2_base_window12to16_192to256",
    "swinv2_base_window12to24_192to384": f"{_SWIN}:swinv2_base_window12to24_192to384",
    "swinv2_base_window16_256": f"{_SWIN}:swinv2_base_window16_256",
    "swinv2_large_window12to16_192to256": f"{_SWIN}:swinv2_large_window12to16_192to256",
    "swinv2_large_window12to24_192to384": f"{_SWIN}:swinv2_large_window12to24_192to384",
    "swinv2_small_window8_256": f"{_SWIN}:swinv2_small_window8_256",
    "swinv2_small_window16_256": f"{_SWIN}:swinv2_small_window16_256",
    "swinv2_test_window4_64": f"{_SWIN}:swinv2_test_window4_64",
    "swinv2_tiny_window8_256": f"{_SWIN}:swinv2_tiny_window8_256",
    "swinv2_tiny_window16_256": f"{_SWIN}:swinv2_tiny_window16_256",
    "tiny_vit_5m_224": f"{_TINYVIT}:tiny_vit_5m_224",
    "tiny_vit_11m_224": f"{_TINYVIT}:tiny_vit_11m_224",
    "tiny_vit_21m_224": f"{_TINYVIT}:tiny_vit_21m_224",
    "tiny_vit_21m_384": f"{_TINYVIT}:tiny_vit_21m_384",
    "tiny_vit_21m_512": f"{_TINYVIT}:tiny_vit_21m_512",
    "tiny_vit_test": f"{_TINYVIT}:tiny_vit_test",
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

_CLASSES = {
    "Beit": _BEIT,
    "BeitForMaskedImageModeling": _BEIT_PRETRAINING,
    "CLIP": _CLIP,
    "ConvNeXt": _CONVNEXT,
    "MaskedAutoencoderViT": _MAE,
    "SimMIM": _SIMMIM,
    "SwinTransformer": _SWIN,
    "SwinTransformerV2": _SWIN,
    "TinyVit": _TINYVIT,
    "VisionTransformer": _VIT,
    "VisionTransformerDistilled": _DEIT,
}

__all__ = [
    "Beit",
    "BeitForMaskedImageModeling",
    "CLIP",
    "ConvNeXt",
    "MODELS",
    "MaskedAutoencoderViT",
    "SimMIM",
    "SwinTransformer",
    "SwinTransformerV2",
    "TinyVit",
    "VisionTransformer",
    "VisionTransformerDistilled",
    "create_model",
    "list_models",
]


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern such as ``"vit_*_384"``, sorted."""
    return sorted(name for name in MODELS if fnmatchcase(name, pattern))


def create_model(
    name: str,
    *,
    features_only: bool = False,
    out_indices: int | tuple[int, ...] | None = None,
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Builds a model by name, with random weights (``fvm_fast.load_weights`` fills them in).

    Args:
        name: one of ``list_models()``.
        features_only: return a backbone whose forward gives a list of feature maps [B, D, rows, columns].
        out_indices: with ``features_only``, the last n blocks or stages for an int, or their numbers; None for the last
            three blocks, or all stages.
        pretrained: False; weights are never downloaded, ``load_weights`` reads files.
        **kwargs: override any size or argument of the model's constructor.

    Raises:
        ValueError: the name is unknown, and the message suggests the nearest ones; or ``pretrained`` is asked for.
    """
    if pretrained:
        raise ValueError(
            f"create_model: pretrained should be False, for nothing is downloaded, got {pretrained!r}; build {name!r} "
            "and call fvm_fast.load_weights(model, path) with a checkpoint of timm, transformers, torchvision, ..."
        )
    if name not in MODELS:
        begun = [known for known in list_models() if known.startswith(name)]
        nearest = (begun or get_close_matches(name, MODELS, n=3, cutoff=0.5))[:3]
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
