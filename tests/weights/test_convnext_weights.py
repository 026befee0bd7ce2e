# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt weights between timm, transformers, torchvision and the papers: same logits and gradients, strict names."""

import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torchvision.models.convnext import CNBlock, CNBlockConfig, LayerNorm2d
from torchvision.models.convnext import ConvNeXt as TorchvisionConvNeXt
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
)

from fvm_fast import export_weights, load_weights
from fvm_fast.models import ConvNeXt
from fvm_fast.weights.convnext import from_torchvision, from_transformers

DEPTHS, DIMS = (1, 1, 2, 1), (8, 12, 16, 24)
V2 = dict(use_grn=True, ls_init_value=None)
EPS = 1e-3  # far from every default, so that a lost epsilon shows


def our_model(**kwargs) -> ConvNeXt:
    arguments = dict(num_classes=5, depths=DEPTHS, dims=DIMS, norm_eps=EPS, block_norm_eps=1e-6)
    return randomise(ConvNeXt(**arguments | kwargs))


def transformers_model(second: bool = False, **kwargs) -> nn.Module:
    config = ConvNextV2Config if second else ConvNextConfig
    model = ConvNextV2ForImageClassification if second else ConvNextForImageClassification
    sizes = dict(depths=list(DEPTHS), hidden_sizes=list(DIMS), num_labels=5)
    return randomise(model(config(**sizes, **dict(layer_norm_eps=EPS) | kwargs)))


def torchvision_model() -> TorchvisionConvNeXt:
    setting = [CNBlockConfig(*sizes) for sizes in zip(DIMS, (*DIMS[1:], None), DEPTHS, strict=True)]
    block = partial(CNBlock, norm_layer=partial(nn.LayerNorm, eps=EPS))
    norm = partial(LayerNorm2d, eps=EPS)
    return randomise(TorchvisionConvNeXt(setting, num_classes=5, block=block, norm_layer=norm))


def randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def logits_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    output = model(images)
    return getattr(output, "logits", output)


