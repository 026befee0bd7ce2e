# SPDX-License-Identifier: Apache-2.0
"""Swin's weights, v1 and v2, as timm (our own names), microsoft, transformers and torchvision spell them.

Of SimMIM, in its own or in transformers' names, the encoder is read.

Merging opens a stage here and in timm and closes one everywhere else: their ``downsample`` has a number less. v2 has no
bias for k: where a library keeps one, it multiplies it by zero.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fvm_fast.layers.relative_position import (
    log_spaced_coordinates,
    relative_position_index,
    resize_relative_position_bias,
    square_window,
)
from fvm_fast.layers.swin_block import resample_patch_embed
from fvm_fast.layers.swin_transformer import SwinTransformerV2
from fvm_fast.weights.simmim_encoder import decoder_of, encoder_of, is_of_simmim, refuse_simmim
from fvm_fast.weights.spelling import Spelling, StateDict, inverse, merge_qkv, rename, split_qkv
from fvm_fast.weights.swin_limits import blocks_of, has_qkv_bias, mlp_ratio, refuse_torchvision, refuse_transformers

_TABLE = "relative_position_bias_table"
_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")
_FUSED, _PARTS = ".attn.qkv.", (".attn.q.", ".attn.k.", ".attn.v.")

_COMMON_BLOCK = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
_HUB_BLOCK = _COMMON_BLOCK | {
    "attn.q": "attention.self.query",
    "attn.k": "attention.self.key",
    "attn.v": "attention.self.value",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}

# One block's modules, each stage's names in front of them. As transformers 5 holds v1 in memory.
TRANSFORMERS_BLOCK = _COMMON_BLOCK | {
    "attn.q": "attention.q_proj",
    "attn.k": "attention.k_proj",
    "attn.v": "attention.v_proj",
    "attn.proj": "attention.o_proj",
    f"attn.{_TABLE}": f"attention.relative_position_bias.{_TABLE}",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}

# As transformers 4 held v1, and as every version writes it to disk.
TRANSFORMERS_HUB_BLOCK = _HUB_BLOCK | {f"attn.{_TABLE}": f"attention.self.{_TABLE}"}

# v2, in memory and on disk alike.
TRANSFORMERS_V2_BLOCK = _HUB_BLOCK | {
    "attn.logit_scale": "attention.self.logit_scale",
    "attn.cpb_mlp.0": "attention.self.continuous_position_bias_mlp.0",
    "attn.cpb_mlp.2": "attention.self.continuous_position_bias_mlp.2",
}

TORCHVISION_BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    f"attn.{_TABLE}": f"attn.{_TABLE}",
    "attn.logit_scale": "attn.logit_scale",
    "attn.cpb_mlp.0": "attn.cpb_mlp.0",
    "attn.cpb_mlp.2": "attn.cpb_mlp.2",
    "norm2": "norm2",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}

_ACT_IN_TRANSFORMERS = {"gelu_tanh": "gelu_pytorch_tanh"}


def adapt(state: StateDict, model: nn.Module, resize: str | None) -> list[str]:
    """Fits a state dict in our names to the model, in place, and says what was done.

    Tables of biases for other windows are resized by the rule ``resize`` (None: the model's own), a projection for
    other patches is resampled. v2 has no tables: its networks answer for any window. Of SimMIM the encoder is taken.
    """
    notes, resized = [] if hasattr(model, "mask_token") else _take_encoder(state), set()
    weight, wanted = state.get("patch_embed.proj.weight"), model.patch_embed.proj.weight.shape
    if weight is not None and weight.ndim == 4 and weight.shape[2:] != wanted[2:]:
        state["patch_embed.proj.weight"] = resample_patch_embed(weight, tuple(wanted[2:]))
        notes.append(f"resampled patch_embed.proj.weight {list(weight.shape)} -> {list(wanted)}")
    for name, module in model.named_modules():
        table = state.get(f"{name}.{_TABLE}")
        if table is None or not hasattr(module, _TABLE) or table.shape == getattr(module, _TABLE).shape:
            continue
        new, old, rule = module.window_size, square_window(len(table)), resize or model.table_resize
        state[f"{name}.{_TABLE}"] = resize_relative_position_bias(table, new, old_window=old, rule=rule)
        resized.add(f"windows of {old[0]} x {old[1]} to {new[0]} x {new[1]} ({rule} rule)")
    return notes + [f"resized the {_TABLE}s from {sizes}" for sizes in sorted(resized)]


def _take_encoder(state: StateDict) -> list[str]:
    """Leaves out SimMIM's mask token and decoder."""
    names = [name for name in state if name == "mask_token" or name.startswith("decoder.")]
    for name in names:
        del state[name]
    return [f"left out the {len(names)} tensors that pretraining alone needs"] if names else []


# ---- timm and microsoft: one block's names, merging before or after


def from_timm(state: StateDict) -> StateDict:
    """A state dict without the masks and tables that some versions of every library store among the weights."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(_BUFFERS)}


def from_microsoft(state: StateDict) -> StateDict:
    """The Swin repository's state dict in our names."""
    state = from_timm(state)
    return {re.sub(r"^head\.", "head.fc.", _renumbered(name, 1)): tensor for name, tensor in state.items()}


def from_simmim(state: StateDict) -> StateDict:
    """SimMIM's encoder in our names, with its mask token, and its decoder as it is; ``adapt`` drops these."""
    encoder = encoder_of(state)
    return (from_microsoft(encoder) if _is_microsoft(encoder) else from_timm(encoder)) | decoder_of(state)


def to_microsoft(state: StateDict) -> StateDict:
    """Our names as the Swin repository's; it computes masks and indices itself, and loads with ``strict=False``."""
    return {_renumbered(name, -1).replace("head.fc.", "head."): tensor for name, tensor in state.items()}


def _renumbered(name: str, by: int) -> str:
    return re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + by}.downsample.", name)


