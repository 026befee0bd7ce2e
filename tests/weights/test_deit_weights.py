# SPDX-License-Identifier: Apache-2.0
"""DeiT weights between timm, transformers (both spellings) and the paper's repositories: same logits and gradients."""

import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import DeiTConfig, DeiTForImageClassification, DeiTForImageClassificationWithTeacher, DeiTModel

from fvm_fast import export_weights, load_weights
from fvm_fast.models import VisionTransformer, VisionTransformerDistilled
from fvm_fast.weights.deit import from_transformers

OURS = dict(img_size=32, patch_size=8, num_classes=5, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0)
EPS = 1e-3  # far from every default, so that a lost epsilon shows
LABELS = torch.tensor([0, 1, 2, 4])
DEIT3 = dict(no_embed_class=True, init_values=0.1)


def randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def our_model(**kwargs) -> VisionTransformerDistilled:
    return randomise(VisionTransformerDistilled(**OURS | dict(norm_eps=EPS) | kwargs))


def our_deit3(**kwargs) -> VisionTransformer:
    return randomise(VisionTransformer(**OURS | DEIT3 | kwargs))


def transformers_model(model_class=DeiTForImageClassificationWithTeacher, **kwargs) -> nn.Module:
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48)
    config = DeiTConfig(**sizes, image_size=32, patch_size=8, num_labels=5, layer_norm_eps=EPS, **kwargs)
    return randomise(model_class(config))


