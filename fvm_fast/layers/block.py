# SPDX-License-Identifier: Apache-2.0
"""The pre-norm transformer block of ViT (https://arxiv.org/abs/2010.11929, equations 2 and 3)."""

from collections.abc import Callable

from torch import Tensor, nn

from fvm_fast.layers.attention import Attention
from fvm_fast.layers.drop_path import DropPath
from fvm_fast.layers.layer_scale import LayerScale
from fvm_fast.layers.mlp import Mlp


class Block(nn.Module):
    """``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``; each branch optionally scaled and dropped.

    Args:
        dim: width of a token.
        num_heads: number of attention heads.
        mlp_ratio: hidden width of the MLP over ``dim``.
        qkv_bias, qk_norm, proj_bias, attn_drop: see ``Attention``; ``proj_bias`` is the MLP's bias too.
        proj_drop: dropout of both branches' results.
        init_values: initial value of LayerScale; None leaves LayerScale out.
        drop_path: probability of skipping a branch for a sample.
        act_layer, norm_layer: activation (name or class) and norm constructor.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: str | Callable[[], nn.Module] | None = None,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop, norm_layer)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, bias=proj_bias, drop=proj_drop)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, D] -> [B, N, D]; the masks are ``Attention``'s."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask, is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
