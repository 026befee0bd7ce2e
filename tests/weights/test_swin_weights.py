# SPDX-License-Identifier: Apache-2.0
"""Swin weights between timm, microsoft, transformers and torchvision: same logits and gradients, strict names."""

import re
from functools import partial

import parity
import pytest
import timm
import torch
from timm.models.swin_transformer import checkpoint_filter_fn
from timm.models.swin_transformer_v2 import checkpoint_filter_fn as checkpoint_filter_fn_v2
from torch import nn
from torch.testing import assert_close
from torchvision.models import swin_transformer as torchvision_swin
from transformers import (
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
    Swinv2Config,
    Swinv2ForImageClassification,
    Swinv2Model,
)

from fvm_fast import export_weights, load_weights
from fvm_fast.layers.relative_position import resize_relative_position_bias
from fvm_fast.models import SwinTransformer, SwinTransformerV2
from fvm_fast.weights.swin import from_torchvision, from_transformers, to_microsoft, torchvision_buffers

BOTH = pytest.mark.parametrize("version", [1, 2])
OURS = {1: SwinTransformer, 2: SwinTransformerV2}
SIZES = dict(img_size=32, patch_size=2, num_classes=5, embed_dim=12, depths=(2, 2), num_heads=(2, 3), window_size=4)
EVERY_SPELLING = ["timm", "microsoft", "transformers", "transformers_hub", "torchvision"]


def our_model(version: int, **kwargs) -> nn.Module:
    model = OURS[version](**SIZES | dict(mlp_ratio=2.0, pad_order="pad_roll", drop_path_rate=0.0) | kwargs)
    return parity.randomise(model.double()).eval()


def transformers_model(version: int, headless: bool = False, **kwargs) -> nn.Module:
    sizes = dict(embed_dim=12, depths=[2, 2], num_heads=[2, 3], window_size=4, mlp_ratio=2.0, drop_path_rate=0.0)
    config_type = SwinConfig if version == 1 else Swinv2Config
    config = config_type(image_size=32, patch_size=2, num_labels=5, **sizes | kwargs)
    if version == 1:
        config._attn_implementation = "sdpa"  # the eager one computes its softmax in float32
    classes = (SwinModel, Swinv2Model) if headless else (SwinForImageClassification, Swinv2ForImageClassification)
    return parity.randomise(classes[version - 1](config).double(), seed=1).eval()


def torchvision_model(version: int, **kwargs) -> nn.Module:
    parts = dict(
        block=(torchvision_swin.SwinTransformerBlock, torchvision_swin.SwinTransformerBlockV2)[version - 1],
        downsample_layer=(torchvision_swin.PatchMerging, torchvision_swin.PatchMergingV2)[version - 1],
    )
    sizes = dict(patch_size=[2, 2], embed_dim=12, depths=[2, 2], num_heads=[2, 3], window_size=[4, 4])
    settings = dict(mlp_ratio=2.0, stochastic_depth_prob=0.0, num_classes=5)
    model = torchvision_swin.SwinTransformer(**sizes | settings | parts | kwargs)
    return parity.randomise(model.double(), seed=1).eval()


