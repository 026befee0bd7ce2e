# SPDX-License-Identifier: Apache-2.0
"""CLIP's weights in and out: open_clip (both layouts), OpenAI, transformers."""

import pytest
import torch
from open_clip.model import CustomTextCLIP, build_model_from_openai_state_dict, resize_pos_embed
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel

from fvm_fast import create_model, export_weights, load_weights
from fvm_fast.layers.contrastive_loss import ClipLoss
from fvm_fast.weights.clip import to_transformers

SPELLINGS = ["open_clip", "open_clip_custom_text", "openai", "transformers"]
TOKENS = torch.tensor([[126, 5, 7, 127, 0, 0, 0, 0, 0, 0, 0, 0], [126, *range(1, 11), 127], [126, 127, *[0] * 10]])


def make_model(**kwargs):
    torch.manual_seed(0)
    return create_model("clip_vit_test", **kwargs).double()


def make_images(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, *model.visual.image_size, dtype=torch.float64, generator=generator)


def assert_same_features(model, image_features, text_features):
    ours = model.encode_image(make_images(model)), model.encode_text(TOKENS)
    assert_close(ours, (image_features, text_features), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_round_trip(spelling):
    model, other = make_model(quick_gelu=True), create_model("clip_vit_test", quick_gelu=True).double()
    report = load_weights(other, export_weights(model, to=spelling))
    assert report.spelling == spelling
    assert report.loaded == len(model.state_dict()) and not report.notes
    assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_transformers_computes_the_same_loss_and_gradients(quick_gelu, tmp_path):
    model = make_model(quick_gelu=quick_gelu, vision_mlp_ratio=3.3)
    state = export_weights(model, to="transformers", path=tmp_path)
    oracle = CLIPModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert_close(dict(oracle.state_dict()), state, rtol=0, atol=0)

    expected = oracle.eval()(input_ids=TOKENS, pixel_values=make_images(model), return_loss=True)
    features = model(make_images(model), TOKENS)
    assert_close(features[:2], (expected.image_embeds, expected.text_embeds), rtol=1e-9, atol=1e-12)
    loss = ClipLoss()(*features)
    assert_close(loss, expected.loss, rtol=1e-9, atol=0)
    loss.backward()
    expected.loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    wanted = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    assert_close(to_transformers(ours), wanted, rtol=1e-9, atol=1e-12)


def test_transformers_checkpoint_loads():
    config = CLIPConfig(
        projection_dim=32,
        vision_config=dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2)
        | dict(image_size=32, patch_size=8),
        text_config=dict(hidden_size=48, intermediate_size=192, num_hidden_layers=2, num_attention_heads=3)
        | dict(vocab_size=128, max_position_embeddings=12, bos_token_id=126, eos_token_id=127),
    )
    oracle = CLIPModel(config).double().eval()
    state = dict(oracle.state_dict()) | {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    model = create_model("clip_vit_test", quick_gelu=True).double()
    assert load_weights(model, state).spelling == "transformers"
    expected = oracle(input_ids=TOKENS, pixel_values=make_images(model))
    assert_close(model(make_images(model), TOKENS)[0], expected.image_embeds, rtol=1e-9, atol=1e-12)
    assert_close(model(make_images(model), TOKENS)[1], expected.text_embeds, rtol=1e-9, atol=1e-12)


def test_open_clip_custom_text_model_computes_the_same():
    model = make_model()
    vision = dict(layers=2, width=64, head_width=32, patch_size=8, image_size=32)
    text = dict(context_length=12, vocab_size=128, width=48, heads=3, layers=2)
    oracle = CustomTextCLIP(32, vision, text).double()
    oracle.load_state_dict(export_weights(model, to="open_clip_custom_text"), strict=True)
    assert_same_features(model, oracle.encode_image(make_images(model)), oracle.encode_text(TOKENS))


def test_openai_loader_takes_our_export():
    # OpenAI's loader takes one head per 64 channels and 4 times the width in the MLP.
    model = make_model(quick_gelu=True, vision_width=128, text_width=64, text_heads=1)
    oracle = build_model_from_openai_state_dict(export_weights(model, to="openai"), cast_dtype=torch.float32).double()
    oracle.load_state_dict(model.state_dict())  # the loader rounds to half precision
    assert_same_features(model, oracle.encode_image(make_images(model)), oracle.encode_text(TOKENS))


def test_half_precision_ddp_checkpoint_file(tmp_path):
    model = make_model()
    state = {f"module.{name}": tensor.half() for name, tensor in model.state_dict().items()}
    state["module.logit_scale"] = state["module.logit_scale"][None]
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "epoch_3.pt")
    other = create_model("clip_vit_test")
    assert load_weights(other, tmp_path / "epoch_3.pt").spelling == "open_clip"
    assert other.logit_scale.shape == () and other.logit_scale.dtype == torch.float32
    assert_close(other.visual.proj, model.visual.proj.half().float(), rtol=0, atol=0)


def test_positions_of_another_image_size_are_resized_as_open_clip_does():
    model, state = create_model("clip_vit_test", image_size=(48, 24)).double(), make_model().state_dict()
    expected = dict(state)
    resize_pos_embed(expected, model)
    report = load_weights(model, state)
    assert report.notes == ("resized visual.positional_embedding from 16 patches to 6 x 3 (timm rule)",)
    wanted = expected["visual.positional_embedding"]
    assert_close(model.visual.positional_embedding.detach(), wanted, rtol=1e-9, atol=1e-12)


def test_shorter_context_keeps_the_first_positions():
    long, short = make_model(), create_model("clip_vit_test", context_length=5).double()
    assert load_weights(short, long.state_dict()).notes == ("cut positional_embedding from 12 to 5 tokens",)
    assert_close(short.encode_text(TOKENS[:1, :5]), long.encode_text(TOKENS[:1]), rtol=1e-12, atol=1e-12)


def test_longer_context_is_refused_with_a_sentence():
    with pytest.raises(ValueError, match=r"positional_embedding should be \[20, 48\], got \[12, 48\]"):
        load_weights(create_model("clip_vit_test", context_length=20), make_model().state_dict())


def test_activation_travels_with_the_file(tmp_path):
    export_weights(make_model(quick_gelu=True), path=tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="trained with act='quick_gelu', the model has 'gelu'"):
        load_weights(create_model("clip_vit_test"), tmp_path / "clip.safetensors")
    assert load_weights(create_model("clip_vit_test", quick_gelu=True), tmp_path / "clip.safetensors").loaded


@pytest.mark.parametrize(
    ("to", "kwargs", "message"),
    [
        ("transformers", dict(init_logit_bias=-10.0), "it has no logit_bias"),
        ("openai", dict(init_logit_bias=-10.0, quick_gelu=True), "it has no logit_bias"),
        ("openai", dict(), "needs norm_eps=1e-5 and quick_gelu=True"),
        ("transformers", dict(image_size=(16, 32)), "its images are square"),
        ("openai", dict(quick_gelu=True, image_size=(16, 32)), "its images are square"),
    ],
)
def test_what_a_library_cannot_hold_is_refused(to, kwargs, message):
    with pytest.raises(ValueError, match=message):
        export_weights(make_model(**kwargs), to=to)


def test_unknown_names_are_a_sentence():
    with pytest.raises(ValueError, match="open_clip, open_clip_custom_text, openai, transformers, got resnet.weight"):
        load_weights(make_model(), {"resnet.weight": torch.zeros(1)})
