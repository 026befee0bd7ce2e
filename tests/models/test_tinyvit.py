# SPDX-License-Identifier: Apache-2.0
"""TinyViT against timm: names, counts, outputs, every gradient and the running statistics, in both modes."""

import re
from pathlib import Path

import parity
import pytest
import timm
import torch
from timm.models.tiny_vit import TinyVit as TimmTinyVit
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.testing import assert_close

from fvm_fast.layers import attention_bias_index, resize_attention_biases
from fvm_fast.models import MODELS, TinyVit, create_model
from fvm_fast.models.knowledge_distillation import tinyvit

SMALL = dict(
    num_classes=7,
    embed_dims=(8, 16, 24, 32),
    depths=(1, 1, 2, 1),
    num_heads=(1, 2, 3, 4),
    window_sizes=(7, 4, 3, 2),
    drop_path_rate=0.0,
)
SIZE = (61, 101)  # maps of 16 x 26, 8 x 13, 4 x 7 and 2 x 4: windows that divide them, that do not, that do on one axis

VARIANTS = {
    "plain": {},
    "larger_windows_than_maps": dict(window_sizes=(7, 14, 9, 5)),
    "small_windows": dict(window_sizes=(2, 2, 2, 2)),
    "grey": dict(in_chans=1),
    "one_head": dict(num_heads=(1, 1, 1, 1)),
    "mlp_ratio": dict(mlp_ratio=1.5),
    "expand_ratio": dict(mbconv_expand_ratio=2.5),
    "local_conv_size": dict(local_conv_size=5),
    "relu": dict(act_layer=nn.ReLU),
    "max_pool": dict(global_pool="max"),
    "avgmax_pool": dict(global_pool="avgmax"),
    "no_pool": dict(global_pool=""),
    "headless": dict(num_classes=0),
}


