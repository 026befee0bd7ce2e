# SPDX-License-Identifier: Apache-2.0
"""Swin v1 and v2 against timm: names, counts, outputs and every gradient."""

import copy
import re
from pathlib import Path

import parity
import pytest
import timm
import torch
from timm.layers import resample_patch_embed as timm_resample_patch_embed
from timm.layers import resize_rel_pos_bias_table, resize_rel_pos_bias_table_simple
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.testing import assert_close

from fvm_fast.layers.relative_position import resize_relative_position_bias
from fvm_fast.layers.swin_block import resample_patch_embed
from fvm_fast.models import MODELS, SwinTransformer, SwinTransformerV2, create_model
from fvm_fast.models.supervised_pretraining import swin

SMALL = dict(
    img_size=32,
    patch_size=2,
    num_classes=7,
    embed_dim=12,
    depths=(2, 2),
    num_heads=(2, 3),
    window_size=4,
    drop_path_rate=0.0,
)
CLASSES = {1: (SwinTransformer, TimmSwin), 2: (SwinTransformerV2, TimmSwinV2)}
BOTH = pytest.mark.parametrize("version", CLASSES)

# What each row is for: the geometry of windows first, then one argument at a time. Maps are 16 x 16, then 8 x 8.
VARIANTS = {
    "plain": {},
    "rectangular": dict(img_size=(24, 40)),
    "windows_do_not_divide": dict(window_size=5),
    "odd_maps": dict(img_size=(26, 34)),
    "windows_cover": dict(window_size=16),
    "windows_cover_one_axis": dict(img_size=(16, 40), window_size=8),
    "always_partition": dict(img_size=20, window_size=8, always_partition=True),
    "oblong_windows": dict(window_size=(3, 5)),
    "windows_by_stage": dict(window_size=((2, 4), (3, 3))),
    "three_stages": dict(depths=(1, 2, 1), num_heads=(2, 2, 4), window_size=(4, 3, 2)),
    "patch_4": dict(patch_size=4, img_size=(40, 64)),
    "grey": dict(in_chans=1),
    "max_pool": dict(global_pool="max"),
    "avgmax_pool": dict(global_pool="avgmax"),
    "catavgmax_pool": dict(global_pool="catavgmax"),
    "no_pool": dict(global_pool=""),
    "headless": dict(num_classes=0),
    "no_qkv_bias": dict(qkv_bias=False, window_size=5),
    "narrow_mlp": dict(mlp_ratio=1.5),
}
OF_ONE_VERSION = {
    "head_dim": (1, dict(head_dim=5)),
    "head_dim_by_stage": (1, dict(head_dim=(4, 9))),
    "mlp_ratio_by_stage": (1, dict(mlp_ratio=(2, 3))),
    "pretrained_windows": (2, dict(pretrained_window_sizes=(3, 6))),
    "gelu_tanh": (2, dict(act_layer="gelu_tanh")),
}


