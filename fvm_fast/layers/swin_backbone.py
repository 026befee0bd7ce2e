# SPDX-License-Identifier: Apache-2.0
"""What Swin v1 and v2 have in common: four stages on maps that halve and widen, and what users of timm call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fvm_fast.layers.activation import activation_name
from fvm_fast.layers.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, check_choice
from fvm_fast.layers.feature_extractor import take_indices
from fvm_fast.layers.mlp import Mlp
from fvm_fast.layers.patch_embed import to_pair
from fvm_fast.layers.pooled_linear import PooledLinear
from fvm_fast.layers.relative_position import Window
from fvm_fast.layers.swin_block import NormLayer, SwinPatchEmbed, SwinTransformerStage


class SwinBackbone(Backbone):
    """A classifier of windowed stages; ``SwinTransformer`` and ``SwinTransformerV2`` say of which blocks.

    Images become a map of patches (``embed``), which the stages halve and widen (``forward_stages``); the last map is
    pooled and classified (``forward_head``). A model of masked images changes the map between the first two.

    Args:
        make_block: for each stage, a constructor of a block that takes dim, input_resolution, num_heads, window_size,
            shifted, always_partition, drop_path and norm_layer by name.
        merging: constructor of a patch merging, called with dim, out_dim and norm_layer.
        img_size, ...: see ``SwinTransformer``.
    """

    def __init__(
        self,
        *,
        make_block: Sequence[Callable[..., nn.Module]],
        merging: Callable[[int, int, NormLayer], nn.Module],
        img_size: int | Sequence[int],
        patch_size: int,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int | Sequence[int] | Sequence[Sequence[int]],
        always_partition: bool,
        strict_img_size: bool,
        drop_rate: float,
        drop_path_rate: float,
        norm_layer: NormLayer,
        image_mean: Sequence[float] | None,
        image_std: Sequence[float] | None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.embed_dim = embed_dim
        self.num_layers = len(depths)
        self.num_features = embed_dim * 2 ** (self.num_layers - 1)
        self.dynamic_img_size = not strict_img_size
        self.output_fmt = "NHWC"
        self.default_out_indices = len(depths)

        self.patch_embed = SwinPatchEmbed(
            norm_layer=norm_layer,
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            strict_img_size=strict_img_size,
            image_mean=image_mean,
            image_std=image_std,
        )
        grid = self.patch_embed.grid_size
        windows = stage_windows(window_size, self.num_layers)
        heads = per_stage("num_heads", num_heads, self.num_layers)
        drop_paths = torch.linspace(0.0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        stages = []
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            blocks = [
                make_block[i](
                    dim=dim,
                    input_resolution=halved(grid, i),
                    num_heads=heads[i],
                    window_size=windows[i],
                    shifted=j % 2 == 1,
                    always_partition=always_partition,
                    drop_path=float(drop_paths[i][j]),
                    norm_layer=norm_layer,
                )
                for j in range(depth)
            ]
            downsample = merging(dim // 2, dim, norm_layer) if i > 0 else nn.Identity()
            stages.append(SwinTransformerStage(downsample, blocks))
        self.layers = nn.Sequential(*stages)
        self._reference = windows, grid  # set_input_size keeps their ratio
        self.norm = norm_layer(self.num_features)
        self.head = PooledLinear(self.num_features, num_classes, global_pool, drop_rate)

    def embed(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> normalised patches [B, H / p, W / p, D]."""
        return self.patch_embed(images)

    def forward_stages(self, x: Tensor) -> Tensor:
        """Patches [B, H / p, W / p, D] -> the last map, normalised: [B, H / 8p, W / 8p, 8D] of four stages."""
        return self.norm(self.layers(x))

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> the last map, normalised: [B, rows, columns, num_features]."""
        return self.forward_stages(self.embed(images))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits [B, num_classes], or the pooled features with ``pre_logits``."""
        return self.head(x, pre_logits)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps after chosen stages.

        Args:
            images: [B, C, H, W].
            indices: stages to return: the last n for an int, all for None, their numbers for a sequence.
            norm: apply the final norm to the last stage's map, the only one that it fits.
            stop_early: skip the stages after the last one asked for.
            output_fmt: ``NCHW``, or ``NHWC`` as the stages work.
            intermediates_only: leave out the final map.

        Returns:
            (final map [B, rows, columns, channels], list of maps in the order of the stages), or the list alone. The
            final map is normalised if it is the last stage's.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NHWC"))
        wanted, last = take_indices(len(self.layers), indices), len(self.layers) - 1
        end = max(wanted) if stop_early else last
        x = self.embed(images)
        maps = []
        for i, stage in enumerate(self.layers[: end + 1]):
            x = stage(x)
            if i in wanted:
                maps.append(self.norm(x) if norm and i == last else x)
        if output_fmt == "NCHW":
            maps = [y.permute(0, 3, 1, 2).contiguous() for y in maps]
        if intermediates_only:
            return maps
        return (self.norm(x) if end == last else x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last one asked for, the norm and the head; returns the numbers of the stages."""
        wanted = take_indices(len(self.layers), indices)
        end, windows, grid = max(wanted) + 1, *self._reference
        shorter = end < len(self.layers)
        self.layers, self._reference = self.layers[:end], (windows[:end], grid)
        self.num_features = self.embed_dim * 2 ** (end - 1)
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return wanted

    def get_classifier(self) -> nn.Module:
        """The Linear of the head, or Identity without classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for ``num_classes`` (0: none), and another pooling if given."""
        self.head.reset(num_classes, global_pool, in_features=self.num_features, like=self.patch_embed.proj.weight)
        self.num_classes = num_classes
        self.global_pool = self.head.pool_type

    @property
    def head_hidden_size(self) -> int:
        """Width of the pooled features."""
        return self.head.num_features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def set_input_size(
        self,
        img_size: int | Sequence[int] | None = None,
        patch_size: int | None = None,
        window_size: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
        window_ratio: int | Sequence[int] | None = None,
        always_partition: bool | None = None,
    ) -> None:
        """Takes other images, patches or windows from now on; tables and the patch projection are resized.

        Args:
            img_size: side or (height, width); None leaves it.
            patch_size: side of a patch; None leaves it.
            window_size: as in the constructor. With neither this nor ``window_ratio``, each stage's windows grow or
                shrink with the grid of patches.
            window_ratio: windows are the grid of patches divided by this, one number or one a stage.
            always_partition: as in the constructor; None leaves it.
        """
        stages, explicit = len(self.layers), window_size is not None or window_ratio is not None
        windows = None if window_size is None else stage_windows(window_size, stages)
        ratios = None if window_ratio is None else per_stage("window_ratio", window_ratio, stages)
        self.patch_embed.set_input_size(img_size, patch_size)
        grid = self.patch_embed.grid_size
        if windows is None:
            windows = self._scaled_windows(grid, ratios)
        if explicit:
            self._reference = windows, grid
        for i, stage in enumerate(self.layers):
            stage.set_input_size(halved(grid, i), windows[i], always_partition)

    def _scaled_windows(self, grid: Window, ratios: Sequence[int] | None) -> tuple[Window, ...]:
        if ratios is not None:
            return tuple(tuple(max(1, side // ratio) for side in grid) for ratio in ratios)
        windows, old_grid = self._reference
        return tuple(
            tuple(max(1, w * new // old) for w, new, old in zip(window, grid, old_grid, strict=True))
            for window in windows
        )

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that assign parameters to depths, for layer-wise learning rates; ``coarse``: one a stage."""
        by_block = [
            (r"^layers\.(\d+)\.downsample", (0,)),
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else by_block}

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Name, channels and stride of the map after each stage."""
        dim, stride = self.embed_dim, self.patch_embed.patch_size[0]
        return [
            {"module": f"layers.{i}", "num_chs": dim * 2**i, "reduction": stride * 2**i}
            for i in range(len(self.layers))
        ]

    @property
    def default_cfg(self) -> dict[str, Any]:
        """What the data pipeline should know, under timm's keys."""
        return super().default_cfg | {
            "mean": self.patch_embed.image_mean or IMAGENET_MEAN,
            "std": self.patch_embed.image_std or IMAGENET_STD,
            "classifier": "head.fc",
        }

    @property
    def numerics(self) -> dict[str, Any]:
        """What must match for equal weights to give equal outputs; it travels with exported weights."""
        norm_eps = next((m.eps for m in self.modules() if isinstance(m, nn.LayerNorm)), None)
        act = next((activation_name(m.act) for m in self.modules() if isinstance(m, Mlp)), None)
        return {name: value for name, value in (("norm_eps", norm_eps), ("act", act)) if value is not None}


def halved(grid: Window, times: int) -> Window:
    """(rows, columns) after so many mergings, each of which rounds up."""
    return -(-grid[0] // 2**times), -(-grid[1] // 2**times)


def per_stage(name: str, value: Any, stages: int) -> tuple:
    """One value for each stage, from a number for all of them or a sequence.

    Raises:
        ValueError: the sequence is of another length.
    """
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * stages
    if len(values) != stages:
        raise ValueError(f"{name} should have one value for each of the {stages} stages, got {value}")
    return values


def stage_windows(window_size: int | Sequence[int] | Sequence[Sequence[int]], stages: int) -> tuple[Window, ...]:
    """(height, width) of each stage's windows, from a side or a pair for all of them, or one of these a stage.

    Raises:
        ValueError: there are not as many as stages, or one is not positive.
    """
    is_pair = isinstance(window_size, (list, tuple)) and len(window_size) == 2 and isinstance(window_size[0], int)
    windows = per_stage("window_size", (window_size,) * stages if is_pair else window_size, stages)
    windows = tuple(to_pair(window) for window in windows)
    if any(min(window) < 1 for window in windows):
        raise ValueError(f"window_size should be positive, got {window_size}")
    return windows
