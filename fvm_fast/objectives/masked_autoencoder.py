# SPDX-License-Identifier: Apache-2.0
"""Masked autoencoding: paint the hidden patches of an image from the visible ones; no labels.

``loss = mean over hidden patches of |pred - pixels|^2``, which the model computes (``models.MaskedAutoencoderViT``).
Paper: Masked Autoencoders Are Scalable Vision Learners (He et al., 2022, arXiv:2111.06377).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MaskedAutoencoding(nn.Module):
    """Train ``model`` to paint the patches that it does not see.

    Args:
        model: maps ``(images, mask_ratio)`` to ``(loss, pred [B, L, pixels of a patch], mask [B, L])``, mask 1 where a
            patch was hidden, and has ``target(images)``, which is what ``pred`` should be.
        mask_ratio: share of the patches to hide; None is the model's own.
    """

    def __init__(self, model: nn.Module, *, mask_ratio: float | None = None) -> None:
        super().__init__()
        if mask_ratio is not None and not 0.0 < mask_ratio <= 1.0:
            raise ValueError(f"MaskedAutoencoding: mask_ratio should be in (0, 1], got {mask_ratio}")
        self.model = model
        self.mask_ratio = mask_ratio

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            batch: ``images`` ``[B, C, H, W]``; other entries are not read.

        Returns:
            ``loss`` (0-d, differentiable); ``pred`` and ``mask`` detached, and the ``images``, which ``metrics`` reads.
        """
        loss, pred, mask = self.model(batch["images"], self.mask_ratio)
        return {"loss": loss, "pred": pred.detach(), "mask": mask, "images": batch["images"]}

    def after_step(self) -> None:
        """Nothing moves but what the optimizer moves."""

    @torch.no_grad()
    def metrics(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """Numbers worth logging now and then.

        ``hidden`` is the share of the patches that was hidden. ``explained`` is 1 minus the loss over the variance of
        the hidden pixels: 0 for a model that paints one colour, 1 for one that paints the image.
        """
        hidden = self.model.target(outputs["images"]).float()[outputs["mask"] > 0]  # [patches, pixels]
        variance = float(hidden.var(correction=0))
        explained = 1.0 - float(outputs["loss"]) / variance if variance > 0.0 else float("nan")
        return {"hidden": float(outputs["mask"].mean()), "explained": explained}
