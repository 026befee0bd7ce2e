# SPDX-License-Identifier: Apache-2.0
"""TinyViT's weights as timm (our own names) and microsoft's repository spell them."""

from collections.abc import Collection, Mapping

from torch import nn

from fvm_fast.layers.attention_bias import resize_attention_biases
from fvm_fast.weights.spelling import Spelling, StateDict, inverse, rename

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _with_statistics(table: Mapping[str, str]) -> dict[str, str]:
    """Adds to each row of a batch norm the rows of its buffers."""
    buffers = {
        f"{ours}.{name}": f"{theirs}.{name}"
        for ours, theirs in table.items()
        if ours.endswith(".bn")
        for name in _STATISTICS
    }
    return dict(table) | buffers


def _convolutions(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.conv": f"{theirs}.c", f"{ours}.bn": f"{theirs}.bn"}


def _microsoft() -> dict[str, str]:
    """Ours -> theirs. The step to a stage stands at its start here, at the end of the one before there."""
    table = _convolutions("patch_embed.conv1", "patch_embed.seq.0") | _convolutions(
        "patch_embed.conv2", "patch_embed.seq.2"
    )
    for k in (1, 2, 3):
        table |= _convolutions(f"stages.0.blocks.{{i}}.conv{k}", f"layers.0.blocks.{{i}}.conv{k}")
    for s in (1, 2, 3):
        block, theirs = f"stages.{s}.blocks.{{i}}", f"layers.{s}.blocks.{{i}}"
        for k in (1, 2, 3):
            table |= _convolutions(f"stages.{s}.downsample.conv{k}", f"layers.{s - 1}.downsample.conv{k}")
        table |= _convolutions(f"{block}.local_conv", f"{theirs}.local_conv")
        same = ("attn.norm", "attn.qkv", "attn.proj", "attn.attention_biases", "mlp.norm", "mlp.fc1", "mlp.fc2")
        table |= {f"{block}.{name}": f"{theirs}.{name}" for name in same}
    return _with_statistics(table | {"head.norm": "norm_head", "head.fc": "head"})


MICROSOFT = _microsoft()


def adapt(state: StateDict, model: nn.Module, resize: str | None) -> list[str]:
    """Resizes the biases of attention to the model's windows, in place, by ``timm``'s rule (None) or ``microsoft``'s.

    Buffers that say which bias a pair of tokens reads are dropped: the model makes its own.
    """
    for name in [name for name in state if name.endswith("attention_bias_idxs")]:
        del state[name]
    rule, notes = resize or "timm", []
    for name, module in model.named_modules():
        biases = state.get(f"{name}.attention_biases")
        if biases is None or biases.shape[1] == module.attention_biases.shape[1]:
            continue
        side = module.window_size
        state[f"{name}.attention_biases"] = resize_attention_biases(biases, side, rule)
        notes.append(f"resized {name}.attention_biases to windows of {side} x {side} ({rule} rule)")
    return notes


def from_microsoft(state: StateDict) -> StateDict:
    """microsoft/Cream's TinyViT in our names."""
    state = {name: tensor for name, tensor in state.items() if not name.endswith("attention_bias_idxs")}
    return rename(state, inverse(MICROSOFT), "our TinyVit")


def to_microsoft(state: StateDict) -> StateDict:
    """Our names as microsoft/Cream's TinyViT has them."""
    return rename(state, MICROSOFT, "microsoft's TinyViT")


def _refuse(model: nn.Module) -> str | None:
    if model.head.global_pool != "avg":
        return f"it pools the mean, the model has global_pool={model.head.global_pool!r}"
    if model.numerics["norm_eps"] != 1e-5:
        return f"its norms have an epsilon of 1e-5, the model {model.numerics['norm_eps']:g}"
    if model.numerics["act"] != "gelu":
        return f"its activation is gelu, the model's {model.numerics['act']}"
    return None


def _is_timm(names: Collection[str]) -> bool:
    return "patch_embed.conv1.conv.weight" in names


def _is_microsoft(names: Collection[str]) -> bool:
    return "patch_embed.seq.0.c.weight" in names


SPELLINGS = (
    Spelling("timm", _is_timm),
    Spelling("microsoft", _is_microsoft, from_microsoft, to_microsoft, _refuse),
)
