# SPDX-License-Identifier: Apache-2.0
"""CLIP's weights as open_clip (our own names), OpenAI and transformers spell them."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from fvm_fast.layers.pos_embed import resize_pos_embed
from fvm_fast.weights.spelling import Spelling, StateDict, inverse, merge_qkv, rename, split_qkv

_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

# The two projections are transposed besides: see _PROJECTIONS.
TRANSFORMERS = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    **{f"visual.transformer.resblocks.{{i}}.{a}": f"vision_model.encoder.layers.{{i}}.{b}" for a, b in _BLOCK.items()},
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    **{f"transformer.resblocks.{{i}}.{a}": f"text_model.encoder.layers.{{i}}.{b}" for a, b in _BLOCK.items()},
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
}

_PROJECTIONS = ("visual_projection.weight", "text_projection.weight")
_FUSED, _PARTS = ".in_proj_", (".q_proj.", ".k_proj.", ".v_proj.")
_TEXT_TOWER = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
_OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")


def adapt(state: StateDict, model: nn.Module, resize: str | None) -> list[str]:
    """Fits a state dict in our names to the model, in place, and says what was done.

    The image tower's positions are resized by the rule ``resize`` (None: ``timm``, which is open_clip's too). The text
    tower's are cut to a shorter context: captions that fit it are embedded exactly as before.
    """
    notes = []
    for name in ("logit_scale", "logit_bias"):
        if name in state and state[name].numel() == 1:
            state[name] = state[name].reshape(())
    name, wanted = "visual.positional_embedding", model.visual.positional_embedding
    if name in state and state[name].shape != wanted.shape:
        rule, grid = resize or "timm", model.visual.grid_size
        notes.append(f"resized {name} from {len(state[name]) - 1} patches to {grid[0]} x {grid[1]} ({rule} rule)")
        state[name] = resize_pos_embed(state[name][None], grid, rule=rule)[0]
    name, wanted = "positional_embedding", model.positional_embedding
    if name in state and len(state[name]) > len(wanted):
        notes.append(f"cut {name} from {len(state[name])} to {len(wanted)} tokens")
        state[name] = state[name][: len(wanted)]
    return notes


def from_custom_text(state: StateDict) -> StateDict:
    """open_clip's ``CustomTextCLIP``, whose text tower is under ``text.``, in our names."""
    return {name.removeprefix("text."): tensor for name, tensor in state.items()}


def to_custom_text(state: StateDict) -> StateDict:
    """Our names with the text tower under ``text.``, for open_clip's ``CustomTextCLIP``."""
    return {f"text.{name}" if name.startswith(_TEXT_TOWER) else name: tensor for name, tensor in state.items()}


def from_openai(state: StateDict) -> StateDict:
    """OpenAI's state dict in our names: the same, without the three sizes stored among the weights."""
    return {name: tensor for name, tensor in state.items() if name not in _OPENAI_SIZES}


def to_openai(state: StateDict) -> StateDict:
    """Our names with the three sizes that OpenAI's loader reads."""
    patches, patch_size = len(state["visual.positional_embedding"]) - 1, state["visual.conv1.weight"].shape[-1]
    sizes = (round(patches**0.5) * patch_size, len(state["positional_embedding"]), len(state["token_embedding.weight"]))
    return state | {name: torch.tensor(size) for name, size in zip(_OPENAI_SIZES, sizes, strict=True)}


def from_transformers(state: StateDict) -> StateDict:
    """``CLIPModel``'s names in ours."""
    state = {name: tensor for name, tensor in state.items() if not name.endswith("embeddings.position_ids")}
    return merge_qkv(rename(_transposed(state), inverse(TRANSFORMERS), "our CLIP"), _FUSED, _PARTS)


def to_transformers(state: StateDict) -> StateDict:
    """Our names as ``CLIPModel`` has them, in memory and on disk."""
    return _transposed(rename(split_qkv(state, _FUSED, _PARTS), TRANSFORMERS, "transformers' CLIPModel"))


def transformers_config(model: nn.Module) -> dict[str, Any]:
    """The ``CLIPConfig`` of this model as transformers' ``config.json``."""
    vision = _tower_config(model.visual.transformer, model.numerics) | {
        "image_size": model.visual.image_size[0],
        "patch_size": model.visual.patch_size,
    }
    text = _tower_config(model.transformer, model.numerics) | {
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context_length,
        "bos_token_id": model.vocab_size - 2,
        "eos_token_id": model.vocab_size - 1,
        "pad_token_id": 0,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model.visual.output_dim,
        "vision_config": vision,
        "text_config": text,
    }


def _tower_config(transformer: nn.Module, numerics: dict[str, Any]) -> dict[str, Any]:
    block = transformer.resblocks[0]
    return {
        "hidden_size": transformer.width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": transformer.layers,
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": numerics["act"],
        "layer_norm_eps": numerics["norm_eps"],
    }


def _transposed(state: StateDict) -> StateDict:
    """The projections of transformers are Linear layers [out, in], ours are matrices [in, out]."""
    return {name: t.T.contiguous() if name in _PROJECTIONS else t for name, t in state.items()}


def _refuse(model: nn.Module) -> str | None:
    if model.visual.grid_size[0] != model.visual.grid_size[1]:
        return f"its images are square, the model's {model.visual.image_size}"
    return None if model.logit_bias is None else "it has no logit_bias"


def _refuse_openai(model: nn.Module) -> str | None:
    if model.numerics != {"norm_eps": 1e-5, "act": "quick_gelu"}:
        return f"it needs norm_eps=1e-5 and quick_gelu=True, the model has {model.numerics}"
    return _refuse(model)


def _is_openai(names: Collection[str]) -> bool:
    return "input_resolution" in names and "visual.conv1.weight" in names


def _is_open_clip(names: Collection[str]) -> bool:
    return "visual.conv1.weight" in names and "input_resolution" not in names and not _is_custom_text(names)


def _is_custom_text(names: Collection[str]) -> bool:
    return "visual.conv1.weight" in names and "text.token_embedding.weight" in names


def _is_transformers(names: Collection[str]) -> bool:
    return "vision_model.embeddings.patch_embedding.weight" in names


SPELLINGS = (
    Spelling("open_clip", _is_open_clip),
    Spelling("open_clip_custom_text", _is_custom_text, from_custom_text, to_custom_text),
    Spelling("openai", _is_openai, from_openai, to_openai, _refuse_openai),
    Spelling("transformers", _is_transformers, from_transformers, to_transformers, _refuse, transformers_config),
)
