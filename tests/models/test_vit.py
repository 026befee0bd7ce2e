# SPDX-License-Identifier: Apache-2.0
"""VisionTransformer against timm: names, counts, outputs and every gradient."""

import re
from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import fvm_fast
from fvm_fast.models import MODELS, VisionTransformer, create_model
from fvm_fast.models.supervised_pretraining import vit

SMALL = dict(img_size=32, patch_size=8, num_classes=7, embed_dim=24, depth=2, num_heads=3)

# What each row is for: the plain model, then one feature at a time, then all that go together.
VARIANTS = {
    "plain": {},
    "rectangular": dict(img_size=(24, 40)),
    "patch_14": dict(img_size=(28, 42), patch_size=14),
    "one_patch": dict(img_size=8),
    "grey": dict(in_chans=1),
    "reg_tokens": dict(reg_tokens=3),
    "qk_norm": dict(qk_norm=True),
    "layer_scale": dict(init_values=0.3),
    "avg_pool": dict(global_pool="avg"),
    "max_pool": dict(global_pool="max"),
    "avgmax_pool": dict(global_pool="avgmax", fc_norm=False),
    "pool_include_prefix": dict(global_pool="avg", pool_include_prefix=True),
    "all_tokens": dict(global_pool=""),
    "no_class_token": dict(class_token=False, global_pool="avg"),
    "no_embed_class": dict(no_embed_class=True),
    "no_pos_embed": dict(pos_embed="none"),
    "pre_norm": dict(pre_norm=True),
    "no_final_norm": dict(final_norm=False),
    "no_biases": dict(qkv_bias=False, proj_bias=False),
    "fc_norm_on_token": dict(fc_norm=True),
    "headless": dict(num_classes=0),
    "gelu_tanh": dict(act_layer="gelu_tanh"),
    "wide_mlp": dict(mlp_ratio=2.5),
    "padded": dict(dynamic_img_size=True, dynamic_img_pad=True),
    "together": dict(
        img_size=(24, 40),
        reg_tokens=2,
        qk_norm=True,
        init_values=0.1,
        no_embed_class=True,
        global_pool="avg",
        pre_norm=True,
    ),
}


