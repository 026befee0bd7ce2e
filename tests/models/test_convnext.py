# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt and ConvNeXt V2 against timm: names, counts, outputs and every gradient."""

import re
from pathlib import Path

import parity
import pytest
import timm
import torch
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.testing import assert_close

from fvm_fast.models import MODELS, ConvNeXt, create_model
from fvm_fast.models.supervised_pretraining import convnext

SMALL = dict(num_classes=7, depths=(1, 1, 2, 1), dims=(8, 12, 16, 24))
V2 = dict(use_grn=True, ls_init_value=None)
SIZE = (35, 102)  # the stem drops 3 rows and 2 columns, the last map is 1 x 3

# What each row is for: the two versions, then one feature at a time, then those that meet.
VARIANTS = {
    "v1": {},
    "v2": V2,
    "conv_mlp": dict(conv_mlp=True),
    "v2_conv_mlp": V2 | dict(conv_mlp=True),
    "grn_and_gamma": dict(use_grn=True, ls_init_value=0.3),
    "grey": dict(in_chans=1),
    "output_stride_16": dict(output_stride=16),
    "output_stride_8": dict(output_stride=8),
    "kernel_sizes": dict(kernel_sizes=(3, 5, 7, 9)),
    "patch_2": dict(patch_size=2),
    "patch_8": dict(patch_size=8, output_stride=8),
    "overlap": dict(stem_type="overlap"),
    "overlap_tiered": dict(stem_type="overlap_tiered", dims=(24, 24, 32, 40)),
    "overlap_act": dict(stem_type="overlap_act", act_layer="relu"),
    "no_conv_bias": dict(conv_bias=False),
    "head_norm_first": dict(head_norm_first=True),
    "head_hidden_size": dict(head_hidden_size=10),
    "max_pool": dict(global_pool="max"),
    "avgmax_pool": dict(global_pool="avgmax"),
    "no_pool": dict(global_pool="", head_hidden_size=10),
    "headless": dict(num_classes=0),
    "gelu_tanh": dict(act_layer="gelu_tanh"),
    "norm_eps": dict(norm_eps=1e-2),
    "rmsnorm": dict(norm_layer="rmsnorm"),
    "together": V2 | dict(output_stride=16, head_norm_first=True, conv_mlp=True, in_chans=2, act_layer="silu"),
}


