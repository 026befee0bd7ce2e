# SPDX-License-Identifier: Apache-2.0
"""BEiT's weights as timm (our own names), the paper's code and transformers (in memory and on the hub) spell them.

The network that pretrains and the classifier share one table: a checkpoint of the first loads into the second, and so
does SimMIM's encoder.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from fvm_fast.layers.pos_embed import resize_pos_embed
from fvm_fast.layers.relative_position import square_window
from fvm_fast.layers.relative_position_attention import CLASS_TOKEN_ROWS, resize_relative_position_table
from fvm_fast.weights import vit
from fvm_fast.weights.simmim_encoder import decoder_of, encoder_of, is_of_simmim, refuse_simmim
from fvm_fast.weights.spelling import Spelling, StateDict, inverse, merge_qkv, rename, split_qkv

_TABLE = "relative_position_bias_table"
_SHARED = f"rel_pos_bias.{_TABLE}"
_BUFFERS = "relative_position_index"
_OF_PRETRAINING = ("mask_token", "lm_head.", "cls_pt_layers.", "decoder.")

_TRANSFORMERS_STEM = {
    "cls_token": "beit.embeddings.cls_token",
    "mask_token": "beit.embeddings.mask_token",
    "pos_embed": "beit.embeddings.position_embeddings",
    "patch_embed.proj": "beit.embeddings.patch_embeddings.projection",
    "fc_norm": "beit.pooler.layernorm",
    "head": "classifier",
    "lm_head": "lm_head",
}

# As transformers 5 holds them in memory.
TRANSFORMERS = _TRANSFORMERS_STEM | {
    _SHARED: f"beit.shared_position_bias.{_TABLE}",
    "blocks.{i}.norm1": "beit.layers.{i}.layernorm_before",
    "blocks.{i}.attn.q.weight": "beit.layers.{i}.attention.q_proj.weight",
    "blocks.{i}.attn.k.weight": "beit.layers.{i}.attention.k_proj.weight",
    "blocks.{i}.attn.v.weight": "beit.layers.{i}.attention.v_proj.weight",
    "blocks.{i}.attn.q_bias": "beit.layers.{i}.attention.q_proj.bias",
    "blocks.{i}.attn.v_bias": "beit.layers.{i}.attention.v_proj.bias",
    f"blocks.{{i}}.attn.{_TABLE}": f"beit.layers.{{i}}.relative_position_bias.{_TABLE}",
    "blocks.{i}.attn.proj": "beit.layers.{i}.attention.o_proj",
    "blocks.{i}.gamma_1": "beit.layers.{i}.lambda_1",
    "blocks.{i}.norm2": "beit.layers.{i}.layernorm_after",
    "blocks.{i}.mlp.fc1": "beit.layers.{i}.mlp.fc1",
    "blocks.{i}.mlp.fc2": "beit.layers.{i}.mlp.fc2",
    "blocks.{i}.gamma_2": "beit.layers.{i}.lambda_2",
}

# As transformers 4 held them, and as every version writes them to disk.
TRANSFORMERS_HUB = _TRANSFORMERS_STEM | {
    _SHARED: f"beit.encoder.relative_position_bias.{_TABLE}",
    "blocks.{i}.norm1": "beit.encoder.layer.{i}.layernorm_before",
    "blocks.{i}.attn.q.weight": "beit.encoder.layer.{i}.attention.attention.query.weight",
    "blocks.{i}.attn.k.weight": "beit.encoder.layer.{i}.attention.attention.key.weight",
    "blocks.{i}.attn.v.weight": "beit.encoder.layer.{i}.attention.attention.value.weight",
    "blocks.{i}.attn.q_bias": "beit.encoder.layer.{i}.attention.attention.query.bias",
    "blocks.{i}.attn.v_bias": "beit.encoder.layer.{i}.attention.attention.value.bias",
    f"blocks.{{i}}.attn.{_TABLE}": f"beit.encoder.layer.{{i}}.attention.attention.relative_position_bias.{_TABLE}",
    "blocks.{i}.attn.proj": "beit.encoder.layer.{i}.attention.output.dense",
    "blocks.{i}.gamma_1": "beit.encoder.layer.{i}.lambda_1",
    "blocks.{i}.norm2": "beit.encoder.layer.{i}.layernorm_after",
    "blocks.{i}.mlp.fc1": "beit.encoder.layer.{i}.intermediate.dense",
    "blocks.{i}.mlp.fc2": "beit.encoder.layer.{i}.output.dense",
    "blocks.{i}.gamma_2": "beit.encoder.layer.{i}.lambda_2",
}


def adapt(state: StateDict, model: nn.Module, resize: str | None) -> list[str]:
    """Fits a state dict in our names to the model, in place, and says what was done.

    A table that all blocks shared becomes one of each block where the model has those; tables for another grid are
    resized by BEiT's geometric rule, absolute positions by the rule ``resize`` (None: the model's own). A classifier
    leaves out what pretraining alone needs.
    """
    notes = [] if hasattr(model, "mask_token") else _leave_pretraining_out(state, model)
    notes += _resize_positions(state, model, resize)
    tables = [name for name in model.state_dict() if name.endswith(_TABLE)]
    if _SHARED in state and _SHARED not in tables and tables:
        shared = state.pop(_SHARED)
        state.update({name: shared for name in tables})
        notes.append(f"copied the table of relative positions that all blocks shared to {len(tables)} blocks")
    return notes + _resize_tables(state, tables, model.patch_embed.grid_size)


def _leave_pretraining_out(state: StateDict, model: nn.Module) -> list[str]:
    """Drops the mask token and the vocabulary, and the norm before the pooling where the model's comes after it."""
    names = [name for name in state if name.startswith(_OF_PRETRAINING)]
    if not names:
        return []
    notes = [f"left out the {len(names)} tensors that pretraining alone needs"]
    if isinstance(model.norm, nn.Identity) and "fc_norm.weight" not in state:
        names += [name for name in state if name.startswith("norm.")]
        notes.append("left out norm; the model has fc_norm instead, after the pooling")
    for name in names:
        del state[name]
    return notes


