# SPDX-License-Identifier: Apache-2.0
"""Self-attention over a whole image that knows how far apart two patches are, and the transformer block around it.

    attention(x) = softmax(q k^T / sqrt(head_dim) + B) v,   q = W_q x + b_q,   k = W_k x,   v = W_v x + b_v

``B[head, i, j]`` is read from a table by the offset of patch i from patch j. Three more rows are for the class token:
as query, as key, as both. The key has no bias: it would add the same number to a whole row of the softmax. A table
belongs to one block, or one table to all of them.

BEiT: BERT Pre-Training of Image Transformers, https://arxiv.org/abs/2106.08254
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvm_fast.layers.drop_path import DropPath
from fvm_fast.layers.mlp import Mlp
from fvm_fast.layers.relative_position import Window, relative_position_index, resize_relative_position_bias

CLASS_TOKEN_ROWS = 3  # class token to patch, patch to class token, class token to itself


def relative_position_rows(window: Window) -> int:
    """Rows of a table for a grid of (rows, columns) patches and the class token."""
    return (2 * window[0] - 1) * (2 * window[1] - 1) + CLASS_TOKEN_ROWS


def relative_position_index_with_class_token(window: Window) -> Tensor:
    """[1 + N, 1 + N] int64: the row of the table for each query and key; the class token is number 0."""
    rows = relative_position_rows(window)
    index = F.pad(relative_position_index(window), (1, 0, 1, 0))
    index[0, 1:] = rows - 3
    index[1:, 0] = rows - 2
    index[0, 0] = rows - 1
    return index


def resize_relative_position_table(table: Tensor, new_window: Window, *, old_window: Window | None = None) -> Tensor:
    """Carries a table to another grid by BEiT's geometric rule; the rows of the class token stay as they are.

    Args:
        table: [(2h - 1)(2w - 1) + 3, heads].
        new_window: (rows, columns) wanted.
        old_window: (h, w) given; a square when None.
    """
    patches, class_token = table[:-CLASS_TOKEN_ROWS], table[-CLASS_TOKEN_ROWS:]
    return torch.cat([resize_relative_position_bias(patches, new_window, old_window=old_window), class_token])


class RelativePositionBias(nn.Module):
    """The bias of every query and key, read from a learned table that begins at zero.

    Args:
        window_size: (rows, columns) of the grid of patches.
        num_heads: number of attention heads.
    """

    def __init__(self, window_size: Window, num_heads: int) -> None:
        super().__init__()
        self.window_size = tuple(window_size)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(relative_position_rows(window_size), num_heads))
        index = relative_position_index_with_class_token(self.window_size)
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self) -> Tensor:
        """[num_heads, 1 + N, 1 + N]."""
        return _read_bias(self.relative_position_bias_table, self.relative_position_index)

    def set_window_size(self, window_size: Window) -> None:
        """Takes another grid of patches from now on; the table is resized."""
        _resize_in_place(self, window_size)


class RelativePositionAttention(nn.Module):
    """Multi-head self-attention with a bias by relative position and biases of query and value.

    Args:
        dim: width of a token, a multiple of ``num_heads``.
        num_heads: number of heads.
        qkv_bias: whether query and value have a bias.
        attn_drop, proj_drop: dropout of the attention probabilities and of the result.
        window_size: (rows, columns) of the patches, for a table of its own; None for none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_size: Window | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim should be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.window_size = None if window_size is None else tuple(window_size)
        table, index = None, None
        if self.window_size is not None:
            table = nn.Parameter(torch.zeros(relative_position_rows(self.window_size), num_heads))
            index = relative_position_index_with_class_token(self.window_size)
        self.relative_position_bias_table = table
        self.register_buffer("relative_position_index", index, persistent=False)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Mixes the tokens.

        Args:
            x: [B, 1 + N, D], the class token first.
            shared_rel_pos_bias: [num_heads, 1 + N, 1 + N], added to that of the own table.

        Returns:
            [B, 1 + N, D].
        """
        B, N, D = x.shape
        qkv = F.linear(x, self.qkv.weight, self._qkv_bias()).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, num_heads, N, head_dim]
        bias = self._bias(shared_rel_pos_bias)
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype)[None], dropout)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, D)))

    def set_window_size(self, window_size: Window) -> None:
        """Takes another grid of patches from now on; the table, if there is one, is resized."""
        if self.window_size is not None:
            _resize_in_place(self, window_size)

    def _qkv_bias(self) -> Tensor | None:
        if self.q_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def _bias(self, shared: Tensor | None) -> Tensor | None:
        if self.relative_position_bias_table is None:
            return shared
        own = _read_bias(self.relative_position_bias_table, self.relative_position_index)
        return own if shared is None else own + shared


class RelativePositionBlock(nn.Module):
    """``x + gamma_1 attn(norm1(x))``, then ``x + gamma_2 mlp(norm2(x))``; each branch may be dropped.

    Args:
        dim: width of a token.
        num_heads: number of attention heads.
        mlp_ratio: hidden width of the MLP over ``dim``.
        qkv_bias, attn_drop, window_size: see ``RelativePositionAttention``.
        proj_drop: dropout of both branches' results.
        drop_path: probability of skipping a branch for a sample.
        init_values: initial LayerScale; None leaves LayerScale out.
        act_layer, norm_layer: activation (name or class) and norm constructor.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float | None = None,
        act_layer: str | Callable[[], nn.Module] | None = None,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        window_size: Window | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = RelativePositionAttention(dim, num_heads, qkv_bias, attn_drop, proj_drop, window_size)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

        # bare parameters, since checkpoints call them so; layers.LayerScale would be ls1.gamma
        self.gamma_1 = nn.Parameter(torch.full((dim,), float(init_values))) if init_values else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), float(init_values))) if init_values else None

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """[B, 1 + N, D] -> [B, 1 + N, D]; the bias is ``RelativePositionAttention``'s."""
        x = x + self.drop_path1(_scaled(self.attn(self.norm1(x), shared_rel_pos_bias), self.gamma_1))
        return x + self.drop_path2(_scaled(self.mlp(self.norm2(x)), self.gamma_2))


@torch.no_grad()
def rescale_blocks(blocks: nn.Sequential, first: int = 1) -> None:
    """Divides the last weights of both branches of block l by sqrt(2 l), where the first block has number ``first``."""
    for number, block in enumerate(blocks, start=first):
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.div_(math.sqrt(2.0 * number))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma


def _read_bias(table: Tensor, index: Tensor) -> Tensor:
    """table [rows, heads] and index [N, N] -> [heads, N, N]."""
    return F.embedding(index, table).permute(2, 0, 1)


def _resize_in_place(module: nn.Module, window_size: Window) -> None:
    """Gives a module with a table and an index those of another grid."""
    table, window_size = module.relative_position_bias_table, tuple(window_size)
    with torch.no_grad():
        resized = resize_relative_position_table(table, window_size, old_window=module.window_size)
    module.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
    module.relative_position_index = relative_position_index_with_class_token(window_size).to(table.device)
    module.window_size = window_size
