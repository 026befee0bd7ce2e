# SPDX-License-Identifier: Apache-2.0
"""Global Response Normalization: channels compete over the whole map.

Of a map x [H, W, C], the norm of each channel over all places says how strongly it responds,

    g_c = ||x_c||,    n_c = g_c / mean(g),    y_c = x_c + weight_c * (x_c * n_c) + bias_c

and a channel that responds more than its neighbours is amplified. weight and bias start at zero, so the layer starts as
the identity.

ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders, https://arxiv.org/abs/2301.00808, section 3.2
"""

import torch
from torch import Tensor, nn


class GlobalResponseNorm(nn.Module):
    """``x * (1 + weight * n(x)) + bias`` on maps with channels last.

    Args:
        dim: channels.
        eps: added to the mean response.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, H, W, dim]."""
        wide = torch.promote_types(x.dtype, torch.float32)  # a bfloat16 sum of squares over a map would lose its tail
        response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide)  # [B, 1, 1, dim]
        response = response / (response.mean(dim=-1, keepdim=True) + self.eps)
        gain = 1 + self.weight * response
        return torch.addcmul(self.bias.to(x.dtype), x, gain.to(x.dtype))
