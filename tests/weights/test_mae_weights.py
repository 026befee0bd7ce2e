# SPDX-License-Identifier: Apache-2.0
"""MAE weights between the paper, transformers (both spellings) and timm, and from all into a VisionTransformer."""

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from fvm_fast import export_weights, load_weights
from fvm_fast.layers import resize_pos_embed
from fvm_fast.models import MaskedAutoencoderViT, VisionTransformer
from fvm_fast.weights.mae import from_transformers, to_transformers

ENCODER = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0)
DECODER = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
EPS = 1e-3  # far from every default, so that a lost epsilon shows
HEADLESS = ("head.*", "fc_norm.*")


def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def our_mae(**kwargs) -> MaskedAutoencoderViT:
    return randomise(MaskedAutoencoderViT(**ENCODER | DECODER | dict(norm_eps=EPS) | kwargs))


def our_vit(**kwargs) -> VisionTransformer:
    return randomise(VisionTransformer(**ENCODER | dict(norm_eps=EPS, num_classes=5) | kwargs), seed=2)


def their_config(**kwargs) -> ViTMAEConfig:
    encoder = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48)
    decoder = dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    sizes = encoder | decoder | dict(decoder_intermediate_size=32, image_size=32, patch_size=8)
    return ViTMAEConfig(**sizes, layer_norm_eps=EPS, **kwargs)


def their_mae(**kwargs) -> ViTMAEForPreTraining:
    return randomise(ViTMAEForPreTraining(their_config(**kwargs)))


def images(size: int | tuple[int, int] = 32) -> torch.Tensor:
    shape = 4, 3, *((size, size) if isinstance(size, int) else size)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def noise() -> torch.Tensor:
    return torch.rand(4, 16, generator=torch.Generator().manual_seed(3))


def loss_of(model: nn.Module) -> torch.Tensor:
    output = model(images(), noise=noise())
    return output[0] if isinstance(output, tuple) else output.loss


@pytest.mark.parametrize("kwargs", [{}, dict(hidden_act="quick_gelu", qkv_bias=False)], ids=["plain", "other_numerics"])
def test_from_transformers_in_memory(kwargs):
    theirs = their_mae(**kwargs)
    ours = our_mae(act_layer=kwargs.get("hidden_act"), qkv_bias=kwargs.get("qkv_bias", True))
    report = load_weights(ours, theirs.state_dict())
    assert report.spelling == "transformers" and report.loaded == len(ours.state_dict())
    losses = loss_of(ours), loss_of(theirs)
    assert_close(*losses, atol=0.0, rtol=1e-9)
    for loss in losses:
        loss.backward()
    expected = from_transformers({name: p.grad for name, p in theirs.named_parameters() if p.requires_grad})
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], atol=1e-9, rtol=1e-9, msg=name)


def test_from_transformers_on_disk(tmp_path):
    theirs = their_mae()
    theirs.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        ours = our_mae()
        assert load_weights(ours, source).spelling == "transformers_hub"
        assert_close(loss_of(ours), loss_of(theirs), atol=0.0, rtol=1e-9)
    with pytest.raises(ValueError, match="norm_eps=0.001, the model has 1e-06; build it to match"):
        load_weights(our_mae(norm_eps=1e-6), tmp_path)


