# SPDX-License-Identifier: Apache-2.0
"""BEiT weights between timm, the paper's code and transformers (both spellings): same logits and gradients."""

import pytest
import timm
import torch
from timm.models.beit import checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import BeitConfig, BeitForImageClassification, BeitModel
from transformers import BeitForMaskedImageModeling as TransformersPretraining

from fvm_fast import export_weights, load_weights
from fvm_fast.models import Beit, BeitForMaskedImageModeling
from fvm_fast.weights.beit import from_transformers

SIZES = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0, init_values=0.1)
OWN = dict(use_abs_pos_emb=False, use_rel_pos_bias=True)
SHARED = dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True)
EPS = 1e-3  # far from every default, so that a lost epsilon shows
LABELS = torch.tensor([0, 1, 2, 4])
MASK = torch.arange(64).view(4, 16) % 3 == 0
TOKENS = torch.arange(int(MASK.sum())) % 11
NEAR = dict(atol=1e-9, rtol=1e-9)

VARIANTS = {
    "own_tables": OWN,
    "shared_table": SHARED,
    "class_token": OWN | dict(global_pool="token"),
    "absolute_positions": dict(use_rel_pos_bias=True),
    "other_numerics": OWN | dict(act_layer="quick_gelu", init_values=None),
}


def randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def our_model(**kwargs) -> Beit:
    return randomise(Beit(**SIZES | dict(num_classes=5, norm_eps=EPS) | kwargs))


def our_pretraining(**kwargs) -> BeitForMaskedImageModeling:
    return randomise(BeitForMaskedImageModeling(**SIZES | dict(vocab_size=11, norm_eps=EPS) | kwargs))


def transformers_model(model_class=BeitForImageClassification, like: dict = OWN, **kwargs) -> nn.Module:
    config = BeitConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        num_labels=5,
        vocab_size=11,
        layer_norm_eps=EPS,
        hidden_act=like.get("act_layer", "gelu"),
        layer_scale_init_value=0.0 if like.get("init_values", 0.1) is None else 0.1,
        use_absolute_position_embeddings=like.get("use_abs_pos_emb", True),
        use_relative_position_bias=like.get("use_rel_pos_bias", False),
        use_shared_relative_position_bias=like.get("use_shared_rel_pos_bias", False),
        use_mean_pooling=like.get("global_pool", "avg") == "avg",
        **kwargs,
    )
    return randomise(model_class(config))


