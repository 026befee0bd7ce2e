# SPDX-License-Identifier: Apache-2.0
"""The pre-norm transformer of CLIP (https://arxiv.org/abs/2103.00020), with OpenAI's and open_clip's parameter names.

Each block computes ``x + attn(ln_1(x))`` and then ``x + mlp(ln_2(x))``. CLIP reads one token of the last block only, so
`Transformer` can be told which (``pool``): that block then projects a single query per sequence, and its output
projection and MLP run on [B, D] instead of [B, N, D]. The pooled values and all gradients are those of the full block.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``: the GELU approximation with which OpenAI's weights were trained."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to a tensor of any shape."""
        return x * torch.sigmoid(1.702 * x)


def take_token(x: Tensor, token: int | Tensor) -> Tensor:
    """One token of each sequence: x [B, N, D], token an index or one index per row [B] -> [B, D]."""
    if isinstance(token, int):
        return x[:, token]
    return x[torch.arange(len(x), device=x.device), token]


class MultiHeadSelfAttention(nn.Module):
    """Self-attention with the parameters, names and initialisation of ``nn.MultiheadAttention``.

    Args:
        dim: width of a token, a multiple of ``num_heads``.
        num_heads: number of heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"attention: the width should be a multiple of the number of heads, got {dim} and {num_heads}"
            )
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, is_causal: bool = False) -> Tensor:
        """Attend over all tokens: [B, N, D] -> [B, N, D]."""
        q, k, v = self._split_heads(F.linear(x, self.in_proj_weight, self.in_proj_bias), 3)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)  # (B, h, N, d)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def forward_token(self, x: Tensor, token: int | Tensor, is_causal: bool = False) -> Tensor:
        """The rows ``token`` of `forward`: [B, N, D] -> [B, D], with one query per sequence."""
        dim = x.shape[-1]
        q_weight, kv_weight = self.in_proj_weight.split([dim, 2 * dim])
        q_bias, kv_bias = self.in_proj_bias.split([dim, 2 * dim])
        (q,) = self._split_heads(F.linear(take_token(x, token), q_weight, q_bias).unsqueeze(1), 1)  # (B, h, 1, d)
        k, v = self._split_heads(F.linear(x, kv_weight, kv_bias), 2)  # (B, h, N, d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=_visible(x, token) if is_causal else None)
        return self.out_proj(y.flatten(1))

    def _split_heads(self, packed: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[B, N, parts * D] -> ``parts`` views [B, h, N, d]; the gradient comes back packed in a single pass."""
        return tuple(p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in packed.chunk(parts, dim=-1))


def _visible(x: Tensor, token: int | Tensor) -> Tensor:
    """The keys that query ``token`` of each row may see in causal attention: bool [B or 1, 1, 1, N]."""
    last = torch.as_tensor(token, device=x.device).view(-1, 1, 1, 1)
    return torch.arange(x.shape[1], device=x.device) <= last


class ResidualAttentionBlock(nn.Module):
    """One pre-norm block: attention, then a two-layer MLP, each added to the residual stream.

    Args:
        d_model: width of a token.
        n_head: number of attention heads.
        mlp_ratio: hidden width of the MLP over ``d_model``; the product is rounded down.
        act_layer: activation module, ``nn.GELU`` or `QuickGELU`.
        norm_eps: epsilon of both LayerNorms.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        mlp_ratio: float = 4.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        hidden = int(d_model * mlp_ratio)
        self.ln_1 = nn.LayerNorm(d_model, eps=norm_eps)
        self.attn = MultiHeadSelfAttention(d_model, n_head)
        self.ln_2 = nn.LayerNorm(d_model, eps=norm_eps)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(d_model, hidden), gelu=act_layer(), c_proj=nn.Linear(hidden, d_model))
        )

    def forward(self, x: Tensor, is_causal: bool = False, pool: int | Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D], or [B, D] when ``pool`` names the only token of each row that is wanted."""
        if pool is None:
            x = x + self.attn(self.ln_1(x), is_causal)
        else:
            x = take_token(x, pool) + self.attn.forward_token(self.ln_1(x), pool, is_causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of `ResidualAttentionBlock`.

    Args:
        width: width of a token.
        layers: number of blocks, at least one.
        heads: number of attention heads.
        mlp_ratio, act_layer, norm_eps: as in `ResidualAttentionBlock`.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"transformer: at least one layer is needed, got {layers}")
        self.width = width
        self.layers = layers
        self.grad_checkpointing = False
        blocks = [ResidualAttentionBlock(width, heads, mlp_ratio, act_layer, norm_eps) for _ in range(layers)]
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, is_causal: bool = False, pool: int | Tensor | None = None) -> Tensor:
        """Run all blocks.

        Args:
            x: tokens [B, N, D].
            is_causal: a token sees itself and those before it.
            pool: None for all tokens; an index, or one index per row [B], for that token of the last block only.

        Returns:
            [B, N, D], or [B, D] with ``pool``.
        """
        *blocks, last = self.resblocks
        for block in blocks:
            x = self._run(block, x, is_causal)
        return self._run(last, x, is_causal, pool)

    def intermediates(self, x: Tensor, is_causal: bool = False) -> list[Tensor]:
        """The output [B, N, D] of every block, first to last."""
        outputs = []
        for block in self.resblocks:
            x = self._run(block, x, is_causal)
            outputs.append(x)
        return outputs

    def _run(self, block: nn.Module, *args: Tensor | int | bool | None) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)
