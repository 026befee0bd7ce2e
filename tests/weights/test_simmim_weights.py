# SPDX-License-Identifier: Apache-2.0
"""SimMIM weights between the paper's code and transformers (both spellings), and into a SwinTransformer and a Beit."""

import pytest
import torch
from parity import assert_same, randomise
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import SwinConfig, SwinForMaskedImageModeling

from fvm_fast import export_weights, load_weights
from fvm_fast.layers.relative_position import relative_position_index
from fvm_fast.layers.relative_position_attention import relative_position_index_with_class_token
from fvm_fast.models import Beit, SimMIM, SwinTransformer
from fvm_fast.models.masked_modeling.simmim import SwinTransformerForSimMIM, VisionTransformerForSimMIM
from fvm_fast.weights.simmim import from_transformers, to_paper, to_transformers, to_transformers_hub

SWIN = dict(img_size=32, patch_size=2, embed_dim=12, depths=(2, 2), num_heads=(2, 3), window_size=4, drop_path_rate=0.0)
VIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0)
BEIT = VIT | dict(num_classes=5, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True)
MASK = torch.rand(3, 256, generator=torch.Generator().manual_seed(3)) < 0.6


def our_swin(seed: int = 0, **kwargs) -> SimMIM:
    return randomise(SimMIM(SwinTransformerForSimMIM(**SWIN | kwargs)), seed=seed).double().eval()


def our_vit(seed: int = 0, **kwargs) -> SimMIM:
    return randomise(SimMIM(VisionTransformerForSimMIM(**VIT | kwargs)), seed=seed).double().eval()


BOTH = pytest.mark.parametrize("model_of", [our_swin, our_vit])


def their_swin() -> SwinForMaskedImageModeling:
    sizes = dict(image_size=32, patch_size=2, embed_dim=12, depths=[2, 2], num_heads=[2, 3], window_size=4)
    config = SwinConfig(**sizes, encoder_stride=4, drop_path_rate=0.0)
    config._attn_implementation = "sdpa"  # the eager one computes its softmax in float32
    return randomise(SwinForMaskedImageModeling(config), seed=1).double().eval()


def images(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 3, *(size or (32, 32)), dtype=torch.float64, generator=generator)


def loss_of(model: nn.Module, pictures: Tensor) -> Tensor:
    """A mask of floats for transformers, which divides by a sum in the mask's dtype, in float32 if that is bool."""
    output = model(pictures, MASK.double())
    return output[0] if isinstance(output, tuple) else output.loss


def assert_equal_states(ours: nn.Module, again: nn.Module) -> None:
    expected = ours.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_from_transformers_in_memory():
    ours, theirs = our_swin(), their_swin()
    report = load_weights(ours, theirs.state_dict())
    assert report.spelling == "transformers" and report.loaded == len(ours.state_dict()) and not report.notes
    assert_same(ours, theirs, images(), loss_of, converted=from_transformers)


def test_from_transformers_on_disk(tmp_path):
    theirs = their_swin()
    theirs.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        ours = our_swin()
        assert load_weights(ours, source).spelling == "transformers_hub"
        assert_close(loss_of(ours, images()), loss_of(theirs, images()), atol=0.0, rtol=1e-9)


def test_to_transformers_loads_strictly():
    ours, theirs = our_swin(), their_swin()
    theirs.load_state_dict(export_weights(ours, to="transformers"), strict=True)
    assert_same(ours, theirs, images(), loss_of, converted=from_transformers)