@pytest.mark.parametrize("to", ["transformers", "transformers_hub"])
def test_to_a_folder_that_from_pretrained_reads(to, tmp_path):
    ours = our_mae(act_layer="gelu_tanh", qkv_bias=False, norm_pix_loss=True, mask_ratio=0.5)
    export_weights(ours, to=to, path=tmp_path / "mae")
    theirs, info = ViTMAEForPreTraining.from_pretrained(tmp_path / "mae", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(loss_of(theirs.double().eval()), loss_of(ours), atol=0.0, rtol=1e-9)


def test_to_transformers_loads_strictly():
    ours, theirs = our_mae(), their_mae()
    for parameter in theirs.parameters():
        nn.init.zeros_(parameter)
    theirs.load_state_dict(export_weights(ours, to="transformers"), strict=True)
    assert_close(loss_of(theirs), loss_of(ours), atol=0.0, rtol=1e-9)


def test_to_timm_the_encoder_loads_strictly():
    ours = our_mae(norm_eps=1e-6)
    theirs = timm.models.VisionTransformer(**ENCODER, num_classes=0).double().eval()
    theirs.load_state_dict(export_weights(ours, to="timm"), strict=True)
    assert_close(theirs.forward_features(images()), ours.forward_features(images()), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("to", ["mae", "transformers", "transformers_hub"])
def test_there_and_back(to, tmp_path):
    ours = our_mae()
    export_weights(ours, to=to, path=tmp_path / "weights.safetensors")
    again = randomise(our_mae(), seed=5)
    report = load_weights(again, tmp_path / "weights.safetensors")
    assert report.spelling == to and not report.notes
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_the_papers_training_checkpoint(tmp_path):
    ours, again = our_mae(), randomise(our_mae(), seed=5)
    torch.save({"model": ours.state_dict(), "epoch": 799, "optimizer": {"state": {}}}, tmp_path / "checkpoint-799.pth")
    load_weights(again, tmp_path / "checkpoint-799.pth")
    assert_close(loss_of(again), loss_of(ours), atol=0.0, rtol=0.0)


def test_resize_on_load():
    ours, larger = our_mae(), our_mae(img_size=(48, 40))
    report = load_weights(larger, ours.state_dict())
    assert report.notes == (
        "resized pos_embed from 16 patches to 6 x 5 (timm rule)",
        "resized decoder_pos_embed from 16 patches to 6 x 5 (timm rule)",
    )
    for name in ("pos_embed", "decoder_pos_embed"):
        expected = resize_pos_embed(ours.get_parameter(name), (6, 5))
        assert torch.equal(larger.get_parameter(name), expected) and not larger.get_parameter(name).requires_grad
    assert larger(images((48, 40)))[0].isfinite()


def test_export_refuses_what_transformers_lacks():
    with pytest.raises(ValueError, match="its images are square, the model's 32 x 48"):
        export_weights(our_mae(img_size=(32, 48)), to="transformers")
    mae = our_mae()
    mae.reset_classifier(3)
    with pytest.raises(ValueError, match="no place for 2 of 64 tensors: head.weight, head.bias"):
        export_weights(mae, to="transformers")


# ---- into a VisionTransformer


@pytest.mark.parametrize("convert, left_out", [(dict, 20), (to_transformers, 24)], ids=["mae", "transformers"])
def test_a_vit_takes_the_encoder(convert, left_out):
    mae, vit = our_mae(), our_vit(num_classes=0)
    report = load_weights(vit, convert(mae.state_dict()))
    assert report.notes == (f"left out the {left_out} tensors of a masked autoencoder's decoder",)
    assert report.loaded == len(vit.state_dict()) and not report.missing
    assert_close(vit.forward_features(images()), mae.forward_features(images()), atol=0.0, rtol=0.0)


def test_a_vit_takes_the_encoder_from_transformers_on_disk(tmp_path):
    theirs = their_mae()
    theirs.save_pretrained(tmp_path / "whole")
    vit = our_vit()
    load_weights(vit, tmp_path / "whole", exclude="head.*")
    theirs.config.mask_ratio = 0.0
    in_order = torch.arange(16.0).expand(4, 16)
    expected = theirs.vit(images(), noise=in_order).last_hidden_state
    assert_close(vit.forward_features(images()), expected, atol=1e-9, rtol=1e-9)


def test_a_vit_reads_transformers_encoder():
    theirs = randomise(ViTMAEModel(their_config(mask_ratio=0.0)))
    vit = our_vit(num_classes=0)
    load_weights(vit, theirs.state_dict())
    expected = theirs(images(), noise=torch.arange(16.0).expand(4, 16)).last_hidden_state
    assert_close(vit.forward_features(images()), expected, atol=1e-9, rtol=1e-9)


def test_an_averaging_vit_leaves_the_norm_and_says_what_is_missing():
    mae, vit = our_mae(), our_vit(global_pool="avg")
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    fresh = ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
    with pytest.raises(ValueError, match="4 of \\d+ tensors are missing \\(fc_norm.weight, fc_norm.bias, head.weight"):
        load_weights(vit, mae.state_dict())
    report = load_weights(vit, mae.state_dict(), strict=False)
    assert report.missing == fresh and not report.unexpected
    assert report.notes[1:] == ("left out norm; the model has fc_norm instead, after the pooling",)
    assert load_weights(vit, mae.state_dict(), exclude=HEADLESS).notes == report.notes
    for name, tensor in vit.state_dict().items():
        assert torch.equal(tensor, before[name] if name in fresh else mae.state_dict()[name]), name


def test_an_averaging_vit_keeps_a_fine_tuned_norm():
    tuned, vit = our_vit(global_pool="avg"), randomise(our_vit(global_pool="avg"), seed=5)
    assert not load_weights(vit, tuned.state_dict()).notes
    assert torch.equal(vit.fc_norm.weight, tuned.fc_norm.weight)


def test_a_norm_beside_fc_norm_is_not_left_out_in_silence():
    state = our_vit(global_pool="avg").state_dict() | {"norm.weight": torch.ones(24)}
    with pytest.raises(ValueError, match="1 have no place in the model \\(norm.weight\\)"):
        load_weights(our_vit(global_pool="avg"), state)


def test_a_mae_refuses_an_encoder_without_its_decoder():
    with pytest.raises(ValueError, match="20 of 50 tensors are missing \\(mask_token, decoder_pos_embed"):
        load_weights(our_mae(), our_vit(num_classes=0).state_dict())
