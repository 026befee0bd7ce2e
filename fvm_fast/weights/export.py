# SPDX-License-Identifier: Apache-2.0
"""Weights out, in the names of any ecosystem that has the model."""

import json
import os
from pathlib import Path

from torch import nn

from fvm_fast.weights.family import converter_of
from fvm_fast.weights.files import NUMERICS_KEY, write_safetensors
from fvm_fast.weights.spelling import StateDict


def export_weights(model: nn.Module, to: str | None = None, path: str | os.PathLike | None = None) -> StateDict:
    """Writes a model's weights as another library spells them.

    Args:
        model: one of ours.
        to: ``timm``, ``transformers`` (in memory), ``transformers_hub`` (on disk), ``torchvision``, ``open_clip``, ...;
            None for our own names.
        path: also write a ``.safetensors`` file, with the numerics in its metadata; a path without that ending is a
            folder, which gets ``model.safetensors`` and, for transformers, the ``config.json`` that it reads.

    Returns:
        Detached tensors by their names there; those that need no conversion share memory with the model.

    Raises:
        ValueError: the spelling is unknown, or that library's model cannot hold these weights.
    """
    spellings = {spelling.name: spelling for spelling in converter_of(model).SPELLINGS}
    to = next(iter(spellings)) if to is None else to
    if to not in spellings:
        raise ValueError(f"export_weights: to should be one of {', '.join(spellings)}, got {to!r}")
    spelling = spellings[to]
    if spelling.refuse is not None and (reason := spelling.refuse(model)):
        raise ValueError(f"export_weights: {to} cannot hold this {type(model).__name__}: {reason}")
    state = spelling.from_native({name: tensor.detach() for name, tensor in model.state_dict().items()})
    if path is not None:
        path = Path(path)
        file = path if path.suffix == ".safetensors" else path / "model.safetensors"
        write_safetensors(state, file, {NUMERICS_KEY: json.dumps(getattr(model, "numerics", {}))})
        if file != path and spelling.config is not None:
            (path / "config.json").write_text(json.dumps(spelling.config(model), indent=2) + "\n")
    return state