def images(size: tuple[int, int] = (32, 64)) -> torch.Tensor:
    return torch.randn(4, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def assert_same_logits_and_gradients(ours, theirs, convert) -> None:
    for model in (ours, theirs):
        cross_entropy(logits_of(model, images()), torch.tensor([0, 1, 2, 4])).backward()
    assert_close(ours(images()), logits_of(theirs, images()), atol=1e-9, rtol=1e-9)
    converted = convert({name: p.grad for name, p in theirs.named_parameters()})
    assert converted.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, converted[name].reshape(parameter.shape), atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("second", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_from_transformers(second, act):
    theirs = transformers_model(second, hidden_act=act)
    ours = our_model(act_layer=act, **V2 if second else {})
    report = load_weights(ours, theirs.state_dict())
    assert report.spelling == "transformers" and report.loaded == len(ours.state_dict()) and not report.notes
    assert_same_logits_and_gradients(ours, theirs, from_transformers)


@pytest.mark.parametrize("second", [False, True], ids=["v1", "v2"])
def test_from_a_folder_of_transformers(second, tmp_path):
    theirs = transformers_model(second)
    theirs.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        ours = our_model(**V2 if second else {})
        assert load_weights(ours, source).spelling == "transformers"
        assert_close(ours(images()), logits_of(theirs, images()), atol=1e-9, rtol=1e-9)
    with pytest.raises(ValueError, match="norm_eps=0.001, the model has 1e-06; build it to match"):
        load_weights(our_model(norm_eps=1e-6, **V2 if second else {}), tmp_path)


def test_transformers_own_epsilons_are_two():
    theirs = transformers_model(layer_norm_eps=1e-12)
    with torch.no_grad():  # a last map of tiny values, where the last epsilon shows
        theirs.convnext.encoder.stages[3].downsampling_layer[1].weight.mul_(1e-6)
        theirs.convnext.encoder.stages[3].downsampling_layer[1].bias.mul_(1e-6)
        theirs.convnext.encoder.stages[3].layers[0].layer_scale_parameter.zero_()
    right, wrong = our_model(norm_eps=1e-12), our_model(norm_eps=1e-6)
    for ours in (right, wrong):
        load_weights(ours, theirs.state_dict())
    expected = logits_of(theirs, images())
    assert_close(right(images()), expected, atol=1e-9, rtol=1e-9)
    assert (wrong(images()) - expected).abs().max() > 1e-2


def test_without_layer_scale_as_transformers_allows():
    theirs, ours = transformers_model(layer_scale_init_value=0.0), our_model(ls_init_value=None)
    load_weights(ours, theirs.state_dict())
    assert_close(ours(images()), logits_of(theirs, images()), atol=1e-9, rtol=1e-9)


def test_from_a_headless_transformers_model():
    theirs = randomise(ConvNextModel(transformers_model().config))
    ours = our_model(num_classes=0)
    load_weights(ours, theirs.state_dict())
    output = theirs(images())
    assert_close(ours.forward_features(images()), output.last_hidden_state, atol=1e-9, rtol=1e-9)
    assert_close(ours(images()), output.pooler_output, atol=1e-9, rtol=1e-9)


def test_from_torchvision():
    theirs, ours = torchvision_model(), our_model(block_norm_eps=EPS)
    assert load_weights(ours, theirs.state_dict()).spelling == "torchvision"
    assert_same_logits_and_gradients(ours, theirs, from_torchvision)


@pytest.mark.parametrize("second", [False, True], ids=["v1", "v2"])
def test_to_transformers(second):
    ours, theirs = our_model(**V2 if second else {}), transformers_model(second)
    for parameter in theirs.parameters():
        nn.init.zeros_(parameter)
    theirs.load_state_dict(export_weights(ours, to="transformers"), strict=True)
    assert_close(logits_of(theirs, images()), ours(images()), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("second", [False, True], ids=["v1", "v2"])
def test_to_a_folder_that_from_pretrained_reads(second, tmp_path):
    version = V2 if second else {}
    ours = our_model(patch_size=3, in_chans=1, act_layer="gelu_tanh", conv_mlp=True, img_size=(32, 48), **version)
    export_weights(ours, to="transformers", path=tmp_path / "convnext")
    cls = ConvNextV2ForImageClassification if second else ConvNextForImageClassification
    theirs, info = cls.from_pretrained(tmp_path / "convnext", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(logits_of(theirs.double().eval(), images()[:, :1]), ours(images()[:, :1]), atol=1e-9, rtol=1e-9)


def test_to_torchvision():
    ours, theirs = our_model(block_norm_eps=EPS), torchvision_model()
    for parameter in theirs.parameters():
        nn.init.zeros_(parameter)
    theirs.load_state_dict(export_weights(ours, to="torchvision"), strict=True)
    assert_close(theirs(images()), ours(images()), atol=1e-9, rtol=1e-9)


FACEBOOK = {  # a tensor of each kind, as the repositories name it -> as we do, and its shape there
    "downsample_layers.0.0.weight": ("stem.0.weight", [8, 3, 4, 4]),
    "downsample_layers.0.1.bias": ("stem.1.bias", [8]),
    "downsample_layers.2.0.weight": ("stages.2.downsample.0.weight", [12]),
    "downsample_layers.2.1.weight": ("stages.2.downsample.1.weight", [16, 12, 2, 2]),
    "stages.2.1.dwconv.weight": ("stages.2.blocks.1.conv_dw.weight", [16, 1, 7, 7]),
    "stages.2.1.norm.weight": ("stages.2.blocks.1.norm.weight", [16]),
    "stages.2.1.pwconv1.weight": ("stages.2.blocks.1.mlp.fc1.weight", [64, 16]),
    "stages.2.1.pwconv2.bias": ("stages.2.blocks.1.mlp.fc2.bias", [16]),
    "norm.weight": ("head.norm.weight", [24]),
    "head.weight": ("head.fc.weight", [5, 24]),
}
FACEBOOK_V1 = {"stages.2.1.gamma": ("stages.2.blocks.1.gamma", [16])}
FACEBOOK_V2 = {
    "stages.2.1.grn.gamma": ("stages.2.blocks.1.mlp.grn.weight", [1, 1, 1, 64]),
    "stages.2.1.grn.beta": ("stages.2.blocks.1.mlp.grn.bias", [1, 1, 1, 64]),
}


@pytest.mark.parametrize("version, more", [({}, FACEBOOK_V1), (V2, FACEBOOK_V2)], ids=["v1", "v2"])
def test_the_papers_names_and_shapes(version, more):
    ours = our_model(**version)
    state, native = export_weights(ours, to="facebook"), ours.state_dict()
    for theirs, (name, shape) in (FACEBOOK | more).items():
        assert list(state[theirs].shape) == shape, theirs
        assert torch.equal(state[theirs].flatten(), native[name].flatten()), theirs
    leaves = r"(norm|head|downsample_layers\.\d\.[01]|stages\.\d\.\d\.(dwconv|norm|pwconv[12]))\.(weight|bias)"
    rest = [name for name in state if not re.fullmatch(leaves, name)]
    assert rest and all(re.fullmatch(r"stages\.\d\.\d\.(gamma|grn\.gamma|grn\.beta)", name) for name in rest)


@pytest.mark.parametrize("version", [{}, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("to", ["timm", "transformers", "torchvision", "facebook"])
def test_there_and_back(to, version, tmp_path):
    if to == "torchvision" and version:
        with pytest.raises(ValueError, match="torchvision cannot hold this ConvNeXt: it needs the layer scale"):
            export_weights(our_model(**version), to=to)
        return
    ours = our_model(**version)
    export_weights(ours, to=to, path=tmp_path / "weights.safetensors")
    again = our_model(**version)
    nn.init.zeros_(again.head.fc.weight)
    report = load_weights(again, tmp_path / "weights.safetensors")
    assert report.spelling == to and not report.notes
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("stored, wanted", [(True, False), (False, True)])
def test_mlps_stored_as_convolutions_or_as_linears_are_reshaped(stored, wanted):
    ours, again = our_model(conv_mlp=stored, **V2), our_model(conv_mlp=wanted, **V2)
    nn.init.zeros_(again.stages[0].blocks[0].mlp.fc1.weight)
    report = load_weights(again, ours.state_dict())
    assert report.notes == ("reshaped 10 MLP weights between Linear and 1 x 1 convolution",)
    assert_close(again(images()), ours(images()), atol=1e-12, rtol=1e-12)


def test_numerics_travel_with_the_file(tmp_path):
    export_weights(our_model(act_layer="silu"), path=tmp_path / "ours.safetensors")
    for kwargs, message in ((dict(), "act='silu'"), (dict(act_layer="silu", block_norm_eps=1e-5), "block_norm_eps")):
        with pytest.raises(ValueError, match=message):
            load_weights(our_model(**kwargs), tmp_path / "ours.safetensors")
    assert load_weights(our_model(), tmp_path / "ours.safetensors", check_numerics=False).loaded > 50


def test_a_pretrained_encoder_without_norm_and_head_loads_by_excluding_them():
    state = {n: t for n, t in export_weights(our_model(**V2), to="facebook").items() if not re.match(r"norm|head", n)}
    ours = our_model(**V2)
    nn.init.zeros_(ours.stem[0].weight)
    with pytest.raises(ValueError, match="4 of \\d+ tensors are missing \\(head.norm.weight"):
        load_weights(ours, state)
    assert load_weights(ours, state, exclude="head.*").missing == ()
    assert_close(ours.forward_features(images()), our_model(**V2).forward_features(images()))


REFUSALS = {
    "pool": (dict(global_pool="max"), "global_pool='max'"),
    "kernels": (dict(kernel_sizes=(3, 7, 7, 7)), "kernel_sizes \\[3, 7\\]"),
    "dilation": (dict(output_stride=16), "output_stride below 32"),
    "no_conv_bias": (dict(conv_bias=False), "conv_bias=False"),
    "norm": (dict(norm_layer="rmsnorm"), "RMSNorm"),
    "both_versions": (dict(use_grn=True), "both use_grn and ls_init_value"),
    "norm_first": (dict(head_norm_first=True), "no place for 2 of \\d+ tensors: norm_pre.weight"),
    "hidden": (dict(head_hidden_size=9), "no place for 2 of \\d+ tensors: head.pre_logits.fc.weight"),
    "stem": (dict(stem_type="overlap"), "no place for 2 of \\d+ tensors: stem.2.weight"),
}


@pytest.mark.parametrize("to", ["transformers", "torchvision", "facebook"])
@pytest.mark.parametrize("kwargs, message", REFUSALS.values(), ids=REFUSALS.keys())
def test_export_refuses_what_the_other_library_lacks(to, kwargs, message):
    with pytest.raises(ValueError, match=message):
        export_weights(our_model(**kwargs), to=to)


def test_export_refuses_numbers_that_the_other_library_has_fixed():
    with pytest.raises(ValueError, match="epsilon of 1e-6, the model 0.001; pass block_norm_eps=1e-6"):
        export_weights(our_model(block_norm_eps=EPS), to="transformers")
    for to in ("torchvision", "facebook"):
        with pytest.raises(ValueError, match="its activation is gelu, the model's silu"):
            export_weights(our_model(act_layer="silu"), to=to)
        with pytest.raises(ValueError, match="patch_size=2"):
            export_weights(our_model(patch_size=2), to=to)
    with pytest.raises(ValueError, match="in_chans=1"):
        export_weights(our_model(in_chans=1), to="torchvision")