@pytest.mark.parametrize("to", ["transformers", "transformers_hub"])
def test_to_a_folder_that_from_pretrained_reads(to, tmp_path):
    ours = our_swin(act_layer="gelu_tanh", mlp_ratio=1.5)
    export_weights(ours, to=to, path=tmp_path / "simmim")
    theirs, info = SwinForMaskedImageModeling.from_pretrained(tmp_path / "simmim", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs.set_attn_implementation("sdpa")
    assert_close(loss_of(theirs.double().eval(), images()), loss_of(ours, images()), atol=0.0, rtol=1e-9)


WAYS = [(our_swin, "simmim"), (our_swin, "microsoft"), (our_swin, "transformers"), (our_swin, "transformers_hub")]
WAYS += [(our_vit, "simmim")]


@pytest.mark.parametrize("model_of, to", WAYS)
def test_there_and_back(model_of, to, tmp_path):
    ours, again = model_of(), model_of(seed=5)
    export_weights(ours, to=to, path=tmp_path / "weights.safetensors")
    report = load_weights(again, tmp_path / "weights.safetensors")
    assert report.spelling == to and not report.notes
    assert_equal_states(ours, again)


def papers_checkpoint(model: SimMIM) -> dict[str, Tensor]:
    """As the paper's code saves it: mergings close a stage, and masks and indices are among the weights."""
    state = dict(to_paper(model.state_dict()))
    if isinstance(model.encoder, SwinTransformer):
        state["encoder.layers.0.blocks.0.attn.relative_position_index"] = relative_position_index((4, 4))
        state["encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    else:
        index = relative_position_index_with_class_token((4, 4))
        state["encoder.rel_pos_bias.relative_position_index"] = index
    return state


def test_the_papers_names_of_mergings():
    names = to_paper(our_swin().state_dict())
    assert "encoder.layers.0.downsample.reduction.weight" in names
    assert not [name for name in names if name.startswith("encoder.layers.1.downsample")]
    assert {"encoder.mask_token", "decoder.0.weight", "decoder.0.bias", "encoder.norm.weight"} <= names.keys()


@BOTH
def test_the_papers_training_checkpoint(model_of, tmp_path):
    ours, again = model_of(), model_of(seed=5)
    torch.save({"model": papers_checkpoint(ours), "epoch": 799, "optimizer": {}}, tmp_path / "ckpt_epoch_799.pth")
    report = load_weights(again, tmp_path / "ckpt_epoch_799.pth")
    assert not report.unexpected and not report.missing
    assert_equal_states(ours, again)


# ---- into the networks to fine-tune

SOURCES = {"ours": dict, "paper": to_paper, "transformers": to_transformers, "transformers_hub": to_transformers_hub}


@pytest.mark.parametrize("convert", SOURCES.values(), ids=SOURCES.keys())
def test_a_swin_takes_the_encoder(convert):
    simmim, swin = our_swin(), SwinTransformer(**SWIN, num_classes=5).double().eval()
    report = load_weights(swin, convert(simmim.state_dict()), exclude="head.*")
    assert report.notes == ("left out the 3 tensors that pretraining alone needs",)
    assert_close(swin.forward_features(images()), simmim.forward_features(images()), atol=0.0, rtol=0.0)


def test_a_swin_with_larger_windows_takes_the_papers_checkpoint():
    simmim = our_swin()
    swin = SwinTransformer(**SWIN | dict(img_size=64, window_size=8), num_classes=0).double().eval()
    report = load_weights(swin, papers_checkpoint(simmim))
    assert report.notes[1:] == ("resized the relative_position_bias_tables from windows of 4 x 4 to 8 x 8 (timm rule)",)
    assert swin(images(64, 64)).isfinite().all()


def test_a_beit_takes_the_encoder_and_a_copy_of_the_table_for_each_block():
    simmim, beit = our_vit(), Beit(**BEIT).double().eval()
    report = load_weights(beit, papers_checkpoint(simmim), exclude=("head.*", "fc_norm.*"))
    assert report.spelling == "simmim" and report.notes[-1].endswith("that all blocks shared to 2 blocks")
    expected = simmim.encoder.get_parameter("rel_pos_bias.relative_position_bias_table")
    assert all(torch.equal(block.attn.relative_position_bias_table, expected) for block in beit.blocks)
    beit.norm = simmim.encoder.norm  # its own comes after the pooling
    assert_close(beit.forward_features(images()), simmim.forward_features(images()), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "small, large, note",
    [
        (our_swin(), our_swin(img_size=48, window_size=6), "from windows of 4 x 4 to 6 x 6 (timm rule)"),
        (our_vit(), our_vit(img_size=48), "resized tables of relative positions from 4 x 4 to 6 x 6"),
    ],
    ids=["swin", "vit"],
)
def test_resize_on_load(small, large, note):
    report = load_weights(large, small.state_dict())
    assert len(report.notes) == 1 and report.notes[0].endswith(note)
    assert large.reconstruct(images(48, 48)).isfinite().all()


REFUSED = {
    "vit": (lambda: our_vit(), "its Vision Transformer has absolute positions"),
    "rectangular": (lambda: our_swin(img_size=(32, 48)), "its images are square, the model's 32 x 48"),
    "windows": (lambda: our_swin(window_size=16), "its stages would have windows"),
}


@pytest.mark.parametrize("model_of, message", REFUSED.values(), ids=REFUSED.keys())
def test_export_refuses_what_transformers_lacks(model_of, message):
    with pytest.raises(ValueError, match=message):
        export_weights(model_of(), to="transformers")


def test_an_encoder_alone_is_not_written_as_simmim():
    for model in (SwinTransformer(**SWIN), Beit(**BEIT)):
        with pytest.raises(ValueError, match="it has a decoder, which a \\w+ lacks; export the SimMIM itself"):
            export_weights(model, to="simmim")


def test_simmim_refuses_an_encoder_without_its_decoder():
    with pytest.raises(ValueError, match="2 of \\d+ tensors are missing \\(decoder.0.weight, decoder.0.bias"):
        load_weights(our_swin(), {k: t for k, t in our_swin().state_dict().items() if not k.startswith("decoder")})
