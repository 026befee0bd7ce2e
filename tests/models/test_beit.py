# SPDX-License-Identifier: Apache-2.0
"""BEiT as a classifier against timm: names, counts, outputs and every gradient."""

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
from timm.models.beit import Beit as TimmBeit
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.testing import assert_close

from fvm_fast.layers.backbone import INCEPTION_MEAN
from fvm_fast.layers.relative_position_attention import relative_position_index_with_class_token
from fvm_fast.models import MODELS, Beit, create_model
from fvm_fast.models.masked_modeling import beit

SMALL = dict(img_size=32, patch_size=8, num_classes=7, embed_dim=24, depth=2, num_heads=3)
TABLES = dict(use_abs_pos_emb=False, use_rel_pos_bias=True)
CLASSIFIERS = [name for name in MODELS if name.startswith("beit") and "test" not in name and "vocab" not in name]

# What each row is for: one feature at a time, then all that go together.
VARIANTS = {
    "own_tables": TABLES,
    "shared_table": dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True),
    "both_tables": TABLES | dict(use_shared_rel_pos_bias=True),
    "absolute_positions": {},
    "layer_scale": TABLES | dict(init_values=0.3),
    "rectangular": TABLES | dict(img_size=(24, 40)),
    "one_patch": TABLES | dict(img_size=8),
    "grey": TABLES | dict(in_chans=1),
    "no_bias": TABLES | dict(qkv_bias=False),
    "class_token": TABLES | dict(global_pool="token"),
    "all_tokens": TABLES | dict(global_pool=""),
    "norm_before_pooling": TABLES | dict(use_fc_norm=False),
    "headless": TABLES | dict(num_classes=0),
    "together": dict(
        img_size=(24, 40), use_rel_pos_bias=True, use_shared_rel_pos_bias=True, init_values=0.1, mlp_ratio=2.5
    ),
}


def pair(dtype: torch.dtype = torch.float64, **kwargs) -> tuple[Beit, TimmBeit]:
    """Our classifier and timm's with the same random weights, none of them at its initial zero or one."""
    ours = randomise(Beit(**SMALL | kwargs)).to(dtype)
    theirs = TimmBeit(**SMALL | dict(norm_layer=lambda dim, **_: nn.LayerNorm(dim, eps=1e-6)) | kwargs).to(dtype)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def pictures(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_timm(kwargs):
    ours, theirs = pair(**kwargs)
    images = pictures(3, kwargs.get("in_chans", 3), *ours.patch_embed.img_size)
    assert_same(ours.eval(), theirs.eval(), images)


def test_the_class_token_has_three_rows_of_its_own():
    index = relative_position_index_with_class_token((2, 3))
    assert index.shape == (7, 7)
    assert set(index[0, 1:].tolist()) == {15} and set(index[1:, 0].tolist()) == {16} and index[0, 0] == 17
    assert set(index[1:, 1:].flatten().tolist()) == set(range(15))


def test_real_size_equals_timm_in_float32():
    torch.manual_seed(0)
    ours, theirs = create_model("beit_base_patch16_224").eval(), timm.create_model("beit_base_patch16_224").eval()
    nn.init.normal_(ours.blocks[5].attn.relative_position_bias_table)
    nn.init.normal_(ours.head.weight, std=0.02)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = pictures(1, 3, 224, 224, dtype=torch.float32)
    with torch.no_grad():
        assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)


COUNTS = {
    "beit_base_patch16_224": 86_530_984,
    "beit_base_patch16_384": 86_744_104,
    "beit_large_patch16_224": 304_430_568,
    "beit_large_patch16_384": 304_998_888,
    "beit_large_patch16_512": 305_674_728,
    "beitv2_base_patch16_224": 86_530_984,
    "beitv2_large_patch16_224": 304_430_568,
}


