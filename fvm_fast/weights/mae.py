# SPDX-License-Identifier: Apache-2.0
"""The masked autoencoder's weights as its paper (our own names) and transformers (in memory and on the hub) spell them.

``weights/vit.py`` reads the same checkpoints for a VisionTransformer, which takes the encoder and leaves the rest.
"""

from collections.abc import Collection
from typing import Any

from torch import nn

from fvm_fast.layers.pos_embed import resize_pos_embed
from fvm_fast.weights import vit
from fvm_fast.weights.spelling import Spelling, StateDict, inverse, merge_qkv, rename, split_qkv


def _table(encoder: dict[str, str], layers: str) -> dict[str, str]:
    """ViT's table without the head, and the same for the decoder, whose blocks are built alike."""
    encoder = {ours: theirs for ours, theirs in encoder.items() if ours != "head"}
    blocks = {name: place for name, place in encoder.items() if name.startswith("blocks.")}
    return encoder | {
        "mask_token": "decoder.mask_token",
        "decoder_pos_embed": "decoder.decoder_pos_embed",
        "decoder_embed": "decoder.decoder_embed",
        **{f"decoder_{name}": place.replace(layers, "decoder.decoder_layers.") for name, place in blocks.items()},
        "decoder_norm": "decoder.decoder_norm",
        "decoder_pred": "decoder.decoder_pred",
    }


TRANSFORMERS = _table(vit.TRANSFORMERS, "vit.layers.")
TRANSFORMERS_HUB = _table(vit.TRANSFORMERS_HUB, "vit.encoder.layer.")


def adapt(state: StateDict, model: nn.Module, resize: str | None) -> list[str]:
    """Fits a state dict in our names to the model, in place, and says what was done; both tables of positions too."""
    notes = vit.adapt(state, model, resize)
    name, wanted = "decoder_pos_embed", model.decoder_pos_embed
    if name in state and state[name].shape != wanted.shape:
        rule, grid = resize or model.pos_embed_resize, model.patch_embed.grid_size
        notes.append(f"resized {name} from {state[name].shape[1] - 1} patches to {grid[0]} x {grid[1]} ({rule} rule)")
        state[name] = resize_pos_embed(state[name], grid, rule=rule)
    return notes


def from_transformers(state: StateDict) -> StateDict:
    """Either spelling of ViTMAEForPreTraining, in our names.

    transformers 5 writes ``decoder_encoder.layer.`` to disk where version 4 wrote ``decoder_layers.``; both are read.
    """
    state = {name.replace(".decoder_encoder.layer.", ".decoder_layers."): tensor for name, tensor in state.items()}
    table = TRANSFORMERS_HUB if vit._is_hub(state) else TRANSFORMERS
    return merge_qkv(rename(state, inverse(table), "our MaskedAutoencoderViT"))


def to_transformers(state: StateDict) -> StateDict:
    """Our names as transformers 5 holds them in memory: for ``ViTMAEForPreTraining.load_state_dict``."""
    return rename(split_qkv(state), TRANSFORMERS, "transformers' ViTMAE")


def to_transformers_hub(state: StateDict) -> StateDict:
    """Our names as transformers 4 wrote them to disk: for ``from_pretrained`` of every version."""
    return rename(split_qkv(state), TRANSFORMERS_HUB, "transformers' ViTMAE")


def to_timm(state: StateDict) -> StateDict:
    """The encoder alone, for timm's ``vit_*.mae`` with ``num_classes=0``."""
    return {name: tensor for name, tensor in state.items() if not vit.is_of_mae_decoder(name)}


def transformers_config(model: nn.Module) -> dict[str, Any]:
    """The ``ViTMAEConfig`` of this model as transformers' ``config.json``."""
    config, block = vit.transformers_config(model), model.decoder_blocks[0]
    del config["id2label"], config["label2id"]
    return config | {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "decoder_hidden_size": model.decoder_embed.out_features,
        "decoder_num_hidden_layers": len(model.decoder_blocks),
        "decoder_num_attention_heads": block.attn.num_heads,
        "decoder_intermediate_size": block.mlp.fc1.out_features,
        "mask_ratio": model.mask_ratio,
        "norm_pix_loss": model.norm_pix_loss,
    }


def _refuse(model: nn.Module) -> str | None:
    """What names alone do not show: transformers' patchify takes square images only."""
    height, width = model.patch_embed.img_size
    return None if height == width else f"its images are square, the model's {height} x {width}"


def _is_mae(names: Collection[str]) -> bool:
    return "patch_embed.proj.weight" in names


SPELLINGS = (
    Spelling("mae", _is_mae),
    Spelling("transformers", vit._is_in_memory, from_transformers, to_transformers, _refuse, transformers_config),
    Spelling("transformers_hub", vit._is_hub, from_transformers, to_transformers_hub, _refuse, transformers_config),
    Spelling("timm", lambda names: False, from_native=to_timm),  # written only: read, it is a "mae" without a decoder
)