def pair(version: int, dtype: torch.dtype = torch.float64, **kwargs) -> tuple[nn.Module, nn.Module]:
    """Our model and timm's with the same random weights, none of them at its initial zero or one."""
    ours, theirs = (cls(**SMALL | kwargs).to(dtype) for cls in CLASSES[version])
    parity.randomise(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def images_for(model: nn.Module, batch: int = 2, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Random images of the size that the model expects, or of another, in its dtype."""
    weight, generator = model.patch_embed.proj.weight, torch.Generator().manual_seed(1)
    shape = (batch, weight.shape[1], *(size or model.patch_embed.img_size))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.dtype)


@BOTH
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_timm(version, kwargs):
    ours, theirs = pair(version, **kwargs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    parity.assert_same(ours, theirs, images_for(ours))


@pytest.mark.parametrize("version, kwargs", OF_ONE_VERSION.values(), ids=OF_ONE_VERSION.keys())
def test_arguments_of_one_version_equal_timm(version, kwargs):
    ours, theirs = pair(version, **kwargs)
    parity.assert_same(ours, theirs, images_for(ours))


def test_scales_above_the_clamp_have_no_gradient():
    ours, theirs = pair(2)
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                parameter.data.copy_(torch.linspace(1.0, 6.0, len(parameter))[:, None, None])
    parity.assert_same(ours, theirs, images_for(ours))
    gradient = ours.layers[0].blocks[0].attn.logit_scale.grad
    assert gradient[0] != 0 and gradient[-1] == 0


@BOTH
@pytest.mark.parametrize("flag", [dict(strict_img_size=False), dict(dynamic_img_size=True)], ids=["strict", "dynamic"])
def test_other_image_sizes_equal_timm(version, flag):
    ours, theirs = pair(version, **flag)
    for size in (32, 32), (24, 40), (8, 38):
        parity.assert_same(ours, theirs, images_for(ours, size=size))


SIZE_CHANGES = {
    "nothing": [dict()],
    "image": [dict(img_size=(24, 40))],
    "larger_image": [dict(img_size=96)],
    "window": [dict(window_size=6)],
    "oblong_window": [dict(img_size=40, window_size=(5, 3))],
    "window_ratio": [dict(img_size=48, window_ratio=4)],
    "ratio_by_stage": [dict(window_ratio=(8, 4))],
    "patch": [dict(patch_size=4)],
    "partition": [dict(img_size=20, always_partition=True)],
    "there_and_back": [dict(img_size=64), dict(img_size=32)],
    "explicit_then_scaled": [dict(window_size=(2, 3)), dict(img_size=64)],
}


@BOTH
@pytest.mark.parametrize("changes", SIZE_CHANGES.values(), ids=SIZE_CHANGES.keys())
def test_set_input_size_equals_timm(version, changes):
    ours, theirs = pair(version)
    for change in changes:
        ours.set_input_size(**change)
        theirs.set_input_size(**change)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")  # timm: in float32
    assert [b.shift_size for s in ours.layers for b in s.blocks] == [
        b.shift_size for s in theirs.layers for b in s.blocks
    ]
    theirs.load_state_dict(ours.state_dict())
    parity.assert_same(ours, theirs, images_for(ours))
    assert ours.feature_info == theirs.feature_info
    assert ours.default_cfg["input_size"][1:] == tuple(theirs.patch_embed.img_size)


@pytest.mark.parametrize("old, new", [((7, 7), (12, 12)), ((12, 12), (7, 7)), ((4, 6), (9, 3)), ((1, 1), (3, 4))])
def test_tables_are_resized_as_timm_and_microsoft_do(old, new):
    table = torch.randn((2 * old[0] - 1) * (2 * old[1] - 1), 3, generator=torch.Generator().manual_seed(0))
    shape = ((2 * new[0] - 1) * (2 * new[1] - 1), 3)
    expected = resize_rel_pos_bias_table(table, new, shape, old_window_size=old)
    assert_close(resize_relative_position_bias(table, new, old_window=old), expected, atol=1e-5, rtol=1e-5)
    if old[0] == old[1]:
        bicubic = resize_relative_position_bias(table, new, rule="microsoft")
        assert_close(bicubic, resize_rel_pos_bias_table_simple(table, new, shape), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (3, 6)])
def test_patch_projections_are_resampled_as_timm_does(size):
    weight = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = timm_resample_patch_embed(weight, list(size))
    assert_close(resample_patch_embed(weight, size), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_a_real_size_equals_timm_in_float32(name):
    ours, theirs = create_model(name).eval(), timm.create_model(name).eval()
    parity.randomise(theirs, std=0.05)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        expected = theirs(images_for(ours, batch=1))
        assert_close(ours(images_for(ours, batch=1)), expected, atol=1e-5 * float(expected.abs().max()), rtol=0.0)


COUNTS = {
    "swin_tiny_patch4_window7_224": 28_288_354,
    "swin_small_patch4_window7_224": 49_606_258,
    "swin_base_patch4_window7_224": 87_768_224,
    "swin_base_patch4_window12_384": 87_903_584,
    "swin_large_patch4_window7_224": 196_532_476,
    "swin_large_patch4_window12_384": 196_735_516,
    "swinv2_tiny_window8_256": 28_347_154,
    "swinv2_tiny_window16_256": 28_347_154,
    "swinv2_small_window8_256": 49_728_418,
    "swinv2_small_window16_256": 49_728_418,
    "swinv2_base_window8_256": 87_918_816,
    "swinv2_base_window16_256": 87_918_816,
    "swinv2_base_window12to16_192to256": 87_918_816,
    "swinv2_base_window12to24_192to384": 87_918_816,
    "swinv2_large_window12to16_192to256": 196_739_932,
    "swinv2_large_window12to24_192to384": 196_739_932,
}
TEST_SIZES = ["swin_test_patch4_window4_64", "swinv2_test_window4_64"]


def test_every_size_is_counted():
    assert COUNTS.keys() | set(TEST_SIZES) == {name for name in MODELS if name.startswith("swin")}


@pytest.mark.parametrize("name, count", COUNTS.items())
def test_every_size_has_timms_names_shapes_and_count(name, count):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(name, num_classes=1000)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == count
    for key in ("input_size", "mean", "std", "crop_pct", "interpolation", "classifier", "first_conv", "num_classes"):
        assert ours.default_cfg[key] == theirs.default_cfg[key], key
    geometry = [[(b.window_size, b.shift_size) for s in m.layers for b in s.blocks] for m in (ours, theirs)]
    assert geometry[0] == geometry[1]


@pytest.mark.parametrize("name, count", [*zip(TEST_SIZES, (504_942, 525_422), strict=True)])
def test_test_sizes_are_small(name, count):
    model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_the_readme_snippet_runs(capsys):
    readme = Path(swin.__file__).with_name("README.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], names)
    assert names["logits"].shape == (2, 10)
    assert [tuple(m.shape) for m in names["maps"]] == [(2, 192, 28, 28), (2, 384, 14, 14), (2, 768, 7, 7)]
    assert "(microsoft names); resized the relative_position_bias_tables" in capsys.readouterr().out


@BOTH
def test_initialisation_has_timms_statistics(version):
    torch.manual_seed(0)
    ours, theirs = (cls(**SMALL | dict(embed_dim=48, num_heads=(3, 6))) for cls in CLASSES[version])
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if a.numel() < 1000:
            assert_close(a.mean(), b.mean(), atol=0.15, rtol=0.0, msg=name)
        else:
            assert_close(a.std(), b.std(), atol=0.0, rtol=0.1, msg=name)


@BOTH
def test_drop_path_rises_as_in_timm(version):
    rates = [
        [getattr(block.drop_path2, "drop_prob", 0.0) for stage in model.layers for block in stage.blocks]
        for model in pair(version, drop_path_rate=0.3)
    ]
    assert rates[0] == rates[1] and rates[0][-1] > 0.29


@BOTH
@pytest.mark.parametrize("indices", [None, 2, (0, 2), (-2,)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("stop_early", [False, True])
def test_forward_intermediates_equals_timm(version, indices, norm, stop_early):
    ours, theirs = pair(version, depths=(1, 2, 1), num_heads=(1, 2, 3), img_size=(24, 40))
    settings = dict(indices=indices, norm=norm, stop_early=stop_early)
    final, maps = ours.forward_intermediates(images_for(ours), **settings)
    timm_final, timm_maps = theirs.forward_intermediates(images_for(ours), **settings)
    assert_close(final, timm_final, atol=1e-9, rtol=1e-9)
    for a, b in zip(maps, timm_maps, strict=True):
        assert_close(a, b, atol=1e-9, rtol=1e-9)
    only = ours.forward_intermediates(images_for(ours), **settings, intermediates_only=True, output_fmt="NHWC")
    assert torch.equal(only[0].permute(0, 3, 1, 2), maps[0])


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
@pytest.mark.parametrize("out_indices", [3, (0, 2), (-3,)])
def test_features_only_equals_timm(name, out_indices):
    kwargs = dict(
        features_only=True, img_size=64, embed_dim=12, depths=(1, 2, 1, 1), num_heads=(1, 2, 3, 4), window_size=4
    )
    timm_indices = (1, 2, 3) if out_indices == 3 else out_indices
    ours = create_model(name, out_indices=out_indices, **kwargs).eval()
    theirs = parity.randomise(timm.create_model(name, out_indices=timm_indices, **kwargs)).eval()
    state = {re.sub(r"^layers_", "layers.", key): value for key, value in theirs.state_dict().items()}
    ours.load_state_dict({f"model.{key}": value for key, value in state.items()}, strict=True)
    pictures = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for a, b in zip(ours(pictures), theirs(pictures), strict=True):
            expected = b.permute(0, 3, 1, 2)  # timm leaves them NHWC
            assert_close(a, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
    for column in ("channels", "reduction", "module_name"):
        assert getattr(ours.feature_info, column)() == getattr(theirs.feature_info, column)()


@BOTH
def test_forward_head_and_reset_classifier(version):
    ours, theirs = (model.eval() for model in pair(version, drop_rate=0.1))
    pictures = images_for(ours)
    x = ours.forward_features(pictures)
    assert_close(x, theirs.forward_features(pictures), atol=1e-9, rtol=1e-9)
    assert_close(ours.forward_head(x, pre_logits=True), theirs.forward_head(x, pre_logits=True))
    assert ours.get_classifier() is ours.head.fc
    for pool, width in (("catavgmax", 48), ("max", 24), ("", 24)):
        for model in (ours, theirs):
            model.reset_classifier(0, pool)
        assert isinstance(ours.get_classifier(), nn.Identity) and ours.num_classes == 0
        assert ours.head_hidden_size == theirs.head_hidden_size == width
        assert_close(ours(pictures), theirs(pictures), atol=1e-9, rtol=1e-9)
    ours.reset_classifier(5, "avg")
    assert ours(pictures).shape == (2, 5) and ours.head.fc.weight.dtype == torch.float64


@BOTH
def test_no_weight_decay_and_groups_equal_timm(version):
    ours, theirs = pair(version)
    assert ours.no_weight_decay() == theirs.no_weight_decay() != set()
    for settings in ({}, dict(no_opt_scale=0.5)):
        sizes = [[len(g["params"]) for g in param_groups_layer_decay(m, **settings)] for m in (ours, theirs)]
        assert sizes[0] == sizes[1]
    coarse = [timm.models.group_parameters(m, m.group_matcher(coarse=True)) for m in (ours, theirs)]
    assert coarse[0] == coarse[1]
    assert timm.data.resolve_model_data_config(ours)["input_size"] == (3, 32, 32)


@BOTH
def test_checkpointing_changes_nothing(version):
    ours, _ = pair(version)
    parity.assert_checkpointing_changes_nothing(ours, images_for(ours))
    ours.set_grad_checkpointing()
    calls = []
    ours.layers[1].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    ours(images_for(ours)).sum().backward()
    assert len(calls) == 2, "the block should have run again in the backward pass"


@BOTH
def test_checkpointing_drops_the_same_attention_weights_again(version):
    ours, _ = pair(version, attn_drop_rate=0.5, drop_path_rate=0.2, proj_drop_rate=0.1)

    def seeded(model: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return model(pictures)

    parity.assert_checkpointing_changes_nothing(ours, images_for(ours), seeded)


@BOTH
@pytest.mark.parametrize("name", ["drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_each_dropout_acts_in_training_only(version, name):
    ours, theirs = pair(version, **{name: 0.5})
    pictures = images_for(ours, batch=4)
    assert_close(ours.eval()(pictures), theirs.eval()(pictures), atol=1e-9, rtol=1e-9)
    ours.train()
    assert not torch.equal(ours(pictures), ours(pictures))


@BOTH
def test_float32_rule(version):
    ours, _ = pair(version, torch.float32, window_size=5)
    parity.assert_float32_rule(ours, images_for(ours))


@BOTH
def test_bfloat16_rule(version):
    ours, theirs = pair(version, torch.float32, window_size=5)
    parity.assert_bfloat16_rule(ours, theirs, images_for(ours, batch=8))


@BOTH
def test_native_and_torch_agree(version):
    ours, _ = pair(version, img_size=(26, 34))
    parity.assert_native_and_torch_agree(ours, images_for(ours))


@BOTH
def test_autocast_is_as_near_as_timm(version):
    ours, theirs = pair(version, torch.float32)
    pictures = images_for(ours)
    exact = copy.deepcopy(ours).double()(pictures.double()).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        errors = [float((model(pictures).detach().double() - exact).norm()) for model in (ours, theirs)]
    assert 0 < errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("name", TEST_SIZES)
def test_test_sizes_compile_without_a_break(name):
    model = parity.randomise(create_model(name, num_classes=5, drop_path_rate=0.0), std=0.1)
    parity.assert_compiles_without_a_break(model, images_for(model))


@pytest.mark.parametrize("name", TEST_SIZES)
def test_test_sizes_export(name):
    model = parity.randomise(create_model(name, num_classes=5), std=0.1)
    parity.assert_exports(model, images_for(model, batch=4))


@BOTH
def test_uint8_images_are_normalised_inside(version):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model = CLASSES[version][0](**SMALL, image_mean=mean, image_std=std).double()
    pictures = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    normalised = (pictures.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert_close(model(pictures), model(normalised), atol=1e-6, rtol=1e-6)


@BOTH
def test_empty_batch(version):
    ours, _ = pair(version, torch.float32)
    logits = ours(torch.zeros(0, 3, 32, 32))
    assert logits.shape == (0, 7)
    logits.sum().backward()
    assert not ours.patch_embed.proj.weight.grad.any()


def images(*size: int) -> torch.Tensor:
    return torch.zeros(1, 3, *size)


BAD = {
    "uint8": (lambda model, cls: model(images(32, 32).byte()), "uint8 images need a mean"),
    "no_batch": (lambda model, cls: model(images(32, 32)[0]), "should be \\[B, C, H, W\\], got 3 dimensions"),
    "other_size": (lambda model, cls: model(images(32, 40)), "should be 32 x 32, got 32 x 40"),
    "partial_patch": (
        lambda model, cls: cls(**SMALL, dynamic_img_size=True)(images(33, 32)),
        "multiples of the patch size 2, got 33 x 32",
    ),
    "heads": (lambda model, cls: cls(**SMALL | dict(num_heads=(5, 3))), "multiple of its num_heads, got 12 and 5"),
    "stages": (lambda model, cls: cls(**SMALL | dict(num_heads=(2,))), "num_heads should .* 2 stages, got \\(2,\\)"),
    "windows": (lambda model, cls: cls(**SMALL | dict(window_size=(4, 4, 4))), "window_size should .* 2 stages"),
    "no_window": (lambda model, cls: cls(**SMALL | dict(window_size=0)), "window_size should be positive, got 0"),
    "pool": (lambda model, cls: cls(**SMALL, global_pool="mean"), "global_pool should be .* got 'mean'"),
    "pad_order": (lambda model, cls: cls(**SMALL, pad_order="pad"), "pad_order should be .* got 'pad'"),
    "drop_path": (lambda model, cls: cls(**SMALL | dict(drop_path_rate=1.0)), "should be in \\[0, 1\\), got 1"),
    "format": (lambda model, cls: model.forward_intermediates(images(32, 32), output_fmt="NLC"), "got 'NLC'"),
    "indices": (lambda model, cls: model.forward_intermediates(images(32, 32), indices=[2]), "got \\[2\\]"),
    "new_windows": (
        lambda model, cls: model.set_input_size(64, window_size=(1, 2, 3)),
        "window_size should .* 2 stages",
    ),
    "ratios": (lambda model, cls: model.set_input_size(window_ratio=(1, 2, 3)), "window_ratio should .* 2 stages"),
    "init": (lambda model, cls: SwinTransformer(**SMALL, weight_init="jax"), "weight_init should be .* got 'jax'"),
    "resize": (
        lambda model, cls: SwinTransformer(**SMALL, table_resize="area"),
        "table_resize should be .* got 'area'",
    ),
    "rule": (
        lambda model, cls: resize_relative_position_bias(torch.zeros(9, 1), (3, 3), rule="dino"),
        "one of timm, microsoft, got 'dino'",
    ),
    "table": (lambda model, cls: resize_relative_position_bias(torch.zeros(8, 1), (3, 3)), "square window, got 8"),
}


@BOTH
@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD.keys())
def test_bad_input_says_what_was_expected(version, call, message):
    cls = CLASSES[version][0]
    with pytest.raises(ValueError, match=message):
        call(cls(**SMALL), cls)


def test_a_refused_change_of_size_leaves_the_model_as_it_was():
    model = SwinTransformer(**SMALL)
    with pytest.raises(ValueError, match="window_size"):
        model.set_input_size(64, window_size=(1, 2, 3))
    assert model.patch_embed.img_size == (32, 32) and model(images(32, 32)).shape == (1, 7)
