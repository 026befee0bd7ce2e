# SPDX-License-Identifier: Apache-2.0
"""The distilled DeiT's weights as timm and the paper (our own names) and transformers (in memory and on the hub) write.

The undistilled DeiT and DeiT III are VisionTransformers: ``weights/vit.py``.
"""

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from fvm_fast.weights import vit
from fvm_fast.weights.spelling import Spelling, StateDict, inverse, merge_qkv, rename, split_qkv

adapt = vit.adapt  # one row of positions more, which the model knows


def _table(vits: dict[str, str]) -> dict[str, str]:
    """ViT's table with the second token and the second head."""
    table = {ours: re.sub(r"^vit\.", "deit.", theirs) for ours, theirs in vits.items()}
    return table | {
        "dist_token": "deit.embeddings.distillation_token",
        "head": "cls_classifier",
        "head_dist": "distillation_classifier",
    }


TRANSFORMERS = _table(vit.TRANSFORMERS)
TRANSFORMERS_HUB = _table(vit.TRANSFORMERS_HUB)


def from_transformers(state: StateDict) -> StateDict:
    """Either spelling of DeiTModel or DeiTForImageClassificationWithTeacher, in our names; the pooler is left out.

    DeiTForImageClassification has the class token's head only: it becomes ``head``, and ``head_dist`` is missing.
    """
    state = {name: tensor for name, tensor in state.items() if not re.match(r"(deit\.)?pooler\.", name)}
    state = {re.sub(r"^classifier\.", "cls_classifier.", name): tensor for name, tensor in state.items()}
    state = {name if _has_owner(name) else f"deit.{name}": tensor for name, tensor in state.items()}
    table = TRANSFORMERS_HUB if _is_hub(state) else TRANSFORMERS
    return merge_qkv(rename(state, inverse(table), "our VisionTransformerDistilled"))


def to_transformers(state: StateDict) -> StateDict:
    """Our names as transformers 5 holds them: for ``DeiTForImageClassificationWithTeacher.load_state_dict``."""
    return rename(split_qkv(state), TRANSFORMERS, "transformers' DeiT")


def to_transformers_hub(state: StateDict) -> StateDict:
    """Our names as transformers writes them to disk: for ``from_pretrained`` of every version."""
    return rename(split_qkv(state), TRANSFORMERS_HUB, "transformers' DeiT")


def transformers_config(model: nn.Module) -> dict[str, Any]:
    """The ``DeiTConfig`` of this model as transformers' ``config.json``."""
    names = {"architectures": ["DeiTForImageClassificationWithTeacher"], "model_type": "deit"}
    return vit.transformers_config(model) | names


def _has_owner(name: str) -> bool:
    return name.startswith(("deit.", "cls_classifier.", "distillation_classifier."))


def _is_hub(names: Collection[str]) -> bool:
    return _is_deit(names) and any(".attention.attention.query." in name for name in names)


def _is_in_memory(names: Collection[str]) -> bool:
    return _is_deit(names) and any(".attention.q_proj." in name for name in names)


def _is_deit(names: Collection[str]) -> bool:
    return any(name.endswith("embeddings.distillation_token") for name in names)


def _is_timm(names: Collection[str]) -> bool:
    return "patch_embed.proj.weight" in names


def _refuse(model: nn.Module) -> str | None:
    """What names alone do not show: transformers' DeiT has a position for every token, and all biases."""
    if model.no_embed_class or model.pos_embed is None:
        return "it needs a position embedding with rows for both tokens"
    if model.blocks[0].attn.proj.bias is None:
        return "it needs the projections' biases, the model has proj_bias=False"
    return None


SPELLINGS = (
    Spelling("timm", _is_timm),
    Spelling("transformers", _is_in_memory, from_transformers, to_transformers, _refuse, transformers_config),
    Spelling("transformers_hub", _is_hub, from_transformers, to_transformers_hub, _refuse, transformers_config),
)
