# SPDX-License-Identifier: Apache-2.0
"""The parts of a Swin stage: patch embedding, merging of patches, the two kinds of block, the stage itself.

All work on maps [B, H, W, C]. https://arxiv.org/abs/2103.14030 (v1), https://arxiv.org/abs/2111.09883 (v2)
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fvm_fast.layers.drop_path import DropPath
from fvm_fast.layers.mlp import Mlp
from fvm_fast.layers.patch_embed import PatchEmbed, to_pair
from fvm_fast.layers.relative_position import Window
from fvm_fast.layers.window_attention import WindowAttention, WindowAttentionV2, fit_window

NormLayer = Callable[[int], nn.Module]
ActLayer = str | Callable[[], nn.Module] | None


class SwinPatchEmbed(PatchEmbed):
    """Patches of an image as a normalised map.

    Args:
        norm_layer: norm constructor.
        **kwargs: ``PatchEmbed``'s arguments.
    """

    def __init__(self, *, norm_layer: NormLayer = nn.LayerNorm, **kwargs) -> None:
        super().__init__(**kwargs)
        self.norm = norm_layer(self.proj.out_channels)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, H / p, W / p, D]."""
        x = super().forward(images)
        return self.norm(x.unflatten(1, self.feat_size(images.shape[-2:])))

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Expects images of this size, cut into patches of this size, from now on; None leaves either as it is."""
        if patch_size is not None and to_pair(patch_size) != self.patch_size:
            self._set_patch_size(to_pair(patch_size))
        super().set_input_size(self.img_size if img_size is None else img_size)

    def _set_patch_size(self, patch_size: tuple[int, int]) -> None:
        old = self.proj
        self.patch_size = patch_size
        with torch.no_grad():
            resampled = resample_patch_embed(old.weight, patch_size)
        self.proj = nn.utils.skip_init(
            nn.Conv2d, old.in_channels, old.out_channels, patch_size, patch_size, bias=False, device=old.weight.device
        )
        self.proj.weight = nn.Parameter(resampled, requires_grad=old.weight.requires_grad)
        self.proj.bias = old.bias


def resample_patch_embed(weight: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """A patch projection for patches of another size.

    The new kernel w' is the one whose answer to an enlarged patch is nearest to the old kernel's to the patch itself:
    ``w' = pinv(R) w`` with R the (bicubic, antialiased) enlargement (FlexiViT, https://arxiv.org/abs/2212.08013,
    section 3.4). Computed in float32 at least.

    Args:
        weight: [D, C, p, q].
        patch_size: (height, width) wanted.

    Returns:
        [D, C, height, width] in the dtype of ``weight``.
    """
    old_size = weight.shape[-2:]
    if tuple(old_size) == tuple(patch_size):
        return weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    basis = torch.eye(old_size.numel(), dtype=wide, device=weight.device).unflatten(1, (1, *old_size))
    enlarged = F.interpolate(basis, size=patch_size, mode="bicubic", antialias=True).flatten(1)  # [p q, height width]
    resampled = weight.to(wide).flatten(2) @ torch.linalg.pinv(enlarged.mT)
    return resampled.unflatten(2, patch_size).to(weight.dtype)


def gather_neighbours(x: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 4C]: 2 x 2 cells as one, column by column; odd maps are padded."""
    if x.shape[1] % 2 or x.shape[2] % 2:  # F.pad by nothing would copy the map
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    B, H, W, C = x.shape
    x = x.reshape(B, H // 2, 2, W // 2, 2, C)
    return x.permute(0, 1, 3, 4, 2, 5).flatten(3)


class PatchMerging(nn.Module):
    """Halves a map and widens its channels: four neighbours side by side, norm, Linear.

    Args:
        dim, out_dim: channels before and after.
        norm_layer: norm constructor.
    """

    def __init__(self, dim: int, out_dim: int, norm_layer: NormLayer = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm_layer(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, ceil(H / 2), ceil(W / 2), out_dim]."""
        return self.reduction(self.norm(gather_neighbours(x)))


class PatchMergingV2(nn.Module):
    """``PatchMerging`` with the norm after the Linear, as everywhere in Swin v2.

    Args:
        dim, out_dim: channels before and after.
        norm_layer: norm constructor.
    """

    def __init__(self, dim: int, out_dim: int, norm_layer: NormLayer = nn.LayerNorm) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)
        self.norm = norm_layer(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, ceil(H / 2), ceil(W / 2), out_dim]."""
        return self.norm(self.reduction(gather_neighbours(x)))


class _WindowBlock(nn.Module):
    """The geometry of a block: it knows its map, and fits the window to it."""

    def __init__(
        self, input_resolution: Window, window_size: int | Sequence[int], shifted: bool, always_partition: bool
    ) -> None:
        super().__init__()
        self.shifted = shifted
        self.always_partition = always_partition
        self.input_resolution = input_resolution
        self.window_size, self.shift_size = fit_window(
            to_pair(window_size), input_resolution, shifted, always_partition
        )

    def set_input_size(self, feat_size: Window, window_size: Window, always_partition: bool | None = None) -> None:
        """Expects maps of (height, width) ``feat_size``, to be cut into such windows; see ``fit_window``."""
        self.input_resolution = feat_size
        if always_partition is not None:
            self.always_partition = always_partition
        self.window_size, self.shift_size = fit_window(window_size, feat_size, self.shifted, self.always_partition)
        self.attn.set_window(self.window_size, self.shift_size)


class SwinTransformerBlock(_WindowBlock):
    """``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``, with attention in windows (equation 3 of Swin).

    Args:
        dim: channels.
        input_resolution: (height, width) of the map that the window is fitted to; other maps are taken all the same.
        num_heads, head_dim: heads, and channels of each (``dim / num_heads`` if None).
        window_size: side or (height, width).
        shifted: shift the windows by half their size, as every second block does.
        always_partition: keep the window where it covers the map; see ``fit_window``.
        mlp_ratio: hidden width of the MLP over ``dim``.
        qkv_bias, attn_drop, pad_order, table_resize: see ``WindowAttention``.
        proj_drop: dropout of both branches' results.
        drop_path: probability of skipping a branch for a sample.
        act_layer, norm_layer: activation (name or class) and norm constructor.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: Window,
        num_heads: int,
        head_dim: int | None = None,
        window_size: int | Sequence[int] = 7,
        shifted: bool = False,
        always_partition: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: ActLayer = None,
        norm_layer: NormLayer = nn.LayerNorm,
        pad_order: str = "roll_pad",
        table_resize: str = "timm",
    ) -> None:
        super().__init__(input_resolution, window_size, shifted, always_partition)
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention(
            dim,
            num_heads,
            head_dim,
            self.window_size,
            self.shift_size,
            qkv_bias,
            attn_drop,
            proj_drop,
            pad_order,
            table_resize,
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class SwinTransformerV2Block(_WindowBlock):
    """``x + norm1(attn(x))``, then ``x + norm2(mlp(x))``: what a branch adds is normalised (section 3.2 of Swin v2).

    However deep the network, no branch can add more than its norm's gain, so activations do not grow with depth.

    Args:
        pretrained_window_size: see ``WindowAttentionV2``.
        dim, input_resolution, num_heads, window_size, shifted, always_partition, mlp_ratio, qkv_bias, proj_drop,
        attn_drop, drop_path, act_layer, norm_layer, pad_order: see ``SwinTransformerBlock``.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: Window,
        num_heads: int,
        window_size: int | Sequence[int] = 7,
        shifted: bool = False,
        always_partition: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: ActLayer = None,
        norm_layer: NormLayer = nn.LayerNorm,
        pretrained_window_size: int | Sequence[int] = 0,
        pad_order: str = "roll_pad",
    ) -> None:
        super().__init__(input_resolution, window_size, shifted, always_partition)
        self.attn = WindowAttentionV2(
            dim,
            num_heads,
            self.window_size,
            self.shift_size,
            qkv_bias,
            attn_drop,
            proj_drop,
            pretrained_window_size,
            pad_order,
        )
        self.norm1 = norm_layer(dim)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop)
        self.norm2 = norm_layer(dim)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = x + self.drop_path1(self.norm1(self.attn(x)))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class SwinTransformerStage(nn.Module):
    """The merging that opens a stage (Identity in the first), and its blocks.

    Args:
        downsample: a ``PatchMerging``, or Identity.
        blocks: blocks that work on maps of one size.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C of the stage before] -> [B, ceil(H / 2), ceil(W / 2), C]; H x W as it is in the first stage."""
        x = self.downsample(x)
        for block in self.blocks:
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x

    def set_input_size(self, feat_size: Window, window_size: Window, always_partition: bool | None = None) -> None:
        """Fits every block to maps of (height, width) ``feat_size``."""
        for block in self.blocks:
            block.set_input_size(feat_size, window_size, always_partition)
