# SPDX-License-Identifier: Apache-2.0
"""Distillation against the paper's formula and timm's task; stored answers against the formula of TinyViT's code."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from timm.task import TokenDistillationTask
from torch import nn
from torch.testing import assert_close

from fvm_fast.data import EmojiPairs
from fvm_fast.data.transforms import Composite
from fvm_fast.models import create_model
from fvm_fast.objectives import ClassificationLoss, Distillation, StoredDistillation
from fvm_fast.objectives.distillation import dense_targets, stored_cross_entropy

LABELS = torch.tensor([0, 4, 2, 1, 4])
SOFT_LABELS = torch.rand(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).softmax(1)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.double()


def networks(student: str = "deit_test_distilled_patch16_64") -> tuple[nn.Module, nn.Module]:
    kwargs = dict(img_size=16, patch_size=8, num_classes=5, embed_dim=16, depth=2, num_heads=2)
    return randomise(create_model(student, **kwargs), 1).train(), randomise(
        create_model("vit_test_patch16_64", **kwargs), 2
    )


def batch_of(labels: torch.Tensor = LABELS) -> dict[str, torch.Tensor]:
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return {"images": images, "labels": labels}


def official_loss(logits, taught, teacher_logits, labels, kind, alpha, tau):
    """The paper's equations 2 and 3, the soft one divided as its code does."""
    base = F.cross_entropy(logits, labels)
    if kind == "hard":
        return (1 - alpha) * base + alpha * F.cross_entropy(taught, teacher_logits.argmax(1))
    p, log_p = (teacher_logits / tau).softmax(1), (teacher_logits / tau).log_softmax(1)
    divergence = (p * (log_p - (taught / tau).log_softmax(1))).sum()
    return (1 - alpha) * base + alpha * tau**2 * divergence / taught.numel()


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("labels", [LABELS, SOFT_LABELS], ids=["numbers", "soft_labels"])
@pytest.mark.parametrize("kind, alpha, tau", [("hard", 0.5, 1.0), ("hard", 0.2, 1.0), ("soft", 0.1, 3.0)])
def test_equals_the_papers_formula(kind, alpha, tau, labels):
    student, teacher = networks()
    batch = batch_of(labels)
    images = batch["images"].requires_grad_()
    loss = Distillation(student, teacher, kind, alpha=alpha, tau=tau)(batch)["loss"]
    expected = official_loss(*student(images), teacher(images).detach(), labels, kind, alpha, tau)
    assert_close(loss, expected, atol=0.0, rtol=1e-9)
    got, wanted = (torch.autograd.grad(value, images, retain_graph=True)[0] for value in (loss, expected))
    assert_close(got, wanted, atol=1e-12, rtol=1e-9, msg="no gradient should come through the teacher")
    assert_close(gradients(student, loss), gradients(student, expected), atol=1e-12, rtol=1e-9)


