# SPDX-License-Identifier: Apache-2.0
"""LayerScale: a learned gain per channel on each residual branch (CaiT, https://arxiv.org/abs/2103.17239)."""

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """``x * gamma``, with gamma [dim] starting at ``init_values``: near zero, a deep network begins as the identity."""

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return x * self.gamma