def logits_of(model: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    output = model(pictures)
    return getattr(output, "logits", output)


def images(*size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 3, *(size or (32, 32)), dtype=torch.float64, generator=generator)


assert_same = partial(parity.assert_same, call=logits_of)


@BOTH
def test_from_transformers_in_memory(version):
    theirs, ours = transformers_model(version), our_model(version)
    report = load_weights(ours, theirs.state_dict())
    assert report.spelling == "transformers" and report.loaded == len(ours.state_dict())
    assert_same(ours, theirs, images(), converted=from_transformers)


@BOTH
@pytest.mark.parametrize("size", [(24, 40), (26, 44)], ids=["padded", "odd"])
def test_transformers_at_other_sizes_pads_before_the_shift(version, size):
    ours, theirs = our_model(version, dynamic_img_size=True), transformers_model(version)
    load_weights(ours, theirs.state_dict())
    assert_same(ours, theirs, images(*size), converted=from_transformers)


@BOTH
def test_from_transformers_with_other_numerics(version):
    kwargs = dict(hidden_act="quick_gelu", qkv_bias=False)
    theirs, ours = transformers_model(version, **kwargs), our_model(version, act_layer="quick_gelu", qkv_bias=False)
    load_weights(ours, theirs.state_dict())
    assert_same(ours, theirs, images(), converted=from_transformers)


@BOTH
def test_from_transformers_on_disk(version, tmp_path):
    theirs, ours = transformers_model(version), our_model(version)
    theirs.save_pretrained(tmp_path)
    report = load_weights(ours, tmp_path)
    assert report.spelling == ("transformers_hub" if version == 1 else "transformers")  # v2 has one spelling
    assert_close(ours(images()), logits_of(theirs, images()), atol=1e-9, rtol=1e-9)
    with pytest.raises(ValueError, match="norm_eps=1e-05, the model has 0.001; build it to match"):
        load_weights(our_model(version, norm_eps=1e-3), tmp_path)


@BOTH
def test_from_a_headless_transformers_model(version):
    theirs, ours = transformers_model(version, headless=True), our_model(version, num_classes=0)
    load_weights(ours, theirs.state_dict())
    assert_close(ours.forward_features(images()).flatten(1, 2), theirs(images()).last_hidden_state)
    assert_close(ours(images()), theirs(images()).pooler_output)


@BOTH
def test_masked_patches_enter_between_embed_and_the_stages(version):
    config = transformers_model(version).config
    theirs = parity.randomise((SwinModel, Swinv2Model)[version - 1](config, use_mask_token=True).double()).eval()
    ours = our_model(version, num_classes=0)
    state = theirs.state_dict()
    mask_token = state.pop("embeddings.mask_token")[0, 0]
    load_weights(ours, state)
    mask = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.6
    x = torch.where(mask[..., None], mask_token, ours.embed(images()))
    expected = theirs(images(), bool_masked_pos=mask.flatten(1)).last_hidden_state
    assert_close(ours.forward_stages(x).flatten(1, 2), expected, atol=1e-9, rtol=1e-9)


@BOTH
def test_to_transformers(version):
    ours, theirs = our_model(version), transformers_model(version)
    theirs.load_state_dict(export_weights(ours, to="transformers"), strict=True)
    assert_same(ours, theirs, images(), converted=from_transformers)


@BOTH
@pytest.mark.parametrize("to", ["transformers", "transformers_hub"])
def test_to_a_folder_that_from_pretrained_reads(version, to, tmp_path):
    extra = {} if version == 1 else dict(pretrained_window_sizes=(3, 2))
    ours = our_model(version, img_size=(24, 40), act_layer="gelu_tanh", qkv_bias=False, in_chans=2, **extra)
    export_weights(ours, to=to, path=tmp_path / "swin")
    cls = (SwinForImageClassification, Swinv2ForImageClassification)[version - 1]
    theirs, info = cls.from_pretrained(tmp_path / "swin", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    wide = images(24, 40)[:, :2]
    assert_close(logits_of(theirs.double().eval(), wide), ours(wide), atol=1e-9, rtol=1e-9)


@BOTH
def test_from_torchvision(version):
    theirs, ours = torchvision_model(version), our_model(version)
    report = load_weights(ours, theirs.state_dict())
    assert report.spelling == "torchvision" and report.loaded == len(ours.state_dict())
    assert_same(ours, theirs, images(), converted=from_torchvision)


@BOTH
@pytest.mark.parametrize("size", [(24, 40), (26, 44)], ids=["padded", "odd"])
def test_torchvision_at_other_sizes_pads_before_the_shift(version, size):
    ours, theirs = our_model(version, dynamic_img_size=True), torchvision_model(version)
    load_weights(ours, theirs.state_dict())
    assert_same(ours, theirs, images(*size), converted=from_torchvision)


@BOTH
def test_to_torchvision(version):
    ours, theirs = our_model(version), torchvision_model(version)
    state = export_weights(ours, to="torchvision")
    if version == 2:
        assert not [name for name in state if name.endswith("relative_position_index")]
    theirs.load_state_dict(state | torchvision_buffers(ours), strict=True)
    if version == 1:
        theirs.load_state_dict(state, strict=True)
    assert_same(ours, theirs, images(), converted=from_torchvision)


@pytest.mark.parametrize("name, ours", [("swin_t", (1, 224, 7)), ("swin_v2_t", (2, 256, 8))])
def test_a_real_size_has_the_shapes_of_torchvision(name, ours):
    version, img_size, window_size = ours
    sizes = dict(
        img_size=img_size, window_size=window_size, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)
    )
    model = OURS[version](**sizes)
    state = export_weights(model, to="torchvision") | torchvision_buffers(model)
    with torch.device("meta"):
        theirs = getattr(torchvision_swin, name)()
    expected = {key: (tensor.shape, tensor.dtype) for key, tensor in theirs.state_dict().items()}
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in state.items()} == expected


