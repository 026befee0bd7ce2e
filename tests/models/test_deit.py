# SPDX-License-Identifier: Apache-2.0
"""DeiT, distilled DeiT and DeiT III against timm: names, counts, outputs and every gradient."""

import re
from pathlib import Path

import pytest
import timm
import torch
from parity import (
    assert_bfloat16_rule,
    assert_checkpointing_changes_nothing,
    assert_compiles_without_a_break,
    assert_exports,
    assert_float32_rule,
    assert_native_and_torch_agree,
    assert_same,
    outputs_and_gradients,
    randomise,
)
from timm.models.deit import VisionTransformerDistilled as TimmDistilled
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from fvm_fast.layers.backbone import IMAGENET_MEAN, IMAGENET_STD
from fvm_fast.models import MODELS, VisionTransformerDistilled, create_model
from fvm_fast.models.knowledge_distillation import deit

SMALL = dict(img_size=32, patch_size=8, num_classes=7, embed_dim=24, depth=2, num_heads=3)
NAMES = [name for name in MODELS if name.startswith("deit") and "test" not in name]
TEST_SIZES = [name for name in MODELS if name.startswith("deit") and "test" in name]

# What each row is for: the plain model, then one feature at a time, then all that go together.
VARIANTS = {
    "plain": {},
    "rectangular": dict(img_size=(24, 40)),
    "one_patch": dict(img_size=8),
    "grey": dict(in_chans=1),
    "layer_scale": dict(init_values=0.3),
    "no_biases": dict(qkv_bias=False, proj_bias=False),
    "headless": dict(num_classes=0),
    "together": dict(img_size=(24, 40), init_values=0.1, act_layer="gelu_tanh", mlp_ratio=2.5),
}