# ---- transformers


def from_transformers(state: StateDict) -> StateDict:
    """``Swin[v2]ForImageClassification``, ``...ForMaskedImageModeling`` or ``...Model``, v1 in both spellings."""
    state = from_timm(state)
    v2 = _is_transformers_v2(state)
    prefix = "swinv2." if v2 else "swin."
    owners = (prefix, "classifier.", "decoder.")
    state = {n if n.startswith(owners) else prefix + n: tensor for n, tensor in state.items()}
    v1_block = TRANSFORMERS_HUB_BLOCK if _is_hub(state) else TRANSFORMERS_BLOCK
    table = _transformers_table(state, TRANSFORMERS_V2_BLOCK if v2 else v1_block)
    state = rename(state, inverse(table), "our Swin")
    return merge_qkv(_named_biases(state) if v2 else state, _FUSED, _PARTS)


def to_transformers(state: StateDict) -> StateDict:
    """Our names as transformers 5 holds them in memory: for ``SwinForImageClassification.load_state_dict``."""
    return _to_transformers(state, TRANSFORMERS_BLOCK)


def to_transformers_hub(state: StateDict) -> StateDict:
    """Our names as transformers writes them to disk: for ``from_pretrained`` of every version."""
    return _to_transformers(state, TRANSFORMERS_HUB_BLOCK)


def _to_transformers(state: StateDict, block: Mapping[str, str]) -> StateDict:
    if _is_v2(state):
        block, state = TRANSFORMERS_V2_BLOCK, _unnamed_biases(state)
    return rename(split_qkv(state, _FUSED, _PARTS), _transformers_table(state, block), "transformers' Swin")


def _transformers_table(state: StateDict, block: Mapping[str, str]) -> dict[str, str]:
    model = "swinv2" if block is TRANSFORMERS_V2_BLOCK else "swin"
    table = {
        "patch_embed.proj": f"{model}.embeddings.patch_embeddings.projection",
        "patch_embed.norm": f"{model}.embeddings.norm",
        "mask_token": f"{model}.embeddings.mask_token",
        "decoder.0": "decoder.0",
        "norm": f"{model}.layernorm",
        "head.fc": "classifier",
    }
    for stage in range(_stages(state)):
        theirs = f"{model}.encoder.layers.{stage}"
        table |= {f"layers.{stage}.blocks.{{i}}.{a}": f"{theirs}.blocks.{{i}}.{b}" for a, b in block.items()}
        table |= {
            f"layers.{stage + 1}.downsample.{part}": f"{theirs}.downsample.{part}" for part in ("norm", "reduction")
        }
    return table


def _named_biases(state: StateDict) -> StateDict:
    """v2's biases of q and v under our names: they belong to no Linear."""
    return {re.sub(r"\.attn\.([qv])\.bias$", r".attn.\1_bias", name): tensor for name, tensor in state.items()}


def _unnamed_biases(state: StateDict) -> StateDict:
    return {re.sub(r"\.attn\.([qv])_bias$", r".attn.\1.bias", name): tensor for name, tensor in state.items()}