def pair(dtype: torch.dtype = torch.float64, **kwargs) -> tuple[ConvNeXt, TimmConvNeXt]:
    """Our model and timm's with the same random weights, none of them at its initial zero or one."""
    ours, theirs = ConvNeXt(**SMALL | kwargs), TimmConvNeXt(**SMALL | kwargs)
    parity.randomise(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.to(dtype), theirs.to(dtype)


def images(batch: int = 3, size: tuple[int, int] = SIZE, channels: int = 3, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(batch, channels, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def channels_last_call(model: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """The output with classes last, also where every place has its own."""
    return model(pictures).movedim(1, -1)


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_timm(kwargs):
    ours, theirs = pair(**kwargs)
    shapes = [{name: t.shape for name, t in model.state_dict().items()} for model in (ours, theirs)]
    assert list(shapes[0]) == list(shapes[1]) and shapes[0] == shapes[1]
    parity.assert_same(ours, theirs, images(channels=kwargs.get("in_chans", 3)), channels_last_call)


@pytest.mark.parametrize("size", [(32, 32), (33, 63), (64, 96)])
def test_every_image_size_equals_timm(size):
    ours, theirs = pair(**V2)
    parity.assert_same(ours, theirs, images(2, size))


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_atto"])
def test_a_real_size_equals_timm_in_float32(name):
    ours, theirs = create_model(name), timm.create_model(name)
    parity.randomise(theirs, std=0.05)
    ours.load_state_dict(theirs.state_dict())
    pictures = images(2, (224, 224), dtype=torch.float32)
    with torch.no_grad():
        expected = theirs.eval()(pictures)
        assert_close(ours.eval()(pictures), expected, atol=1e-5 * float(expected.abs().max()), rtol=0.0)


COUNTS = {
    "convnext_tiny": 28_589_128,
    "convnext_small": 50_223_688,
    "convnext_base": 88_591_464,
    "convnext_large": 197_767_336,
    "convnext_xlarge": 350_196_968,
    "convnextv2_atto": 3_708_400,
    "convnextv2_femto": 5_233_240,
    "convnextv2_pico": 9_066_280,
    "convnextv2_nano": 15_623_800,
    "convnextv2_tiny": 28_635_496,
    "convnextv2_base": 88_717_800,
    "convnextv2_large": 197_956_840,
    "convnextv2_huge": 660_289_640,
}
SIZES = [name for name in MODELS if name.startswith("convnext")]


@pytest.mark.parametrize("name", [name for name in SIZES if "test" not in name])
def test_every_size_has_timms_names_shapes_and_count(name):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(name, num_classes=1000)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    count = sum(p.numel() for p in ours.parameters())
    assert count == COUNTS.get(name, count)
    for key in ("input_size", "mean", "std", "interpolation", "classifier", "first_conv", "num_classes"):
        assert ours.default_cfg[key] == theirs.default_cfg[key], key


def test_every_count_belongs_to_a_size():
    assert COUNTS.keys() <= set(SIZES)


@pytest.mark.parametrize("name, count", [("convnext_test", 298_520), ("convnextv2_test", 300_424)])
def test_test_sizes_are_small(name, count):
    model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_the_readme_snippet_runs(capsys):
    readme = Path(convnext.__file__).with_name("README.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], names)
    assert names["logits"].shape == (2, 10)
    assert [tuple(m.shape) for m in names["maps"]] == [(2, 96, 28, 28), (2, 192, 14, 14), (2, 384, 14, 14)]
    assert "(torchvision names)" in capsys.readouterr().out


def test_initialisation_has_timms_statistics():
    kwargs = dict(dims=(32, 48, 64, 96), depths=(1, 1, 2, 1), use_grn=True, head_init_scale=0.1, head_hidden_size=48)
    torch.manual_seed(0)
    ours, theirs = ConvNeXt(**kwargs), TimmConvNeXt(**kwargs)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if b.std() == 0:
            assert torch.equal(a, b), name
        else:
            assert_close(a.std(), b.std(), atol=0.0, rtol=0.1, msg=name)


@pytest.mark.parametrize("version", [{}, V2], ids=["v1", "v2"])
def test_float32_and_bfloat16_are_as_near_as_they_should_be(version):
    ours, theirs = pair(**version)
    parity.assert_float32_rule(ours, images())
    parity.assert_bfloat16_rule(ours, theirs, images(8))


@pytest.mark.parametrize("version", [{}, V2], ids=["v1", "v2"])
def test_native_and_torch_agree(version):
    ours, _ = pair(**version)
    parity.assert_native_and_torch_agree(ours, images())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_norms_and_mlps_read_maps_where_the_convolutions_wrote_them(layout):
    ours, _ = pair(torch.float32, **V2)
    read = []
    for block in (block for stage in ours.stages for block in stage.blocks):
        for module in (block.norm, block.mlp.fc1, block.mlp.fc2):
            module.register_forward_pre_hook(lambda _, x: read.append(x[0].is_contiguous()))
    features = ours.forward_features(images(2, (128, 160), dtype=torch.float32).to(memory_format=layout))
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert len(read) == 15 and all(read)


@pytest.mark.parametrize("kwargs", [{}, V2 | dict(head_norm_first=True)], ids=["v1", "v2"])
@pytest.mark.parametrize("indices", [None, 2, (0, 2), (-1,)])
def test_forward_intermediates_equals_timm(indices, kwargs):
    ours, theirs = pair(**kwargs)
    settings = dict(indices=indices, norm=True)
    final, maps = ours.forward_intermediates(images(), **settings)
    timm_final, timm_maps = theirs.forward_intermediates(images(), **settings)
    assert_close(final, timm_final)
    assert len(maps) == len(timm_maps)
    for a, b in zip(maps, timm_maps, strict=True):
        assert_close(a, b)
    only = ours.forward_intermediates(images(), **settings, intermediates_only=True, stop_early=True, output_fmt="NHWC")
    assert len(only) == len(maps)
    assert_close(only[-1], maps[-1].permute(0, 2, 3, 1))


def test_stop_early_skips_the_later_stages():
    ours, theirs = pair()
    calls = []
    ours.stages[2].register_forward_pre_hook(lambda *_: calls.append(1))
    final, _ = ours.forward_intermediates(images(), (0, 1), stop_early=True)
    assert_close(final, theirs.forward_intermediates(images(), (0, 1), stop_early=True)[0])
    assert not calls


@pytest.mark.parametrize("out_indices", [3, (0, 2), (-2,)])
def test_features_only_equals_timm(out_indices):
    arguments = dict(features_only=True, out_indices=out_indices)
    theirs = timm.create_model("convnextv2_atto", **arguments, feature_cls="getter")
    ours = create_model("convnextv2_atto", **arguments)
    parity.randomise(theirs, std=0.05)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    pictures = images(1, (96, 64), dtype=torch.float32)
    with torch.no_grad():
        for a, b in zip(ours(pictures), theirs(pictures), strict=True):
            assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=0.0)
    for column in ("channels", "reduction", "module_name"):
        assert getattr(ours.feature_info, column)() == getattr(theirs.feature_info, column)()


def test_forward_head_and_reset_classifier():
    ours, theirs = pair(drop_rate=0.1, head_hidden_size=10)
    ours.eval(), theirs.eval()
    features = ours.forward_features(images())
    assert_close(features, theirs.forward_features(images()))
    assert_close(ours.forward_head(features, pre_logits=True), theirs.forward_head(features, pre_logits=True))
    assert ours.get_classifier() is ours.head.fc and ours.head_hidden_size == 10
    for pool in ("max", "", "avg"):
        ours.reset_classifier(5, pool), theirs.reset_classifier(5, pool)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert_close(ours(images()), theirs(images()))
    for kwargs in ({}, dict(reset_other=True)):
        ours.reset_classifier(0, **kwargs), theirs.reset_classifier(0, **kwargs)
        assert_close(ours(images()), theirs(images()))
        assert isinstance(ours.get_classifier(), nn.Identity) and ours.num_classes == 0
        assert ours.head_hidden_size == theirs.head_hidden_size


def test_pruning_equals_timm():
    ours, theirs = pair(head_norm_first=True)
    for model in (ours, theirs):
        assert model.prune_intermediate_layers((0, 1), prune_head=False) == [0, 1]
    assert list(ours.state_dict()) == list(theirs.state_dict()) and ours.num_features == theirs.num_features
    assert_close(ours(images()), theirs(images()))


def test_groups_of_parameters_equal_timms():
    ours, theirs = pair(head_norm_first=True)
    for coarse in (False, True):
        assert ours.group_matcher(coarse) == theirs.group_matcher(coarse)
    sizes = [[len(group["params"]) for group in param_groups_layer_decay(model)] for model in (ours, theirs)]
    assert sizes[0] == sizes[1]
    assert ours.no_weight_decay() == set()


def test_input_size_is_only_what_the_data_pipeline_hears():
    ours, _ = pair()
    before = ours(images())
    ours.set_input_size((384, 96))
    config = timm.data.resolve_model_data_config(ours)
    assert config["input_size"] == (3, 384, 96) and config["crop_pct"] == 1.0
    assert torch.equal(ours(images()), before)


@pytest.mark.parametrize("version", [{}, V2], ids=["v1", "v2"])
def test_checkpointing_gives_the_same_gradients(version):
    ours, _ = pair(**version)
    parity.assert_checkpointing_changes_nothing(ours, images())
    ours.set_grad_checkpointing()
    calls = []
    ours.stages[1].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    ours(images()).sum().backward()
    assert len(calls) == 2, "the block should have run again in the backward pass"


@pytest.mark.parametrize("name", ["convnext_test", "convnextv2_test"])
def test_compiles_and_exports(name):
    model = parity.randomise(create_model(name, num_classes=5), std=0.1)
    pictures = images(3, (64, 64), dtype=torch.float32)
    parity.assert_compiles_without_a_break(model, pictures)
    parity.assert_exports(model, pictures)


@pytest.mark.parametrize("name", ["drop_rate", "drop_path_rate"])
def test_each_dropout_acts_in_training_only(name):
    ours, theirs = pair(**{name: 0.5})
    assert_close(ours.eval()(images()), theirs.eval()(images()))
    ours.train()
    assert not torch.equal(ours(images()), ours(images()))


def test_stochastic_depth_rises_as_timms():
    models = pair(drop_path_rate=0.4)
    rates = [[getattr(b.drop_path, "drop_prob", 0.0) for s in model.stages for b in s.blocks] for model in models]
    assert rates[0] == rates[1] and rates[0][0] == 0.0 and rates[0][-1] == pytest.approx(0.4)


@pytest.mark.parametrize("stem_type", ["patch", "overlap"])
def test_uint8_images_are_normalised_inside(stem_type):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model = ConvNeXt(**SMALL, stem_type=stem_type, image_mean=mean, image_std=std).double()
    pictures = torch.randint(0, 256, (2, 3, 35, 66), dtype=torch.uint8)
    normalised = (pictures.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert_close(model(pictures), model(normalised), atol=1e-6, rtol=1e-6)
    assert model.default_cfg["mean"] == mean


@pytest.mark.parametrize("version", [{}, V2], ids=["v1", "v2"])
def test_empty_batch(version):
    ours, _ = pair(torch.float32, **version)
    logits = ours(torch.zeros(0, 3, 32, 32))
    logits.sum().backward()
    assert logits.shape == (0, 7) and not ours.stages[1].blocks[0].conv_dw.weight.grad.any()


BAD = {
    "uint8": (lambda model: model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "uint8 images need a mean"),
    "no_batch": (lambda model: model(torch.zeros(3, 32, 32)), "should be \\[B, C, H, W\\], got 3 dimensions"),
    "too_small": (lambda model: model(torch.zeros(1, 3, 32, 31)), "at least 32 x 32, got 32 x 31"),
    "output_stride": (lambda model: ConvNeXt(output_stride=4), "output_stride should be 8, 16 or 32, got 4"),
    "dims": (lambda model: ConvNeXt(dims=(8, 8)), "one number per stage, got \\(3, 3, 9, 3\\) and \\(8, 8\\)"),
    "kernels": (lambda model: ConvNeXt(**SMALL, kernel_sizes=4), "kernel_sizes should be odd.* got 4"),
    "stem": (lambda model: ConvNeXt(stem_type="conv"), "stem_type should be .* got 'conv'"),
    "norm": (lambda model: ConvNeXt(norm_layer="batchnorm"), "norm_layer should be .* got 'batchnorm'"),
    "two_heads": (lambda model: ConvNeXt(head_norm_first=True, head_hidden_size=8), "leave out head_norm_first"),
    "pool": (lambda model: ConvNeXt(**SMALL, global_pool="token"), "global_pool should be .* got 'token'"),
    "pool_later": (lambda model: model.reset_classifier(3, "token"), "global_pool should be .* got 'token'"),
    "activation": (lambda model: ConvNeXt(**SMALL, act_layer="glue"), "act_layer should be .* got 'glue'"),
    "drop_path": (lambda model: ConvNeXt(**SMALL, drop_path_rate=1.0), "should be in \\[0, 1\\), got 1"),
    "format": (lambda model: model.forward_intermediates(images(), output_fmt="NLC"), "got 'NLC'"),
    "indices": (lambda model: model.forward_intermediates(images(), indices=[4]), "got \\[4\\]"),
    "half_a_normalisation": (lambda model: ConvNeXt(**SMALL, image_mean=(0, 0, 0)), "go together"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD.keys())
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call(ConvNeXt(**SMALL))
