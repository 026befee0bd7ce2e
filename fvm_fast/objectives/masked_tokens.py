# SPDX-License-Identifier: Apache-2.0
"""Masked token prediction: say which visual token each hidden patch of an image would have been; no labels.

``loss = mean over hidden patches i of -log p(token_i | image without the hidden patches)``, where a frozen tokenizer
gives the tokens of the whole image.
Paper: BEiT: BERT Pre-Training of Image Transformers (Bao et al., 2022, arXiv:2106.08254), equation 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from fvm_fast.data.block_masking import BlockMasking


class MaskedTokenPrediction(nn.Module):
    """Train ``model`` to predict a frozen tokenizer's tokens of the patches that it does not see.

    The tokenizer is set to evaluation mode and its parameters to ``requires_grad=False``, for good. It is no submodule:
    ``parameters()``, ``state_dict()`` and ``train()`` leave it out (a checkpoint holds what was learned; who resumes
    gives the tokenizer again), while ``to()``, ``cuda()`` and ``double()`` move and cast it too.

    Args:
        model: maps ``(images, ids_masked=[B, K])`` to logits [B, K, vocab_size], or to two such, BEiT v2's two
            predictions, whose losses are added; and has ``patch_embed.grid_size``.
        tokenizer: has ``get_codebook_indices(images)`` -> [B, rows, columns] int64, one token a patch.
        masking: maps ``(batch, generator)`` to masks [batch, L] bool, all with as many patches hidden; None is the
            paper's, 75 of 196 in blocks.
        tokenizer_transform: maps the model's images to the tokenizer's, where the batch has no ``token_images``.
        generator: source of the masks, on the CPU; torch's default if None.
    """

    tokenizer: nn.Module

    def __init__(
        self,
        model: nn.Module,
        tokenizer: nn.Module,
        *,
        masking: Callable[[int, Generator | None], Tensor] | None = None,
        tokenizer_transform: Callable[[Tensor], Tensor] | None = None,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        if tokenizer is model:
            raise ValueError("MaskedTokenPrediction: the tokenizer should be another network than the model")
        self.model = model
        object.__setattr__(self, "tokenizer", tokenizer.eval().requires_grad_(False))  # past nn.Module: no submodule
        self.masking = BlockMasking(model.patch_embed.grid_size) if masking is None else masking
        self.tokenizer_transform = tokenizer_transform
        self.generator = generator

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedTokenPrediction:
        """What ``to()`` and its like are made of."""
        self.tokenizer._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            batch: ``images`` [B, C, H, W] as the model takes them; optionally ``token_images``, the same pictures as
                the tokenizer takes them, and ``mask`` [B, L] bool, instead of masks of our own.

        Returns:
            ``loss`` (0-d, differentiable, at least float32); detached, ``logits`` [B, K, vocab_size] and ``tokens``
            [B, K] of the hidden patches, and ``ids_masked`` [B, K], which they are.

        Raises:
            ValueError: a mask with unequal numbers, or another number of tokens than of patches.
        """
        images = batch["images"]
        mask = batch["mask"] if "mask" in batch else self.masking(len(images), self.generator)
        ids_masked = masked_ids(mask).to(images.device)
        tokens = self._tokens(batch, mask.shape[1]).gather(1, ids_masked)
        outputs = self.model(images, ids_masked=ids_masked)
        predictions = (outputs,) if isinstance(outputs, Tensor) else outputs
        loss = torch.stack([_cross_entropy(logits, tokens) for logits in predictions]).sum()
        return {"loss": loss, "logits": predictions[0].detach(), "tokens": tokens, "ids_masked": ids_masked}

    @torch.no_grad()
    def _tokens(self, batch: dict[str, Tensor], patches: int) -> Tensor:
        """The tokens of all patches [B, L]."""
        images = batch.get("token_images")
        if images is None:
            images = batch["images"]
            images = images if self.tokenizer_transform is None else self.tokenizer_transform(images)
        tokens = self.tokenizer.get_codebook_indices(images).flatten(1)
        if tokens.shape[1] != patches:
            raise ValueError(
                f"MaskedTokenPrediction: the tokenizer should give {patches} tokens, one a patch, got "
                f"{tokens.shape[1]} for images of {images.shape[2]} x {images.shape[3]}; give it images of another "
                "size as token_images"
            )
        return tokens

    def after_step(self) -> None:
        """Nothing moves but what the optimizer moves."""

    @staticmethod
    @torch.no_grad()
    def metrics(outputs: dict[str, Tensor]) -> dict[str, float]:
        """Share of the hidden patches whose token is predicted right, and of those that have the commonest token."""
        tokens = outputs["tokens"].flatten()
        if not tokens.numel():
            return {"accuracy": float("nan"), "commonest": float("nan")}
        hits = outputs["logits"].flatten(0, 1).argmax(dim=1) == tokens
        return {"accuracy": float(hits.float().mean()), "commonest": int(tokens.bincount().max()) / len(tokens)}


def _cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean over [B, K], at least in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def masked_ids(mask: Tensor) -> Tensor:
    """A mask [B, L] bool whose rows hide as many patches each -> their numbers [B, K] int64, in order.

    Raises:
        ValueError: the rows differ.
    """
    counts = mask.sum(dim=1).unique().tolist()
    if len(counts) > 1:
        raise ValueError(f"mask should hide as many patches of every image, got {counts[0]} to {counts[-1]}")
    return mask.nonzero()[:, 1].view(len(mask), counts[0] if counts else 0)
