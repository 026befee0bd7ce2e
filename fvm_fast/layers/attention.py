# SPDX-License-Identifier: Apache-2.0
"""Multi-head self-attention over all tokens (https://arxiv.org/abs/1706.03762)."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """``proj(softmax(q k^T / sqrt(head_dim)) v)`` with q, k and v from one fused Linear.

    Args:
        dim: width of a token, a multiple of ``num_heads``.
        num_heads: number of heads.
        qkv_bias, proj_bias: biases of the two Linears.
        qk_norm: normalise q and k over ``head_dim`` before their product (https://arxiv.org/abs/2302.05442).
        attn_drop, proj_drop: dropout of the attention probabilities and of the result.
        norm_layer: used by ``qk_norm``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim should be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Mixes the tokens.

        Args:
            x: [B, N, D].
            attn_mask: boolean (True attends) or additive, broadcast to [B, num_heads, N, N].
            is_causal: token i sees tokens 0..i only.

        Returns:
            [B, N, D].
        """
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, num_heads, N, head_dim]
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask, dropout, is_causal)
        x = x.transpose(1, 2).reshape(B, N, D)
        return self.proj_drop(self.proj(x))