def pair(dtype: torch.dtype = torch.float64, **kwargs) -> tuple[VisionTransformer, TimmViT]:
    """Our model and timm's with the same random weights, none of them at its initial zero or one."""
    torch.manual_seed(0)
    ours, theirs = VisionTransformer(**SMALL | kwargs).to(dtype), TimmViT(**SMALL | kwargs).to(dtype)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def gradients(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits, and the gradient of their cross-entropy for the images and for every parameter."""
    images = images.clone().requires_grad_()
    logits = model(images)
    rows = logits.reshape(-1, logits.shape[-1])
    cross_entropy(rows, torch.arange(len(rows)) % rows.shape[1]).backward()
    return logits.detach(), {"images": images.grad} | {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient is not None and gradient.abs().max() > 0, f"{name} should have a gradient"
        assert_close(gradient, theirs[name], msg=lambda text, name=name: f"gradient of {name}: {text}", **tolerance)


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_timm(kwargs):
    ours, theirs = pair(**kwargs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    height, width = ours.patch_embed.img_size
    size = (height - 3, width + 1) if kwargs.get("dynamic_img_pad") else (height, width)
    images = torch.randn(3, kwargs.get("in_chans", 3), *size, dtype=torch.float64)
    tolerance = dict(atol=1e-9, rtol=1e-9)
    if "dynamic_img_pad" in kwargs and ours.patch_embed.feat_size(size) != ours.patch_embed.grid_size:
        tolerance = dict(atol=1e-6, rtol=1e-6)  # timm resizes positions in float32
    logits, ours_gradients = gradients(ours, images)
    timm_logits, timm_gradients = gradients(theirs, images)
    assert_close(logits, timm_logits, **tolerance)
    assert_same_gradients(ours_gradients, timm_gradients, **tolerance)


@pytest.mark.parametrize("kwargs", [{}, dict(no_embed_class=True, reg_tokens=2)], ids=["plain", "no_embed_class"])
def test_dynamic_img_size_equals_timm(kwargs):
    ours, theirs = pair(torch.float32, dynamic_img_size=True, **kwargs)
    for size in (32, 32), (24, 48), (64, 40):
        images = torch.randn(2, 3, *size)
        ours.zero_grad(), theirs.zero_grad()
        logits, ours_gradients = gradients(ours, images)
        timm_logits, timm_gradients = gradients(theirs, images)
        assert_close(logits, timm_logits, atol=1e-5, rtol=1e-5)
        assert_same_gradients(ours_gradients, timm_gradients, atol=1e-5, rtol=1e-4)


def test_vit_tiny_equals_timm_in_float32():
    torch.manual_seed(0)
    ours = create_model("vit_tiny_patch16_224", num_classes=100)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=100)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 224, 224)
    logits, ours_gradients = gradients(ours, images)
    timm_logits, timm_gradients = gradients(theirs, images)
    assert_close(logits, timm_logits, atol=1e-5, rtol=1e-5)
    for name, gradient in ours_gradients.items():
        error = (gradient - timm_gradients[name]).norm() / timm_gradients[name].norm()
        assert error < 1e-5 or gradient.norm() < 1e-5, f"gradient of {name}: relative error {error:.1e}"


COUNTS = {
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch8_224": 22_055_272,
    "vit_small_patch16_224": 22_050_664,
    "vit_small_patch32_224": 22_878_952,
    "vit_base_patch8_224": 86_576_872,
    "vit_base_patch16_224": 86_567_656,
    "vit_base_patch16_384": 86_859_496,
    "vit_base_patch32_224": 88_224_232,
    "vit_large_patch16_224": 304_326_632,
    "vit_large_patch16_384": 304_715_752,
    "vit_huge_patch14_224": 632_045_800,
}


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("vit_") and "test" not in name])
def test_every_size_has_timms_names_shapes_and_count(name):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(name, num_classes=1000)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    count = sum(p.numel() for p in ours.parameters())
    assert count == COUNTS.get(name, count)
    for key in ("input_size", "mean", "std", "crop_pct", "interpolation", "classifier", "first_conv"):
        assert ours.default_cfg[key] == theirs.default_cfg[key], key


def test_test_size_is_small():
    model = create_model("vit_test_patch16_64")
    assert sum(p.numel() for p in model.parameters()) == 265_448
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_the_readme_snippet_runs(capsys):
    readme = Path(vit.__file__).with_name("README.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], names)
    assert names["model"](names["images"]).shape == (2, 10)
    assert [tuple(m.shape) for m in names["maps"]] == [(2, 192, 14, 14)] * 3
    assert "(transformers names); resized pos_embed from 196 patches to 24 x 24" in capsys.readouterr().out


def test_initialisation_has_timms_statistics():
    torch.manual_seed(0)
    kwargs = dict(img_size=64, patch_size=8, embed_dim=96, depth=2, num_heads=3, reg_tokens=4)
    ours, theirs = VisionTransformer(**kwargs), TimmViT(**kwargs)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if a.numel() < 1000:
            assert_close(a.mean(), b.mean(), atol=0.02, rtol=0.0, msg=name)
        else:
            assert_close(a.std(), b.std(), atol=0.0, rtol=0.1, msg=name)


@pytest.mark.parametrize("indices", [None, 2, (0, 2), (-1,)])
@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
def test_forward_intermediates_equals_timm(indices, output_fmt):
    ours, theirs = pair(depth=3, img_size=(24, 40), reg_tokens=1)
    images = torch.randn(2, 3, 24, 40, dtype=torch.float64)
    settings = dict(indices=indices, output_fmt=output_fmt, norm=True, return_prefix_tokens=True)
    final, maps = ours.forward_intermediates(images, **settings)
    timm_final, timm_maps = theirs.forward_intermediates(images, **settings)
    assert_close(final, timm_final)
    assert len(maps) == len(timm_maps)
    for (patches, prefix), (timm_patches, timm_prefix) in zip(maps, timm_maps, strict=True):
        assert_close(patches, timm_patches)
        assert_close(prefix, timm_prefix)
    only = ours.forward_intermediates(images, **settings | dict(intermediates_only=True, stop_early=True))
    assert_close(only[-1][0], maps[-1][0])


@pytest.mark.parametrize("out_indices", [3, (2, 5), (-2,)])
def test_features_only_equals_timm(out_indices):
    theirs = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=out_indices)
    ours = create_model("vit_tiny_patch16_224", features_only=True, out_indices=out_indices)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for a, b in zip(ours(images), theirs(images), strict=True):
            assert_close(a, b, atol=1e-5, rtol=1e-5)
    for column in ("channels", "reduction", "module_name"):
        assert getattr(ours.feature_info, column)() == getattr(theirs.feature_info, column)()


def test_forward_head_and_reset_classifier():
    ours, theirs = pair(drop_rate=0.1)
    ours.eval(), theirs.eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    tokens = ours.forward_features(images)
    assert_close(tokens, theirs.forward_features(images))
    assert_close(ours.forward_head(tokens, pre_logits=True), theirs.forward_head(tokens, pre_logits=True))
    assert ours.get_classifier() is ours.head
    for model in (ours, theirs):
        model.reset_classifier(0, "avg")
    assert isinstance(ours.get_classifier(), nn.Identity) and ours.num_classes == 0
    assert_close(ours(images), theirs(images))
    ours.reset_classifier(5)
    assert ours(images).shape == (2, 5)


def test_set_input_size_equals_timm():
    ours, theirs = pair(torch.float32)
    for model in (ours, theirs):
        model.set_input_size((48, 24))
    assert_close(ours.pos_embed, theirs.pos_embed)
    images = torch.randn(2, 3, 48, 24)
    assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)
    assert ours.default_cfg["input_size"] == (3, 48, 24)


def test_no_weight_decay_and_groups_equal_timm():
    ours, theirs = pair()
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    from timm.optim import param_groups_layer_decay

    sizes = [[len(group["params"]) for group in param_groups_layer_decay(model)] for model in (ours, theirs)]
    assert sizes[0] == sizes[1]
    assert timm.data.resolve_model_data_config(ours)["input_size"] == (3, 32, 32)


def test_checkpointing_gives_the_same_gradients():
    ours, _ = pair()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    logits, plain = gradients(ours, images)
    ours.zero_grad()
    ours.set_grad_checkpointing()
    calls = []
    ours.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    again, recomputed = gradients(ours, images)
    assert_close(again, logits, atol=0.0, rtol=0.0)
    assert_same_gradients(recomputed, plain, atol=0.0, rtol=0.0)
    assert len(calls) == 2, "the block should have run again in the backward pass"


def test_patch_drop_trains_on_fewer_tokens():
    ours, _ = pair(patch_drop_rate=0.5, reg_tokens=1)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert ours.train().forward_features(images).shape[1] == 2 + 8
    assert ours.eval().forward_features(images).shape[1] == 2 + 16
    seen = {tuple(ours.train()._kept_patches(images)[0].tolist()) for _ in range(5)}
    assert len(seen) > 1
    assert ours.forward_intermediates(images, 1, intermediates_only=True)[0].shape == (2, 24, 4, 4)


@pytest.mark.parametrize("name", ["drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_each_dropout_acts_in_training_only(name):
    ours, theirs = pair(**{name: 0.5})
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    assert_close(ours.eval()(images), theirs.eval()(images))
    ours.train()
    assert not torch.equal(ours(images), ours(images))


def test_uint8_images_are_normalised_inside():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for extra in ({}, dict(dynamic_img_size=True, dynamic_img_pad=True)):
        model = VisionTransformer(**SMALL, image_mean=mean, image_std=std, **extra).double()
        size = (32, 32) if not extra else (29, 32)
        images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
        normalised = (images.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        assert_close(model(images), model(normalised), atol=1e-6, rtol=1e-6)


def test_native_and_torch_agree():
    ours, _ = pair(torch.float32, reg_tokens=1)
    images = torch.randn(3, 3, 32, 32).to(memory_format=torch.channels_last)
    logits, automatic = gradients(ours, images)
    ours.zero_grad()
    with fvm_fast.backend("torch"):
        torch_logits, plain = gradients(ours, images)
    assert_close(logits, torch_logits, atol=1e-5, rtol=1e-5)
    assert_same_gradients(automatic, plain, atol=1e-5, rtol=1e-4)


def test_empty_batch():
    ours, _ = pair(torch.float32)
    assert ours(torch.zeros(0, 3, 32, 32)).shape == (0, 7)


BAD = {
    "uint8": (lambda model: model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "uint8 images need a mean"),
    "no_batch": (lambda model: model(torch.zeros(3, 32, 32)), "should be \\[B, C, H, W\\], got 3 dimensions"),
    "other_size": (lambda model: model(torch.zeros(1, 3, 32, 40)), "should be 32 x 32, got 32 x 40"),
    "partial_patch": (
        lambda model: VisionTransformer(**SMALL, dynamic_img_size=True)(torch.zeros(1, 3, 33, 32)),
        "multiples of the patch size 8, got 33 x 32",
    ),
    "heads": (lambda model: VisionTransformer(**SMALL | dict(num_heads=5)), "multiple of num_heads, got 24 and 5"),
    "pool": (lambda model: VisionTransformer(**SMALL, global_pool="mean"), "global_pool should be .* got 'mean'"),
    "positions": (lambda model: VisionTransformer(**SMALL, pos_embed="rope"), "pos_embed should be .* got 'rope'"),
    "init": (lambda model: VisionTransformer(**SMALL, weight_init="jax"), "weight_init should be .* got 'jax'"),
    "resize": (lambda model: VisionTransformer(**SMALL, pos_embed_resize="area"), "resize should be .* got 'area'"),
    "token_pool": (lambda model: VisionTransformer(**SMALL, class_token=False), "needs class_token=True"),
    "drop_path": (lambda model: VisionTransformer(**SMALL, drop_path_rate=1.0), "should be in \\[0, 1\\), got 1"),
    "activation": (lambda model: VisionTransformer(**SMALL, act_layer="glue"), "act_layer should be .* got 'glue'"),
    "format": (lambda model: model.forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="HW"), "got 'HW'"),
    "indices": (lambda model: model.forward_intermediates(torch.zeros(1, 3, 32, 32), indices=[2]), "got \\[2\\]"),
    "half_a_normalisation": (lambda model: VisionTransformer(**SMALL, image_mean=(0, 0, 0)), "go together"),
    "patch": (lambda model: VisionTransformer(**SMALL | dict(patch_size=(8, 4))), "should be square, got \\(8, 4\\)"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD.keys())
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call(VisionTransformer(**SMALL))
