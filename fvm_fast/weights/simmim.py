# SPDX-License-Identifier: Apache-2.0
"""SimMIM's weights in our own names, and as the paper's code and transformers (in memory and on the hub) spell them.

Our names are the paper's, but for Swin's mergings, which open a stage here and close one there. ``weights/swin.py``
and ``weights/beit.py`` read the same checkpoints for a SwinTransformer and a Beit, which take the encoder only.
"""

from collections.abc import Collection
from typing import Any

from torch import nn

from fvm_fast.layers.swin_transformer import SwinTransformer
from fvm_fast.weights import beit, swin
from fvm_fast.weights.simmim_encoder import DECODER, ENCODER, decoder_of, encoder_of, is_of_simmim
from fvm_fast.weights.spelling import Spelling, StateDict
from fvm_fast.weights.swin_limits import refuse_transformers


def adapt(state: StateDict, model: nn.Module, resize: str | None) -> list[str]:
    """Fits a state dict in our names to the model, in place, and says what was done: as the encoder's family does."""
    family = swin if isinstance(model.encoder, SwinTransformer) else beit
    encoder = encoder_of(state)
    notes = family.adapt(encoder, model.encoder, resize)
    state.update(_as_encoder(encoder))
    return notes


def from_native(state: StateDict) -> StateDict:
    """Without the masks and indices that the paper's code stores among the weights."""
    return swin.from_timm(state)


def from_paper(state: StateDict) -> StateDict:
    """The names of SimMIM's repository in ours."""
    return _as_encoder(swin.from_microsoft(encoder_of(state))) | decoder_of(state)


def to_paper(state: StateDict) -> StateDict:
    """Our names as SimMIM's repository; it computes masks and indices itself, and loads with ``strict=False``."""
    return _as_encoder(swin.to_microsoft(encoder_of(state))) | decoder_of(state)


def from_transformers(state: StateDict) -> StateDict:
    """Either spelling of ``SwinForMaskedImageModeling``, in our names."""
    state = swin.from_transformers(state)
    encoder = {name: tensor for name, tensor in state.items() if not name.startswith(DECODER)}
    return _as_encoder(encoder) | decoder_of(state)


def to_transformers(state: StateDict) -> StateDict:
    """Our names as transformers 5 holds them in memory: for ``SwinForMaskedImageModeling.load_state_dict``."""
    return swin.to_transformers(encoder_of(state) | decoder_of(state))


def to_transformers_hub(state: StateDict) -> StateDict:
    """Our names as transformers writes them to disk: for ``from_pretrained`` of every version."""
    return swin.to_transformers_hub(encoder_of(state) | decoder_of(state))


def transformers_config(model: nn.Module) -> dict[str, Any]:
    """The ``SwinConfig`` of this model as transformers' ``config.json``."""
    config = swin.transformers_config(model.encoder)
    del config["id2label"], config["label2id"]
    return config | {
        "architectures": ["SwinForMaskedImageModeling"],
        "encoder_stride": model.encoder_stride,
        "drop_path_rate": 0.0,
    }


def _as_encoder(state: StateDict) -> StateDict:
    return {ENCODER + name: tensor for name, tensor in state.items()}


def _refuse(model: nn.Module) -> str | None:
    """What names alone do not show: transformers masks Swin, and a Vision Transformer without relative positions."""
    if not isinstance(model.encoder, SwinTransformer):
        return "its Vision Transformer has absolute positions, the model's a table of relative ones; it takes Swin only"
    height, width = model.patch_embed.img_size
    if height != width:
        return f"its images are square, the model's {height} x {width}"
    return refuse_transformers(model.encoder)


def _is_paper(names: Collection[str]) -> bool:
    return is_of_simmim(names) and f"{ENCODER}layers.0.downsample.reduction.weight" in names


SPELLINGS = (
    Spelling("simmim", lambda names: is_of_simmim(names) and not _is_paper(names), from_native),
    Spelling("microsoft", _is_paper, from_paper, to_paper),
    Spelling("transformers", swin._is_in_memory, from_transformers, to_transformers, _refuse, transformers_config),
    Spelling("transformers_hub", swin._is_hub, from_transformers, to_transformers_hub, _refuse, transformers_config),
)
