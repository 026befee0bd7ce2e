# SPDX-License-Identifier: Apache-2.0
"""A spelling: one ecosystem's names for the tensors of one family of models."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Spelling:
    """How one ecosystem writes a family's weights.

    Attributes:
        name: what ``export_weights(to=...)`` calls it.
        recognise: whether a checkpoint with these names is written so.
        to_native: a checkpoint so written, in our names.
        from_native: our state dict, so written.
        refuse: why this model cannot be written so, or None when it can.
        config: the ``config.json`` that belongs beside the weights, as a dict.
    """

    name: str
    recognise: Callable[[Collection[str]], bool]
    to_native: Callable[[StateDict], StateDict] = dict
    from_native: Callable[[StateDict], StateDict] = dict
    refuse: Callable[[nn.Module], str | None] | None = None
    config: Callable[[nn.Module], dict] | None = None


def rename(state: StateDict, table: Mapping[str, str], where: str) -> StateDict:
    """Renames every tensor by a table of modules (or of whole names), ``{i}`` standing for the number of a block.

    ``{"blocks.{i}.norm1": "layers.{i}.ln_1"}`` turns ``blocks.3.norm1.weight`` into ``layers.3.ln_1.weight``.

    Raises:
        ValueError: a name is not in the table; ``where`` says what was being converted.
    """
    rules = [(_pattern(old), new) for old, new in table.items()]
    renamed, homeless = {}, []
    for name, tensor in state.items():
        for pattern, new in rules:
            if match := pattern.fullmatch(name):
                renamed[new.replace("{i}", match.groupdict().get("i", "")) + match["leaf"]] = tensor
                break
        else:
            homeless.append(name)
    if homeless:
        raise ValueError(f"{where} has no place for {len(homeless)} of {len(state)} tensors: {listed(homeless)}")
    return renamed


def inverse(table: Mapping[str, str]) -> dict[str, str]:
    """The table of the way back."""
    return {new: old for old, new in table.items()}


def split_qkv(state: StateDict, fused: str = ".qkv.", parts: tuple[str, str, str] = (".q.", ".k.", ".v.")) -> StateDict:
    """Cuts every fused ``qkv`` tensor [3D, ...] into q, k and v [D, ...]."""
    result = {}
    for name, tensor in state.items():
        if fused in name:
            result |= {name.replace(fused, part): t for part, t in zip(parts, tensor.chunk(3), strict=True)}
        else:
            result[name] = tensor
    return result


def merge_qkv(state: StateDict, fused: str = ".qkv.", parts: tuple[str, str, str] = (".q.", ".k.", ".v.")) -> StateDict:
    """Joins q, k and v [D, ...] to the fused ``qkv`` [3D, ...]; a part that is absent (BEiT's key bias) is zero."""
    result = {}
    for name, tensor in state.items():
        part = next((p for p in parts if p in name), None)
        if part is None:
            result[name] = tensor
            continue
        trio = [state.get(name.replace(part, p)) for p in parts]
        result.setdefault(
            name.replace(part, fused), torch.cat([torch.zeros_like(tensor) if t is None else t for t in trio])
        )
    return result


def listed(names: Collection[str], limit: int = 5) -> str:
    """The first names, for a message."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{i\}", r"(?P<i>\d+)") + r"(?P<leaf>(?:\.weight|\.bias)?)")
