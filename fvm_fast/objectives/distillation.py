# SPDX-License-Identifier: Apache-2.0
"""Distillation: a student learns from the labels and from a teacher, who is asked live or whose answers are stored.

With the student's logits ``x`` for the labels and ``z`` for the teacher (a distilled DeiT has a head for each; for any
other student they are the same) and the teacher's logits ``y``, all ``[n, C]``:

    loss = (1 - alpha) criterion(x, labels) + alpha d(z, y)
    hard   d = cross_entropy(z, argmax y)
    soft   d = tau^2 KL(softmax(y / tau) || softmax(z / tau)), the sum divided by n C ("numel") or by n ("batchmean")

Training data-efficient image transformers & distillation through attention, https://arxiv.org/abs/2012.12877,
equations 2 and 3. Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531.
TinyViT: Fast Pretraining Distillation for Small Vision Transformers, https://arxiv.org/abs/2207.10666.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvm_fast.objectives.classification import ClassificationLoss, main_class, share

KINDS = ("hard", "soft")
REDUCTIONS = ("numel", "batchmean")


class Distillation(nn.Module):
    """Train ``student`` on the labels and on a frozen teacher's predictions.

    The teacher is set to evaluation mode and its parameters to ``requires_grad=False``, for good. It is no submodule:
    ``parameters()``, ``state_dict()`` and ``train()`` leave it out (a checkpoint holds what was learned; who resumes
    gives the teacher again), while ``to()``, ``cuda()`` and ``double()`` move and cast it too.

    Args:
        student: maps images to logits [n, C], or to the pair (class logits, distillation logits) while training; one
            with ``set_distilled_training`` (DeiT's) is told to give the pair.
        teacher: maps images to logits [n, C], or to an object that has ``.logits``.
        kind: ``"hard"`` or ``"soft"``.
        alpha: weight of the teacher.
        tau: temperature of the soft kind.
        reduction: of the soft kind: ``"numel"`` as in the paper's code, ``"batchmean"`` as in timm's.
        task_weight: weight of the labels; ``1 - alpha`` when None.
        criterion: loss of the labels; None is cross-entropy.
        teacher_transform: maps the student's images to the teacher's, for another normalisation or size. uint8 images
            need none when both models normalise inside.
    """

    teacher: nn.Module

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        kind: str = "hard",
        *,
        alpha: float = 0.5,
        tau: float = 1.0,
        reduction: str = "numel",
        task_weight: float | None = None,
        criterion: nn.Module | None = None,
        teacher_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"Distillation: kind should be one of {', '.join(KINDS)}, got {kind!r}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"Distillation: reduction should be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        if tau <= 0.0:
            raise ValueError(f"Distillation: tau should be positive, got {tau}")
        if teacher is student:
            raise ValueError("Distillation: the teacher should be another network than the student, got the same")
        self.model = student
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))  # past nn.Module: no submodule
        self.kind, self.alpha, self.tau, self.reduction = kind, alpha, tau, reduction
        self.task_weight = 1.0 - alpha if task_weight is None else task_weight
        self.criterion = ClassificationLoss() if criterion is None else criterion
        self.teacher_transform = teacher_transform
        if hasattr(student, "set_distilled_training"):
            student.set_distilled_training(True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distillation:
        """What ``to()`` and its like are made of."""
        self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            batch: ``images``, and ``labels``: class numbers [n] or soft targets [n, C].

        Returns:
            ``loss`` (0-d, differentiable); detached, its parts ``task_loss`` and ``distillation_loss``, the ``logits``
            [n, C] that the labels teach, the main ``labels`` [n], and ``taught`` and ``teacher`` [n]: the classes that
            the taught logits and the teacher predict.
        """
        images, labels = batch["images"], batch["labels"]
        outputs = self.model(images)
        logits, taught = (outputs, outputs) if isinstance(outputs, Tensor) else outputs
        teacher_logits = self._ask_teacher(images, taught)
        task_loss = self.criterion(logits, labels)
        distillation_loss = self._distillation_loss(taught, teacher_logits)
        return {
            "loss": self.task_weight * task_loss + self.alpha * distillation_loss,
            "task_loss": task_loss.detach(),
            "distillation_loss": distillation_loss.detach(),
            "logits": logits.detach(),
            "labels": main_class(labels),
            "taught": taught.detach().argmax(dim=1),
            "teacher": teacher_logits.argmax(dim=1),
        }

    @torch.no_grad()
    def _ask_teacher(self, images: Tensor, taught: Tensor) -> Tensor:
        if self.teacher_transform is not None:
            images = self.teacher_transform(images)
        outputs = self.teacher(images)
        logits = outputs if isinstance(outputs, Tensor) else outputs.logits
        if logits.shape != taught.shape:
            raise ValueError(
                f"Distillation: the teacher's logits should have the student's shape {tuple(taught.shape)}, got "
                f"{tuple(logits.shape)}; build both with the same num_classes"
            )
        return logits

    def _distillation_loss(self, taught: Tensor, teacher_logits: Tensor) -> Tensor:
        dtype = torch.promote_types(taught.dtype, torch.float32)
        taught, teacher_logits = taught.to(dtype), teacher_logits.to(dtype)
        if self.kind == "hard":
            return F.cross_entropy(taught, teacher_logits.argmax(dim=1))
        student, teacher = (F.log_softmax(x / self.tau, dim=1) for x in (taught, teacher_logits))
        count = taught.numel() if self.reduction == "numel" else len(taught)
        return F.kl_div(student, teacher, reduction="sum", log_target=True) * (self.tau**2 / count)

    def after_step(self) -> None:
        """Nothing to do between steps: the teacher does not move."""

    @staticmethod
    @torch.no_grad()
    def metrics(outputs: dict[str, Tensor]) -> dict[str, float]:
        """Both losses; the share of images classified right, and of those where student and teacher agree."""
        return {
            "task_loss": float(outputs["task_loss"]),
            "distillation_loss": float(outputs["distillation_loss"]),
            "accuracy": share(outputs["logits"].argmax(dim=1) == outputs["labels"]),
            "agreement": share(outputs["taught"] == outputs["teacher"]),
        }


class StoredDistillation(nn.Module):
    """Train ``student`` on a teacher's stored answers (``objectives.StoredLogits``), without labels.

    ``loss = -mean_i sum_c t_ic log softmax(x_i)_c``, where the target ``t_i`` has the stored probabilities at the
    stored classes and spreads what is left of 1 evenly over the others. The dense targets are never made.

    Args:
        student: maps images to logits [n, C].
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.model = student

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            batch: ``images``, augmented as the teacher saw them, ``teacher_indices`` [n, k] and ``teacher_values``
                [n, k]: the teacher's likeliest classes in falling order, and their probabilities.

        Returns:
            ``loss`` (0-d, differentiable); detached, ``logits`` [n, C] and ``teacher`` [n], the teacher's first choice.
        """
        logits, indices = self.model(batch["images"]), batch["teacher_indices"]
        loss = stored_cross_entropy(logits, indices, batch["teacher_values"])
        return {"loss": loss, "logits": logits.detach(), "teacher": indices[:, 0]}

    def after_step(self) -> None:
        """Nothing to do between steps."""

    @staticmethod
    @torch.no_grad()
    def metrics(outputs: dict[str, Tensor]) -> dict[str, float]:
        """Share of the images where student and teacher agree."""
        return {"agreement": share(outputs["logits"].argmax(dim=1) == outputs["teacher"])}


def stored_cross_entropy(logits: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Mean cross-entropy of logits [n, C] with sparse targets: classes [n, k] and their probabilities [n, k].

    With ``m`` the share of each class that is not stored, the sum over the classes is
    ``sum_c t_c log p_c = m sum_c log p_c + sum_k (v_k - m) log p_k``.
    """
    log_probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)
    values = values.to(log_probabilities.dtype)
    rest = _share_of_the_rest(values, logits.shape[1])
    stored = ((values - rest) * log_probabilities.gather(1, indices)).sum(dim=1)
    return -(rest[:, 0] * log_probabilities.sum(dim=1) + stored).mean()


def dense_targets(indices: Tensor, values: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sparse targets written out [n, num_classes], for other losses."""
    values = values.to(dtype)
    return _share_of_the_rest(values, num_classes).repeat(1, num_classes).scatter_(1, indices, values)


def _share_of_the_rest(values: Tensor, num_classes: int) -> Tensor:
    """What is left of 1, for each class that is not stored [n, 1].

    Rounding to fp16 may leave a little less than nothing (-1e-3 over all); as in TinyViT's code it stays, so that every
    target sums to 1.
    """
    others = num_classes - values.shape[1]
    return (1.0 - values.sum(dim=1, keepdim=True)) / others if others else torch.zeros_like(values[:, :1])
