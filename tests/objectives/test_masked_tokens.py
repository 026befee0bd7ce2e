# SPDX-License-Identifier: Apache-2.0
"""MaskedTokenPrediction: the loss it wires, what it keeps out of checkpoints, and that tokenizer and model learn."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, one_hot
from torch.testing import assert_close

from fvm_fast.data.block_masking import BlockMasking
from fvm_fast.data.emoji import EmojiPairs
from fvm_fast.data.transforms import Composite
from fvm_fast.models import create_model
from fvm_fast.models.masked_modeling.beit.discrete_vae import DiscreteVAE, discrete_vae_test
from fvm_fast.objectives import MaskedTokenPrediction
from fvm_fast.objectives.masked_tokens import masked_ids

BLOCKS = BlockMasking((4, 4), 6, min_block=2)


def model_of(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return create_model("beit_test_patch16_64_64_vocab", **kwargs)


def half(images: Tensor) -> Tensor:
    return images[:, :, ::2, ::2]


def objective_of(**kwargs) -> MaskedTokenPrediction:
    return MaskedTokenPrediction(
        model_of(), discrete_vae_test(), **dict(masking=BLOCKS, tokenizer_transform=half) | kwargs
    )


def some_pixels(batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8, generator=generator)


def test_loss_and_every_gradient_are_the_formulas():
    objective = objective_of(generator=torch.Generator().manual_seed(5)).double()
    outputs = objective({"images": some_pixels()})
    mask = BLOCKS(3, torch.Generator().manual_seed(5))
    tokens = objective.tokenizer.get_codebook_indices(half(some_pixels())).flatten(1)[mask]
    loss = cross_entropy(objective.model(some_pixels(), mask), tokens)
    assert_close(outputs["loss"], loss, atol=1e-12, rtol=1e-9)
    assert torch.equal(outputs["tokens"].flatten(), tokens) and outputs["ids_masked"].shape == (3, 6)
    parameters = list(objective.model.parameters())
    for got, expected in zip(*(torch.autograd.grad(x, parameters) for x in (outputs["loss"], loss)), strict=True):
        assert_close(got, expected, atol=1e-12, rtol=1e-9)


def test_masks_and_token_images_may_come_with_the_batch():
    objective = objective_of(tokenizer_transform=None)
    mask = torch.arange(16).expand(3, 16) % 4 == 0
    outputs = objective({"images": some_pixels(), "token_images": half(some_pixels()), "mask": mask})
    assert outputs["ids_masked"].tolist() == [[0, 4, 8, 12]] * 3
    assert outputs["logits"].shape == (3, 4, 64)


def test_both_predictions_of_v2_are_taught():
    model = model_of(depth=4, early_layers=2)
    objective = MaskedTokenPrediction(model, discrete_vae_test())
    mask = torch.arange(16).expand(3, 16) % 4 == 0
    outputs = objective({"images": some_pixels(), "token_images": half(some_pixels()), "mask": mask})
    first, second = model(some_pixels(), mask)
    tokens = outputs["tokens"].flatten()
    assert_close(outputs["loss"], cross_entropy(first, tokens) + cross_entropy(second, tokens))
    assert_close(outputs["logits"].flatten(0, 1), first.detach())
    outputs["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_papers_masks_are_the_default():
    objective = MaskedTokenPrediction(model_of(), discrete_vae_test())
    assert objective.masking.grid == (4, 4) and objective.masking.num_masked == round(16 * 75 / 196)


def test_the_tokenizer_is_frozen_and_no_submodule():
    tokenizer = discrete_vae_test().train()
    objective = MaskedTokenPrediction(model_of(), tokenizer)
    assert not tokenizer.training and not any(p.requires_grad for p in tokenizer.parameters())
    assert not [name for name in objective.state_dict() if "tokenizer" in name]
    assert len(list(objective.parameters())) == len(list(objective.model.parameters()))
    objective.train()
    assert not tokenizer.training
    assert objective.double() is objective and tokenizer.encoder.blocks.input.w.dtype == torch.float64


def test_outputs_are_detached_but_for_the_loss_which_is_float32_at_least():
    objective = objective_of(generator=torch.Generator().manual_seed(5))
    exact = objective({"images": some_pixels()})
    assert exact["loss"].requires_grad
    assert not any(exact[key].requires_grad for key in exact if key != "loss")
    objective.generator.manual_seed(5)
    batch = {"images": some_pixels(), "token_images": half(some_pixels())}
    objective.model.bfloat16()
    rounded = objective(batch)
    assert rounded["loss"].dtype == torch.float32 and rounded["logits"].dtype == torch.bfloat16
    assert_close(rounded["loss"], exact["loss"], atol=0.0, rtol=0.02)


def test_metrics():
    logits = torch.zeros(2, 2, 5)
    logits[0, 0, 3] = logits[0, 1, 1] = logits[1, 0, 1] = logits[1, 1, 1] = 1.0
    outputs = {"logits": logits, "tokens": torch.tensor([[3, 3], [3, 1]])}
    assert MaskedTokenPrediction.metrics(outputs) == {"accuracy": 0.5, "commonest": 0.75}


def test_empty_batch():
    outputs = objective_of()({"images": some_pixels(0)})
    assert outputs["loss"].isnan() and outputs["logits"].shape == (0, 0, 64)  # a mean of nothing


def test_the_objective_compiles_without_a_break():
    objective = objective_of()
    batch = {"images": some_pixels()}
    outputs = objective(batch)
    torch._dynamo.reset()
    compiled = torch.compile(objective.model, backend="aot_eager", fullgraph=True)
    logits = compiled(batch["images"], ids_masked=outputs["ids_masked"])
    assert_close(logits, outputs["logits"], atol=1e-5, rtol=1e-5)


def test_bad_input_says_what_was_expected():
    with pytest.raises(ValueError, match="should give 16 tokens, one a patch, got 64 for images of 64 x 64; give it"):
        objective_of(tokenizer_transform=None)({"images": some_pixels()})
    unequal = torch.zeros(3, 16, dtype=torch.bool)
    unequal[1, :4] = True
    with pytest.raises(ValueError, match="should hide as many patches of every image, got 0 to 4"):
        objective_of()({"images": some_pixels(), "mask": unequal})
    model = model_of()
    with pytest.raises(ValueError, match="another network than the model"):
        MaskedTokenPrediction(model, model)


def test_masked_ids_of_no_image_and_of_none_hidden():
    assert masked_ids(torch.zeros(0, 4, dtype=torch.bool)).shape == (0, 0)
    assert masked_ids(torch.zeros(2, 4, dtype=torch.bool)).shape == (2, 0)


def pictures(concepts: str) -> Tensor:
    """Emoji of one side of the split on white, uint8 [n, 3, 32, 32]."""
    return Composite("white")(EmojiPairs(styles="twitter", subset="all", concepts=concepts, image_size=32).images)


def train_tokenizer(tokenizer: DiscreteVAE, images: Tensor, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=3e-3)
    for step in range(steps):
        batch = images[torch.randint(len(images), (32,), generator=generator)]
        optimizer.zero_grad()
        tokenizer(batch, 0.5 ** (step / steps))[0].backward()
        optimizer.step()


def train_model(objective: MaskedTokenPrediction, images: Tensor, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(objective.parameters(), lr=2e-3, weight_decay=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(batch_of(images[torch.randint(len(images), (32,), generator=generator)]))["loss"].backward()
        optimizer.step()
        objective.after_step()


def batch_of(small: Tensor) -> dict[str, Tensor]:
    """Two views: twice as large for the model, whose patches are twice as large as a token's."""
    return {"images": interpolate(small, scale_factor=2, mode="nearest"), "token_images": small}


