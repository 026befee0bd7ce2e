# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint of SimMIM holds the encoder of another family: for SimMIM's converter and for that family's."""

from collections.abc import Collection

from torch import nn

from fvm_fast.weights.spelling import StateDict

ENCODER, DECODER = "encoder.", "decoder."


def is_of_simmim(names: Collection[str]) -> bool:
    """Whether these are the names of SimMIM, our own or the paper's."""
    return f"{ENCODER}mask_token" in names and f"{ENCODER}patch_embed.proj.weight" in names


def encoder_of(state: StateDict) -> StateDict:
    """The encoder's tensors under its own names, the mask token among them."""
    return {name.removeprefix(ENCODER): tensor for name, tensor in state.items() if name.startswith(ENCODER)}


def decoder_of(state: StateDict) -> StateDict:
    """The decoder's tensors, as they are."""
    return {name: tensor for name, tensor in state.items() if name.startswith(DECODER)}


def refuse_simmim(model: nn.Module) -> str:
    """Why an encoder alone is not written so."""
    return f"it has a decoder, which a {type(model).__name__} lacks; export the SimMIM itself"
