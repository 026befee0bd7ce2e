# SPDX-License-Identifier: Apache-2.0
"""CLIP against open_clip: sizes, initial weights, features, loss and every gradient."""

from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP as OracleCLIP
from open_clip.model import resize_pos_embed as oracle_resize
from torch.testing import assert_close

import fvm_fast
from fvm_fast import create_model
from fvm_fast.data.tokenizer import EmojiTokenizer
from fvm_fast.layers.contrastive_loss import ClipLoss
from fvm_fast.models.contrastive_learning.clip import model as clip
from fvm_fast.models.contrastive_learning.clip.model import OPENAI_MEAN, OPENAI_STD

COUNTS = {  # models.md 1.3: open_clip's counts
    "clip_vit_b_32": 151_277_313,
    "clip_vit_b_16": 149_620_737,
    "clip_vit_l_14": 427_616_513,
    "clip_vit_l_14_336": 427_944_193,
    "clip_vit_h_14": 986_109_441,
    "clip_vit_g_14": 1_366_678_273,
    "clip_vit_bigg_14": 2_539_567_105,
    "clip_vit_emoji": 1_647_873,
    "clip_vit_test": 180_609,
}
SIZES = [
    dict(image_size=32),
    dict(image_size=(16, 40)),
    dict(image_size=28, patch_size=7, vision_layers=1, text_layers=1),
]
EOT = 127


def oracle_like(model, image_size=32, patch_size=8, vision_layers=2, text_layers=2, **kwargs):
    """open_clip's model of the sizes of clip_vit_test, with our weights if a model is given."""
    vision = dict(layers=vision_layers, width=64, head_width=32, patch_size=patch_size, image_size=image_size)
    text = dict(context_length=12, vocab_size=128, width=48, heads=3, layers=text_layers)
    oracle = OracleCLIP(32, vision, text, **kwargs)
    if model is not None:
        oracle.load_state_dict(model.state_dict(), strict=True)
        oracle.to(model.logit_scale.dtype)
    return oracle.train(model is None or model.training)