TIMM = {
    "soft": (dict(kind="soft", tau=2.0), dict(distill_type="soft", temperature=2.0)),
    "hard": (dict(kind="hard"), dict(distill_type="hard")),
}
WEIGHTS = {
    "timms_default": (dict(alpha=1.0, task_weight=1.0), {}),
    "complementary": (dict(alpha=0.3), dict(task_loss_weight=0.7)),
    "independent": (dict(alpha=0.3, task_weight=2.0), dict(task_loss_weight=2.0, distill_loss_weight=0.3)),
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("kinds", TIMM.values(), ids=TIMM.keys())
def test_equals_timms_task(kinds, weights):
    student, teacher = networks()
    theirs = copy.deepcopy(student)
    smooth = ClassificationLoss(label_smoothing=0.1)
    ours = Distillation(student, teacher, **kinds[0] | weights[0], reduction="batchmean", criterion=smooth)
    oracle_options = dict(criterion=nn.CrossEntropyLoss(label_smoothing=0.1), device="cpu", dtype=torch.float64)
    oracle = TokenDistillationTask(theirs, copy.deepcopy(teacher), **kinds[1] | weights[1] | oracle_options)
    batch = batch_of()
    # timm maps the images from the student's statistics to the teacher's, which differ here
    mean, std = (torch.tensor(student.default_cfg[key], dtype=torch.float64)[:, None, None] for key in ("mean", "std"))
    ours.teacher_transform = lambda images: (images * std + mean - 0.5) / 0.5
    outputs, expected = ours(batch), oracle(batch["images"], batch["labels"])
    for key in ("loss", "task_loss"):
        assert_close(outputs[key], expected[key].to(outputs[key]), atol=0.0, rtol=1e-9)
    assert_close(outputs["distillation_loss"], expected["distill_loss"].detach(), atol=0.0, rtol=1e-9)
    assert_close(gradients(student, outputs["loss"]), gradients(theirs, expected["loss"]), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("mode", ["plain_student", "evaluation"])
def test_one_prediction_learns_from_both(mode):
    student, teacher = networks("vit_test_patch16_64" if mode == "plain_student" else "deit_test_distilled_patch16_64")
    objective = Distillation(student, teacher, "soft", alpha=0.4, tau=2.0).train(mode == "plain_student")
    batch = batch_of()
    outputs, logits = objective(batch), student(batch["images"])
    expected = official_loss(logits, logits, teacher(batch["images"]), LABELS, "soft", 0.4, 2.0)
    assert_close(outputs["loss"], expected, atol=0.0, rtol=1e-9)


class Teacher(nn.Module):
    """A convolutional teacher whose batch norm and dropout would show if it were in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 5)

    def forward(self, images):
        return SimpleNamespace(logits=self.head(self.drop(self.norm(self.conv(images)).mean((2, 3)))))


def test_the_teacher_stands_still_and_is_not_saved():
    student, _ = networks()
    teacher = Teacher().double()
    before = copy.deepcopy(teacher.state_dict())
    objective = Distillation(student, teacher).train()
    assert objective.state_dict().keys() == {f"model.{name}" for name in student.state_dict()}
    assert {id(p) for p in objective.parameters()} == {id(p) for p in student.parameters()}
    outputs = objective(batch_of())
    outputs["loss"].backward()
    assert not teacher.training and not teacher.norm.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert_close(teacher.state_dict(), before, atol=0.0, rtol=0.0)
    assert torch.equal(outputs["teacher"], objective(batch_of())["teacher"]), "dropout is off"
    objective.load_state_dict(objective.state_dict(), strict=True)
    objective.float()
    assert teacher.head.weight.dtype == torch.float32, "it is cast and moved with the objective"
    assert copy.deepcopy(objective).teacher is not teacher


def test_metrics():
    student, teacher = networks()
    outputs = Distillation(student, teacher)(batch_of())
    logits, taught = student(batch_of()["images"])
    says = teacher(batch_of()["images"]).argmax(1)
    metrics = Distillation.metrics(outputs)
    assert metrics["accuracy"] == pytest.approx(float((logits.argmax(1) == LABELS).double().mean()))
    assert metrics["agreement"] == pytest.approx(float((taught.argmax(1) == says).double().mean()))
    total = 0.5 * metrics["task_loss"] + 0.5 * metrics["distillation_loss"]
    assert total == pytest.approx(float(outputs["loss"].detach()))
    assert not outputs["logits"].requires_grad


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_compiles_without_a_break(kind):
    student, teacher = networks()
    objective = Distillation(student, teacher, kind, tau=2.0)
    torch._dynamo.reset()
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    loss, expected = compiled(batch_of())["loss"], objective(batch_of())["loss"]
    assert_close(loss, expected, atol=0.0, rtol=1e-9)
    assert_close(gradients(student, loss), gradients(student, expected), atol=1e-12, rtol=1e-9)


BAD = {
    "kind": (dict(kind="warm"), "kind should be one of hard, soft, got 'warm'"),
    "reduction": (dict(reduction="mean"), "reduction should be one of numel, batchmean, got 'mean'"),
    "tau": (dict(kind="soft", tau=0.0), "tau should be positive, got 0"),
}


@pytest.mark.parametrize("kwargs, message", BAD.values(), ids=BAD.keys())
def test_bad_arguments_say_what_was_expected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Distillation(*networks(), **kwargs)


def test_unfit_teachers_are_refused():
    student, teacher = networks()
    with pytest.raises(ValueError, match="another network than the student"):
        Distillation(student, student)
    teacher.reset_classifier(6)
    with pytest.raises(ValueError, match="should have the student's shape \\(5, 5\\), got \\(5, 6\\); build both"):
        Distillation(student, teacher)(batch_of())


# ---- stored answers


def sparse_answers(n: int, classes: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    values, indices = torch.randn(n, classes, generator=generator).softmax(1).topk(k)
    return indices, values.half()


def formula(logits, indices, values):
    """TinyViT's: the stored probabilities, the rest of the mass evenly over the other classes, soft cross-entropy."""
    rows = []
    for x, index, value in zip(logits, indices.tolist(), values.to(logits.dtype), strict=True):
        target = ((1 - value.sum()) / max(len(x) - len(index), 1)).repeat(len(x))
        for i, v in zip(index, value, strict=True):
            target[i] = v
        rows.append(-(target * x.log_softmax(0)).sum())
    return torch.stack(rows).mean()


@pytest.mark.parametrize("classes, k", [(11, 3), (11, 1), (7, 7), (1, 1)])
def test_stored_cross_entropy_equals_the_formula(classes, k):
    indices, values = sparse_answers(4, classes, k)
    logits = torch.randn(4, classes, dtype=torch.float64, requires_grad=True)
    loss, expected = stored_cross_entropy(logits, indices, values), formula(logits, indices, values)
    assert_close(loss, expected, atol=1e-12, rtol=1e-9)
    got, wanted = (torch.autograd.grad(value, logits)[0] for value in (loss, expected))
    assert_close(got, wanted, atol=1e-12, rtol=1e-9)
    targets = dense_targets(indices, values, classes, torch.float64)
    assert_close(ClassificationLoss()(logits, targets), expected, atol=1e-12, rtol=1e-9)
    if k < classes:
        assert_close(targets.sum(1), torch.ones(4, dtype=torch.float64), atol=1e-12, rtol=0.0)


def test_stored_distillation_wires_model_and_loss():
    student, _ = networks("vit_test_patch16_64")
    indices, values = sparse_answers(5, 5, 2)
    objective = StoredDistillation(student)
    images = batch_of()["images"]
    outputs = objective({"images": images, "teacher_indices": indices, "teacher_values": values})
    expected = formula(student(images), indices, values)
    assert_close(outputs["loss"], expected, atol=0.0, rtol=1e-9)
    assert_close(gradients(student, outputs["loss"]), gradients(student, expected), atol=1e-12, rtol=1e-9)
    agreement = (student(images).argmax(1) == indices[:, 0]).double().mean()
    assert objective.metrics(outputs) == {"agreement": pytest.approx(float(agreement))}
    assert objective.after_step() is None


def test_a_student_learns_from_a_teacher_on_real_images():
    images = Composite()(EmojiPairs("twitter", image_size=32).images[:48])
    labels = torch.arange(48) % 4
    kwargs = dict(img_size=32, patch_size=8, num_classes=4)
    torch.manual_seed(0)
    teacher = create_model("vit_test_patch16_64", **kwargs)
    torch.nn.init.normal_(teacher.head.weight, std=0.5)  # an untrained teacher with opinions
    student = create_model("deit_test_distilled_patch16_64", **kwargs)
    objective = Distillation(student, teacher, "hard")
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    batch = {"images": images, "labels": labels}
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        outputs = objective(batch)
        outputs["loss"].backward()
        optimizer.step()
        losses.append(float(outputs["loss"].detach()))
    assert losses[-1] < 0.7 * losses[0], (losses[0], losses[-1])
    assert objective.metrics(outputs)["agreement"] > 0.8