def images(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(4, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def zeroed(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def assert_equal_state(ours: nn.Module, theirs: nn.Module) -> None:
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def assert_same_gradients(ours: nn.Module, our_loss: Tensor, theirs: nn.Module, their_loss: Tensor) -> None:
    assert_close(our_loss, their_loss, **NEAR)
    our_loss.backward()
    their_loss.backward()
    converted = from_transformers({name: p.grad for name, p in theirs.named_parameters()})
    assert converted.keys() == dict(ours.named_parameters()).keys()
    largest = max(float(gradient.abs().max()) for gradient in converted.values())
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, converted[name], atol=1e-9 * max(largest, 1.0), rtol=1e-9, msg=name)


def assert_classifies_alike(ours: nn.Module, theirs: nn.Module) -> None:
    logits, expected = ours(images()), theirs(images()).logits
    assert_close(logits, expected, **NEAR)
    assert_same_gradients(ours, cross_entropy(logits, LABELS), theirs, cross_entropy(expected, LABELS))


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_from_transformers_in_memory(kwargs):
    theirs, ours = transformers_model(like=kwargs), zeroed(our_model(**kwargs))
    report = load_weights(ours, theirs.state_dict())
    assert report.spelling == "transformers" and report.loaded == len(ours.state_dict()) and not report.notes
    assert_classifies_alike(ours, theirs)


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_to_transformers(kwargs):
    ours, theirs = our_model(**kwargs), zeroed(transformers_model(like=kwargs))
    theirs.load_state_dict(export_weights(ours, to="transformers"), strict=True)
    assert_classifies_alike(ours, theirs)


def test_pretraining_from_and_to_transformers():
    theirs = transformers_model(TransformersPretraining, SHARED, use_mask_token=True)
    ours = zeroed(our_pretraining())
    assert load_weights(ours, theirs.state_dict()).spelling == "transformers"
    expected = theirs(images(), bool_masked_pos=MASK, labels=TOKENS).loss
    assert_same_gradients(ours, cross_entropy(ours(images(), MASK), TOKENS), theirs, expected)
    again = zeroed(transformers_model(TransformersPretraining, SHARED, use_mask_token=True))
    again.load_state_dict(export_weights(ours, to="transformers"), strict=True)
    assert_equal_state(again, theirs)


@pytest.mark.parametrize("kwargs", [OWN, SHARED], ids=["own_tables", "shared_table"])
def test_from_transformers_on_disk(kwargs, tmp_path):
    theirs = transformers_model(like=kwargs)
    theirs.save_pretrained(tmp_path)
    ours = zeroed(our_model(**kwargs))
    assert load_weights(ours, tmp_path).spelling == "transformers_hub"
    assert_close(ours(images()), theirs(images()).logits, **NEAR)
    with pytest.raises(ValueError, match="norm_eps=0.001, the model has 1e-06; build it to match"):
        load_weights(our_model(**kwargs, norm_eps=1e-6), tmp_path)


def test_indices_in_old_transformers_checkpoints_are_ignored():
    ours = our_model(**OWN)
    state = export_weights(ours, to="transformers_hub")
    for i in range(2):
        owner = f"beit.encoder.layer.{i}.attention.attention.relative_position_bias"
        state[f"{owner}.relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
    again = zeroed(our_model(**OWN))
    load_weights(again, state)
    assert_equal_state(ours, again)


def test_from_a_headless_transformers_model():
    theirs, ours = transformers_model(BeitModel), zeroed(our_model(num_classes=0, **OWN))
    load_weights(ours, theirs.state_dict())
    assert_close(ours.forward_features(images()), theirs(images()).last_hidden_state, **NEAR)
    assert_close(ours(images()), theirs(images()).pooler_output, **NEAR)


@pytest.mark.parametrize("to", ["transformers", "transformers_hub"])
def test_to_a_folder_that_from_pretrained_reads(to, tmp_path):
    ours = our_model(**OWN, act_layer="gelu_tanh")
    export_weights(ours, to=to, path=tmp_path / "beit")
    theirs, info = BeitForImageClassification.from_pretrained(tmp_path / "beit", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(theirs.double().eval()(images()).logits, ours(images()), **NEAR)


def test_pretraining_to_a_folder_that_from_pretrained_reads(tmp_path):
    ours = our_pretraining()
    export_weights(ours, to="transformers_hub", path=tmp_path / "beit")
    theirs, info = TransformersPretraining.from_pretrained(tmp_path / "beit", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = theirs.double().eval()(images(), bool_masked_pos=MASK).logits
    assert_close(ours(images(), MASK, return_all_tokens=True), expected, **NEAR)


@pytest.mark.parametrize("build", [our_model, our_pretraining], ids=["classifier", "pretraining"])
@pytest.mark.parametrize("to", ["timm", "transformers", "transformers_hub"])
def test_there_and_back(to, build, tmp_path):
    ours, again = build(**SHARED), zeroed(build(**SHARED))
    export_weights(ours, to=to, path=tmp_path / "weights.safetensors")
    report = load_weights(again, tmp_path / "weights.safetensors")
    assert report.spelling == to and not report.notes
    assert_equal_state(ours, again)


def paper_checkpoint(model: nn.Module) -> dict:
    """As the paper's trainer saves a network: the index of each table beside it."""
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor
        if name.endswith("relative_position_bias_table"):
            index = name.replace("bias_table", "index")
            state[index] = torch.zeros(17, 17, dtype=torch.long)
    return {"model": state, "epoch": 799}


def timm_model(**kwargs) -> nn.Module:
    sizes = SIZES | OWN | dict(num_classes=5) | kwargs
    return timm.create_model("beit_base_patch16_224", **sizes).double().eval()


@pytest.mark.parametrize("kwargs", [OWN, SHARED], ids=["own_tables", "shared_table"])
def test_a_checkpoint_of_the_papers_code_loads_without_its_indices(kwargs, tmp_path):
    ours, again = our_model(**kwargs), zeroed(our_model(**kwargs))
    torch.save(paper_checkpoint(ours), tmp_path / "beit.pth")
    report = load_weights(again, tmp_path / "beit.pth")
    assert report.spelling == "timm" and not report.notes
    assert_equal_state(ours, again)


def test_to_and_from_timm():
    ours = our_model(norm_eps=1e-6, **OWN)
    theirs = timm_model()
    theirs.load_state_dict(export_weights(ours, to="timm"), strict=True)
    assert_close(ours(images()), theirs(images()), atol=1e-9, rtol=1e-9)
    again = zeroed(our_model(norm_eps=1e-6, **OWN))
    load_weights(again, theirs.state_dict())
    for model in (again, theirs):
        cross_entropy(model(images()), LABELS).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in again.named_parameters():
        assert_close(parameter.grad, expected[name].grad, atol=1e-9, rtol=1e-9, msg=name)


def test_a_classifier_starts_from_what_was_pretrained(tmp_path):
    pretrained, ours = our_pretraining(), our_model(**OWN)
    torch.save(paper_checkpoint(pretrained), tmp_path / "beit_pt.pth")
    with pytest.raises(ValueError, match="4 of 39 tensors are missing \\(fc_norm.weight, fc_norm.bias, head.weight"):
        load_weights(ours, tmp_path / "beit_pt.pth")
    report = load_weights(ours, tmp_path / "beit_pt.pth", exclude=("head.*", "fc_norm.*"))
    assert report.notes == (
        "left out the 3 tensors that pretraining alone needs",
        "left out norm; the model has fc_norm instead, after the pooling",
        "copied the table of relative positions that all blocks shared to 2 blocks",
    )
    before_norm = nn.Identity()
    pretrained.norm = before_norm
    assert_close(ours.forward_features(images()), pretrained.forward_features(images()), atol=1e-9, rtol=1e-9)


def test_a_classifier_that_keeps_the_shared_table_and_the_norm():
    pretrained, ours = our_pretraining(), our_model(**SHARED, global_pool="token")
    report = load_weights(ours, pretrained.state_dict(), exclude="head.*")
    assert report.notes == ("left out the 3 tensors that pretraining alone needs",)
    assert_close(ours.forward_features(images()), pretrained.forward_features(images()), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("size", [48, (32, 56)], ids=["square", "rectangular"])
def test_tables_are_resized_on_load_as_timm_does(size):
    ours = our_model(img_size=size, norm_eps=1e-6, **OWN)
    report = load_weights(ours, our_model(**OWN).state_dict())
    rows, columns = ours.patch_embed.grid_size
    assert report.notes == (f"resized tables of relative positions from 4 x 4 to {rows} x {columns}",)
    theirs = timm_model(img_size=size).float()  # timm resizes in float32
    state = {name: tensor.float() for name, tensor in our_model(**OWN).state_dict().items()}
    theirs.load_state_dict(checkpoint_filter_fn(state, theirs), strict=True)
    for name, tensor in theirs.state_dict().items():
        assert_close(ours.state_dict()[name].float(), tensor, atol=1e-5, rtol=1e-5, msg=name)


def test_a_shared_table_is_copied_and_resized_and_absolute_positions_too():
    pretrained = our_pretraining(use_abs_pos_emb=True)
    ours = our_model(img_size=48, use_rel_pos_bias=True)
    report = load_weights(ours, pretrained.state_dict(), exclude=("head.*", "fc_norm.*"), resize="transformers")
    assert "resized pos_embed from 16 patches to 6 x 6 (transformers rule)" in report.notes
    assert "resized tables of relative positions from 4 x 4 to 6 x 6" in report.notes
    tables = [block.attn.relative_position_bias_table for block in ours.blocks]
    assert len(tables[0]) == 11 * 11 + 3 and torch.equal(*tables)
    assert torch.equal(tables[0][-3:], pretrained.rel_pos_bias.relative_position_bias_table[-3:])


REFUSALS = {
    "no_bias": (dict(qkv_bias=False, **OWN), "needs the biases of query and value, the model has qkv_bias=False"),
    "pool": (dict(global_pool="avg", use_fc_norm=False, **OWN), "the model has 'avg' and False"),
    "rectangular": (dict(img_size=(24, 40), **OWN), "the model's grid is 3 x 5"),
}


@pytest.mark.parametrize("to", ["transformers", "transformers_hub"])
@pytest.mark.parametrize("kwargs, message", REFUSALS.values(), ids=REFUSALS.keys())
def test_export_refuses_what_transformers_lacks(to, kwargs, message):
    with pytest.raises(ValueError, match=message):
        export_weights(our_model(**kwargs), to=to)
