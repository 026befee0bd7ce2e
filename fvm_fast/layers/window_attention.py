# SPDX-License-Identifier: Apache-2.0
"""Self-attention within the windows of a map, with a bias by relative position: Swin's and Swin v2's.

A map goes in and a map comes out. Neither the shift nor the windows are ever laid out in memory:
``ops.window_attention`` reads the projected map where it is.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvm_fast import ops
from fvm_fast.layers.patch_embed import to_pair
from fvm_fast.layers.relative_position import (
    Window,
    log_spaced_coordinates,
    relative_position_index,
    resize_relative_position_bias,
)


def fit_window(window: Window, resolution: Window, shifted: bool, always_partition: bool) -> tuple[Window, Window]:
    """The window and the shift that a map gets.

    On an axis where the window covers the map it shrinks to the map and is not shifted; with ``always_partition`` it
    stays, and the map is padded. A shift is half a window.
    """
    shift = (window[0] // 2, window[1] // 2) if shifted else (0, 0)
    if always_partition:
        return window, shift
    covered = [side <= w for side, w in zip(resolution, window, strict=True)]
    window = tuple(side if c else w for side, w, c in zip(resolution, window, covered, strict=True))
    return window, tuple(0 if c else s for s, c in zip(shift, covered, strict=True))


class _WindowAttention(nn.Module):
    """What both kinds share: the geometry, the dropout and the call of the op."""

    def __init__(
        self,
        num_heads: int,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int],
        attn_drop: float,
        proj_drop: float,
        pad_order: str,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = to_pair(window_size)
        self.shift_size = to_pair(shift_size)
        self.pad_order = pad_order
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)
        self.register_buffer("relative_position_index", relative_position_index(self.window_size), persistent=False)

    def _attend(self, qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor | None, logit_scale: Tensor | None) -> Tensor:
        """[B, H, W, 3C] and a table [(2h - 1)(2w - 1), heads] of biases -> [B, H, W, C]."""
        bias = F.embedding(self.relative_position_index, bias_table).permute(2, 0, 1)  # [heads, N, N]
        dropout = self.attn_drop.p if self.training else 0.0
        return ops.window_attention(
            qkv,
            bias,
            num_heads=self.num_heads,
            window_size=self.window_size,
            shift_size=self.shift_size,
            logit_scale=logit_scale,
            pad_qkv=pad_qkv,
            pad_order=self.pad_order,
            dropout_p=dropout,
            seed=torch.randint(2**62, (), device=qkv.device) if dropout else None,
        )

    def _set_window(self, window_size: Window, shift_size: Window) -> None:
        self.window_size, self.shift_size = window_size, shift_size
        index = relative_position_index(window_size).to(self.relative_position_index.device)
        self.register_buffer("relative_position_index", index, persistent=False)

    def extra_repr(self) -> str:
        """Window and shift, for ``print(model)``."""
        return f"window_size={self.window_size}, shift_size={self.shift_size}"


class WindowAttention(_WindowAttention):
    """Swin's attention: ``softmax(q k^T / sqrt(head_dim) + bias) v`` in each window (equation 4 of the paper).

    Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, https://arxiv.org/abs/2103.14030

    Args:
        dim: channels of the map.
        num_heads: number of heads.
        head_dim: channels of a head; ``dim / num_heads`` if None.
        window_size, shift_size: side or (height, width); see ``ops.window_attention``.
        qkv_bias: whether q, k and v have biases.
        attn_drop, proj_drop: dropout of the attention weights and of the result.
        pad_order: ``roll_pad`` (timm) or ``pad_roll`` (torchvision, transformers), where windows do not divide a map.
        table_resize: the rule of ``resize_relative_position_bias`` when the window changes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        window_size: int | Sequence[int] = 7,
        shift_size: int | Sequence[int] = 0,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pad_order: str = "roll_pad",
        table_resize: str = "timm",
    ) -> None:
        super().__init__(num_heads, window_size, shift_size, attn_drop, proj_drop, pad_order)
        inner = (head_dim or _head_dim(dim, num_heads)) * num_heads
        height, width = self.window_size
        self.table_resize = table_resize
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * height - 1) * (2 * width - 1), num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias)
        self.proj = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, H, W, C] -> map [B, H, W, C]."""
        x = self._attend(self.qkv(x), self.relative_position_bias_table, self.qkv.bias, None)
        return self.proj_drop(self.proj(x))

    def set_window(self, window_size: Window, shift_size: Window) -> None:
        """Uses this window and shift, (height, width), from now on; the table of biases is resized."""
        old, table = self.window_size, self.relative_position_bias_table
        self._set_window(window_size, shift_size)
        if window_size == old:
            return
        with torch.no_grad():
            resized = resize_relative_position_bias(table, window_size, old_window=old, rule=self.table_resize)
        self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)


class WindowAttentionV2(_WindowAttention):
    """Swin v2's attention: ``softmax(cos(q, k) scale + 16 sigmoid(network(offset))) v`` in each window.

    Cosines with a learned scale of at most 100 stay bounded in models of any width; a small network of the log-spaced
    offset takes the place of the table, so that it answers for windows it was not trained with.

    Swin Transformer V2: Scaling Up Capacity and Resolution, https://arxiv.org/abs/2111.09883, section 3

    Args:
        dim: channels of the map, a multiple of ``num_heads``.
        num_heads: number of heads.
        window_size, shift_size: side or (height, width); see ``ops.window_attention``.
        qkv_bias: whether q and v have biases; k never has one.
        attn_drop, proj_drop: dropout of the attention weights and of the result.
        pretrained_window_size: the window by which offsets are scaled; the window itself where it is 0.
        pad_order: ``roll_pad`` (timm) or ``pad_roll`` (torchvision, transformers), where windows do not divide a map.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int] = 7,
        shift_size: int | Sequence[int] = 0,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pretrained_window_size: int | Sequence[int] = 0,
        pad_order: str = "roll_pad",
    ) -> None:
        super().__init__(num_heads, window_size, shift_size, attn_drop, proj_drop, pad_order)
        _head_dim(dim, num_heads)
        self.pretrained_window_size = to_pair(pretrained_window_size)
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.proj = nn.Linear(dim, dim)
        coordinates = log_spaced_coordinates(self.window_size, self.pretrained_window_size)
        self.register_buffer("relative_coords_table", coordinates, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, H, W, C] -> map [B, H, W, C]."""
        qkv_bias = self.qkv_bias()
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        logit_scale = self.logit_scale.clamp(max=math.log(100)).exp().flatten()
        bias_table = 16 * self.cpb_mlp(self.relative_coords_table).sigmoid().flatten(0, 2)
        return self.proj_drop(self.proj(self._attend(qkv, bias_table, qkv_bias, logit_scale)))

    def qkv_bias(self) -> Tensor | None:
        """[3C] with zeros for k, or None."""
        if self.q_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def set_window(self, window_size: Window, shift_size: Window) -> None:
        """Uses this window and shift, (height, width), from now on."""
        self._set_window(window_size, shift_size)
        coordinates = log_spaced_coordinates(window_size, self.pretrained_window_size).to(self.relative_coords_table)
        self.register_buffer("relative_coords_table", coordinates, persistent=False)


def _head_dim(dim: int, num_heads: int) -> int:
    if dim % num_heads:
        raise ValueError(f"the channels of a stage should be a multiple of its num_heads, got {dim} and {num_heads}")
    return dim // num_heads
