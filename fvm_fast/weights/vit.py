# SPDX-License-Identifier: Apache-2.0
"""ViT's weights as timm (our names), transformers (in memory and on the hub), torchvision and DeiT III spell them."""

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from fvm_fast.layers.pos_embed import resize_pos_embed
from fvm_fast.weights.spelling import Spelling, StateDict, inverse, merge_qkv, rename, split_qkv

_TRANSFORMERS_STEM = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "head": "classifier",
}

# As transformers 5 holds them in memory.
TRANSFORMERS = _TRANSFORMERS_STEM | {
    "blocks.{i}.norm1": "vit.layers.{i}.layernorm_before",
    "blocks.{i}.attn.q": "vit.layers.{i}.attention.q_proj",
    "blocks.{i}.attn.k": "vit.layers.{i}.attention.k_proj",
    "blocks.{i}.attn.v": "vit.layers.{i}.attention.v_proj",
    "blocks.{i}.attn.proj": "vit.layers.{i}.attention.o_proj",
    "blocks.{i}.norm2": "vit.layers.{i}.layernorm_after",
    "blocks.{i}.mlp.fc1": "vit.layers.{i}.mlp.fc1",
    "blocks.{i}.mlp.fc2": "vit.layers.{i}.mlp.fc2",
}

# As transformers 4 held them, and as every version writes them to disk.
TRANSFORMERS_HUB = _TRANSFORMERS_STEM | {
    "blocks.{i}.norm1": "vit.encoder.layer.{i}.layernorm_before",
    "blocks.{i}.attn.q": "vit.encoder.layer.{i}.attention.attention.query",
    "blocks.{i}.attn.k": "vit.encoder.layer.{i}.attention.attention.key",
    "blocks.{i}.attn.v": "vit.encoder.layer.{i}.attention.attention.value",
    "blocks.{i}.attn.proj": "vit.encoder.layer.{i}.attention.output.dense",
    "blocks.{i}.norm2": "vit.encoder.layer.{i}.layernorm_after",
    "blocks.{i}.mlp.fc1": "vit.encoder.layer.{i}.intermediate.dense",
    "blocks.{i}.mlp.fc2": "vit.encoder.layer.{i}.output.dense",
}

TORCHVISION = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj": "conv_proj",
    "blocks.{i}.norm1": "encoder.layers.encoder_layer_{i}.ln_1",
    "blocks.{i}.attn.qkv.weight": "encoder.layers.encoder_layer_{i}.self_attention.in_proj_weight",
    "blocks.{i}.attn.qkv.bias": "encoder.layers.encoder_layer_{i}.self_attention.in_proj_bias",
    "blocks.{i}.attn.proj": "encoder.layers.encoder_layer_{i}.self_attention.out_proj",
    "blocks.{i}.norm2": "encoder.layers.encoder_layer_{i}.ln_2",
    "blocks.{i}.mlp.fc1": "encoder.layers.encoder_layer_{i}.mlp.0",
    "blocks.{i}.mlp.fc2": "encoder.layers.encoder_layer_{i}.mlp.3",
    "norm": "encoder.ln",
    "head": "heads.head",
}

_ACT_IN_TRANSFORMERS = {"gelu_tanh": "gelu_pytorch_tanh"}


def adapt(state: StateDict, model: nn.Module, resize: str | None) -> list[str]:
    """Fits a state dict in our names to the model, in place, and says what was done.

    A patch projection stored as a Linear [D, C p p] becomes a convolution's [D, C, p, p]; a position embedding for
    another grid is resized by the rule ``resize`` (None: the model's own rule). Of a masked autoencoder the encoder is
    taken.
    """
    notes = [] if hasattr(model, "decoder_blocks") else _take_encoder(state, model)
    weight, pos_embed = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    wanted = model.patch_embed.proj.weight.shape
    if weight is not None and weight.ndim == 2 and weight.numel() == wanted.numel():
        state["patch_embed.proj.weight"] = weight.reshape(wanted)
        notes.append(f"reshaped patch_embed.proj.weight {list(weight.shape)} -> {list(wanted)}")
    if pos_embed is not None and model.pos_embed is not None and pos_embed.shape != model.pos_embed.shape:
        rule, grid = resize or model.pos_embed_resize, model.patch_embed.grid_size
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        state["pos_embed"] = resize_pos_embed(pos_embed, grid, num_prefix_tokens=prefix, rule=rule)
        patches = pos_embed.shape[1] - prefix
        notes.append(f"resized pos_embed from {patches} patches to {grid[0]} x {grid[1]} ({rule} rule)")
    return notes


def from_transformers(state: StateDict) -> StateDict:
    """Either spelling of ViTModel, ViTForImageClassification or ViTMAEForPreTraining, in our names; no pooler."""
    decoder = {name: tensor for name, tensor in state.items() if name.startswith("decoder.")}  # ``adapt`` drops it
    state = {name: tensor for name, tensor in state.items() if not re.match(r"(vit\.)?pooler\.|decoder\.", name)}
    state = {n if n.startswith(("vit.", "classifier.")) else f"vit.{n}": tensor for n, tensor in state.items()}
    table = TRANSFORMERS_HUB if _is_hub(state) else TRANSFORMERS
    return merge_qkv(rename(state, inverse(table), "our VisionTransformer")) | decoder


def to_transformers(state: StateDict) -> StateDict:
    """Our names as transformers 5 holds them in memory: for ``ViTForImageClassification.load_state_dict``."""
    return rename(split_qkv(state), TRANSFORMERS, "transformers' ViT")


