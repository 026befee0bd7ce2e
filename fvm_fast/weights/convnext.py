# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt's weights as timm (our own names), transformers, torchvision and the papers' repositories spell them."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from fvm_fast.weights.spelling import Spelling, StateDict, inverse, rename

_MLP_WEIGHTS = (".mlp.fc1.weight", ".mlp.fc2.weight")


def _by_stage(table: Mapping[str, str]) -> dict[str, str]:
    """Writes each row with ``{s}`` once for every stage; the first stage has no downsampling."""
    rows = {}
    for ours, theirs in table.items():
        for s in range(1 if ".downsample." in ours else 0, 4 if "{s}" in ours else 1):
            numbers = (("{s}", s), ("{2s}", 2 * s), ("{2s+1}", 2 * s + 1))
            a, b = ours, theirs
            for mark, number in numbers:
                a, b = a.replace(mark, str(number)), b.replace(mark, str(number))
            rows[a] = b
    return rows


# Without the prefix "convnext." or "convnextv2.", which all but the classifier has.
TRANSFORMERS = _by_stage(
    {
        "stem.0": "embeddings.patch_embeddings",
        "stem.1": "embeddings.layernorm",
        "stages.{s}.downsample.0": "encoder.stages.{s}.downsampling_layer.0",
        "stages.{s}.downsample.1": "encoder.stages.{s}.downsampling_layer.1",
        "stages.{s}.blocks.{i}.conv_dw": "encoder.stages.{s}.layers.{i}.dwconv",
        "stages.{s}.blocks.{i}.norm": "encoder.stages.{s}.layers.{i}.layernorm",
        "stages.{s}.blocks.{i}.mlp.fc1": "encoder.stages.{s}.layers.{i}.pwconv1",
        "stages.{s}.blocks.{i}.mlp.grn": "encoder.stages.{s}.layers.{i}.grn",
        "stages.{s}.blocks.{i}.mlp.fc2": "encoder.stages.{s}.layers.{i}.pwconv2",
        "stages.{s}.blocks.{i}.gamma": "encoder.stages.{s}.layers.{i}.layer_scale_parameter",
        "head.norm": "layernorm",
        "head.fc": "classifier",
    }
)

TORCHVISION = _by_stage(
    {
        "stem.0": "features.0.0",
        "stem.1": "features.0.1",
        "stages.{s}.downsample.0": "features.{2s}.0",
        "stages.{s}.downsample.1": "features.{2s}.1",
        "stages.{s}.blocks.{i}.conv_dw": "features.{2s+1}.{i}.block.0",
        "stages.{s}.blocks.{i}.norm": "features.{2s+1}.{i}.block.2",
        "stages.{s}.blocks.{i}.mlp.fc1": "features.{2s+1}.{i}.block.3",
        "stages.{s}.blocks.{i}.mlp.fc2": "features.{2s+1}.{i}.block.5",
        "stages.{s}.blocks.{i}.gamma": "features.{2s+1}.{i}.layer_scale",
        "head.norm": "classifier.0",
        "head.fc": "classifier.2",
    }
)

# facebookresearch/ConvNeXt and facebookresearch/ConvNeXt-V2
FACEBOOK = _by_stage(
    {
        "stem.0": "downsample_layers.0.0",
        "stem.1": "downsample_layers.0.1",
        "stages.{s}.downsample.0": "downsample_layers.{s}.0",
        "stages.{s}.downsample.1": "downsample_layers.{s}.1",
        "stages.{s}.blocks.{i}.conv_dw": "stages.{s}.{i}.dwconv",
        "stages.{s}.blocks.{i}.norm": "stages.{s}.{i}.norm",
        "stages.{s}.blocks.{i}.mlp.fc1": "stages.{s}.{i}.pwconv1",
        "stages.{s}.blocks.{i}.mlp.grn.weight": "stages.{s}.{i}.grn.gamma",
        "stages.{s}.blocks.{i}.mlp.grn.bias": "stages.{s}.{i}.grn.beta",
        "stages.{s}.blocks.{i}.mlp.fc2": "stages.{s}.{i}.pwconv2",
        "stages.{s}.blocks.{i}.gamma": "stages.{s}.{i}.gamma",
        "head.norm": "norm",
        "head.fc": "head",
    }
)


def adapt(state: StateDict, model: nn.Module, resize: str | None) -> list[str]:
    """Gives the MLPs' weights the shape that the model stores them in, [out, in] or that of a 1 x 1 convolution."""
    wanted, reshaped = model.state_dict(), 0
    for name, tensor in state.items():
        if name.endswith(_MLP_WEIGHTS) and name in wanted and tensor.shape[:2] == wanted[name].shape[:2]:
            reshaped += tensor.ndim != wanted[name].ndim
            state[name] = tensor.reshape(wanted[name].shape)
    return [f"reshaped {reshaped} MLP weights between Linear and 1 x 1 convolution"] if reshaped else []


def from_transformers(state: StateDict) -> StateDict:
    """ConvNextModel, ConvNextForImageClassification and those of version 2, in our names."""
    state = {name.removeprefix("convnext.").removeprefix("convnextv2."): tensor for name, tensor in state.items()}
    return _flat(rename(state, inverse(TRANSFORMERS), "our ConvNeXt"))


def to_transformers(state: StateDict) -> StateDict:
    """Our names as ``ConvNextForImageClassification`` or, with response norms, ``ConvNextV2ForImageClassification``."""
    prefix = "convnextv2." if any(".grn." in name for name in state) else "convnext."
    state = _shaped(rename(_linear(state), TRANSFORMERS, "transformers' ConvNeXt"), ".grn.", (1, 1, 1, -1))
    return {name if name.startswith("classifier.") else prefix + name: tensor for name, tensor in state.items()}


