# SPDX-License-Identifier: Apache-2.0
"""TinyViT's convolutional half: the stem, the blocks of the first stage, and the steps between stages.

Every convolution is followed by a batch norm and has no bias. Maps are [B, C, H, W] in channels_last memory.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fvm_fast.layers.drop_path import DropPath

Activation = Callable[[], nn.Module]


class ConvNorm(nn.Sequential):
    """``bn(conv(x))``, padded so that a stride of 1 keeps the size of the map.

    Args:
        in_chs, out_chs: channels before and after.
        kernel_size, stride, groups: of the convolution; the kernel is odd.
        bn_weight_init: initial gain of the norm.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        bn_weight_init: float = 1.0,
    ) -> None:
        conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        super().__init__(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_chs)))
        nn.init.constant_(self.bn.weight, bn_weight_init)


class PatchEmbed(nn.Module):
    """The stem: two 3 x 3 convolutions of stride 2.

    Args:
        in_chans, embed_dim: channels of the image and of the map.
        act_layer: activation between the two.
    """

    stride = 4

    def __init__(self, in_chans: int, embed_dim: int, act_layer: Activation) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_chans, embed_dim // 2, 3, stride=2)
        self.act = act_layer()
        self.conv2 = ConvNorm(embed_dim // 2, embed_dim, 3, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, embed_dim, H / 4, W / 4], rounded up."""
        return self.conv2(self.act(self.conv1(images)))


class MBConv(nn.Module):
    """An inverted bottleneck, ``act(x + conv1x1(act(dwconv3x3(act(conv1x1(x))))))``: wide inside, narrow outside.

    The last norm starts at zero, so that the block starts as its activation alone (MobileNetV2,
    https://arxiv.org/abs/1801.04381).

    Args:
        dim: channels outside.
        expand_ratio: channels inside over ``dim``.
        act_layer: activation.
        drop_path: probability of skipping the branch for a sample.
    """

    def __init__(self, dim: int, expand_ratio: float, act_layer: Activation, drop_path: float = 0.0) -> None:
        super().__init__()
        inside = int(dim * expand_ratio)
        self.conv1 = ConvNorm(dim, inside)
        self.act1 = act_layer()
        self.conv2 = ConvNorm(inside, inside, 3, groups=inside)
        self.act2 = act_layer()
        self.conv3 = ConvNorm(inside, dim, bn_weight_init=0.0)
        self.act3 = act_layer()
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim, H, W] -> [B, dim, H, W]."""
        branch = self.conv3(self.act2(self.conv2(self.act1(self.conv1(x)))))
        return self.act3(x + self.drop_path(branch))


class PatchMerging(nn.Module):
    """Between stages: ``conv1x1(act(dwconv3x3 of stride 2(act(conv1x1(x)))))``.

    Args:
        dim, out_dim: channels before and after.
        act_layer: activation.
    """

    def __init__(self, dim: int, out_dim: int, act_layer: Activation) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, out_dim)
        self.act1 = act_layer()
        self.conv2 = ConvNorm(out_dim, out_dim, 3, stride=2, groups=out_dim)
        self.act2 = act_layer()
        self.conv3 = ConvNorm(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim, H, W] -> [B, out_dim, H / 2, W / 2], rounded up."""
        return self.conv3(self.act2(self.conv2(self.act1(self.conv1(x)))))


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Within it the batch norms of ``module`` leave their running statistics as they are."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