def to_transformers_hub(state: StateDict) -> StateDict:
    """Our names as transformers writes them to disk: for ``from_pretrained`` of every version."""
    return rename(split_qkv(state), TRANSFORMERS_HUB, "transformers' ViT")


def from_torchvision(state: StateDict) -> StateDict:
    """torchvision's names in ours; the MLP's first names (``linear_1``, ``linear_2``) too."""
    old = {".mlp.linear_1.": ".mlp.0.", ".mlp.linear_2.": ".mlp.3."}
    state = {re.sub(r"\.mlp\.linear_\d\.", lambda m: old[m[0]], name): tensor for name, tensor in state.items()}
    return rename(state, inverse(TORCHVISION), "our VisionTransformer")


def to_torchvision(state: StateDict) -> StateDict:
    """Our names as ``torchvision.models.vision_transformer.VisionTransformer`` has them."""
    return rename(state, TORCHVISION, "torchvision's ViT")


def from_deit3(state: StateDict) -> StateDict:
    """The names of DeiT III's repository, which has LayerScale as ``gamma_1`` and ``gamma_2``, in ours."""
    return {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name): tensor for name, tensor in state.items()}


def to_deit3(state: StateDict) -> StateDict:
    """Our names as ``vit_models`` of DeiT III's repository has them."""
    return {re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name): tensor for name, tensor in state.items()}


def transformers_config(model: nn.Module) -> dict[str, Any]:
    """The ``ViTConfig`` of this model as transformers' ``config.json``."""
    block, (height, width) = model.blocks[0], model.patch_embed.img_size
    act = model.numerics["act"]
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": _ACT_IN_TRANSFORMERS.get(act, act),
        "layer_norm_eps": model.numerics["norm_eps"],
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_embed.patch_size[0],
        "num_channels": model.patch_embed.proj.in_channels,
        "qkv_bias": block.attn.qkv.bias is not None,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": {str(i): f"LABEL_{i}" for i in range(model.num_classes)},
        "label2id": {f"LABEL_{i}": i for i in range(model.num_classes)},
    }


def is_of_mae_decoder(name: str) -> bool:
    """Whether a tensor of a masked autoencoder, in its own or in transformers' names, belongs to the decoder."""
    return name == "mask_token" or name.startswith(("decoder_", "decoder."))


def _take_encoder(state: StateDict, model: nn.Module) -> list[str]:
    """Leaves out a masked autoencoder's decoder, and the norm before the pooling where the model's comes after it."""
    decoder = [name for name in state if is_of_mae_decoder(name)]
    pools_first = isinstance(model.norm, nn.Identity) and not isinstance(model.fc_norm, nn.Identity)
    norm = [name for name in state if name.startswith("norm.")] if pools_first and "fc_norm.weight" not in state else []
    for name in decoder + norm:
        del state[name]
    notes = [f"left out the {len(decoder)} tensors of a masked autoencoder's decoder"] if decoder else []
    return notes + (["left out norm; the model has fc_norm instead, after the pooling"] if norm else [])


def _refuse(model: nn.Module) -> str | None:
    """What names alone do not show: the other libraries' ViT has one class token, with a position, and pools it."""
    if model.num_prefix_tokens != 1 or not model.has_class_token or model.no_embed_class or model.pos_embed is None:
        return "it needs one class token and a position embedding with a row for it"
    if model.global_pool != "token":
        return f"it pools the class token, the model has global_pool={model.global_pool!r}"
    if model.blocks[0].attn.proj.bias is None:
        return "it needs the projections' biases, the model has proj_bias=False"
    return None


def _refuse_torchvision(model: nn.Module) -> str | None:
    if model.blocks[0].attn.qkv.bias is None:
        return "it needs the bias of qkv, the model has qkv_bias=False"
    if model.numerics["act"] != "gelu":
        return f"its activation is gelu, the model's {model.numerics['act']}"
    return _refuse(model)


def _refuse_deit3(model: nn.Module) -> str | None:
    """Its network has one class token, whose position is not learned, and LayerScale."""
    if model.num_prefix_tokens != 1 or not model.has_class_token or not model.no_embed_class or model.pos_embed is None:
        return "it needs one class token and positions for the patches only (no_embed_class=True)"
    if isinstance(model.blocks[0].ls1, nn.Identity):
        return "it needs LayerScale, the model has init_values=None"
    if model.global_pool != "token":
        return f"it pools the class token, the model has global_pool={model.global_pool!r}"
    return None


def _is_hub(names: Collection[str]) -> bool:
    return any(".attention.attention.query." in name for name in names)


def _is_in_memory(names: Collection[str]) -> bool:
    return any(re.fullmatch(r"(vit\.)?layers\.\d+\.attention\.q_proj\.weight", name) for name in names)


def _is_timm(names: Collection[str]) -> bool:
    return "patch_embed.proj.weight" in names and not _is_deit3(names)


def _is_deit3(names: Collection[str]) -> bool:
    return "patch_embed.proj.weight" in names and any(name.endswith(".gamma_1") for name in names)


def _is_torchvision(names: Collection[str]) -> bool:
    return "conv_proj.weight" in names


SPELLINGS = (
    Spelling("timm", _is_timm),
    Spelling("transformers", _is_in_memory, from_transformers, to_transformers, _refuse, transformers_config),
    Spelling("transformers_hub", _is_hub, from_transformers, to_transformers_hub, _refuse, transformers_config),
    Spelling("torchvision", _is_torchvision, from_torchvision, to_torchvision, _refuse_torchvision),
    Spelling("deit3", _is_deit3, from_deit3, to_deit3, _refuse_deit3),
)
