# SPDX-License-Identifier: Apache-2.0
"""Batch number ``step``: pairs from the sampler, one caption each, augmented images, tokens."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fvm_fast.data.sampler import ConceptSampler, generator_for

CAPTION_STREAM, IMAGE_STREAM = 1, 2


def choose_captions(captions: Sequence[Sequence[str]], label_share: float, generator: torch.Generator) -> list[str]:
    """One text for each pair: its first with probability ``label_share``, else one of the others if there are any."""
    draws = torch.rand(len(captions), 2, generator=generator, dtype=torch.float64).tolist()
    texts = []
    for choices, (keep, which) in zip(captions, draws, strict=True):
        first = len(choices) == 1 or keep < label_share
        texts.append(choices[0] if first else choices[1 + int(which * (len(choices) - 1))])
    return texts


class PairLoader:
    """Endless batches ``{"images", "tokens", "concepts"}``, each a pure function of the seed and its number.

    Args:
        pairs: map-style data set of ``Sample(image, captions, concept)``; one with all its images in memory
            (``.images``, ``.captions``, ``.concepts``) is indexed at once, others go through worker processes.
        sampler: gives the indices of batch ``step``, over all processes together.
        transform: maps uint8 images ``[n, C, S, S]`` and a generator to what the model takes.
        tokenizer: maps a list of texts to ``[n, context_length]``.
        label_share: probability that a pair's first caption is used.
        seed: of captions and augmentation.
        rank, world_size: this process takes its share of every batch.
        workers: loader processes.
    """

    def __init__(
        self,
        pairs: Any,
        sampler: ConceptSampler,
        transform: Callable[[Tensor, torch.Generator], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        *,
        label_share: float = 1.0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ) -> None:
        if sampler.batch_size % world_size:
            raise ValueError(
                f"optimizer.batch_size should be a multiple of the {world_size} processes, got {sampler.batch_size}"
            )
        self.pairs = pairs
        self.sampler = sampler
        self.transform = transform
        self.tokenizer = tokenizer
        self.label_share = label_share
        self.seed = seed
        self.rank = rank
        self.local_size = sampler.batch_size // world_size
        self.workers = workers

    def batches(self, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Batches number ``start``, ``start + 1``, ... without end."""
        order = _Order(self, start)
        if hasattr(self.pairs, "images"):
            raw = map(self._from_memory, order)
        else:
            options = {
                "num_workers": self.workers,
                "collate_fn": _collate,
                "worker_init_fn": _leave_ctrl_c_to_the_parent,
            }
            raw = iter(DataLoader(self.pairs, batch_sampler=order, **options))
        for step, (images, captions, concepts) in enumerate(raw, start):
            texts = choose_captions(
                captions, self.label_share, generator_for(self.seed, step, CAPTION_STREAM, self.rank)
            )
            generator = generator_for(self.seed, step, IMAGE_STREAM, self.rank)
            yield {
                "images": self.transform(images, generator),
                "tokens": self.tokenizer(texts),
                "concepts": concepts,
            }

    def indices(self, step: int) -> list[int]:
        """This process's share of batch ``step``."""
        return self.sampler.batch(step)[self.rank * self.local_size : (self.rank + 1) * self.local_size].tolist()

    def _from_memory(self, indices: list[int]) -> tuple[Tensor, list[Sequence[str]], Tensor]:
        concepts = torch.as_tensor(self.pairs.concepts)[indices]
        return self.pairs.images[indices], [self.pairs.captions[index] for index in indices], concepts


class _Order:
    """The index lists of batches ``start``, ``start + 1``, ...: what a DataLoader calls a batch sampler."""

    def __init__(self, loader: PairLoader, start: int) -> None:
        self.loader = loader
        self.start = start

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start
        while True:
            yield self.loader.indices(step)
            step += 1


def _leave_ctrl_c_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collate(samples: list[Any]) -> tuple[Tensor, list[Sequence[str]], Tensor]:
    images = torch.stack([sample.image for sample in samples])
    return images, [sample.captions for sample in samples], torch.tensor([sample.concept for sample in samples])
