# SPDX-License-Identifier: Apache-2.0
"""ViT weights between timm, transformers (both spellings) and torchvision: same logits and gradients, strict names."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT
from torchvision.models.vision_transformer import interpolate_embeddings
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from fvm_fast import export_weights, load_weights
from fvm_fast.models import VisionTransformer
from fvm_fast.weights.vit import from_torchvision, from_transformers

OURS = dict(img_size=32, patch_size=8, num_classes=5, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0)
EPS = 1e-3  # far from every default, so that a lost epsilon shows


def our_model(**kwargs) -> VisionTransformer:
    return randomise(VisionTransformer(**OURS | dict(norm_eps=EPS) | kwargs))


def transformers_model(**kwargs) -> ViTForImageClassification:
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48)
    config = ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5, layer_norm_eps=EPS, **kwargs)
    return randomise(ViTForImageClassification(config))


def torchvision_model() -> TorchvisionViT:
    return randomise(TorchvisionViT(32, 8, 2, 3, 24, 48, num_classes=5, norm_layer=partial(nn.LayerNorm, eps=EPS)))


def randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def logits_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    output = model(images)
    return getattr(output, "logits", output)


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def assert_same_logits_and_gradients(ours, theirs, convert) -> None:
    for model in (ours, theirs):
        cross_entropy(logits_of(model, images()), torch.tensor([0, 1, 2, 4])).backward()
    assert_close(ours(images()), logits_of(theirs, images()), atol=1e-9, rtol=1e-9)
    converted = convert({name: p.grad for name, p in theirs.named_parameters()})
    assert converted.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, converted[name], atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("kwargs", [{}, dict(hidden_act="quick_gelu", qkv_bias=False)], ids=["plain", "other_numerics"])
def test_from_transformers_in_memory(kwargs):
    theirs = transformers_model(**kwargs)
    ours = our_model(act_layer=kwargs.get("hidden_act"), qkv_bias=kwargs.get("qkv_bias", True))
    report = load_weights(ours, theirs.state_dict())
    assert report.spelling == "transformers" and report.loaded == len(ours.state_dict())
    assert_same_logits_and_gradients(ours, theirs, from_transformers)


def test_from_transformers_on_disk(tmp_path):
    theirs = transformers_model()
    theirs.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        ours = our_model()
        assert load_weights(ours, source).spelling == "transformers_hub"
        assert_close(ours(images()), logits_of(theirs, images()), atol=1e-9, rtol=1e-9)
    with pytest.raises(ValueError, match="norm_eps=0.001, the model has 1e-06; build it to match"):
        load_weights(our_model(norm_eps=1e-6), tmp_path)


def test_from_a_headless_transformers_model_with_pooler():
    theirs = randomise(ViTModel(transformers_model().config))
    ours = our_model(num_classes=0)
    load_weights(ours, theirs.state_dict())
    assert_close(ours.forward_features(images()), theirs(images()).last_hidden_state, atol=1e-9, rtol=1e-9)


def test_from_torchvision():
    theirs, ours = torchvision_model(), our_model()
    assert load_weights(ours, theirs.state_dict()).spelling == "torchvision"
    assert_same_logits_and_gradients(ours, theirs, from_torchvision)


def test_from_torchvisions_first_names():
    first = {".mlp.0.": ".mlp.linear_1.", ".mlp.3.": ".mlp.linear_2."}
    state = torchvision_model().state_dict()
    for new, old in first.items():
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    ours = our_model()
    load_weights(ours, state)
    assert_close(ours(images()), torchvision_model()(images()), atol=1e-9, rtol=1e-9)


def test_to_transformers():
    ours, theirs = our_model(), transformers_model()
    for parameter in theirs.parameters():
        nn.init.zeros_(parameter)
    theirs.load_state_dict(export_weights(ours, to="transformers"), strict=True)
    assert_close(logits_of(theirs, images()), ours(images()), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("to", ["transformers", "transformers_hub"])
def test_to_a_folder_that_from_pretrained_reads(to, tmp_path):
    ours = our_model(img_size=(32, 48), act_layer="gelu_tanh", qkv_bias=False)
    export_weights(ours, to=to, path=tmp_path / "vit")
    theirs, info = ViTForImageClassification.from_pretrained(tmp_path / "vit", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    wide = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    assert_close(logits_of(theirs.double().eval(), wide), ours(wide), atol=1e-9, rtol=1e-9)


def test_to_torchvision():
    ours, theirs = our_model(), torchvision_model()
    for parameter in theirs.parameters():
        nn.init.zeros_(parameter)
    theirs.load_state_dict(export_weights(ours, to="torchvision"), strict=True)
    assert_close(theirs(images()), ours(images()), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("to", ["timm", "transformers", "transformers_hub", "torchvision"])
def test_there_and_back(to, tmp_path):
    ours = our_model()
    export_weights(ours, to=to, path=tmp_path / "weights.safetensors")
    again = our_model(img_size=32)
    nn.init.zeros_(again.head.weight)
    report = load_weights(again, tmp_path / "weights.safetensors")
    assert report.spelling == to and not report.notes
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_numerics_travel_with_the_file(tmp_path):
    export_weights(our_model(act_layer="quick_gelu"), path=tmp_path / "ours.safetensors")
    with pytest.raises(ValueError, match="act='quick_gelu', the model has 'gelu'; build it to match"):
        load_weights(our_model(), tmp_path / "ours.safetensors")
    assert load_weights(our_model(), tmp_path / "ours.safetensors", check_numerics=False).loaded == 32


def test_resize_on_load_as_transformers_does_while_running():
    theirs, ours = transformers_model(), our_model(img_size=48)
    report = load_weights(ours, theirs.state_dict(), resize="transformers")
    assert report.notes == ("resized pos_embed from 16 patches to 6 x 6 (transformers rule)",)
    expected = theirs(images(48), interpolate_pos_encoding=True).logits
    assert_close(ours(images(48)), expected, atol=1e-6, rtol=1e-6)


def test_resize_on_load_as_torchvision_does():
    ours, theirs = our_model(img_size=48), torchvision_model()
    load_weights(ours, theirs.state_dict(), resize="torchvision")
    expected = interpolate_embeddings(48, 8, theirs.state_dict())["encoder.pos_embedding"]
    assert_close(ours.pos_embed.detach(), expected, atol=1e-9, rtol=1e-9)


def test_a_projection_stored_as_a_linear_is_reshaped():
    state = our_model().state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    ours = our_model()
    nn.init.zeros_(ours.patch_embed.proj.weight)
    assert "reshaped patch_embed.proj.weight [24, 192] -> [24, 3, 8, 8]" in str(load_weights(ours, state))
    assert_close(ours(images()), our_model()(images()), atol=0.0, rtol=0.0)


REFUSALS = {
    "layer_scale": (dict(init_values=0.1), "no place for 4 of \\d+ tensors: blocks.0.ls1.gamma"),
    "registers": (dict(reg_tokens=1), "one class token"),
    "no_embed_class": (dict(no_embed_class=True), "one class token"),
    "pool": (dict(global_pool="avg", fc_norm=False), "global_pool='avg'"),
    "no_proj_bias": (dict(proj_bias=False), "proj_bias=False"),
}


@pytest.mark.parametrize("to", ["transformers", "transformers_hub", "torchvision"])
@pytest.mark.parametrize("kwargs, message", REFUSALS.values(), ids=REFUSALS.keys())
def test_export_refuses_what_the_other_library_lacks(to, kwargs, message):
    with pytest.raises(ValueError, match=message):
        export_weights(our_model(**kwargs), to=to)


def test_export_to_torchvision_refuses_other_activations():
    with pytest.raises(ValueError, match="its activation is gelu, the model's quick_gelu"):
        export_weights(our_model(act_layer="quick_gelu"), to="torchvision")
    with pytest.raises(ValueError, match="qkv_bias=False"):
        export_weights(our_model(qkv_bias=False), to="torchvision")
