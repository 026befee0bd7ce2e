# SPDX-License-Identifier: Apache-2.0
"""Weights in: any spelling, any image size, checked as a whole before a single tensor is changed."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from fvm_fast.weights.family import converter_of
from fvm_fast.weights.files import read_checkpoint, unwrap
from fvm_fast.weights.spelling import Spelling, StateDict, listed


@dataclass(frozen=True)
class LoadReport:
    """What ``load_weights`` did.

    Attributes:
        spelling: whose names the checkpoint had.
        loaded: number of tensors copied.
        missing: parameters of the model that kept their values.
        unexpected: tensors of the checkpoint that were not used.
        notes: what had to be fitted, as sentences.
    """

    spelling: str
    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"loaded {self.loaded} tensors ({self.spelling} names)", *self.notes]
        parts += [f"not in the checkpoint: {listed(self.missing)}"] if self.missing else []
        parts += [f"not used: {listed(self.unexpected)}"] if self.unexpected else []
        return "; ".join(parts)


def load_weights(
    model: nn.Module,
    source: str | os.PathLike | Mapping[str, Any],
    *,
    strict: bool = True,
    exclude: str | Sequence[str] = (),
    resize: str | None = None,
    check_numerics: bool = True,
) -> LoadReport:
    """Loads a checkpoint of any known ecosystem into one of our models; a refusal leaves the model as it was.

    A model of other than three channels takes the first convolution of one with three, as timm converts it.

    Args:
        model: ours, on any device; the tensors are copied into its parameters and cast to their dtype.
        source: a file (``.safetensors``, ``.pth``, ``.pt``, ``.bin``), a folder of transformers', or a state dict; a
            training checkpoint (``{"model": ...}``, ``{"state_dict": ...}``) and ``module.`` prefixes are unwrapped.
        strict: refuse a checkpoint that lacks tensors or has more.
        exclude: shell patterns of our names that are not loaded and may be missing, such as ``"head.*"``.
        resize: rule for a position embedding of another size (``timm``, ``transformers``, ``torchvision``, ``dino``);
            None takes the model's own.
        check_numerics: refuse when the checkpoint says that it was trained with another norm epsilon or activation.

    Raises:
        FileNotFoundError, ValueError: a sentence with what was expected, what was got and what to do.
    """
    family = converter_of(model)
    state, numerics = (unwrap(source), {}) if isinstance(source, Mapping) else read_checkpoint(source)
    spelling = recognise(state, family.SPELLINGS)
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    state = _without(spelling.to_native(state), exclude)
    notes = family.adapt(state, model, resize) if hasattr(family, "adapt") else []

    wanted = _without(model.state_dict(), exclude)
    notes += _fit_channels(state, wanted, getattr(model, "default_cfg", {}).get("first_conv"))
    missing = tuple(name for name in wanted if name not in state)
    unexpected = tuple(name for name in state if name not in wanted)
    _check_names(missing, unexpected, len(wanted), strict)
    state = {name: tensor for name, tensor in state.items() if name in wanted}
    _check_shapes(state, wanted)
    if check_numerics:
        _check_numerics(numerics, getattr(model, "numerics", {}))
    model.load_state_dict(state, strict=False)
    return LoadReport(spelling.name, len(state), missing, unexpected, tuple(notes))


def _fit_channels(state: StateDict, wanted: Mapping[str, Tensor], first_conv: str | None) -> list[str]:
    """Fits a first convolution [D, 3, p, p] to images of C channels, in place and by timm's rule; says so.

    One channel gets the sum of the three, more channels their repetition, scaled so that equal channels give as much.
    """
    name = f"{first_conv}.weight"
    if name not in state or name not in wanted:
        return []
    weight, channels = state[name], wanted[name].shape[1]
    if weight.ndim != 4 or weight.shape[1] != 3 or channels == 3:
        return []
    if channels == 1:
        state[name] = weight.sum(dim=1, keepdim=True)
    else:
        state[name] = weight.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)
    return [f"fitted {name} from 3 channels to {channels}"]


def recognise(state: StateDict, spellings: Sequence[Spelling]) -> Spelling:
    """The spelling that a state dict is written in.

    Raises:
        ValueError: none of them.
    """
    for spelling in spellings:
        if spelling.recognise(state.keys()):
            return spelling
    known = ", ".join(spelling.name for spelling in spellings)
    raise ValueError(f"load_weights: the names should be those of {known}, got {listed(state)}")


def _without(state: StateDict, patterns: Sequence[str]) -> StateDict:
    return {name: t for name, t in state.items() if not any(fnmatchcase(name, pattern) for pattern in patterns)}


def _check_names(missing: Sequence[str], unexpected: Sequence[str], total: int, strict: bool) -> None:
    problems = [f"{len(missing)} of {total} tensors are missing ({listed(missing)})"] if missing else []
    problems += [f"{len(unexpected)} have no place in the model ({listed(unexpected)})"] if unexpected else []
    if problems and strict:
        raise ValueError(
            f"load_weights: the checkpoint should have the model's {total} tensors, but {' and '.join(problems)}; "
            "build the model to match, name what to leave with exclude=, or pass strict=False"
        )
    if len(missing) == total:
        raise ValueError(f"load_weights: none of the model's {total} tensors is there, got {listed(unexpected)}")


def _check_shapes(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{name} should be {list(wanted[name].shape)}, got {list(tensor.shape)}"
        for name, tensor in state.items()
        if tensor.shape != wanted[name].shape
    ]
    if wrong:
        raise ValueError(
            f"load_weights: {listed(wrong, limit=3)}; build the model with the checkpoint's sizes, or leave these out "
            "with exclude="
        )


def _check_numerics(checkpoint: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    for name, value in checkpoint.items():
        if name in model and model[name] != value:
            raise ValueError(
                f"load_weights: these weights were trained with {name}={value!r}, the model has {model[name]!r}; "
                "build it to match, or pass check_numerics=False"
            )