def microsoft_checkpoint(model: nn.Module) -> dict:
    """What the Swin repository saves: merging closes a stage, ``head`` is a Linear, buffers are among the weights."""
    state = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        state[name.replace("head.fc", "head")] = tensor
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    state["layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    if isinstance(model, SwinTransformerV2):
        state["layers.0.blocks.1.attn.relative_coords_table"] = torch.zeros(1, 7, 7, 2)
    return {"model": state, "epoch": 299}


@BOTH
@pytest.mark.parametrize("headless", [False, True])
def test_from_microsoft(version, headless):
    source, ours = our_model(version, num_classes=0 if headless else 5), our_model(version, num_classes=5)
    parity.randomise(source, seed=3)
    checkpoint = microsoft_checkpoint(source)
    report = load_weights(ours, checkpoint, exclude="head.*" if headless else ())
    assert report.spelling == "microsoft"
    assert_close(ours.forward_features(images()), source.forward_features(images()), atol=0.0, rtol=0.0)
    theirs = (checkpoint_filter_fn, checkpoint_filter_fn_v2)[version - 1](checkpoint, ours)  # timm's reading of it
    assert theirs.keys() == source.state_dict().keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in source.state_dict().items())


@BOTH
def test_to_microsoft(version):
    ours = our_model(version)
    state = export_weights(ours, to="microsoft")
    expected = microsoft_checkpoint(ours)["model"]
    buffers = {name for name in expected if re.search("attn_mask|relative_position_index|relative_coords_table", name)}
    assert state.keys() == expected.keys() - buffers
    assert to_microsoft(ours.state_dict()).keys() == state.keys()


@BOTH
def test_early_timm_checkpoints_hold_buffers(version):
    ours = our_model(version)
    stored = {
        "layers.0.blocks.1.attn_mask": torch.zeros(1),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(1),
    }
    report = load_weights(ours, ours.state_dict() | stored)
    assert report.spelling == "timm" and report.loaded == len(ours.state_dict())


@BOTH
@pytest.mark.parametrize("to", EVERY_SPELLING)
def test_there_and_back(version, to, tmp_path):
    ours, again = our_model(version), parity.randomise(our_model(version), seed=5)
    export_weights(ours, to=to, path=tmp_path / "weights.safetensors")
    report = load_weights(again, tmp_path / "weights.safetensors")
    assert report.spelling == ("transformers" if (version, to) == (2, "transformers_hub") else to) and not report.notes
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("rule", [None, "timm", "microsoft"])
def test_tables_are_resized_on_load(rule):
    source, ours = our_model(1), our_model(1, window_size=7)
    report = load_weights(ours, source.state_dict(), resize=rule)
    used = rule or "timm"
    assert report.notes == (f"resized the relative_position_bias_tables from windows of 4 x 4 to 7 x 7 ({used} rule)",)
    for name, table in source.state_dict().items():
        if name.endswith("relative_position_bias_table"):
            expected = resize_relative_position_bias(table, (7, 7), rule=used)
            assert torch.equal(ours.state_dict()[name], expected)