def make_tokens(lengths, context_length=12):
    """Random captions with start, end and padding; ``lengths`` include start and end."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, EOT - 1, (len(lengths), context_length), generator=generator)
    for row, length in zip(tokens, lengths, strict=True):
        row[0], row[length - 1], row[length:] = EOT - 1, EOT, 0
    return tokens


def make_images(model, count=5, dtype=torch.float64):
    return torch.randn(count, 3, *model.visual.image_size, generator=torch.Generator().manual_seed(2)).to(dtype)


def gradients(model, loss):
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


@pytest.mark.parametrize("size", SIZES)
def test_same_seed_gives_open_clips_initial_weights(size):
    torch.manual_seed(3)
    expected = oracle_like(None, **size).state_dict()
    torch.manual_seed(3)
    ours = create_model("clip_vit_test", **size).state_dict()
    assert list(ours) and ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(ours[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lengths", [(2, 12, 7, 3, 9), (4, 3, 5, 2, 5)], ids=["full", "short"])
def test_features_loss_and_every_gradient(size, quick_gelu, lengths):
    model = create_model("clip_vit_test", quick_gelu=quick_gelu, **size).double()
    oracle = oracle_like(model, quick_gelu=quick_gelu, **size)
    images, tokens = make_images(model), make_tokens(lengths)

    ours, expected = model(images, tokens), oracle(images, tokens)
    assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    loss, oracle_loss = ClipLoss()(*ours), open_clip.ClipLoss()(*expected)
    assert_close(loss, oracle_loss, rtol=1e-9, atol=1e-12)
    wanted = gradients(oracle, oracle_loss)
    for name, gradient in gradients(model, loss).items():
        assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_float32_at_the_demo_size():
    torch.manual_seed(0)
    model = create_model("clip_vit_emoji", image_size=24)
    vision = dict(layers=4, width=128, head_width=32, patch_size=8, image_size=24)
    oracle = OracleCLIP(128, vision, dict(context_length=16, vocab_size=3072, width=128, heads=4, layers=2))
    oracle.load_state_dict(model.state_dict(), strict=True)
    images, tokens = make_images(model, 6, torch.float32), make_tokens((3, 5, 2, 16, 9, 4), 16)
    ours, expected = model(images, tokens), oracle(images, tokens)
    assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    loss, oracle_loss = ClipLoss()(*ours), open_clip.ClipLoss()(*expected)
    assert_close(loss, oracle_loss, rtol=1e-5, atol=0)
    wanted = gradients(oracle, oracle_loss)
    for name, gradient in gradients(model, loss).items():
        scale = wanted[name].abs().max().item()
        assert_close(
            gradient, wanted[name], rtol=1e-4, atol=1e-5 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_uint8_images_are_normalised_inside(backend):
    model = create_model("clip_vit_test", image_size=(24, 40)).eval()
    images = torch.randint(0, 256, (3, 3, 24, 40), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))
    with fvm_fast.backend(backend):
        assert_close(model.encode_image(images), model.encode_image((images / 255 - mean) / std), rtol=1e-4, atol=1e-5)


def test_own_statistics():
    model = create_model("clip_vit_test", image_mean=(0.0, 0.5, 0.1), image_std=(1.0, 0.25, 2.0)).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.0, 0.5, 0.1]).view(3, 1, 1), torch.tensor([1.0, 0.25, 2.0]).view(3, 1, 1)
    assert_close(model.encode_image(images), model.encode_image((images / 255 - mean) / std), rtol=1e-4, atol=1e-5)
    without = create_model("clip_vit_test", image_mean=None, image_std=None)
    with pytest.raises(ValueError, match="uint8 images need a mean .*, got none; build the model with image_mean"):
        without.encode_image(images)


def test_native_and_torch_backends_agree():
    model = create_model("clip_vit_test").double()
    images, tokens = make_images(model), make_tokens((2, 12, 7, 3, 9))
    results = []
    for backend in ("auto", "torch"):
        model.zero_grad()
        with fvm_fast.backend(backend):
            loss = ClipLoss()(*model(images, tokens))
            results.append((loss.detach(), gradients(model, loss)))
    assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_what_follows_the_end_of_text_changes_nothing():
    model = create_model("clip_vit_test").double()
    tokens = make_tokens((4, 6, 3))
    noisy = torch.where(tokens == 0, 5, tokens)
    assert_close(model.encode_text(noisy), model.encode_text(tokens), rtol=1e-12, atol=1e-12)
    assert_close(model.encode_text(tokens[:, :6]), model.encode_text(tokens), rtol=0, atol=0)


def test_needless_columns_never_reach_the_blocks():
    model = create_model("clip_vit_test")
    lengths = []
    model.transformer.resblocks[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    model.encode_text(make_tokens((4, 6, 3)))
    assert lengths == [6]


def test_patch_dropout_keeps_a_random_part_in_training_only():
    model = create_model("clip_vit_test", patch_dropout=0.75).double()
    images = make_images(model, 3)
    torch.manual_seed(4)
    ids_keep = model.visual._draw_patches(images)
    assert ids_keep.shape == (3, 4)
    torch.manual_seed(4)
    dropped = model.encode_image(images)
    model.eval()
    tokens = model.visual.embed(images)
    assert tokens.shape[1] == 17
    rows = torch.arange(3)[:, None]
    kept = torch.cat([tokens[:, :1], tokens[rows, 1 + ids_keep]], dim=1)
    expected = model.visual.ln_post(model.visual.transformer(kept)[:, 0]) @ model.visual.proj
    assert_close(dropped, expected, rtol=1e-10, atol=1e-12)


def test_patch_dropout_spares_the_only_patch():
    model = create_model("clip_vit_test", patch_dropout=0.5, image_size=8)
    assert model.visual._draw_patches(make_images(model, 2)) is None


@pytest.mark.parametrize("side", range(2, 9))
def test_extreme_patch_dropout_keeps_one_patch(side):
    model = create_model("clip_vit_test", patch_dropout=0.99, image_size=8 * side)
    assert model.visual._draw_patches(make_images(model, 2)).shape == (2, 1)
    assert model.encode_image(make_images(model, 2, torch.float32)).shape == (2, 32)


def test_gradient_checkpointing_changes_no_gradient():
    model = create_model("clip_vit_test").double()
    images, tokens = make_images(model), make_tokens((2, 12, 7, 3, 9))
    plain = gradients(model, ClipLoss()(*model(images, tokens)))
    model.zero_grad()
    model.set_grad_checkpointing()
    calls = []
    model.transformer.resblocks[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed = gradients(model, ClipLoss()(*model(images, tokens)))
    assert len(calls) == 2  # once forward, once again for the backward pass
    assert_close(recomputed, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("unlocked_groups", range(6))
def test_locked_image_tower_trains_open_clips_groups(unlocked_groups):
    model = create_model("clip_vit_test")
    oracle = oracle_like(model)
    model.lock_image_tower(unlocked_groups)
    oracle.lock_image_tower(unlocked_groups)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in oracle.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("new_size", [48, 16, (24, 56)])
def test_another_image_size(new_size):
    model = create_model("clip_vit_test").double()
    state = dict(model.state_dict())
    model.set_image_size(new_size)
    oracle = oracle_like(None, image_size=new_size).double()
    oracle_resize(state, oracle)
    oracle.load_state_dict(state, strict=True)
    images = make_images(model)
    assert_close(model.encode_image(images), oracle.encode_image(images), rtol=1e-9, atol=1e-12)


def test_intermediates():
    model = create_model("clip_vit_test", image_size=(16, 40), patch_dropout=0.5).double()
    oracle = oracle_like(model, image_size=(16, 40)).eval()
    images = make_images(model)
    expected = oracle.visual.forward_intermediates(images)["image_intermediates"]
    maps = model.visual.forward_intermediates(images)
    assert maps[0].shape == (5, 64, 2, 5)
    assert_close(maps, expected, rtol=1e-9, atol=1e-12)
    assert model.visual.training  # patch dropout does not thin the maps


def test_logit_bias_logits_and_dict():
    model = create_model("clip_vit_test", init_logit_bias=-10.0, init_logit_scale=2.0, output_dict=True).double()
    oracle = oracle_like(model, init_logit_bias=-10.0, output_dict=True)
    images, tokens = make_images(model), make_tokens((2, 12, 7, 3, 9))
    assert_close(model(images, tokens), oracle(images, tokens), rtol=1e-9, atol=1e-12)
    assert_close(model.get_logits(images, tokens), oracle.get_logits(images, tokens), rtol=1e-9, atol=1e-12)
    model.output_dict = False
    assert len(model(images, tokens)) == 4
    assert model(images=images)[1] is None and model(tokens=tokens)[0] is None


def test_weight_decay_exceptions_are_open_clips():
    model = create_model("clip_vit_test")
    assert model.no_weight_decay() == oracle_like(model).no_weight_decay()


def test_empty_batch():
    model = create_model("clip_vit_test")
    image_features, text_features, _ = model(torch.zeros(0, 3, 32, 32), torch.zeros(0, 12, dtype=torch.int64))
    assert image_features.shape == text_features.shape == (0, 32)
    (image_features.sum() + text_features.sum()).backward()
    assert model.visual.conv1.weight.grad.abs().max() == 0


def test_bfloat16_autocast_stays_close():
    torch.manual_seed(0)
    model = create_model("clip_vit_test")
    images, tokens = make_images(model, 5, torch.float32), make_tokens((2, 12, 7, 3, 9))
    expected = model(images, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images, tokens)
    for ours, exact in zip(outputs[:2], expected[:2], strict=True):
        assert F.cosine_similarity(ours.float(), exact).min() > 0.999


def test_traces_without_a_graph_break():
    model = create_model("clip_vit_test").double()
    images, tokens = make_images(model), make_tokens((2, 11, 7, 3, 9))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(images, tokens), model(images, tokens), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.encode_image(torch.zeros(3, 32, 32)), r"\[B, 3, 32, 32\], got \(3, 32, 32\)"),
        (lambda model: model.encode_image(torch.zeros(1, 3, 32, 40)), r"got \(1, 3, 32, 40\); .*set_image_size"),
        (lambda model: model.encode_text(torch.zeros(12, dtype=torch.int64)), r"tokens should be \[n, L\]"),
        (lambda model: model.encode_text(torch.zeros(1, 13, dtype=torch.int64)), "at most context_length 12"),
        (lambda model: model.encode_text(torch.full((1, 4), 128)), "below vocab_size 128, got 128"),
        (lambda model: model.set_image_size(36), "multiple of patch_size 8, got"),
    ],
)
def test_bad_input_is_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(create_model("clip_vit_test"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(image_size=30), "positive multiple of patch_size 8"),
        (dict(patch_dropout=1.0), r"patch_dropout should be in \[0, 1\), got 1.0"),
        (dict(vision_heads=5), "multiple of the number of heads, got 64 and 5"),
        (dict(text_layers=0), "at least one layer"),
        (dict(image_std=None), "given together"),
    ],
)
def test_bad_sizes_are_a_sentence(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_model("clip_vit_test", **kwargs)


def test_the_demo_tokenizer_fits_the_demo_model():
    tokenizer = EmojiTokenizer()
    model = create_model("clip_vit_emoji", vision_layers=1, text_layers=1)
    assert model.vocab_size == tokenizer.vocab_size and model.context_length == tokenizer.context_length
    tokens = tokenizer(["a red apple", ""])
    assert model.encode_text(tokens).shape == (2, 128)
    assert_close(tokens.argmax(dim=1), (tokens == tokenizer.eot_token).int().argmax(dim=1))


def test_readme_snippet_runs_and_its_counts_are_right(capsys):
    readme = Path(clip.__file__).with_name("README.md").read_text()
    exec(readme.split("```python\n")[1].split("```")[0], {})
    assert "transformers names" in capsys.readouterr().out
    for name, count in COUNTS.items():
        assert name in readme and f"{count:,}" in readme
