# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth: a residual branch is skipped for a random part of the batch (https://arxiv.org/abs/1603.09382)."""

from torch import Tensor, nn


class DropPath(nn.Module):
    """Zeroes the whole branch for each sample with probability ``drop_prob`` while training.

    Args:
        drop_prob: probability of dropping, in [0, 1).
        scale_by_keep: divide the kept samples by ``1 - drop_prob``, so that the expectation does not change.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"drop_path should be in [0, 1), got {drop_prob}")
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, ...]."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1.0 - self.drop_prob
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep_prob)
        return x * (keep / keep_prob if self.scale_by_keep else keep)

    def extra_repr(self) -> str:
        """The probability, for ``print(model)``."""
        return f"drop_prob={self.drop_prob:g}"
