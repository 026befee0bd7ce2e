# SPDX-License-Identifier: Apache-2.0
"""TinyViT's transformer block, on maps [B, H, W, C].

    x = x + proj(attention in windows(norm(x)))
    x = bn(dwconv3x3(x))                                no residual around it
    x = x + fc2(gelu(fc1(norm(x))))

Windows are not shifted: it is the convolution that carries information from one to the next.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fvm_fast import ops
from fvm_fast.layers.attention_bias import attention_bias_index, resize_attention_biases
from fvm_fast.layers.drop_path import DropPath
from fvm_fast.models.knowledge_distillation.tinyvit.convolution import ConvNorm


class Attention(nn.Module):
    """Self-attention within windows, after a norm of its own, with a bias for each distance (|dy|, |dx|).

    Args:
        dim: channels, a multiple of ``num_heads``.
        num_heads: number of heads.
        window_size: side of a window.
        norm_eps: epsilon of the norm.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, norm_eps: float = 1e-5) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dims should be multiples of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim)  # head by head: q, k and v of the first, of the second, ...
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window_size**2))
        self._set_window(window_size)

    def _set_window(self, window_size: int) -> None:
        self.window_size = window_size
        index = attention_bias_index(window_size).to(self.attention_biases.device)
        self.register_buffer("attention_bias_idxs", index, persistent=False)

    def set_window_size(self, window_size: int, rule: str = "timm") -> None:
        """Attends within windows of another side from now on; the biases are resized by ``rule``."""
        with torch.no_grad():
            resized = resize_attention_biases(self.attention_biases, window_size, rule)
        self.attention_biases = nn.Parameter(resized, requires_grad=self.attention_biases.requires_grad)
        self._set_window(window_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, H, W, dim]; a map that the windows do not divide is padded at the bottom and right."""
        N = self.window_size**2
        bias = self.attention_biases.index_select(1, self.attention_bias_idxs.flatten()).view(self.num_heads, N, N)
        divided = x.shape[1] % self.window_size == 0 and x.shape[2] % self.window_size == 0
        # The zeros that pad a map are normed and projected with it: norm(0) is the norm's bias.
        pad_qkv = None if divided else self.qkv(self.norm.bias)
        x = ops.window_attention(
            self.qkv(self.norm(x)),
            bias,
            num_heads=self.num_heads,
            window_size=self.window_size,
            pad_qkv=pad_qkv,
            qkv_layout="h3d",
        )
        return self.proj(x)


class NormMlp(nn.Module):
    """``fc2(act(fc1(norm(x))))`` on every place by itself.

    Args:
        dim, hidden_dim: channels outside and inside.
        act_layer: activation.
        drop: dropout after the activation and after ``fc2``.
        norm_eps: epsilon of the norm.
    """

    def __init__(
        self, dim: int, hidden_dim: int, act_layer: Callable[[], nn.Module], drop: float = 0.0, norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        x = self.drop1(self.act(self.fc1(self.norm(x))))
        return self.drop2(self.fc2(x))


class TinyVitBlock(nn.Module):
    """Attention in windows, a depthwise convolution, an MLP.

    Args:
        dim, num_heads, window_size, norm_eps: see ``Attention``.
        mlp_ratio: hidden width of the MLP over ``dim``.
        drop: dropout of the MLP.
        drop_path: probability of skipping attention, or MLP, for a sample.
        local_conv_size: kernel of the convolution.
        act_layer: activation of the MLP.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        local_conv_size: int = 3,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads, window_size, norm_eps)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.mlp = NormMlp(dim, int(dim * mlp_ratio), act_layer, drop, norm_eps)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.local_conv = ConvNorm(dim, dim, local_conv_size, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, H, W, dim]."""
        x = x + self.drop_path1(self.attn(x))
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path2(self.mlp(x))
