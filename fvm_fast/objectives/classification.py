# SPDX-License-Identifier: Apache-2.0
"""Classification: cross-entropy or binary cross-entropy, on class numbers or on the soft targets of mixup and CutMix.

With logits ``x`` and targets ``t`` (both ``[n, C]``; a class number counts as its one-hot row), smoothed to
``t' = (1 - s) t + s / C``:

    cross_entropy   mean over rows of  -sum_c t'_c log softmax(x)_c
    bce             mean over rows and classes (or sum over classes) of
                    -t'_c log sigmoid(x_c) - (1 - t'_c) log sigmoid(-x_c)

Label smoothing is from Inception (https://arxiv.org/abs/1512.00567), BCE with thresholded targets from ResNet strikes
back (https://arxiv.org/abs/2110.00476) and DeiT III (https://arxiv.org/abs/2204.07118).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOSSES = ("cross_entropy", "bce")


class ClassificationLoss(nn.Module):
    """The formulas above.

    Args:
        loss: ``"cross_entropy"`` (the classes exclude each other) or ``"bce"`` (each class is a question of its own).
        label_smoothing: ``s``. It commutes with mixing, so mixed targets are smoothed here too.
        target_threshold: BCE only: a target above it is 1, any other 0 (DeiT III: 0.0, after mixing).
        sum_classes: BCE only: sum over the classes instead of the mean.
    """

    def __init__(
        self,
        loss: str = "cross_entropy",
        *,
        label_smoothing: float = 0.0,
        target_threshold: float | None = None,
        sum_classes: bool = False,
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"ClassificationLoss: loss should be one of {', '.join(LOSSES)}, got {loss!r}")
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"ClassificationLoss: label_smoothing should be in [0, 1), got {label_smoothing}")
        if loss != "bce" and (target_threshold is not None or sum_classes):
            raise ValueError(f"ClassificationLoss: target_threshold and sum_classes belong to loss='bce', got {loss!r}")
        self.loss = loss
        self.label_smoothing = label_smoothing
        self.target_threshold = target_threshold
        self.sum_classes = sum_classes

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss (0-d), computed in float32 at least.

        Args:
            logits: [n, C].
            labels: class numbers [n] int64, or targets [n, C] that say how much of each class there is.
        """
        check_labels(logits, labels)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels.to(logits.dtype) if labels.ndim == 2 else labels.long()
        if self.loss == "cross_entropy":
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        reduction = "sum" if self.sum_classes else "mean"
        loss = F.binary_cross_entropy_with_logits(logits, self._binary_targets(logits, labels), reduction=reduction)
        return loss / len(logits) if self.sum_classes else loss

    def _binary_targets(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Smoothed, then thresholded [n, C]."""
        targets = labels if labels.ndim == 2 else torch.zeros_like(logits).scatter_(1, labels[:, None], 1.0)
        off_value = self.label_smoothing / logits.shape[1]
        targets = targets * (1.0 - self.label_smoothing) + off_value
        if self.target_threshold is None:
            return targets
        if self.target_threshold < off_value:
            raise ValueError(
                "ClassificationLoss: target_threshold should be at least label_smoothing / classes, "
                f"{off_value:g}, or every class is a target, got {self.target_threshold:g}"
            )
        return (targets > self.target_threshold).to(logits.dtype)


class Classification(nn.Module):
    """Train ``model`` to name the class of each image.

    Args:
        model: maps images to logits [n, C].
        loss, label_smoothing, target_threshold, sum_classes: see :class:`ClassificationLoss`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str = "cross_entropy",
        *,
        label_smoothing: float = 0.0,
        target_threshold: float | None = None,
        sum_classes: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.criterion = ClassificationLoss(
            loss, label_smoothing=label_smoothing, target_threshold=target_threshold, sum_classes=sum_classes
        )

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            batch: ``images`` as the model takes them, and ``labels``: class numbers [n], or soft targets [n, C] such
                as ``data.transforms.Mixup`` makes.

        Returns:
            ``loss`` (0-d, differentiable); detached, ``logits`` [n, C] and the main ``labels`` [n].
        """
        logits, labels = self.model(batch["images"]), batch["labels"]
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"Classification: the model should return logits [n, C], got a {type(logits).__name__}; a distilled "
                "model trains with objectives.Distillation, or alone after set_distilled_training(False)"
            )
        return {"loss": self.criterion(logits, labels), "logits": logits.detach(), "labels": main_class(labels)}

    def after_step(self) -> None:
        """Nothing to do between steps."""

    @staticmethod
    @torch.no_grad()
    def metrics(outputs: dict[str, Tensor]) -> dict[str, float]:
        """Share of the images whose largest logit is their (main) class."""
        return {"accuracy": share(outputs["logits"].argmax(dim=1) == outputs["labels"])}


def main_class(labels: Tensor) -> Tensor:
    """Class numbers [n] of class numbers [n] or targets [n, C]."""
    return labels.argmax(dim=1) if labels.ndim == 2 else labels


def share(hits: Tensor) -> float:
    """The part of a bool [n] that is true; 0 of nothing."""
    return float(hits.sum()) / max(len(hits), 1)


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Raises ValueError unless logits are [n, C] and labels int64 [n] or floating [n, C]."""
    numbers = labels.shape == logits.shape[:1] and not labels.is_floating_point()
    targets = labels.shape == logits.shape and labels.is_floating_point()
    if logits.ndim != 2 or not (numbers or targets):
        raise ValueError(
            "labels should be class numbers [n] (integers) or targets [n, C] (floats) beside logits [n, C], got labels "
            f"{labels.dtype} {tuple(labels.shape)} and logits {tuple(logits.shape)}"
        )
