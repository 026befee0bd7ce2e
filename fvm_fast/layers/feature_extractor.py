# SPDX-License-Identifier: Apache-2.0
"""A backbone that returns feature maps, for detection, segmentation and dense prediction."""

from collections.abc import Sequence

from torch import Tensor, nn


def take_indices(num_blocks: int, indices: int | Sequence[int] | None) -> list[int]:
    """Block numbers from what a caller may say: the last n for an int, all for None, negative ones from the end.

    Raises:
        ValueError: a block that does not exist.
    """
    if indices is None:
        return list(range(num_blocks))
    if isinstance(indices, int):
        if not 0 < indices <= num_blocks:
            raise ValueError(f"indices should be 1 to {num_blocks} last blocks, got {indices}")
        return list(range(num_blocks - indices, num_blocks))
    wrong = [i for i in indices if not -num_blocks <= i < num_blocks]
    if wrong:
        raise ValueError(f"indices should name blocks 0 to {num_blocks - 1} (or negative, from the end), got {wrong}")
    return [i % num_blocks for i in indices]


class FeatureInfo:
    """What each returned map is: its channels, its stride in pixels and the module it comes from.

    Args:
        info: one dict per block with ``module``, ``num_chs`` and ``reduction``.
        out_indices: blocks whose maps are returned.
    """

    def __init__(self, info: Sequence[dict], out_indices: Sequence[int]) -> None:
        self.info = list(info)
        self.out_indices = tuple(out_indices)

    def _column(self, name: str) -> list:
        return [self.info[i][name] for i in self.out_indices]

    def channels(self) -> list[int]:
        """Channels of each map."""
        return self._column("num_chs")

    def reduction(self) -> list[int]:
        """Pixels of the image per cell of each map."""
        return self._column("reduction")

    def module_name(self) -> list[str]:
        """Name of the block that each map comes from."""
        return self._column("module")


class FeatureExtractor(nn.Module):
    """Wraps a model that has ``forward_intermediates``; blocks after the last one asked for, norm and head are removed.

    Args:
        model: taken over and pruned in place.
        out_indices: blocks or stages to return: the last n for an int, their numbers for a sequence; None is timm's
            choice, all stages or the last three blocks.
        norm: apply the final norm to every map.
    """

    def __init__(self, model: nn.Module, out_indices: int | Sequence[int] | None = None, norm: bool = False) -> None:
        super().__init__()
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"features_only needs a model with intermediate maps, got {type(model).__name__}")
        info = model.feature_info
        out_indices = model.default_out_indices if out_indices is None else out_indices
        self.norm = norm
        self.out_indices = model.prune_intermediate_layers(out_indices, prune_norm=not norm)
        self.feature_info = FeatureInfo(info, self.out_indices)
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, C, H, W] -> one [B, D, rows, columns] for each of ``out_indices``."""
        return self.model.forward_intermediates(images, self.out_indices, norm=self.norm, intermediates_only=True)