def _resize_positions(state: StateDict, model: nn.Module, resize: str | None) -> list[str]:
    positions, rule, grid = state.get("pos_embed"), resize or model.pos_embed_resize, model.patch_embed.grid_size
    if positions is None or model.pos_embed is None or positions.shape == model.pos_embed.shape:
        return []
    state["pos_embed"] = resize_pos_embed(positions, grid, rule=rule)
    return [f"resized pos_embed from {positions.shape[1] - 1} patches to {grid[0]} x {grid[1]} ({rule} rule)"]


def _resize_tables(state: StateDict, names: Collection[str], grid: tuple[int, int]) -> list[str]:
    rows = {state[name].shape[0] for name in names if name in state}
    wanted = (2 * grid[0] - 1) * (2 * grid[1] - 1) + CLASS_TOKEN_ROWS
    notes = []
    for old_rows in sorted(rows - {wanted}):
        old = square_window(old_rows - CLASS_TOKEN_ROWS)
        for name in names:
            if name in state and len(state[name]) == old_rows:
                state[name] = resize_relative_position_table(state[name], grid, old_window=old)
        notes.append(f"resized tables of relative positions from {old[0]} x {old[1]} to {grid[0]} x {grid[1]}")
    return notes


def without_buffers(state: StateDict) -> StateDict:
    """Without the index of each table, which the paper's code and old versions of transformers store beside it."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(_BUFFERS)}


def from_simmim(state: StateDict) -> StateDict:
    """SimMIM's encoder in our names, with its mask token, and its decoder as it is; ``adapt`` drops these."""
    return without_buffers(encoder_of(state)) | decoder_of(state)


