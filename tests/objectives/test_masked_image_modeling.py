# SPDX-License-Identifier: Apache-2.0
"""MaskedImageModeling: the loss it wires, what it logs, and that it learns to paint real images it has not seen."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fvm_fast.data.emoji import EmojiPairs
from fvm_fast.data.patch_masking import PatchMasking
from fvm_fast.data.transforms import Composite
from fvm_fast.models import create_model
from fvm_fast.objectives import MaskedImageModeling

NAMES = ["simmim_swin_test", "simmim_vit_test"]
MASKINGS = {name: PatchMasking(32, 8, patch) for name, patch in zip(NAMES, (4, 8), strict=True)}


def model_of(name: str = "simmim_vit_test", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, img_size=32, **kwargs)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(concepts: str) -> torch.Tensor:
    """Emoji of one side of the split on white, uint8 [n, 3, 32, 32]."""
    return Composite("white")(EmojiPairs(styles="twitter", subset="all", concepts=concepts, image_size=32).images)


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_every_gradient_are_the_models(name):
    model, masking = model_of(name).double(), MASKINGS[name]
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    outputs = MaskedImageModeling(model, masking, generator=generator(5))({"images": images, "tokens": None})
    mask = masking(3, generator(5))
    loss, pred = model(images, mask)
    assert_close([outputs["loss"], outputs["pred"], outputs["mask"]], [loss, pred, mask], atol=0.0, rtol=0.0)
    parameters = list(model.parameters())
    for got, expected in zip(*(torch.autograd.grad(x, parameters) for x in (outputs["loss"], loss)), strict=True):
        assert torch.equal(got, expected)


def test_the_papers_masks_are_the_default():
    objective = MaskedImageModeling(create_model("simmim_swin_test", img_size=96, window_size=3))
    mask = objective({"images": torch.zeros(2, 3, 96, 96)})["mask"]
    assert mask.shape == (2, 24 * 24) and mask.sum(dim=1).tolist() == [6 * 64] * 2  # 6 squares of 9


def test_masks_may_come_with_the_batch():
    mask = torch.arange(16).expand(2, 16) < 3
    outputs = MaskedImageModeling(model_of())({"images": torch.zeros(2, 3, 32, 32), "mask": mask})
    assert torch.equal(outputs["mask"], mask)


def test_outputs_are_detached_but_for_the_loss():
    outputs = MaskedImageModeling(model_of())({"images": torch.randn(2, 3, 32, 32)})
    assert outputs["loss"].requires_grad
    assert not any(outputs[key].requires_grad for key in outputs if key != "loss")


def test_metrics_compare_with_one_colour():
    objective = MaskedImageModeling(model_of())
    images, mask = torch.randn(4, 3, 32, 32), torch.zeros(4, 4, 4)
    mask[:, :3] = 1.0
    hidden = images[:, :, :24].movedim(1, 0).flatten(1)  # [3, pixels]
    colour = hidden.median(dim=1, keepdim=True).values
    pred = colour.view(1, 3, 1, 1).expand_as(images)
    of_one_colour = {"loss": objective.model.forward_loss(images, pred, mask), "mask": mask, "images": images}
    assert objective.metrics(of_one_colour) == {"hidden": 0.75, "explained": pytest.approx(0.0, abs=1e-5)}
    assert objective.metrics(of_one_colour | {"loss": torch.tensor(0.0)})["explained"] == 1.0
    nothing = objective.metrics(of_one_colour | {"mask": torch.zeros(4, 16)})
    assert nothing["hidden"] == 0.0 and nothing["explained"] != nothing["explained"]


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_to_paint_pictures_it_has_not_seen(name):
    """160 steps beat, on concepts held out, the best guesses without looking: mean and median training image."""
    train, held_out = pictures("train"), pictures("held_out")
    masking, source = MASKINGS[name], generator(0)
    objective = MaskedImageModeling(model_of(name), masking, generator=source)
    model, mask = objective.model, masking(len(held_out), source)
    with torch.no_grad():
        untrained = model(held_out, mask)[0]
        target = model.target(train)
        guesses = (target.mean(dim=0), target.median(dim=0).values)
        baseline = min(model.forward_loss(held_out, guess.expand(len(held_out), -1, -1, -1), mask) for guess in guesses)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for _ in range(160):
        batch = train[torch.randint(len(train), (64,), generator=source)]
        optimizer.zero_grad()
        objective({"images": batch})["loss"].backward()
        optimizer.step()
        objective.after_step()
    with torch.no_grad():
        learned = model(held_out, mask)[0]
    assert learned < 0.92 * baseline < untrained
