# SPDX-License-Identifier: Apache-2.0
"""ContrastivePretraining: the loss it wires, its gradients, the temperature's bound and the logged accuracy."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fvm_fast.objectives import ContrastivePretraining


class TwoTowers(nn.Module):
    """The smallest model with CLIP's interface, in float64."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Linear(6, 5, dtype=torch.float64)
        self.text = nn.Linear(4, 5, dtype=torch.float64)
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor(-1.5, dtype=torch.float64)) if bias else None

    def forward(self, images, tokens):
        outputs = (
            F.normalize(self.image(images), dim=-1),
            F.normalize(self.text(tokens), dim=-1),
            self.logit_scale.exp(),
        )
        return outputs if self.logit_bias is None else (*outputs, self.logit_bias)


def batch_of(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": torch.randn(n, 6, generator=generator, dtype=torch.float64),
        "tokens": torch.randn(n, 4, generator=generator, dtype=torch.float64),
        "concepts": torch.arange(n),
    }


def logits_of(model, batch):
    u, v, scale, *bias = model(batch["images"], batch["tokens"])
    return scale * u @ v.T + (bias[0] if bias else 0.0)


def softmax_loss(logits, targets, smoothing=0.0):
    targets = (1 - smoothing) * targets + smoothing / len(targets)
    rows = -(targets * logits.log_softmax(1)).sum(1).mean()
    columns = -(targets.T * logits.T.log_softmax(1)).sum(1).mean()
    return (rows + columns) / 2


def assert_matches(objective, batch, expected):
    parameters = dict(objective.model.named_parameters())
    loss = objective(batch)["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    got = torch.autograd.grad(loss, list(parameters.values()))
    want = torch.autograd.grad(expected, list(parameters.values()))
    for name, left, right in zip(parameters, got, want, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("n", [1, 2, 13])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_clip_loss_and_every_gradient(n, smoothing):
    model, batch = TwoTowers(), batch_of(n)
    expected = softmax_loss(logits_of(model, batch), torch.eye(n, dtype=torch.float64), smoothing)
    assert_matches(ContrastivePretraining(model, label_smoothing=smoothing), batch, expected)


@pytest.mark.parametrize("n", [1, 7])
def test_siglip_loss_and_every_gradient(n):
    model, batch = TwoTowers(bias=True), batch_of(n)
    sign = 2 * torch.eye(n, dtype=torch.float64) - 1
    expected = -F.logsigmoid(sign * logits_of(model, batch)).sum() / n
    assert_matches(ContrastivePretraining(model, "siglip"), batch, expected)


def test_multi_positive_spreads_over_equal_concepts_and_keeps_unknown_ones_apart():
    model, batch = TwoTowers(), batch_of(6)
    batch["concepts"] = torch.tensor([4, 2, 4, -1, -1, 2])
    same = torch.eye(6, dtype=torch.float64)
    same[0, 2] = same[2, 0] = same[1, 5] = same[5, 1] = 1.0
    expected = softmax_loss(logits_of(model, batch), same / same.sum(1, keepdim=True))
    assert_matches(ContrastivePretraining(model, multi_positive=True), batch, expected)


@pytest.mark.parametrize(("before", "after"), [(5.3, math.log(100)), (3.0, 3.0), (-0.4, 0.0)])
def test_after_step_bounds_the_temperature(before, after):
    objective = ContrastivePretraining(TwoTowers())
    with torch.no_grad():
        objective.model.logit_scale.fill_(before)
    objective.after_step()
    assert objective.model.logit_scale.item() == pytest.approx(after)


def test_accuracy_counts_own_texts_over_chunks():
    texts = torch.eye(5)
    outputs = {
        "image_features": texts[[0, 1, 3, 2, 4]],
        "text_features": texts,
        "logit_scale": torch.tensor(7.0),
    }
    assert ContrastivePretraining.metrics(outputs, chunk=2) == {"logit_scale": 7.0, "accuracy": 3 / 5}


def test_outputs_are_detached_but_for_the_loss():
    outputs = ContrastivePretraining(TwoTowers())(batch_of(3))
    assert outputs["loss"].requires_grad
    assert not any(outputs[key].requires_grad for key in outputs if key != "loss")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "triplet"}, "one of clip, siglip, got 'triplet'"),
        ({"loss": "siglip"}, "init_logit_bias"),
        ({"loss": "siglip", "label_smoothing": 0.1}, "label_smoothing belongs to loss='clip', got 0.1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ContrastivePretraining(TwoTowers(), **arguments)
