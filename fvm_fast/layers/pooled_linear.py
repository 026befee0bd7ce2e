# SPDX-License-Identifier: Apache-2.0
"""A classifier over a map: pooling, dropout, Linear."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def _avg(x: Tensor) -> Tensor:
    return x.mean(dim=(1, 2))


def _max(x: Tensor) -> Tensor:
    return x.amax(dim=(1, 2))


_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": _avg,
    "max": _max,
    "avgmax": lambda x: 0.5 * (_avg(x) + _max(x)),
    "catavgmax": lambda x: torch.cat([_avg(x), _max(x)], dim=1),
    "": lambda x: x,
}


class PooledLinear(nn.Module):
    """``fc(drop(pool(x)))``; without pooling every place of the map is classified.

    Args:
        in_features: channels of the map.
        num_classes: width of the result; 0 leaves ``fc`` out.
        pool_type: ``avg``, ``max``, ``avgmax`` (their mean), ``catavgmax`` (side by side), or ``""``.
        drop_rate: dropout before ``fc``.
    """

    def __init__(self, in_features: int, num_classes: int, pool_type: str = "avg", drop_rate: float = 0.0) -> None:
        super().__init__()
        self.drop = nn.Dropout(drop_rate)
        self.in_features = in_features
        self.reset(num_classes, pool_type)

    @property
    def num_features(self) -> int:
        """Width of the pooled features."""
        return self.in_features * (2 if self.pool_type == "catavgmax" else 1)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, H, W, C] -> [B, num_classes], or the pooled features; H and W stay where there is no pooling."""
        x = self.drop(_POOLS[self.pool_type](x))
        return x if pre_logits else self.fc(x)

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        *,
        in_features: int | None = None,
        like: Tensor | None = None,
    ) -> None:
        """A fresh ``fc``, of the device and dtype of ``like``; other pooling and channels where they are given."""
        pool_type = self.pool_type if pool_type is None else pool_type
        if pool_type not in _POOLS:
            raise ValueError(f"global_pool should be one of {', '.join(map(repr, _POOLS))}, got {pool_type!r}")
        self.pool_type = pool_type
        self.in_features = in_features or self.in_features
        factory = {} if like is None else {"device": like.device, "dtype": like.dtype}
        self.fc = nn.Linear(self.num_features, num_classes, **factory) if num_classes > 0 else nn.Identity()
