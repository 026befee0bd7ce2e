# SPDX-License-Identifier: Apache-2.0
"""Classification against timm's losses: values, gradients, soft targets, and that it learns from real images."""

import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.testing import assert_close

from fvm_fast.data import EmojiPairs
from fvm_fast.data.transforms import Composite, Mixup
from fvm_fast.models import create_model
from fvm_fast.objectives import Classification, ClassificationLoss

CLASSES = 7
NUMBERS = torch.tensor([0, 6, 3, 3, 2])
TARGETS = torch.rand(5, CLASSES, generator=torch.Generator().manual_seed(3), dtype=torch.float64).softmax(1)


def logits_of(n: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(n, CLASSES, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


# (our arguments, timm's loss, labels); the dense targets of timm's are smoothed beforehand, as its Mixup does
CASES = {
    "numbers": ({}, LabelSmoothingCrossEntropy(0.0), NUMBERS),
    "smooth_numbers": (dict(label_smoothing=0.1), LabelSmoothingCrossEntropy(0.1), NUMBERS),
    "soft": ({}, SoftTargetCrossEntropy(), TARGETS),
    "bce_numbers": (dict(loss="bce"), BinaryCrossEntropy(0.0), NUMBERS),
    "bce_smooth": (dict(loss="bce", label_smoothing=0.1), BinaryCrossEntropy(0.1), NUMBERS),
    "bce_soft": (dict(loss="bce"), BinaryCrossEntropy(), TARGETS),
    "bce_sum": (
        dict(loss="bce", label_smoothing=0.2, sum_classes=True),
        BinaryCrossEntropy(0.2, sum_classes=True),
        NUMBERS,
    ),
    "bce_threshold": (
        dict(loss="bce", label_smoothing=0.1, target_threshold=0.2),
        BinaryCrossEntropy(0.1, target_threshold=0.2),
        NUMBERS,
    ),
    "bce_zero_threshold": (
        dict(loss="bce", target_threshold=0.0),
        BinaryCrossEntropy(0.0, target_threshold=0.0),
        NUMBERS,
    ),
    "bce_threshold_soft": (
        dict(loss="bce", target_threshold=0.15, sum_classes=True),
        BinaryCrossEntropy(target_threshold=0.15, sum_classes=True),
        TARGETS,
    ),
}


@pytest.mark.parametrize("kwargs, oracle, labels", CASES.values(), ids=CASES.keys())
def test_equals_timm(kwargs, oracle, labels):
    ours, theirs = logits_of(), logits_of()
    loss, expected = ClassificationLoss(**kwargs)(ours, labels), oracle(theirs, labels)
    assert_close(loss, expected, atol=0.0, rtol=1e-9)
    loss.backward(), expected.backward()
    assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_smoothing_mixed_targets_equals_timms_mixing_of_smooth_ones(loss):
    lam = 0.3
    hard = mixup_target(NUMBERS, CLASSES, lam).double()
    smooth = mixup_target(NUMBERS, CLASSES, lam, smoothing=0.1).double()
    oracle = SoftTargetCrossEntropy() if loss == "cross_entropy" else BinaryCrossEntropy()
    got = ClassificationLoss(loss, label_smoothing=0.1)(logits_of(), hard)
    assert_close(got, oracle(logits_of(), smooth), atol=0.0, rtol=1e-6)  # timm mixes in float32


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_half_precision_is_summed_in_float32(loss):
    logits = logits_of(dtype=torch.bfloat16)
    got = ClassificationLoss(loss, label_smoothing=0.1)(logits, NUMBERS)
    exact = ClassificationLoss(loss, label_smoothing=0.1)(logits.detach().double(), NUMBERS)
    assert got.dtype == torch.float32
    assert_close(got.double(), exact, atol=0.0, rtol=1e-6)


@pytest.mark.parametrize("labels", [NUMBERS, TARGETS], ids=["numbers", "soft"])
def test_the_objective_wires_model_and_loss(labels):
    torch.manual_seed(0)
    model = nn.Linear(4, CLASSES).double()
    images = torch.randn(5, 4, dtype=torch.float64)
    objective = Classification(model, label_smoothing=0.1)
    outputs = objective({"images": images, "labels": labels})
    assert_close(outputs["loss"], ClassificationLoss(label_smoothing=0.1)(model(images), labels))
    outputs["loss"].backward()
    assert model.weight.grad.abs().max() > 0 and not outputs["logits"].requires_grad
    main = labels if labels.ndim == 1 else labels.argmax(1)
    hits = (model(images).argmax(1) == main).double().mean()
    assert objective.metrics(outputs) == {"accuracy": pytest.approx(float(hits))}
    assert objective.after_step() is None
    assert objective.state_dict().keys() == {"model.weight", "model.bias"}


def test_accuracy_counts():
    outputs = {"logits": torch.eye(4), "labels": torch.tensor([0, 1, 3, 3])}
    assert Classification.metrics(outputs) == {"accuracy": 0.75}


@pytest.mark.parametrize("kwargs", [{}, dict(loss="bce", target_threshold=0.0)], ids=["cross_entropy", "bce"])
def test_compiles_without_a_break(kwargs):
    objective = Classification(nn.Linear(4, CLASSES), **kwargs)
    for labels in (NUMBERS, TARGETS.float()):
        batch = {"images": torch.randn(5, 4), "labels": labels}
        torch._dynamo.reset()
        compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
        assert_close(compiled(batch)["loss"], objective(batch)["loss"])


BAD = {
    "loss": (lambda: ClassificationLoss("focal"), "loss should be one of cross_entropy, bce, got 'focal'"),
    "smoothing": (lambda: ClassificationLoss(label_smoothing=1.0), "label_smoothing should be in \\[0, 1\\), got 1"),
    "options": (lambda: ClassificationLoss(sum_classes=True), "belong to loss='bce', got 'cross_entropy'"),
    "threshold": (
        lambda: ClassificationLoss("bce", label_smoothing=0.1, target_threshold=0.0)(logits_of(), NUMBERS),
        "at least label_smoothing / classes, 0.0142857, or every class is a target, got 0",
    ),
    "too_few": (
        lambda: ClassificationLoss()(logits_of(4), NUMBERS),
        "labels torch.int64 \\(5,\\) and logits \\(4, 7\\)",
    ),
    "other_width": (lambda: ClassificationLoss()(logits_of(), TARGETS[:, :6]), "got labels torch.float64 \\(5, 6\\)"),
    "float_numbers": (
        lambda: ClassificationLoss()(logits_of(), NUMBERS.float()),
        "class numbers \\[n\\] \\(integers\\)",
    ),
    "pair": (
        lambda: Classification(PairOfLogits())({"images": torch.ones(5, CLASSES), "labels": NUMBERS}),
        "should return logits \\[n, C\\], got a tuple; a distilled model trains with objectives.Distillation",
    ),
}


class PairOfLogits(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD.keys())
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


GROUPS = ("flags", "smileys-emotion", "animals-nature", "objects")


def emoji(styles: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Drawings with the number of their group."""
    pairs = EmojiPairs(styles, GROUPS, image_size=32)
    labels = torch.tensor([GROUPS.index(pairs.groups[concept]) for concept in pairs.concepts.tolist()])
    return {"images": Composite()(pairs.images), "labels": labels}


@pytest.mark.parametrize(
    "kwargs", [dict(label_smoothing=0.1), dict(loss="bce", target_threshold=0.0)], ids=["ce", "bce"]
)
def test_learns_the_group_of_emoji_in_a_style_it_never_saw(kwargs):
    seen, unseen = emoji(("google", "fluent")), emoji(("twitter",))
    torch.manual_seed(0)
    model = create_model("deit_test_patch16_64", img_size=32, patch_size=8, num_classes=4)
    objective = Classification(model, **kwargs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    mixup, generator = Mixup(4, mixup_alpha=0.2, prob=0.5), torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = objective(unseen)
    for _ in range(40):
        rows = torch.randint(len(seen["labels"]), (64,), generator=generator)
        images, targets = mixup(seen["images"][rows], seen["labels"][rows], generator)
        optimizer.zero_grad()
        objective({"images": images, "labels": targets})["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        after = objective(unseen)
    most_common = float(unseen["labels"].bincount().max()) / len(unseen["labels"])
    assert after["loss"] < 0.85 * before["loss"], (float(after["loss"]), float(before["loss"]))
    assert objective.metrics(after)["accuracy"] > 1.6 * most_common
