# SPDX-License-Identifier: Apache-2.0
"""Image-text contrastive pretraining: CLIP's softmax loss and SigLIP's sigmoid loss over any two-tower model.

``loss = clip_loss(u, v, s)`` with normalised image features ``u``, text features ``v`` (both ``[n, D]``) and the
learned scale ``s = exp(logit_scale)``; row ``i`` of one is the positive of row ``i`` of the other.
Papers: CLIP (Radford et al., 2021, arXiv:2103.00020), SigLIP (Zhai et al., 2023, arXiv:2303.15343).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fvm_fast.ops import ClassIds, clip_loss, siglip_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LOSSES = ("clip", "siglip")
MAX_LOGIT_SCALE = math.log(100.0)  # CLIP, section 2.5: beyond 100 training became unstable


class ContrastivePretraining(nn.Module):
    """Train ``model`` to tell the text of each image from the other texts of the batch.

    Args:
        model: maps ``(images, tokens)`` to ``(image_features [n, D], text_features [n, D], scale)``, features
            normalised and scale already exponentiated, as CLIP does; SigLIP reads a fourth value, the logits' bias.
        loss: ``"clip"`` (softmax over rows and columns) or ``"siglip"`` (a sigmoid for each pair).
        label_smoothing: mass spread evenly over the negatives; CLIP's loss only.
        multi_positive: count pairs of the same ``batch["concepts"]`` (where 0 or more) as positives of one another.
        max_logit_scale: upper bound of ``model.logit_scale`` (a logarithm), enforced by :meth:`after_step`.
        group: process group whose local batches form the batch; None is this process alone.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str = "clip",
        *,
        label_smoothing: float = 0.0,
        multi_positive: bool = False,
        max_logit_scale: float = MAX_LOGIT_SCALE,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"ContrastivePretraining: loss should be one of {', '.join(LOSSES)}, got {loss!r}")
        if loss == "siglip" and label_smoothing:
            raise ValueError(f"ContrastivePretraining: label_smoothing belongs to loss='clip', got {label_smoothing}")
        if loss == "siglip" and getattr(model, "logit_bias", None) is None:
            raise ValueError(
                "ContrastivePretraining: loss='siglip' learns a bias of the logits, and this model has no logit_bias; "
                "build it with init_logit_bias=-10"
            )
        self.model = model
        self.loss = loss
        self.label_smoothing = label_smoothing
        self.multi_positive = multi_positive
        self.max_logit_scale = max_logit_scale
        self.group = group

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            batch: ``images`` ``[n, C, H, W]``, ``tokens`` ``[n, context_length]`` and, for multi-positive training,
                ``concepts`` ``[n]``.

        Returns:
            ``loss`` (0-d, differentiable); ``logit_scale`` (0-d), ``image_features`` and ``text_features`` detached.
        """
        image_features, text_features, scale, *bias = self.model(batch["images"], batch["tokens"])
        options = {"targets": self._targets(batch), "group": self.group}
        if self.loss == "siglip":
            loss = siglip_loss(image_features, text_features, scale, *bias, **options)
        else:
            options["label_smoothing"] = self.label_smoothing
            loss = clip_loss(image_features, text_features, scale, **options)
        return {
            "loss": loss,
            "logit_scale": scale.detach(),
            "image_features": image_features.detach(),
            "text_features": text_features.detach(),
        }

    @torch.no_grad()
    def after_step(self) -> None:
        """Bound the temperature; call it after each optimizer step."""
        self.model.logit_scale.clamp_(0.0, self.max_logit_scale)

    @staticmethod
    @torch.no_grad()
    def metrics(outputs: dict[str, Tensor], chunk: int = 1024) -> dict[str, float]:
        """Numbers worth logging now and then: the scale, and how often an image finds its own text in its batch.

        Works over blocks of ``chunk`` images, so that no n x n matrix is held.
        """
        texts = outputs["text_features"].float()
        hits = 0
        for start, images in enumerate(outputs["image_features"].float().split(chunk)):
            found = (images @ texts.T).argmax(dim=1)
            hits += int((found == start * chunk + torch.arange(len(images), device=found.device)).sum())
        return {"logit_scale": float(outputs["logit_scale"]), "accuracy": hits / max(len(texts), 1)}

    def _targets(self, batch: dict[str, Tensor]) -> ClassIds | None:
        if not self.multi_positive:
            return None
        concepts = batch["concepts"]
        # an unknown concept (-1) is positive with itself only: give each such row an id nobody else has
        own = -1 - torch.arange(len(concepts), device=concepts.device)
        if self.group is not None:
            own -= torch.distributed.get_rank(self.group) << 32
        ids = torch.where(concepts < 0, own, concepts)
        return ClassIds(ids, ids)
