# SPDX-License-Identifier: Apache-2.0
"""Block-wise masks: neighbouring patches are hidden together, so that an image cannot be filled in from next door.

Rectangles of random area and aspect ratio are masked until enough patches are (BEiT, https://arxiv.org/abs/2106.08254,
algorithm 1). The last few may be single patches, so that every image of a batch hides exactly as many.
"""

import math
import random

import torch
from torch import Generator, Tensor


class BlockMasking:
    """Draws masks of ``num_masked`` patches each, deterministic under a generator.

    Args:
        grid: (rows, columns) of patches.
        num_masked: patches to hide; None is the paper's share, 75 of 196.
        min_block: least number of patches of a block.
        max_block: greatest; None is ``num_masked``.
        min_aspect: least height over width of a block; the greatest is its inverse.
        attempts: rectangles tried for one block before single patches make up the number.

    Raises:
        ValueError: numbers that no mask can have.
    """

    def __init__(
        self,
        grid: tuple[int, int] = (14, 14),
        num_masked: int | None = None,
        *,
        min_block: int = 16,
        max_block: int | None = None,
        min_aspect: float = 0.3,
        attempts: int = 10,
    ) -> None:
        self.grid = (int(grid[0]), int(grid[1]))
        patches = self.grid[0] * self.grid[1]
        self.num_masked = round(patches * 75 / 196) if num_masked is None else num_masked
        self.min_block = min_block
        self.max_block = self.num_masked if max_block is None else max_block
        self.min_aspect = min_aspect
        self.attempts = attempts
        if not 0 <= self.num_masked <= patches:
            raise ValueError(f"num_masked should be 0 to {patches} for a grid of {grid}, got {num_masked}")
        if not 0.0 < min_aspect <= 1.0:
            raise ValueError(f"min_aspect should be in (0, 1], got {min_aspect}")
        if min_block < 1 or self.max_block < 0:
            raise ValueError(f"min_block should be at least 1 and max_block not negative, got {min_block}, {max_block}")

    def __call__(self, batch: int, generator: Generator | None = None) -> Tensor:
        """``batch`` masks [batch, rows * columns] bool on the CPU, true where hidden; one draw for each."""
        # thousands of numbers are needed one by one, for which Python's own source is many times faster than torch's
        seeds = torch.randint(2**62, (batch,), generator=generator, dtype=torch.int64).tolist()
        masks = [list(self._mask(random.Random(seed))) for seed in seeds]
        return torch.tensor(masks, dtype=torch.bool).view(batch, self.grid[0] * self.grid[1])

    def _mask(self, rng: random.Random) -> bytearray:
        mask, hidden = bytearray(self.grid[0] * self.grid[1]), 0
        while hidden < self.num_masked:
            added = self._add_block(mask, min(self.num_masked - hidden, self.max_block), rng)
            if added == 0:
                self._add_patches(mask, self.num_masked - hidden, rng)
                break
            hidden += added
        return mask

    def _add_block(self, mask: bytearray, most: int, rng: random.Random) -> int:
        """Hides a rectangle that hides 1 to ``most`` patches more; returns how many, 0 if none was found."""
        rows, columns = self.grid
        for _ in range(self.attempts):
            area = rng.uniform(self.min_block, most)
            aspect = math.exp(rng.uniform(math.log(self.min_aspect), -math.log(self.min_aspect)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height < rows and 0 < width < columns):
                continue
            top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
            starts = range(top * columns + left, (top + height) * columns, columns)
            added = height * width - sum(sum(mask[start : start + width]) for start in starts)
            if 0 < added <= most:
                for start in starts:
                    mask[start : start + width] = b"\1" * width
                return added
        return 0

    @staticmethod
    def _add_patches(mask: bytearray, count: int, rng: random.Random) -> None:
        for place in rng.sample([i for i, hidden in enumerate(mask) if not hidden], count):
            mask[place] = 1