def from_torchvision(state: StateDict) -> StateDict:
    """``torchvision.models.ConvNeXt`` in our names."""
    return _flat(rename(state, inverse(TORCHVISION), "our ConvNeXt"))


def to_torchvision(state: StateDict) -> StateDict:
    """Our names as ``torchvision.models.ConvNeXt`` has them, which is version 1."""
    return _shaped(rename(_linear(state), TORCHVISION, "torchvision's ConvNeXt"), ".layer_scale", (-1, 1, 1))


def from_facebook(state: StateDict) -> StateDict:
    """The papers' repositories in our names."""
    return _flat(rename(state, inverse(FACEBOOK), "our ConvNeXt"))


def to_facebook(state: StateDict) -> StateDict:
    """Our names as the papers' repositories have them."""
    return _shaped(rename(_linear(state), FACEBOOK, "the papers' ConvNeXt"), ".grn.", (1, 1, 1, -1))


def _flat(state: StateDict) -> StateDict:
    """Gains and response norms as vectors, whatever dimensions of one they are stored with."""
    return {
        name: tensor.flatten() if name.endswith(".gamma") or ".grn." in name else tensor
        for name, tensor in state.items()
    }


def _linear(state: StateDict) -> StateDict:
    """The MLPs' weights as those of Linears, [out, in]."""
    return {name: tensor.flatten(1) if name.endswith(_MLP_WEIGHTS) else tensor for name, tensor in state.items()}


def _shaped(state: StateDict, part: str, shape: tuple[int, ...]) -> StateDict:
    return {name: tensor.reshape(shape) if part in name else tensor for name, tensor in state.items()}


def transformers_config(model: nn.Module) -> dict[str, Any]:
    """The ``ConvNextConfig`` or ``ConvNextV2Config`` of this model as transformers' ``config.json``."""
    block, (height, width) = model.stages[0].blocks[0], model.img_size
    act = model.numerics["act"]
    second = _has_grn(model)
    return {
        "architectures": ["ConvNextV2ForImageClassification" if second else "ConvNextForImageClassification"],
        "model_type": "convnextv2" if second else "convnext",
        "num_channels": model.in_chans,
        "patch_size": model.stem.stride,
        "num_stages": len(model.stages),
        "hidden_sizes": [info["num_chs"] for info in model.feature_info],
        "depths": [len(stage.blocks) for stage in model.stages],
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(act, act),
        "layer_norm_eps": model.numerics["norm_eps"],
        **({} if second else {"layer_scale_init_value": 0.0 if block.gamma is None else 1e-6}),
        "image_size": height if height == width else [height, width],
        "id2label": {str(i): f"LABEL_{i}" for i in range(model.num_classes)},
        "label2id": {f"LABEL_{i}": i for i in range(model.num_classes)},
    }


def _has_grn(model: nn.Module) -> bool:
    return not isinstance(model.stages[0].blocks[0].mlp.grn, nn.Identity)


def _refuse(model: nn.Module) -> str | None:
    """What names alone do not show: the other libraries have one kernel, no dilation, and pool the mean."""
    kernels = {block.conv_dw.kernel_size[0] for stage in model.stages for block in stage.blocks}
    if model.head.global_pool != "avg":
        return f"it pools the mean, the model has global_pool={model.head.global_pool!r}"
    if kernels != {7}:
        return f"its kernels are 7 x 7, the model has kernel_sizes {sorted(kernels)}"
    if any(block.conv_dw.dilation[0] > 1 for stage in model.stages for block in stage.blocks):
        return "it has no dilation, the model was built with an output_stride below 32"
    if model.stem[0].bias is None:
        return "it needs the convolutions' biases, the model has conv_bias=False"
    if not isinstance(model.stem[-1], nn.LayerNorm):
        return f"its norms are LayerNorms, the model's {type(model.stem[-1]).__name__}"
    if _has_grn(model) and model.stages[0].blocks[0].gamma is not None:
        return "its version 2 has no layer scale, the model has both use_grn and ls_init_value"
    return None


def _refuse_transformers(model: nn.Module) -> str | None:
    eps = model.numerics.get("block_norm_eps")
    if eps not in (None, 1e-6):
        return f"its norms but the last have an epsilon of 1e-6, the model {eps:g}; pass block_norm_eps=1e-6"
    return _refuse(model)


def _refuse_facebook(model: nn.Module) -> str | None:
    if model.numerics["act"] != "gelu":
        return f"its activation is gelu, the model's {model.numerics['act']}"
    if model.stem.stride != 4:
        return f"its patches are 4 x 4, the model has patch_size={model.stem.stride}"
    return _refuse(model)


def _refuse_torchvision(model: nn.Module) -> str | None:
    if model.in_chans != 3:
        return f"its images have 3 channels, the model has in_chans={model.in_chans}"
    if model.stages[0].blocks[0].gamma is None:
        return "it needs the layer scale of version 1, the model has ls_init_value=None"
    return _refuse_facebook(model)


def _is_timm(names: Collection[str]) -> bool:
    return "stem.0.weight" in names


def _is_transformers(names: Collection[str]) -> bool:
    return any(name.endswith("embeddings.patch_embeddings.weight") for name in names)


def _is_torchvision(names: Collection[str]) -> bool:
    return "features.0.0.weight" in names


def _is_facebook(names: Collection[str]) -> bool:
    return "downsample_layers.0.0.weight" in names


SPELLINGS = (
    Spelling("timm", _is_timm),
    Spelling(
        "transformers", _is_transformers, from_transformers, to_transformers, _refuse_transformers, transformers_config
    ),
    Spelling("torchvision", _is_torchvision, from_torchvision, to_torchvision, _refuse_torchvision),
    Spelling("facebook", _is_facebook, from_facebook, to_facebook, _refuse_facebook),
)