def images(height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(4, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def assert_equal_state(ours: nn.Module, theirs: nn.Module) -> None:
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


@pytest.mark.parametrize("kwargs", [{}, dict(hidden_act="quick_gelu", qkv_bias=False)], ids=["plain", "other_numerics"])
def test_from_transformers_in_memory(kwargs):
    theirs = transformers_model(**kwargs)
    ours = our_model(act_layer=kwargs.get("hidden_act"), qkv_bias=kwargs.get("qkv_bias", True))
    report = load_weights(ours, theirs.state_dict())
    assert report.spelling == "transformers" and report.loaded == len(ours.state_dict())
    output = theirs(images())
    assert_close(ours(images()), output.logits, atol=1e-9, rtol=1e-9)
    ours.train().set_distilled_training()
    assert_close(ours(images()), (output.cls_logits, output.distillation_logits), atol=1e-9, rtol=1e-9)
    assert_same_gradients(ours, theirs)


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    output = theirs(images())
    for logits, taught in (ours(images()), (output.cls_logits, output.distillation_logits)):
        loss = cross_entropy(logits, LABELS) + 0.3 * cross_entropy(taught, LABELS.flip(0))
        loss.backward()
    converted = from_transformers({name: p.grad for name, p in theirs.named_parameters()})
    assert converted.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, converted[name], atol=1e-9, rtol=1e-9, msg=name)


def test_from_transformers_on_disk(tmp_path):
    theirs = transformers_model()
    theirs.save_pretrained(tmp_path)
    ours = our_model()
    assert load_weights(ours, tmp_path).spelling == "transformers_hub"
    assert_close(ours(images()), theirs(images()).logits, atol=1e-9, rtol=1e-9)
    with pytest.raises(ValueError, match="norm_eps=0.001, the model has 1e-06; build it to match"):
        load_weights(our_model(norm_eps=1e-6), tmp_path)


def test_from_a_headless_transformers_model_with_pooler():
    theirs = transformers_model(DeiTModel)
    ours = our_model(num_classes=0)
    load_weights(ours, theirs.state_dict())
    assert_close(ours.forward_features(images()), theirs(images()).last_hidden_state, atol=1e-9, rtol=1e-9)


def test_from_transformers_with_one_head():
    theirs, ours = transformers_model(DeiTForImageClassification), our_model()
    with pytest.raises(ValueError, match="2 of 35 tensors are missing \\(head_dist.weight, head_dist.bias\\)"):
        load_weights(ours, theirs.state_dict())
    report = load_weights(ours, theirs.state_dict(), exclude="head_dist.*")
    assert report.loaded == 33
    ours.train().set_distilled_training()
    assert_close(ours(images())[0], theirs(images()).logits, atol=1e-9, rtol=1e-9)


def test_to_transformers():
    ours, theirs = our_model(), transformers_model()
    for parameter in theirs.parameters():
        nn.init.zeros_(parameter)
    theirs.load_state_dict(export_weights(ours, to="transformers"), strict=True)
    assert_close(theirs(images()).logits, ours(images()), atol=1e-9, rtol=1e-9)
    ours.train().set_distilled_training()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("to", ["transformers", "transformers_hub"])
def test_to_a_folder_that_from_pretrained_reads(to, tmp_path):
    ours = our_model(img_size=(32, 48), act_layer="gelu_tanh", qkv_bias=False)
    export_weights(ours, to=to, path=tmp_path / "deit")
    load = DeiTForImageClassificationWithTeacher.from_pretrained
    theirs, info = load(tmp_path / "deit", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(theirs.double().eval()(images(32, 48)).logits, ours(images(32, 48)), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("to", ["timm", "transformers", "transformers_hub"])
def test_there_and_back(to, tmp_path):
    ours, again = our_model(), our_model()
    export_weights(ours, to=to, path=tmp_path / "weights.safetensors")
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    report = load_weights(again, tmp_path / "weights.safetensors")
    assert report.spelling == to and not report.notes
    assert_equal_state(ours, again)


def test_a_checkpoint_of_the_papers_code_loads_as_it_is(tmp_path):
    # main.py of the repository saves the network under "model", in timm's names
    ours = our_model()
    torch.save({"model": ours.state_dict(), "epoch": 299}, tmp_path / "deit.pth")
    again = our_model()
    nn.init.zeros_(again.head_dist.weight)
    assert load_weights(again, tmp_path / "deit.pth").spelling == "timm"
    assert_equal_state(ours, again)


def test_resize_on_load_keeps_the_rows_of_both_tokens():
    theirs, ours = transformers_model(), our_model(img_size=48)
    report = load_weights(ours, theirs.state_dict(), resize="transformers")
    assert report.notes == ("resized pos_embed from 16 patches to 6 x 6 (transformers rule)",)
    expected = theirs(images(48, 48), interpolate_pos_encoding=True).logits
    assert_close(ours(images(48, 48)), expected, atol=1e-6, rtol=1e-6)


REFUSALS = {
    "layer_scale": (dict(init_values=0.1), "no place for 4 of \\d+ tensors: blocks.0.ls1.gamma"),
    "no_embed_class": (dict(no_embed_class=True), "rows for both tokens"),
    "no_positions": (dict(pos_embed="none"), "rows for both tokens"),
    "no_proj_bias": (dict(proj_bias=False), "proj_bias=False"),
}


@pytest.mark.parametrize("to", ["transformers", "transformers_hub"])
@pytest.mark.parametrize("kwargs, message", REFUSALS.values(), ids=REFUSALS.keys())
def test_export_refuses_what_transformers_lacks(to, kwargs, message):
    with pytest.raises(ValueError, match=message):
        export_weights(our_model(**kwargs), to=to)


def timm_deit3(**kwargs) -> nn.Module:
    return timm.create_model("deit3_small_patch16_224", **OURS | kwargs).double().eval()


def test_to_the_names_of_deit3s_repository():
    ours = our_deit3()
    state = export_weights(ours, to="deit3")
    assert "blocks.1.gamma_2" in state and not any(".ls" in name for name in state)
    theirs = timm_deit3()
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs, adapt_layer_scale=True), strict=True)
    assert_close(ours(images()), theirs(images()), atol=1e-9, rtol=1e-9)


def test_from_the_names_of_deit3s_repository(tmp_path):
    ours, again = our_deit3(), our_deit3()
    torch.save({"model": export_weights(ours, to="deit3")}, tmp_path / "deit_3_small_224_1k.pth")
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    report = load_weights(again, tmp_path / "deit_3_small_224_1k.pth")
    assert report.spelling == "deit3" and report.loaded == len(ours.state_dict()) and not report.notes
    assert_equal_state(ours, again)


def test_deit3s_positions_are_resized_without_a_class_row():
    ours = our_deit3(img_size=48)
    report = load_weights(ours, export_weights(our_deit3(), to="deit3"))
    assert report.notes == ("resized pos_embed from 16 patches to 6 x 6 (timm rule)",)
    theirs = timm_deit3(img_size=48)
    state = checkpoint_filter_fn(export_weights(our_deit3(), to="deit3"), theirs, adapt_layer_scale=True)
    assert_close(ours.pos_embed.detach(), state["pos_embed"], atol=1e-6, rtol=1e-6)


DEIT3_REFUSALS = {
    "class_row": (dict(no_embed_class=False), "positions for the patches only"),
    "no_layer_scale": (dict(init_values=None), "it needs LayerScale"),
    "pool": (dict(global_pool="avg", fc_norm=False), "global_pool='avg'"),
}


@pytest.mark.parametrize("kwargs, message", DEIT3_REFUSALS.values(), ids=DEIT3_REFUSALS.keys())
def test_export_refuses_what_deit3_lacks(kwargs, message):
    with pytest.raises(ValueError, match=message):
        export_weights(our_deit3(**kwargs), to="deit3")