def test_tables_are_resized_on_load_as_timm_does():
    source, ours = our_model(1), our_model(1, window_size=7)
    settings = SIZES | dict(mlp_ratio=2.0, drop_path_rate=0.0, window_size=7)
    theirs = timm.models.SwinTransformer(**settings).double().eval()
    theirs.load_state_dict(checkpoint_filter_fn(source.state_dict(), theirs))
    load_weights(ours, source.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert_close(ours.state_dict()[name], tensor, atol=1e-5, rtol=1e-5)


def test_a_projection_for_other_patches_is_resampled_on_load():
    source, ours = our_model(2), our_model(2, patch_size=4)
    assert "resampled patch_embed.proj.weight [12, 3, 2, 2] -> [12, 3, 4, 4]" in str(
        load_weights(ours, source.state_dict())
    )
    source.set_input_size(patch_size=4, window_size=4)
    assert_close(ours.patch_embed.proj.weight, source.patch_embed.proj.weight)


def test_v1_does_not_load_into_v2():
    with pytest.raises(ValueError, match="tensors are missing .* have no place in the model"):
        load_weights(our_model(2), our_model(1).state_dict())


OF_BOTH = {
    "pool": (dict(global_pool="max"), "global_pool='max'"),
    "oblong": (dict(window_size=(4, 2)), "its windows are square, the model's are \\[\\(4, 2\\)\\]"),
    "covering": (dict(always_partition=True, window_size=8), "does not shift windows that cover the map"),
    "padded": (dict(window_size=5, pad_order="roll_pad"), "build the model with pad_order='pad_roll'"),
}
OF_V1 = {
    "head_dim": (dict(head_dim=4), "a head_dim of its own"),
    "mlp_ratio": (dict(mlp_ratio=(2.0, 3.0)), "one mlp_ratio for all stages, the model has \\[2.0, 3.0\\]"),
}
OF_TRANSFORMERS = {
    "norm_eps": (dict(norm_eps=1e-6), "norm_eps=1e-5, the model has 1e-06"),
    "windows": (
        dict(window_size=((4, 4), (2, 2))),
        "would have windows of .* the model's are \\[\\(4, 4\\), \\(2, 2\\)\\]",
    ),
    "half_covered": (dict(img_size=(8, 32), depths=(2,), num_heads=(2,)), "along both axes or none"),
}
OF_TORCHVISION = {
    "windows": (dict(window_size=((4, 4), (2, 2))), "the same window, the model's are \\[\\(2, 2\\), \\(4, 4\\)\\]"),
    "act": (dict(act_layer="quick_gelu"), "its activation is gelu, the model's quick_gelu"),
    "grey": (dict(in_chans=1), "its images have 3 channels, the model's 1"),
    "no_bias": (dict(qkv_bias=False), "qkv_bias=False"),
}


def refusals(to: tuple[str, ...], rows: dict, versions: tuple[int, ...] = (1, 2)) -> list:
    return [pytest.param(v, t, *row, id=f"{t}-v{v}-{name}") for t in to for v in versions for name, row in rows.items()]


@pytest.mark.parametrize(
    "version, to, kwargs, message",
    [
        *refusals(("transformers", "torchvision"), OF_BOTH),
        *refusals(("transformers", "torchvision"), OF_V1, (1,)),
        *refusals(("transformers", "transformers_hub"), OF_TRANSFORMERS),
        *refusals(("torchvision",), OF_TORCHVISION),
        *refusals(("torchvision",), {"scale": (dict(pretrained_window_sizes=3), "sizes of \\(3, 3\\)")}, (2,)),
    ],
)
def test_export_refuses_what_the_other_library_lacks(version, to, kwargs, message):
    with pytest.raises(ValueError, match=message):
        export_weights(our_model(version, **kwargs), to=to)
