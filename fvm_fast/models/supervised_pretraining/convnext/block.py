# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt's block and stage.

    x = x + gamma * mlp(norm(dwconv7x7(x)))      mlp(x) = fc2(grn(gelu(fc1(x))))

A transformer block with the attention replaced by a depthwise convolution: the convolution mixes places, the MLP mixes
channels. Version 2 has the global response norm ``grn`` and no ``gamma``; version 1 the other way round.

A map is [B, C, H, W] in channels_last memory: the convolutions see that shape, norm and MLP the view [B, H, W, C] of
the same memory, and nothing is copied in between.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvm_fast.layers.activation import get_act_layer
from fvm_fast.layers.drop_path import DropPath
from fvm_fast.layers.global_response_norm import GlobalResponseNorm
from fvm_fast.layers.pointwise_conv import PointwiseConv


class ConvNeXtMlp(nn.Module):
    """``fc2(grn(act(fc1(x))))`` on every place; the norm, where there is one, looks over the whole map.

    Args:
        dim, hidden_dim: channels outside and inside.
        conv_mlp: store the weights as 1 x 1 convolutions, as timm's small sizes do.
        use_grn: whether there is a ``GlobalResponseNorm``.
        act_layer: activation, by name or class.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        conv_mlp: bool = False,
        use_grn: bool = False,
        act_layer: str | Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        linear = PointwiseConv if conv_mlp else nn.Linear
        self.fc1 = linear(dim, hidden_dim)
        self.act = get_act_layer(act_layer)()
        self.grn = GlobalResponseNorm(hidden_dim) if use_grn else nn.Identity()
        self.fc2 = linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, H, W, dim]."""
        return self.fc2(self.grn(self.act(self.fc1(x))))


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, MLP, layer scale, residual.

    Args:
        dim: channels.
        kernel_size, dilation: of the depthwise convolution; the kernel is odd.
        mlp_ratio: hidden width of the MLP over ``dim``.
        conv_mlp, use_grn, act_layer: see ``ConvNeXtMlp``.
        conv_bias: whether the convolution has a bias.
        ls_init_value: initial gain ``gamma`` of the branch; None leaves it out.
        norm_layer: constructor of a norm over the last dimension.
        drop_path: probability of skipping the branch for a sample.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        dilation: int = 1,
        mlp_ratio: float = 4.0,
        conv_mlp: bool = False,
        conv_bias: bool = True,
        use_grn: bool = False,
        ls_init_value: float | None = 1e-6,
        act_layer: str | Callable[[], nn.Module] | None = None,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_sizes should be odd, so that a map keeps its size, got {kernel_size}")
        padding = dilation * (kernel_size // 2)
        self.conv_dw = nn.Conv2d(dim, dim, kernel_size, padding=padding, dilation=dilation, groups=dim, bias=conv_bias)
        self.norm = norm_layer(dim)
        self.mlp = ConvNeXtMlp(dim, int(mlp_ratio * dim), conv_mlp, use_grn, act_layer)
        self.gamma = None if ls_init_value is None else nn.Parameter(torch.full((dim,), float(ls_init_value)))
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim, H, W] -> [B, dim, H, W]."""
        branch = self.conv_dw(x).permute(0, 2, 3, 1)  # [B, H, W, dim]
        branch = self.mlp(self.norm(branch))
        if self.gamma is not None:
            branch = branch * self.gamma
        return x + self.drop_path(branch.permute(0, 3, 1, 2))


class Downsample(nn.Sequential):
    """Norm, then a 2 x 2 convolution that halves the map; or, dilated, one that keeps its size.

    Args:
        in_dim, dim: channels before and after.
        stride: 2 halves, 1 keeps.
        dilation: of the convolution, for a stride of 1.
        bias: whether the convolution has one.
        norm_layer: constructor of a norm over the last dimension.
    """

    def __init__(
        self, in_dim: int, dim: int, stride: int, dilation: int, bias: bool, norm_layer: Callable[[int], nn.Module]
    ) -> None:
        super().__init__(norm_layer(in_dim), nn.Conv2d(in_dim, dim, 2, stride, dilation=dilation, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_dim, H, W] -> [B, dim, H / stride, W / stride], rounded down."""
        norm, conv = self
        x = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if conv.stride[0] == 1:
            before = conv.dilation[0] // 2
            after = conv.dilation[0] - before
            x = F.pad(x, (before, after, before, after))
        return conv(x)


class ConvNeXtStage(nn.Module):
    """A downsampling, where the map or its dilation changes, and a number of blocks.

    Args:
        in_dim, dim: channels before and after.
        stride: of the downsampling.
        dilation: of the downsampling, and of the blocks.
        drop_path: one probability per block.
        conv_bias, norm_layer: of downsampling and blocks.
        **block: the other arguments of ``ConvNeXtBlock``.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int,
        dilation: tuple[int, int],
        drop_path: Sequence[float],
        conv_bias: bool,
        norm_layer: Callable[[int], nn.Module],
        **block: Any,
    ) -> None:
        super().__init__()
        changes = stride > 1 or dilation[0] != dilation[1]
        self.downsample = (
            Downsample(in_dim, dim, stride, dilation[0], conv_bias, norm_layer) if changes else nn.Identity()
        )
        self.blocks = nn.Sequential(
            *(
                ConvNeXtBlock(
                    dim, dilation=dilation[1], conv_bias=conv_bias, norm_layer=norm_layer, drop_path=p, **block
                )
                for p in drop_path
            )
        )

    def forward(self, x: Tensor, run_block: Callable[[nn.Module, Tensor], Tensor] | None = None) -> Tensor:
        """[B, in_dim, H, W] -> [B, dim, rows, columns]; ``run_block(block, x)`` runs a block."""
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x) if run_block is None else run_block(block, x)
        return x
