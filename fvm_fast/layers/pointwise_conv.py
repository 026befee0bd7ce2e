# SPDX-License-Identifier: Apache-2.0
"""A 1 x 1 convolution that is applied as what it is: one Linear for every place."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class PointwiseConv(nn.Conv2d):
    """``nn.Linear`` over the last dimension, with the weight of a 1 x 1 convolution, [out, in, 1, 1].

    Checkpoints of some models store their Linears so; with channels in the last dimension no layout has to change.

    Args:
        in_features, out_features: channels before and after.
        bias: whether there is one.
        **factory: ``device`` and ``dtype``.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **factory: Any) -> None:
        super().__init__(in_features, out_features, kernel_size=1, bias=bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return F.linear(x, self.weight.flatten(1), self.bias)
