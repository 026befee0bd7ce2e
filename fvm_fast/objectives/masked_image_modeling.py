# SPDX-License-Identifier: Apache-2.0
"""Masked image modelling: paint the hidden squares of an image, pixel by pixel; no labels.

``loss = mean over hidden pixels of |pred - pixels|``, which the model computes (``models.SimMIM``).
Paper: SimMIM: a Simple Framework for Masked Image Modeling (Xie et al., 2022, arXiv:2111.09886).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from fvm_fast.data.patch_masking import PatchMasking


class MaskedImageModeling(nn.Module):
    """Train ``model`` to paint the squares of an image that are hidden from it.

    Args:
        model: maps ``(images, mask [B, L] bool)`` to ``(loss, pred [B, C, H, W])``, has ``target(images)``, which is
            what ``pred`` should be, and ``patch_embed`` with ``img_size`` and ``patch_size``.
        masking: maps ``(batch, generator)`` to masks [batch, L] bool; None is the paper's, 60 % of squares of 32 px.
        generator: source of the masks; torch's default if None.
    """

    def __init__(
        self,
        model: nn.Module,
        masking: Callable[[int, Generator | None], Tensor] | None = None,
        *,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        stem = model.patch_embed
        self.model = model
        self.masking = PatchMasking(stem.img_size, 32, stem.patch_size[0]) if masking is None else masking
        self.generator = generator

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            batch: ``images`` [B, C, H, W] as the model takes them; optionally ``mask`` [B, L] bool, instead of one of
                our own.

        Returns:
            ``loss`` (0-d, differentiable); ``pred`` detached, the ``mask`` and the ``images``, which ``metrics`` reads.
        """
        images = batch["images"]
        mask = batch["mask"] if "mask" in batch else self.masking(len(images), self.generator)
        mask = mask.to(images.device)
        loss, pred = self.model(images, mask)
        return {"loss": loss, "pred": pred.detach(), "mask": mask, "images": images}

    def after_step(self) -> None:
        """Nothing moves but what the optimizer moves."""

    @torch.no_grad()
    def metrics(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """Numbers worth logging now and then.

        ``hidden`` is the share of the patches that was hidden. ``explained`` is 1 minus the loss over that of the best
        single colour, the median of the hidden pixels: 0 for a model that paints it, 1 for one that paints the image.
        """
        pixels, mask = self.model.target(outputs["images"]).float(), outputs["mask"]
        stem = self.model.patch_embed
        rows, columns = stem.feat_size(pixels.shape[2:])
        mask = mask.bool().view(-1, rows, columns)
        p = stem.patch_size[0]
        where = mask.repeat_interleave(p, 1).repeat_interleave(p, 2)  # [B, H, W]
        hidden = pixels.movedim(1, 0)[:, where]  # [C, pixels]
        explained = float("nan")
        if hidden.numel():
            deviation = float((hidden - hidden.median(dim=1, keepdim=True).values).abs().mean())
            explained = 1.0 - float(outputs["loss"]) / deviation if deviation > 0.0 else float("nan")
        return {"hidden": float(mask.float().mean()), "explained": explained}