def transformers_config(model: nn.Module) -> dict[str, Any]:
    """The ``SwinConfig`` or ``Swinv2Config`` of this model as transformers' ``config.json``."""
    v2, blocks, (height, width) = isinstance(model, SwinTransformerV2), blocks_of(model), model.patch_embed.img_size
    act = model.numerics["act"]
    config = {
        "architectures": ["Swinv2ForImageClassification" if v2 else "SwinForImageClassification"],
        "model_type": "swinv2" if v2 else "swin",
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_embed.patch_size[0],
        "num_channels": model.patch_embed.proj.in_channels,
        "embed_dim": model.embed_dim,
        "depths": [len(stage.blocks) for stage in model.layers],
        "num_heads": [stage.blocks[0].attn.num_heads for stage in model.layers],
        "window_size": max(block.window_size[0] for block in blocks),
        "mlp_ratio": mlp_ratio(blocks[0]),
        "qkv_bias": has_qkv_bias(blocks[0].attn),
        "hidden_act": _ACT_IN_TRANSFORMERS.get(act, act),
        "layer_norm_eps": model.numerics["norm_eps"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": {str(i): f"LABEL_{i}" for i in range(model.num_classes)},
        "label2id": {f"LABEL_{i}": i for i in range(model.num_classes)},
    }
    if v2:
        sizes = [stage.blocks[0].attn.pretrained_window_size[0] for stage in model.layers]
        config["pretrained_window_sizes"] = sizes
    return config


# ---- torchvision


def from_torchvision(state: StateDict) -> StateDict:
    """torchvision's names in ours, v1 or v2; the bias of v2's k, which it never uses, is left out."""
    state = rename(from_timm(state), inverse(_torchvision_table(state)), "our Swin")
    if not _is_v2(state):
        return state
    result = {}
    for name, tensor in state.items():
        if name.endswith(".attn.qkv.bias"):
            q_bias, _, v_bias = tensor.chunk(3)
            result |= {name.replace("qkv.bias", "q_bias"): q_bias, name.replace("qkv.bias", "v_bias"): v_bias}
        else:
            result[name] = tensor
    return result


def to_torchvision(state: StateDict) -> StateDict:
    """Our names as ``torchvision.models.SwinTransformer`` has them.

    It stores v1's indices too, which are added here. Of v2, ``torchvision_buffers`` makes what it stores besides.
    """
    result = {}
    for name, tensor in state.items():
        if name.endswith(".attn.q_bias"):
            v_bias = state[name.replace("q_bias", "v_bias")]
            result[name.replace("q_bias", "qkv.bias")] = torch.cat([tensor, torch.zeros_like(tensor), v_bias])
        elif not name.endswith(".attn.v_bias"):
            result[name] = tensor
    result = rename(result, _torchvision_table(state), "torchvision's Swin")
    tables = {name: tensor for name, tensor in result.items() if name.endswith(_TABLE)}
    indices = {
        name.replace(_TABLE, _BUFFERS[0]): relative_position_index(square_window(len(table))).flatten()
        for name, table in tables.items()
    }
    return result | indices


def torchvision_buffers(model: nn.Module) -> StateDict:
    """What torchvision's Swin stores besides weights: join it to ``export_weights(model, to="torchvision")``.

    v1's export has it already; v2's does not know the windows, since its weights do not depend on them.
    """
    buffers = {}
    for s, stage in enumerate(model.layers):
        for i, block in enumerate(stage.blocks):
            prefix, window = f"features.{2 * s + 1}.{i}.attn", block.attn.window_size
            buffers[f"{prefix}.relative_position_index"] = relative_position_index(window).flatten()
            if isinstance(model, SwinTransformerV2):
                buffers[f"{prefix}.relative_coords_table"] = log_spaced_coordinates(window)
    return buffers


def _torchvision_table(state: StateDict) -> dict[str, str]:
    table = {"patch_embed.proj": "features.0.0", "patch_embed.norm": "features.0.2", "norm": "norm", "head.fc": "head"}
    for stage in range(_stages(state)):
        blocks, merging = f"features.{2 * stage + 1}", f"features.{2 * stage + 2}"
        table |= {f"layers.{stage}.blocks.{{i}}.{a}": f"{blocks}.{{i}}.{b}" for a, b in TORCHVISION_BLOCK.items()}
        table |= {f"layers.{stage + 1}.downsample.{part}": f"{merging}.{part}" for part in ("norm", "reduction")}
    return table


def _stages(state: Mapping[str, Tensor]) -> int:
    """Stages of a state dict in any spelling; torchvision counts mergings too, so it may be more than there are."""
    numbers = (re.search(r"(?:layers|features)\.(\d+)\.", name) for name in state)
    return 1 + max((int(match[1]) for match in numbers if match), default=0)


def _is_v2(names: Collection[str]) -> bool:
    return any(name.endswith(".logit_scale") for name in names)


def _is_microsoft(names: Collection[str]) -> bool:
    closing = "layers.0.downsample.reduction.weight" in names or "head.weight" in names
    return "patch_embed.proj.weight" in names and closing


def _is_timm(names: Collection[str]) -> bool:
    return "patch_embed.proj.weight" in names and not _is_microsoft(names)


def _is_transformers_v2(names: Collection[str]) -> bool:
    return any(".continuous_position_bias_mlp." in name for name in names)


def _is_hub(names: Collection[str]) -> bool:
    return any(".attention.self.query." in name for name in names)


def _is_in_memory(names: Collection[str]) -> bool:
    return any(".attention.q_proj." in name for name in names) or _is_transformers_v2(names)


def _is_torchvision(names: Collection[str]) -> bool:
    return "features.0.0.weight" in names


SPELLINGS = (
    Spelling("timm", _is_timm, from_timm),
    Spelling("microsoft", _is_microsoft, from_microsoft, to_microsoft),
    Spelling(
        "transformers", _is_in_memory, from_transformers, to_transformers, refuse_transformers, transformers_config
    ),
    Spelling(
        "transformers_hub", _is_hub, from_transformers, to_transformers_hub, refuse_transformers, transformers_config
    ),
    Spelling("simmim", is_of_simmim, from_simmim, refuse=refuse_simmim),
    Spelling("torchvision", _is_torchvision, from_torchvision, to_torchvision, refuse_torchvision),
)
