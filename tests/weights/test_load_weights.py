# SPDX-License-Identifier: Apache-2.0
"""load_weights and export_weights: what they accept, what they refuse, and that a refusal changes nothing."""

import pytest
import torch
from timm.models import adapt_input_conv
from torch import nn
from torch.testing import assert_close

from fvm_fast import create_model, export_weights, load_weights
from fvm_fast.weights.spelling import merge_qkv, rename, split_qkv


def model(**kwargs) -> nn.Module:
    return create_model("vit_test_patch16_64", num_classes=5, **kwargs)


def changed(state: dict, **tensors) -> dict:
    """The state with some tensors replaced (names with dots written as ``__``), or removed when None."""
    state = state | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.fixture
def state() -> dict:
    torch.manual_seed(7)
    return {name: torch.randn_like(tensor) for name, tensor in model().state_dict().items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": state, "optimizer": {}},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"model": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}},
    ],
    ids=["plain", "model", "state_dict", "ddp", "compiled_ddp"],
)
def test_wrappings_are_taken_off(wrap, state):
    ours = model()
    report = load_weights(ours, wrap(state))
    assert report.loaded == len(state) and not report.missing and not report.unexpected
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


def test_tensors_are_cast_to_the_models_dtype(state):
    ours = model().bfloat16()
    load_weights(ours, state)
    assert torch.equal(ours.head.weight, state["head.weight"].bfloat16())


REFUSED = {
    "missing": (dict(norm__weight=None, head__bias=None), "2 of 44 tensors are missing \\(norm.weight, head.bias\\)"),
    "unexpected": (dict(fc_norm__weight=torch.ones(64)), "1 have no place in the model \\(fc_norm.weight\\)"),
    "other_head": (dict(head__weight=torch.ones(9, 64)), "head.weight should be \\[5, 64\\], got \\[9, 64\\]"),
    "no_square": (dict(pos_embed=torch.ones(1, 8, 64)), "square grid, got 7 patches"),
    "foreign": ({"patch_embed__proj__weight": None}, "names should be those of timm, .* got cls_token"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED.keys())
def test_a_refusal_is_a_sentence_and_changes_nothing(change, message, state):
    ours = model()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(ours, changed(state, **change))
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_exclude_leaves_a_head_of_another_size(state):
    ours = model()
    head = ours.head.weight.clone()
    state = changed(state, head__weight=torch.ones(9, 64), head__bias=torch.ones(9))
    report = load_weights(ours, state, exclude="head.*")
    assert report.loaded == 42 and torch.equal(ours.head.weight, head)
    assert torch.equal(ours.norm.weight, state["norm.weight"])


def test_not_strict_loads_what_there_is_and_reports_the_rest(state):
    ours = model()
    report = load_weights(ours, changed(state, norm__bias=None, extra=torch.ones(1)), strict=False)
    assert report.missing == ("norm.bias",) and report.unexpected == ("extra",) and report.loaded == 43
    assert str(report) == "loaded 43 tensors (timm names); not in the checkpoint: norm.bias; not used: extra"


def test_position_embedding_is_resized_on_load(state):
    ours = model(img_size=(32, 96))
    report = load_weights(ours, state)
    assert "resized pos_embed from 16 patches to 2 x 6 (timm rule)" in str(report)
    assert torch.equal(ours.pos_embed[:, :1], state["pos_embed"][:, :1])
    with pytest.raises(ValueError, match="rule should be one of timm, .* got 'nearest'"):
        load_weights(model(img_size=32), state, resize="nearest")


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("name", ["vit_test_patch16_64", "swin_test_patch4_window4_64", "convnext_test"])
def test_the_first_convolution_is_fitted_to_other_channels_as_timm_does(name, channels):
    torch.manual_seed(0)
    state = create_model(name).state_dict()
    ours = create_model(name, in_chans=channels)
    first = f"{ours.default_cfg['first_conv']}.weight"
    report = load_weights(ours, state)
    assert_close(ours.state_dict()[first], adapt_input_conv(channels, state[first]))
    assert f"fitted {first} from 3 channels to {channels}" in report.notes
    with pytest.raises(ValueError, match=f"{first} should be"):
        load_weights(create_model(name, in_chans=3), ours.state_dict())


def test_a_training_checkpoint_with_several_networks_names_them(state):
    with pytest.raises(ValueError, match="got 'student', 'teacher'; pass the part that does"):
        load_weights(model(), {"student": state, "teacher": state})
    with pytest.raises(ValueError, match="got nothing"):
        load_weights(model(), {})


def test_unknown_models_and_spellings():
    with pytest.raises(ValueError, match="should be one of .*CLIP, .*VisionTransformer.*, got Linear"):
        load_weights(nn.Linear(2, 2), {})
    with pytest.raises(ValueError, match="to should be one of timm, .* got 'keras'"):
        export_weights(model(), to="keras")


def test_rename_says_which_tensors_have_no_place():
    table = {"blocks.{i}.norm": "layer.{i}.ln", "head": "fc"}
    ones = torch.ones(1)
    renamed = rename({"blocks.12.norm.weight": ones, "head.bias": ones, "head": ones}, table, "theirs")
    assert list(renamed) == ["layer.12.ln.weight", "fc.bias", "fc"]
    with pytest.raises(ValueError, match="theirs has no place for 1 of 1 tensors: blocks.x.norm.weight"):
        rename({"blocks.x.norm.weight": ones}, table, "theirs")


def test_qkv_is_split_and_merged_with_a_zero_for_an_absent_key_bias():
    fused = {"a.qkv.weight": torch.randn(6, 2), "a.qkv.bias": torch.randn(6), "b.weight": torch.ones(1)}
    split = split_qkv(fused)
    assert set(split) == {"a.q.weight", "a.k.weight", "a.v.weight", "a.q.bias", "a.k.bias", "a.v.bias", "b.weight"}
    assert torch.equal(split["a.k.weight"], fused["a.qkv.weight"][2:4])
    merged = merge_qkv(split)
    assert merged.keys() == fused.keys() and all(torch.equal(merged[name], fused[name]) for name in fused)
    del split["a.k.bias"]
    assert torch.equal(merge_qkv(split)["a.qkv.bias"][2:4], torch.zeros(2))
