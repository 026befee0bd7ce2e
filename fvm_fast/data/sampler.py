# SPDX-License-Identifier: Apache-2.0
"""Which pairs make up batch number ``step``: a pure function of the seed and the step, so a run resumes from a number.

In a contrastive batch two pictures of one concept would be taught to repel each other. The sampler therefore deals each
concept's pairs out like cards, to different batches: sort the pairs by (shuffled) concept and give pair ``i`` to batch
``i mod num_batches``. A concept's pairs are neighbours, so they land in different batches whenever there are no more of
them than batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def stream_seed(*words: int) -> int:
    """A 63-bit seed that is a pure, well mixed function of ``words`` (such as a seed, a step and a stream number)."""
    return int(np.random.SeedSequence([word & (2**63 - 1) for word in words]).generate_state(1, np.uint64)[0] >> 1)


def generator_for(*words: int) -> torch.Generator:
    """A fresh CPU generator seeded by :func:`stream_seed`."""
    return torch.Generator().manual_seed(stream_seed(*words))


class ConceptSampler:
    """Batches in which no concept occurs twice and, up to the remainder, each pair occurs once an epoch.

    Args:
        concepts: concept id of each pair, -1 where unknown (such a pair is a concept of its own).
        batch_size: pairs a batch (over all processes together).
        seed: another seed is another order.

    Raises:
        ValueError: fewer pairs than a batch, or a concept with more pairs than an epoch has batches.
    """

    def __init__(self, concepts: torch.Tensor | Sequence[int], batch_size: int, seed: int = 0) -> None:
        concepts = torch.as_tensor(concepts, dtype=torch.int64)
        if not 1 <= batch_size <= len(concepts):
            raise ValueError(
                f"sampler: batch_size should be between 1 and the number of pairs, {len(concepts)}, got {batch_size}"
            )
        own = -1 - torch.arange(len(concepts))
        _, self._concepts, counts = torch.where(concepts < 0, own, concepts).unique(
            return_inverse=True, return_counts=True
        )
        self.batch_size = batch_size
        self.num_batches = len(concepts) // batch_size
        self.seed = seed
        self._epoch: tuple[int, torch.Tensor] | None = None
        if int(counts.max()) > self.num_batches:
            raise ValueError(
                f"sampler: one concept has {int(counts.max())} pairs, and {self.num_batches} batches of {batch_size} "
                f"cannot hold them apart; use a batch size of at most {len(concepts) // int(counts.max())}, or "
                "data.unique_concepts=false"
            )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.num_batches

    def batch(self, step: int) -> torch.Tensor:
        """Indices ``[batch_size]`` int64 of the pairs in batch ``step`` = 0, 1, 2, ..."""
        epoch, position = divmod(step, self.num_batches)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._deal(epoch)
        return self._epoch[1][position]

    def _deal(self, epoch: int) -> torch.Tensor:
        """Indices ``[num_batches, batch_size]`` of one epoch."""
        generator = generator_for(self.seed, epoch, 0)
        concept_rank = torch.randperm(int(self._concepts.max()) + 1, generator=generator)
        pairs = torch.randperm(len(self._concepts), generator=generator)  # random order within a concept ...
        pairs = pairs[concept_rank[self._concepts[pairs]].argsort(stable=True)]  # ... and random order of concepts
        pairs = pairs[: self.num_batches * self.batch_size]
        batches = pairs.view(self.batch_size, self.num_batches).T
        return batches[torch.randperm(self.num_batches, generator=generator)].contiguous()


def shuffled_sampler(num_pairs: int, batch_size: int, seed: int = 0) -> ConceptSampler:
    """A sampler that knows no concepts: plain shuffling without replacement."""
    return ConceptSampler(torch.full((num_pairs,), -1), batch_size, seed)
