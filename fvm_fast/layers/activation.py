# SPDX-License-Identifier: Apache-2.0
"""Activations by name: the same weights need the same curve, so the name travels with a checkpoint."""

from collections.abc import Callable
from functools import partial

from torch import nn

from fvm_fast.layers.residual_attention import QuickGELU

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


def get_act_layer(act: str | Callable[[], nn.Module] | None) -> Callable[[], nn.Module]:
    """Returns a constructor of the activation: a name of ``ACTIVATIONS``, a class (taken as it is), or None for GELU.

    Raises:
        ValueError: the name is unknown.
    """
    if act is None:
        return nn.GELU
    if not isinstance(act, str):
        return act
    if act not in ACTIVATIONS:
        raise ValueError(f"act_layer should be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    return ACTIVATIONS[act]


def activation_name(module: nn.Module) -> str:
    """The name under which ``get_act_layer`` builds this activation again; its class name if there is none."""
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    known = {QuickGELU: "quick_gelu", nn.ReLU: "relu", nn.SiLU: "silu"}
    return known.get(type(module), type(module).__name__)
