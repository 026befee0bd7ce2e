# SPDX-License-Identifier: Apache-2.0
"""MaskedAutoencoding: the loss it wires, what it logs, and that it learns to paint real images it has not seen."""

import pytest
import torch
from torch.testing import assert_close

from fvm_fast.data.emoji import EmojiPairs
from fvm_fast.data.transforms import Composite
from fvm_fast.models import create_model
from fvm_fast.objectives import MaskedAutoencoding


def model_of(**kwargs):
    torch.manual_seed(0)
    return create_model("mae_vit_test_patch8", img_size=32, **kwargs)


def pictures(concepts: str) -> torch.Tensor:
    """Emoji of one side of the split on white, uint8 [n, 3, 32, 32]."""
    return Composite("white")(EmojiPairs(styles="twitter", subset="all", concepts=concepts, image_size=32).images)


def test_loss_and_every_gradient_are_the_models():
    model = model_of().double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(1)
    outputs = MaskedAutoencoding(model, mask_ratio=0.5)({"images": images, "tokens": None})
    torch.manual_seed(1)
    loss, pred, mask = model(images, 0.5)
    assert_close([outputs["loss"], outputs["pred"], outputs["mask"]], [loss, pred, mask], atol=0.0, rtol=0.0)
    assert mask.sum(dim=1).tolist() == [8.0, 8.0, 8.0]
    for got, expected in zip(*(torch.autograd.grad(x, parameters) for x in (outputs["loss"], loss)), strict=True):
        assert torch.equal(got, expected)


def test_the_models_ratio_is_the_default():
    outputs = MaskedAutoencoding(model_of(mask_ratio=0.25))({"images": torch.zeros(2, 3, 32, 32)})
    assert outputs["mask"].sum(dim=1).tolist() == [4.0, 4.0]


def test_outputs_are_detached_but_for_the_loss():
    outputs = MaskedAutoencoding(model_of())({"images": torch.randn(2, 3, 32, 32)})
    assert outputs["loss"].requires_grad
    assert not any(outputs[key].requires_grad for key in outputs if key != "loss")


def test_metrics_compare_with_one_colour():
    objective = MaskedAutoencoding(model_of())
    images = torch.randn(4, 3, 32, 32)
    mask = torch.zeros(4, 16)
    mask[:, :12] = 1.0
    hidden = objective.model.target(images)[:, :12]
    of_one_colour = {"loss": (hidden - hidden.mean()).square().mean(), "mask": mask, "images": images}
    assert objective.metrics(of_one_colour) == {"hidden": 0.75, "explained": pytest.approx(0.0, abs=1e-5)}
    assert objective.metrics(of_one_colour | {"loss": torch.tensor(0.0)})["explained"] == 1.0


def test_it_learns_to_paint_pictures_it_has_not_seen():
    """Eighty steps beat, on concepts held out, the best guess without looking: the mean training image."""
    train, held_out = pictures("train"), pictures("held_out")
    objective = MaskedAutoencoding(model_of())
    model, generator = objective.model, torch.Generator().manual_seed(0)
    noise = torch.rand(len(held_out), 16, generator=generator)
    with torch.no_grad():
        untrained, _, mask = model(held_out, noise=noise)
        guess = model.target(train).mean(dim=0)
        baseline = model.forward_loss(held_out, guess.expand(len(held_out), -1, -1), mask)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for _ in range(80):
        batch = train[torch.randint(len(train), (64,), generator=generator)]
        optimizer.zero_grad()
        objective({"images": batch})["loss"].backward()
        optimizer.step()
        objective.after_step()
    with torch.no_grad():
        learned = model(held_out, noise=noise)[0]
    assert learned < 0.85 * baseline < untrained


@pytest.mark.parametrize("mask_ratio", [0.0, 1.2])
def test_bad_ratio(mask_ratio):
    with pytest.raises(ValueError, match=f"mask_ratio should be in \\(0, 1\\], got {mask_ratio}"):
        MaskedAutoencoding(model_of(), mask_ratio=mask_ratio)