def test_the_sizes_are_timms():
    theirs = {name for name in timm.list_models("beit*") if not name.startswith("beit3")}  # another network
    assert set(CLASSIFIERS) == set(COUNTS) == theirs


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_size_has_timms_names_shapes_and_count(name):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(name, num_classes=1000)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == COUNTS[name]
    for key in ("input_size", "mean", "std", "crop_pct", "interpolation", "num_classes", "classifier", "first_conv"):
        assert ours.default_cfg[key] == theirs.default_cfg[key], key


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "beitv2_base_patch16_224"])
def test_initialisation_has_timms_statistics(name):
    torch.manual_seed(0)
    small = dict(img_size=64, patch_size=8, embed_dim=96, depth=3, num_heads=3)
    ours, theirs = create_model(name, **small), timm.create_model(name, **small)
    theirs = dict(theirs.named_parameters())
    for key, a in ours.named_parameters():
        b = theirs[key]
        if a.numel() < 1000 or not b.any():
            assert_close(a.mean(), b.mean(), atol=0.02, rtol=0.0, msg=key)
        else:
            assert_close(a.std(), b.std(), atol=0.0, rtol=0.1, msg=key)
    assert set(ours.blocks[1].gamma_2.tolist()) == set(theirs["blocks.1.gamma_2"].tolist())


def test_test_size_is_small():
    model = create_model("beit_test_patch16_64")
    assert sum(p.numel() for p in model.parameters()) == 265_176
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    assert model(torch.zeros(0, 3, 64, 64)).shape == (0, 1000)


@pytest.mark.parametrize("kwargs", [TABLES, VARIANTS["shared_table"]], ids=["own_tables", "shared_table"])
def test_float32_and_bfloat16_rules(kwargs):
    ours, theirs = pair(**kwargs)
    images = pictures(4, 3, 32, 32)
    assert_float32_rule(ours, images)
    assert_bfloat16_rule(ours.eval(), theirs.eval(), images)


@pytest.mark.parametrize(
    "kwargs", [{}, dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)], ids=["own", "shared"]
)
def test_test_size_compiles_exports_and_agrees_on_both_backends(kwargs):
    kwargs = kwargs | dict(num_classes=5)
    model = randomise(create_model("beit_test_patch16_64", **kwargs), std=0.05).eval()
    images = pictures(3, 3, 64, 64, dtype=torch.float32)
    assert_native_and_torch_agree(randomise(create_model("beit_test_patch16_64", **kwargs)).double(), images.double())
    assert_checkpointing_changes_nothing(model, images)
    assert_compiles_without_a_break(model, images)
    assert_exports(model, images)


@pytest.mark.parametrize("kwargs", [TABLES, VARIANTS["shared_table"]], ids=["own_tables", "shared_table"])
@pytest.mark.parametrize("settings", [dict(indices=2), dict(indices=(0, -1), output_fmt="NLC")], ids=["nchw", "nlc"])
def test_forward_intermediates_equals_timm(settings, kwargs):
    ours, theirs = pair(depth=3, img_size=(24, 40), global_pool="token", **kwargs)
    images = pictures(2, 3, 24, 40)
    settings = settings | dict(norm=True, return_prefix_tokens=True)
    final, maps = ours.forward_intermediates(images, **settings)
    timm_final, timm_maps = theirs.forward_intermediates(images, **settings)
    assert_close(final, timm_final, atol=1e-9, rtol=1e-9)
    assert_close(maps, timm_maps, atol=1e-9, rtol=1e-9)
    only = ours.forward_intermediates(images, **settings | dict(intermediates_only=True, stop_early=True))
    assert_close(only, maps, atol=0.0, rtol=0.0)


def test_features_only_equals_timm():
    name, out_indices = "beit_base_patch16_224", (1, 3)
    sizes = dict(depth=4, embed_dim=24, img_size=64)
    theirs = timm.create_model(name, features_only=True, out_indices=out_indices, **sizes)
    ours = create_model(name, features_only=True, out_indices=out_indices, **sizes)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = pictures(1, 3, 64, 64, dtype=torch.float32)
    assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)
    for column in ("channels", "reduction", "module_name"):
        assert getattr(ours.feature_info, column)() == getattr(theirs.feature_info, column)()