def pair(dtype: torch.dtype = torch.float64, training: bool = False, **kwargs) -> tuple[TinyVit, TimmTinyVit]:
    """Our model and timm's with the same random weights and statistics, none of them at its initial value."""
    ours, theirs = TinyVit(**SMALL | kwargs), TimmTinyVit(**SMALL | kwargs)
    parity.randomise(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.to(dtype).train(training), theirs.to(dtype).train(training)


def images(batch: int = 3, size: tuple[int, int] = SIZE, channels: int = 3, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(batch, channels, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def channels_last_call(model: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """The output with classes last, also where every place has its own."""
    return model(pictures).movedim(1, -1)


def shifts_that_a_batch_norm_takes_out(model: nn.Module) -> list[nn.Parameter]:
    """Biases that only a 1 x 1 convolution and a batch norm read: in training their true gradient is zero."""
    return [stage.blocks[-1].mlp.fc2.bias for stage in model.stages[1:-1]]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_timm(kwargs, training):
    ours, theirs = pair(training=training, **kwargs)
    shapes = [{name: t.shape for name, t in model.state_dict().items()} for model in (ours, theirs)]
    assert list(shapes[0]) == list(shapes[1]) and shapes[0] == shapes[1]
    if training:
        for model in (ours, theirs):
            for bias in shifts_that_a_batch_norm_takes_out(model):
                bias.requires_grad_(False)
    parity.assert_same(ours, theirs, images(channels=kwargs.get("in_chans", 3)), channels_last_call)
    statistics = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        if ".bn." in name:
            assert_close(buffer, statistics[name], atol=1e-9, rtol=1e-9, msg=name)
    assert ours.patch_embed.conv1.bn.num_batches_tracked == int(training)


def test_shifts_before_a_batch_norm_have_no_gradient():
    ours, _ = pair(training=True)
    parity.outputs_and_gradients(ours, images())
    for bias in shifts_that_a_batch_norm_takes_out(ours):
        assert bias.grad.abs().max() < 1e-12


@pytest.mark.parametrize("size", [(32, 32), (33, 63), (1, 1), (48, 96)])
def test_every_image_size_equals_timm(size):
    parity.assert_same(*pair(), images(2, size))


def test_a_real_size_equals_timm_in_float32():
    ours, theirs = create_model("tiny_vit_5m_224"), timm.create_model("tiny_vit_5m_224", num_classes=1000)
    parity.randomise(theirs, std=0.05)
    ours.load_state_dict(theirs.state_dict())
    pictures = images(2, (224, 224), dtype=torch.float32)
    with torch.no_grad():
        expected = theirs.eval()(pictures)
        assert_close(ours.eval()(pictures), expected, atol=1e-5 * float(expected.abs().max()), rtol=0.0)


COUNTS = {
    "tiny_vit_5m_224": 5_392_764,
    "tiny_vit_11m_224": 10_996_972,
    "tiny_vit_21m_224": 21_198_568,
    "tiny_vit_21m_384": 21_230_488,
    "tiny_vit_21m_512": 21_268_120,
}


def test_the_sizes_are_these():
    assert {name for name in MODELS if name.startswith("tiny_vit")} == {*COUNTS, "tiny_vit_test"}


@pytest.mark.parametrize("name", COUNTS)
def test_every_size_has_timms_names_shapes_and_count(name):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(name, num_classes=1000)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == COUNTS[name]
    for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "classifier", "first_conv"):
        assert ours.default_cfg[key] == theirs.default_cfg[key], key
    assert drop_path_rates(ours) == drop_path_rates(theirs)


def drop_path_rates(model: nn.Module) -> list[float]:
    return [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]


def test_the_test_size_is_small():
    model = create_model("tiny_vit_test")
    assert sum(p.numel() for p in model.parameters()) == 205_648
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_the_readme_snippet_runs(capsys):
    readme = Path(tinyvit.__file__).with_name("README.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], names)
    assert names["logits"].shape == (2, 10)
    assert [tuple(m.shape) for m in names["maps"]] == [(2, 128, 14, 14), (2, 160, 7, 7), (2, 320, 4, 4)]
    report = capsys.readouterr().out
    assert "(microsoft names)" in report and "attention_biases to windows of 12 x 12 (timm rule)" in report


def test_initialisation_has_timms_statistics():
    kwargs = SMALL | dict(embed_dims=(32, 48, 60, 96))
    torch.manual_seed(0)
    ours, theirs = TinyVit(**kwargs), TimmTinyVit(**kwargs)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if b.std() == 0:
            assert torch.equal(a, b), name
        elif b.numel() > 500:
            assert_close(a.std(), b.std(), atol=0.0, rtol=0.15, msg=name)


def test_float32_and_bfloat16_are_as_near_as_they_should_be():
    ours, theirs = pair()
    parity.assert_float32_rule(ours, images())
    parity.assert_bfloat16_rule(ours, theirs, images(8))


def test_native_and_torch_agree():
    parity.assert_native_and_torch_agree(pair()[0], images())


@pytest.mark.parametrize("window", [1, 2, 5, 7])
def test_biases_are_read_by_distance(window):
    index, places = attention_bias_index(window), [(y, x) for y in range(window) for x in range(window)]
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            assert index[i, j] == abs(y - v) * window + abs(x - u)


@pytest.mark.parametrize("indices", [None, 2, (0, 2), (-1,)])
def test_forward_intermediates_equals_timm(indices):
    ours, theirs = pair()
    final, maps = ours.forward_intermediates(images(), indices, norm=True)
    timm_final, timm_maps = theirs.forward_intermediates(images(), indices)
    assert_close(final, timm_final)
    assert len(maps) == len(timm_maps)
    for a, b in zip(maps, timm_maps, strict=True):
        assert_close(a, b)
    only = ours.forward_intermediates(images(), indices, intermediates_only=True, stop_early=True, output_fmt="NHWC")
    assert_close(only[-1], maps[-1].permute(0, 2, 3, 1))


@pytest.mark.parametrize("out_indices", [3, (0, 2), (-2,)])
def test_features_only_equals_timm(out_indices):
    arguments = dict(features_only=True, out_indices=out_indices)
    theirs = timm.create_model("tiny_vit_5m_224", **arguments, feature_cls="getter").eval()
    ours = create_model("tiny_vit_5m_224", **arguments).eval()
    parity.randomise(theirs, std=0.05)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    pictures = images(1, (96, 64), dtype=torch.float32)
    with torch.no_grad():
        for a, b in zip(ours(pictures), theirs(pictures), strict=True):
            assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=0.0)
    for column in ("channels", "reduction", "module_name"):
        assert getattr(ours.feature_info, column)() == getattr(theirs.feature_info, column)()


def test_forward_head_and_reset_classifier():
    ours, theirs = pair(drop_rate=0.1)
    with torch.no_grad():
        features = ours.forward_features(images())
        assert_close(features, theirs.forward_features(images()))
        assert_close(ours.forward_head(features, pre_logits=True), theirs.forward_head(features, pre_logits=True))
        assert ours.get_classifier() is ours.head.fc
        for pool in ("max", "", "avg"):
            ours.reset_classifier(5, pool), theirs.reset_classifier(5, pool)
            theirs.load_state_dict(ours.state_dict(), strict=True)
            assert_close(ours(images()), theirs(images()))
        ours.reset_classifier(0), theirs.reset_classifier(0)
        assert_close(ours(images()), theirs(images()))
    assert isinstance(ours.get_classifier(), nn.Identity) and ours.num_classes == 0


def test_groups_of_parameters_equal_timms():
    ours, theirs = pair()
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    for coarse in (False, True):
        assert ours.group_matcher(coarse) == theirs.group_matcher(coarse)
    sizes = [[len(group["params"]) for group in param_groups_layer_decay(model)] for model in (ours, theirs)]
    assert sizes[0] == sizes[1]


def test_input_size_and_windows_can_be_changed():
    ours, theirs = pair(torch.float32)
    ours.set_input_size((96, 128), window_sizes=(7, 5, 4, 3))
    assert timm.data.resolve_model_data_config(ours)["input_size"] == (3, 96, 128)
    larger = TimmTinyVit(**SMALL | dict(window_sizes=(7, 5, 4, 3))).eval()
    larger.load_state_dict(timm.models.tiny_vit.checkpoint_filter_fn(theirs.state_dict(), larger))
    pictures = images(2, (96, 128), dtype=torch.float32)
    assert_close(ours(pictures), larger(pictures), atol=1e-5, rtol=1e-5)
    before = ours.stages[1].blocks[0].attn.attention_biases
    ours.set_input_size(64)
    assert ours.stages[1].blocks[0].attn.attention_biases is before


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_checkpointing_changes_neither_gradients_nor_statistics(training):
    ours, _ = pair(training=training)
    parity.assert_checkpointing_changes_nothing(ours, images())
    states = []
    for enable in (False, True):
        model, _ = pair(training=training, use_checkpoint=enable)
        calls = []
        model.stages[1].blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(images()).sum().backward()
        assert len(calls) == 1 + enable, "the block should run again in the backward pass where checkpointing is on"
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_compiles_and_exports():
    model = parity.randomise(create_model("tiny_vit_test", num_classes=5), std=0.1)
    pictures = images(3, (64, 60), dtype=torch.float32)
    parity.assert_compiles_without_a_break(model, pictures)
    parity.assert_exports(model, pictures)


@pytest.mark.parametrize("name", ["drop_rate", "proj_drop_rate", "drop_path_rate"])
def test_each_dropout_acts_in_training_only(name):
    ours, theirs = pair(**{name: 0.5})
    assert_close(ours(images()), theirs(images()))
    norms = [module for module in ours.train().modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.eval()
    assert not torch.equal(ours(images()), ours(images()))


def test_uint8_images_are_normalised_inside():
    model = TinyVit(**SMALL, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4)).double().eval()
    pictures = torch.randint(0, 256, (2, 3, 33, 64), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    normalised = (pictures.double() / 255 - mean[:, None, None]) / std[:, None, None]
    assert_close(model(pictures), model(normalised), atol=1e-6, rtol=1e-6)
    assert model.default_cfg["mean"] == (0.4, 0.5, 0.6)


def test_empty_batch():
    assert pair(torch.float32)[0](torch.zeros(0, 3, 32, 32)).shape == (0, 7)


BAD = {
    "uint8": (lambda model: model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "uint8 images need a mean"),
    "no_batch": (lambda model: model(torch.zeros(3, 32, 32)), "should be \\[B, C, H, W\\], got 3 dimensions"),
    "no_pixels": (lambda model: model(torch.zeros(1, 3, 0, 32)), "at least 1 x 1, got 0 x 32"),
    "stages": (lambda model: TinyVit(depths=(1, 1)), "one number per stage in each, got .*depths \\(1, 1\\)"),
    "heads": (lambda model: TinyVit(**SMALL | dict(num_heads=(1, 3, 3, 4))), "multiples of num_heads, got 16 and 3"),
    "local_conv": (lambda model: TinyVit(**SMALL, local_conv_size=2), "local_conv_size should be odd.* got 2"),
    "pool": (lambda model: TinyVit(**SMALL, global_pool="token"), "global_pool should be .* got 'token'"),
    "activation": (lambda model: TinyVit(**SMALL, act_layer="glue"), "act_layer should be .* got 'glue'"),
    "windows": (lambda model: model.set_input_size(64, (7, 7)), "one for each of 4 stages, got \\(7, 7\\)"),
    "rule": (lambda model: model.set_input_size(64, (7, 5, 5, 5), "area"), "rule should be .* got 'area'"),
    "table": (lambda model: resize_attention_biases(torch.zeros(2, 6), 3), "square window, got 6 distances"),
    "format": (lambda model: model.forward_intermediates(images(), output_fmt="NLC"), "got 'NLC'"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD.keys())
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call(TinyVit(**SMALL))