def pair(dtype: torch.dtype = torch.float64, **kwargs) -> tuple[VisionTransformerDistilled, TimmDistilled]:
    """Our distilled model and timm's with the same random weights, none of them at its initial zero or one."""
    ours = randomise(VisionTransformerDistilled(**SMALL | kwargs)).to(dtype)
    theirs = TimmDistilled(**SMALL | kwargs).to(dtype)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def pictures(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def both_losses(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Different losses of the two heads, as distillation has them."""
    logits, taught = model(images)
    numbers = torch.arange(len(images), device=images.device) % logits.shape[1]
    return cross_entropy(logits, numbers) + 0.3 * cross_entropy(taught, (numbers + 1) % logits.shape[1])


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_timm(kwargs):
    ours, theirs = pair(**kwargs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = pictures(3, kwargs.get("in_chans", 3), *ours.patch_embed.img_size)
    assert_same(ours.eval(), theirs.eval(), images)


@pytest.mark.parametrize("kwargs", [{}, dict(img_size=(24, 40), init_values=0.3)], ids=["plain", "rectangular"])
def test_distilled_training_equals_timm(kwargs):
    ours, theirs = pair(**kwargs)
    images = pictures(3, 3, *ours.patch_embed.img_size)
    for model in (ours.train(), theirs.train()):
        assert isinstance(model(images), torch.Tensor), "before it is set, training gives the mean"
        model.set_distilled_training()
    for got, expected in zip(ours(images), theirs(images), strict=True):
        assert_close(got, expected, atol=1e-9, rtol=1e-9)
    assert_same(ours, theirs, images, both_losses)
    mean = (ours(images)[0] + ours(images)[1]) / 2
    assert_close(ours.eval()(images), mean, atol=1e-12, rtol=1e-12)
    ours.train().set_distilled_training(False)
    assert_close(ours(images), mean, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["deit_test_patch16_64", "deit3_test_patch16_64"])
@pytest.mark.parametrize("size", [(64, 64), (32, 48)], ids=["square", "rectangular"])
def test_undistilled_sizes_equal_timm(name, size):
    # timm has no test size: the tiny and small ones of the family, made as small
    theirs_name = {"deit_test_patch16_64": "deit_tiny_patch16_224", "deit3_test_patch16_64": "deit3_small_patch16_224"}
    small = dict(embed_dim=64, depth=3, num_heads=4, img_size=size, num_classes=5)
    ours = randomise(create_model(name, img_size=size, num_classes=5)).double()
    theirs = timm.create_model(theirs_name[name], **small).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same(ours, theirs, pictures(2, 3, *size))


def test_dynamic_img_size_equals_timm():
    ours, theirs = pair(torch.float32, dynamic_img_size=True)  # float32: timm resizes positions in it
    for size in (32, 32), (24, 48), (64, 40):
        images = pictures(2, 3, *size, dtype=torch.float32)
        logits, gradients = outputs_and_gradients(ours.eval(), images)
        timm_logits, timm_gradients = outputs_and_gradients(theirs.eval(), images)
        assert_close(logits, timm_logits, atol=1e-5, rtol=1e-5)
        for name, gradient in gradients.items():
            assert_close(gradient, timm_gradients[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224"])
def test_real_size_equals_timm_in_float32(name):
    torch.manual_seed(0)
    ours, theirs = create_model(name).eval(), timm.create_model(name).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = pictures(1, 3, 224, 224, dtype=torch.float32)
    with torch.no_grad():
        assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)


COUNTS = {
    "deit_tiny_patch16_224": 5_717_416,
    "deit_small_patch16_224": 22_050_664,
    "deit_base_patch16_224": 86_567_656,
    "deit_base_patch16_384": 86_859_496,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_small_distilled_patch16_224": 22_436_432,
    "deit_base_distilled_patch16_224": 87_338_192,
    "deit_base_distilled_patch16_384": 87_630_032,
    "deit3_small_patch16_224": 22_059_496,
    "deit3_small_patch16_384": 22_205_416,
    "deit3_medium_patch16_224": 38_849_512,
    "deit3_base_patch16_224": 86_585_320,
    "deit3_base_patch16_384": 86_877_160,
    "deit3_large_patch16_224": 304_374_760,
    "deit3_large_patch16_384": 304_763_880,
    "deit3_huge_patch14_224": 632_126_440,
}


def test_the_sizes_are_timms():
    assert set(NAMES) == set(COUNTS)
    assert set(NAMES) == set(timm.list_models("deit_*")) | set(timm.list_models("deit3_*"))


@pytest.mark.parametrize("name", NAMES)
def test_every_size_has_timms_names_shapes_and_count(name):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(name)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == COUNTS[name]
    for key in ("input_size", "mean", "std", "crop_pct", "interpolation", "num_classes", "classifier", "first_conv"):
        assert ours.default_cfg[key] == theirs.default_cfg[key], key


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"])
def test_initialisation_has_timms_statistics(name):
    torch.manual_seed(0)
    small = dict(img_size=64, patch_size=8, embed_dim=96, depth=2, num_heads=3)
    ours, theirs = create_model(name, **small), timm.create_model(name, **small)
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if key == "dist_token":
            assert_close(a.std(), torch.tensor(0.02), atol=0.005, rtol=0.0)
        elif a.numel() < 1000:
            assert_close(a.mean(), b.mean(), atol=0.02, rtol=0.0, msg=key)
        else:
            assert_close(a.std(), b.std(), atol=0.0, rtol=0.1, msg=key)
    if "deit3" in name:
        assert set(ours.blocks[1].ls2.gamma.tolist()) == set(theirs.blocks[1].ls2.gamma.tolist())


@pytest.mark.parametrize("name, count", list(zip(TEST_SIZES, [265_768, 330_576, 265_448], strict=True)))
def test_test_sizes_are_small(name, count):
    model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    assert model(torch.zeros(0, 3, 64, 64)).shape == (0, 1000)


def test_float32_and_bfloat16_rules():
    ours, theirs = pair()
    images = pictures(4, 3, 32, 32)
    assert_float32_rule(ours, images)
    assert_bfloat16_rule(ours.eval(), theirs.eval(), images)


@pytest.mark.parametrize("name", TEST_SIZES)
def test_test_sizes_compile_export_and_agree_on_both_backends(name):
    model = randomise(create_model(name, num_classes=5), std=0.05).eval()
    images = pictures(3, 3, 64, 64, dtype=torch.float32)
    assert_native_and_torch_agree(randomise(create_model(name, num_classes=5)).double(), images.double())
    assert_checkpointing_changes_nothing(model, images)
    assert_compiles_without_a_break(model, images)
    assert_exports(model, images)


def test_distilled_training_compiles_without_a_break():
    model = randomise(create_model("deit_test_distilled_patch16_64", num_classes=5), std=0.05).train()
    model.set_distilled_training()
    assert_compiles_without_a_break(model, pictures(3, 3, 64, 64, dtype=torch.float32), both_losses)


@pytest.mark.parametrize("settings", [dict(indices=2), dict(indices=(0, -1), output_fmt="NLC")], ids=["nchw", "nlc"])
def test_forward_intermediates_equals_timm(settings):
    ours, theirs = pair(depth=3, img_size=(24, 40))
    images = pictures(2, 3, 24, 40)
    settings = settings | dict(norm=True, return_prefix_tokens=True)
    final, maps = ours.forward_intermediates(images, **settings)
    timm_final, timm_maps = theirs.forward_intermediates(images, **settings)
    assert_close(final, timm_final, atol=1e-9, rtol=1e-9)
    assert_close(maps, timm_maps, atol=1e-9, rtol=1e-9)
    assert maps[0][1].shape == (2, 2, 24), "class and distillation token"
    only = ours.forward_intermediates(images, **settings | dict(intermediates_only=True, stop_early=True))
    assert_close(only, maps, atol=0.0, rtol=0.0)


def test_features_only_equals_timm():
    name, out_indices = "deit_tiny_distilled_patch16_224", (1, 3)
    sizes = dict(depth=4, embed_dim=24, img_size=64)
    theirs = timm.create_model(name, features_only=True, out_indices=out_indices, **sizes)
    ours = create_model(name, features_only=True, out_indices=out_indices, **sizes)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = pictures(1, 3, 64, 64, dtype=torch.float32)
    assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)
    for column in ("channels", "reduction", "module_name"):
        assert getattr(ours.feature_info, column)() == getattr(theirs.feature_info, column)()


def test_heads_equal_timm():
    ours, theirs = (model.eval() for model in pair())
    images = pictures(2, 3, 32, 32)
    tokens = ours.forward_features(images)
    assert_close(tokens, theirs.forward_features(images), atol=1e-9, rtol=1e-9)
    features = ours.forward_head(tokens, pre_logits=True)
    assert_close(features, theirs.forward_head(tokens, pre_logits=True), atol=1e-9, rtol=1e-9)
    assert ours.get_classifier() == (ours.head, ours.head_dist)
    for model in (ours, theirs):
        model.reset_classifier(0)
        assert all(isinstance(head, nn.Identity) for head in model.get_classifier()) and model.num_classes == 0
    assert_close(ours(images), features, atol=1e-12, rtol=1e-12)
    ours.reset_classifier(5, "token")
    assert ours(images).shape == (2, 5) and ours.head_dist.weight.dtype == torch.float64
    with pytest.raises(ValueError, match="global_pool should stay 'token', which both heads read, got 'avg'"):
        ours.reset_classifier(5, "avg")


def test_set_input_size_equals_timm():
    ours, theirs = pair(torch.float32)
    for model in (ours, theirs):
        model.eval().set_input_size((48, 24))
    assert ours.pos_embed.shape == (1, 2 + 18, 24)
    assert_close(ours.pos_embed, theirs.pos_embed)
    images = pictures(2, 3, 48, 24, dtype=torch.float32)
    assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)


def test_no_weight_decay_and_groups_equal_timm():
    ours, theirs = pair()
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    groups = []
    for model in (ours, theirs):
        names = {parameter: name for name, parameter in model.named_parameters()}
        scaled = param_groups_layer_decay(model)
        groups.append({names[p]: (g["lr_scale"], g["weight_decay"]) for g in scaled for p in g["params"]})
    assert groups[0] == groups[1] and len(groups[0]) == len(list(ours.parameters()))
    config = timm.data.resolve_model_data_config(create_model("deit_test_distilled_patch16_64"))
    assert config["mean"] == IMAGENET_MEAN and config["input_size"] == (3, 64, 64)


@pytest.mark.parametrize("name", ["drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_each_dropout_acts_in_training_only(name):
    ours, theirs = pair(**{name: 0.5})
    images = pictures(4, 3, 32, 32)
    assert_close(ours.eval()(images), theirs.eval()(images), atol=1e-9, rtol=1e-9)
    ours.train()
    assert not torch.equal(ours(images), ours(images))


def test_both_tokens_are_dropped_before_their_heads_as_in_timm():
    outputs = []
    for model in pair(drop_rate=0.5):
        model.train().set_distilled_training()
        torch.manual_seed(0)
        outputs.append(model(pictures(4, 3, 32, 32)))
    assert_close(*outputs, atol=1e-9, rtol=1e-9)


def test_patch_drop_keeps_both_tokens():
    ours, _ = pair(patch_drop_rate=0.5)
    images = pictures(2, 3, 32, 32)
    tokens = ours.train().embed(images, ours._kept_patches(images))
    assert tokens.shape == (2, 2 + 8, 24)
    assert_close(tokens[:, :2], ours.embed(images)[:, :2], atol=0.0, rtol=0.0)


def test_positions_of_patches_only():
    # timm's distilled model makes rows for both tokens here and then cannot add them; ours has none, as DeiT III
    ours = randomise(VisionTransformerDistilled(**SMALL, no_embed_class=True)).double()
    assert ours.pos_embed.shape == (1, 16, 24)
    tokens = ours.embed(pictures(2, 3, 32, 32))
    assert_close(tokens[:, :2], ours.prefix_tokens().expand(2, 2, 24), atol=1e-12, rtol=1e-12)


def test_uint8_images_are_normalised_inside():
    model = create_model("deit_test_distilled_patch16_64", num_classes=5).double().eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert_close(model(images), model((images / 255.0 - mean) / std), atol=1e-6, rtol=1e-6)
    assert create_model("deit_test_patch16_64", in_chans=1)(torch.zeros(1, 1, 64, 64)).shape == (1, 1000)


BAD = {
    "pool": (dict(global_pool="avg"), "global_pool should be 'token', since its heads read .* got 'avg'"),
    "class_token": (dict(class_token=False), "needs class_token=True"),
    "registers": (dict(reg_tokens=2), "reg_tokens should be 0, .* got 2"),
    "fc_norm": (dict(fc_norm=True), "fc_norm should be False, .* got True"),
}


@pytest.mark.parametrize("kwargs, message", BAD.values(), ids=BAD.keys())
def test_bad_arguments_say_what_was_expected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformerDistilled(**SMALL | kwargs)


def test_the_readme_snippet_runs(capsys):
    readme = Path(deit.__file__).with_name("README.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], names)
    assert names["logits"].shape == (4, 10)
    assert names["outputs"]["loss"].requires_grad
    assert "loaded 47 tensors" in capsys.readouterr().out