def test_heads_equal_timm():
    ours, theirs = (model.eval() for model in pair(**TABLES))
    images = pictures(2, 3, 32, 32)
    tokens = ours.forward_features(images)
    assert_close(tokens, theirs.forward_features(images), atol=1e-9, rtol=1e-9)
    features = ours.forward_head(tokens, pre_logits=True)
    assert_close(features, theirs.forward_head(tokens, pre_logits=True), atol=1e-9, rtol=1e-9)
    assert ours.get_classifier() is ours.head
    for model in (ours, theirs):
        model.reset_classifier(0, "token")
    assert_close(ours(images), theirs(images), atol=1e-9, rtol=1e-9)
    ours.reset_classifier(5, "avg")
    assert ours(images).shape == (2, 5) and ours.head.weight.dtype == torch.float64


@pytest.mark.parametrize("size", [(48, 24), (40, 40)], ids=["rectangular", "square"])
def test_set_input_size_equals_timm(size):
    ours, theirs = pair(torch.float32, **VARIANTS["together"] | dict(img_size=32))
    for model in (ours, theirs):
        model.eval().set_input_size(size)
    expected = theirs.state_dict()
    for name, table in ours.state_dict().items():
        assert_close(table, expected[name], atol=1e-5, rtol=1e-5, msg=name)
    assert len(ours.blocks[0].attn.relative_position_bias_table) == (size[0] // 4 - 1) * (size[1] // 4 - 1) + 3
    images = pictures(2, 3, *size, dtype=torch.float32)
    assert_close(ours(images), theirs(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kwargs", [TABLES, VARIANTS["together"]], ids=["own_tables", "together"])
def test_no_weight_decay_and_groups_equal_timm(kwargs):
    ours, theirs = pair(**kwargs)
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    groups = []
    for model in (ours, theirs):
        names = {parameter: name for name, parameter in model.named_parameters()}
        scaled = param_groups_layer_decay(model)
        groups.append({names[p]: (g["lr_scale"], g["weight_decay"]) for g in scaled for p in g["params"]})
    assert groups[0] == groups[1] and len(groups[0]) == len(list(ours.parameters()))
    config = timm.data.resolve_model_data_config(create_model("beit_test_patch16_64"))
    assert config["mean"] == INCEPTION_MEAN and config["input_size"] == (3, 64, 64)


@pytest.mark.parametrize("name", ["drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_each_dropout_acts_in_training_only(name):
    ours, theirs = pair(**TABLES, **{name: 0.5})
    images = pictures(4, 3, 32, 32)
    assert_close(ours.eval()(images), theirs.eval()(images), atol=1e-9, rtol=1e-9)
    ours.train()
    assert not torch.equal(ours(images), ours(images))


def test_uint8_images_are_normalised_inside():
    model = create_model("beit_test_patch16_64", num_classes=5).double().eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert_close(model(images), model((images.double() / 255 - 0.5) / 0.5), atol=1e-9, rtol=1e-9)
    assert create_model("beit_test_patch16_64", in_chans=1)(torch.zeros(1, 1, 64, 64)).shape == (1, 1000)


BAD = {
    "heads": (dict(num_heads=5), "multiple of num_heads, got 24 and 5"),
    "pool": (dict(global_pool="mean"), "global_pool should be one of .* got 'mean'"),
}


@pytest.mark.parametrize("kwargs, message", BAD.values(), ids=BAD.keys())
def test_bad_arguments_say_what_was_expected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Beit(**SMALL | kwargs)


def test_training_on_uint8_images_teaches_the_tables():
    model = create_model("beit_test_patch16_64", num_classes=3)
    _, gradients = outputs_and_gradients(model, torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    assert gradients["blocks.0.attn.relative_position_bias_table"].any()


def test_the_readme_snippet_runs(capsys):
    readme = Path(beit.__file__).with_name("README.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], names)
    assert names["outputs"]["loss"].requires_grad
    assert names["classifier"](names["images"]).shape == (8, 10)
    assert "copied the table of relative positions that all blocks shared to 3 blocks" in capsys.readouterr().out