def guess_without_looking(tokenizer: DiscreteVAE, train: Tensor, held_out: Tensor) -> Tensor:
    """Cross-entropy of each place's token frequencies, counted over the training images with one more of each."""
    counts = one_hot(tokenizer.get_codebook_indices(train).flatten(1), tokenizer.vocab_size).sum(dim=0) + 1.0
    log_share = (counts / counts.sum(dim=1, keepdim=True)).log()  # [L, vocab_size]
    tokens = tokenizer.get_codebook_indices(held_out).flatten(1)
    return -log_share.expand(len(tokens), -1, -1).gather(2, tokens[:, :, None]).mean()


def test_tokenizer_and_model_learn_pictures_they_have_not_seen():
    """On concepts held out, the tokenizer rebuilds better than the mean image, the model guesses better than places."""
    train, held_out = pictures("train"), pictures("held_out")
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    tokenizer = discrete_vae_test()
    train_tokenizer(tokenizer, train, 80, generator)
    tokens = tokenizer.get_codebook_indices(held_out)
    error = (tokenizer.decode(tokens) - held_out / 255).square().mean()
    mean_image = (held_out / 255 - train.float().mean(dim=0) / 255).square().mean()
    assert error < 0.85 * mean_image
    assert len(tokens.unique()) > 16, "the codes should not collapse to a few"

    objective = MaskedTokenPrediction(model_of(), tokenizer, masking=BLOCKS, generator=generator)
    train_model(objective, train, 150, generator)
    with torch.no_grad():
        outputs = objective.eval()(batch_of(held_out))
    assert outputs["loss"] < 0.93 * guess_without_looking(tokenizer, train, held_out)
    metrics = objective.metrics(outputs)
    assert metrics["accuracy"] > 1.5 * metrics["commonest"]