def from_transformers(state: StateDict) -> StateDict:
    """Either spelling of BeitModel, BeitForImageClassification or BeitForMaskedImageModeling, in our names."""
    state = without_buffers(state)
    owners = ("beit.", "classifier.", "lm_head.", "layernorm.")
    if not any(name.startswith("beit.") for name in state):  # BeitModel by itself
        owners = ()
    state = {name if name.startswith(owners) else f"beit.{name}": tensor for name, tensor in state.items()}
    table = _with_norm(TRANSFORMERS_HUB if _is_hub(state) else TRANSFORMERS, "lm_head.weight" in state)
    return merge_qkv(rename(state, inverse(table), "our Beit"))


def to_transformers(state: StateDict) -> StateDict:
    """Our names as transformers 5 holds them, for ``load_state_dict`` of the class that has the head."""
    table = _with_norm(TRANSFORMERS, "lm_head.weight" in state)
    return rename(split_qkv(state), table, "transformers' BEiT")


def to_transformers_hub(state: StateDict) -> StateDict:
    """Our names as transformers writes them to disk: for ``from_pretrained`` of every version."""
    table = _with_norm(TRANSFORMERS_HUB, "lm_head.weight" in state)
    return rename(split_qkv(state), table, "transformers' BEiT")


def _with_norm(table: Mapping[str, str], has_lm_head: bool) -> dict[str, str]:
    """The last norm belongs to the encoder, or to the head over the vocabulary."""
    return dict(table) | {"norm": "layernorm" if has_lm_head else "beit.layernorm"}


def transformers_config(model: nn.Module) -> dict[str, Any]:
    """The ``BeitConfig`` of this model as transformers' ``config.json``."""
    block, pretraining = model.blocks[0], hasattr(model, "lm_head")
    config = vit.transformers_config(model)
    del config["qkv_bias"]
    return config | {
        "architectures": ["BeitForMaskedImageModeling" if pretraining else "BeitForImageClassification"],
        "model_type": "beit",
        "vocab_size": model.lm_head.out_features if pretraining else 8192,
        "use_mask_token": pretraining,
        "use_absolute_position_embeddings": model.pos_embed is not None,
        "use_relative_position_bias": block.attn.window_size is not None,
        "use_shared_relative_position_bias": model.rel_pos_bias is not None,
        "use_mean_pooling": pretraining or model.global_pool == "avg",
        "layer_scale_init_value": 0.0 if block.gamma_1 is None else 0.1,
        "drop_path_rate": 0.0,
    }


def _refuse(model: nn.Module) -> str | None:
    """What names alone do not show: transformers' BEiT has both biases, squares, and pools in one of two ways."""
    if model.blocks[0].attn.q_bias is None:
        return "it needs the biases of query and value, the model has qkv_bias=False"
    rows, columns = model.patch_embed.grid_size
    if rows != columns:
        return f"it takes a table of rows x columns for one of columns x rows, the model's grid is {rows} x {columns}"
    has_fc_norm = not isinstance(model.fc_norm, nn.Identity)
    if not hasattr(model, "lm_head") and (model.global_pool, has_fc_norm) not in (("avg", True), ("token", False)):
        return (
            "it pools patches before the norm (global_pool='avg', use_fc_norm=True) or takes the class token after it "
            f"('token', False), the model has {model.global_pool!r} and {has_fc_norm}"
        )
    return None


def _is_timm(names: Collection[str]) -> bool:
    return "patch_embed.proj.weight" in names


def _is_hub(names: Collection[str]) -> bool:
    return any(".attention.attention.query." in name for name in names)


def _is_in_memory(names: Collection[str]) -> bool:
    return any(name.endswith(".attention.q_proj.weight") for name in names)


SPELLINGS = (
    Spelling("timm", _is_timm, without_buffers),  # the paper's code, too
    Spelling("transformers", _is_in_memory, from_transformers, to_transformers, _refuse, transformers_config),
    Spelling("transformers_hub", _is_hub, from_transformers, to_transformers_hub, _refuse, transformers_config),
    Spelling("simmim", is_of_simmim, from_simmim, refuse=refuse_simmim),
)
