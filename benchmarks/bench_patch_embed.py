# SPDX-License-Identifier: Apache-2.0
"""Images to tokens: ours against timm's and MAE's order of operations.

python benchmarks/bench_patch_embed.py
"""

from argparse import Namespace
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness import main
from problem import Floor, Problem, rivals_on
from torch import Tensor

from fvm_fast import backend, ops

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Size(NamedTuple):
    """B images of ``side`` x ``side`` pixels, patches of p x p, tokens of D numbers."""

    B: int
    side: int
    p: int
    D: int

    @property
    def L(self) -> int:
        """Patches of an image."""
        return (self.side // self.p) ** 2

    def __str__(self) -> str:
        return f"{self.B} x {self.side} px, patch {self.p}, D {self.D}"


def timm_embed(images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, cls_token: Tensor) -> Tensor:
    """timm's VisionTransformer: convolve, flatten, transpose, cat, add."""
    x = F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    return torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1) + pos_embed


def mae_embed(
    images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, cls_token: Tensor, ids_keep: Tensor
) -> Tensor:
    """MAE's encoder up to its first block: embed every patch, add positions, then throw three quarters away."""
    x = F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2) + pos_embed[:, 1:]
    x = torch.gather(x, 1, ids_keep.unsqueeze(-1).repeat(1, 1, x.shape[-1]))
    return torch.cat([(cls_token + pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)


def normalize(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [B, 3, H, W] as a data loader normalises it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((images.float() / 255 - mean) / std).to(dtype)


def uint8_embed(images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, cls_token: Tensor) -> Tensor:
    """Normalise, then timm's order."""
    return timm_embed(normalize(images, weight.dtype), weight, bias, pos_embed, cls_token)


def ours(images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, cls_token: Tensor, ids_keep=None) -> Tensor:
    statistics = dict(mean=MEAN, std=STD) if images.dtype == torch.uint8 else {}
    with backend("native"):
        return ops.patch_embed(images, weight, bias, pos_embed, cls_token[0], ids_keep, **statistics)


def parameters(size: Size, dtype: torch.dtype) -> list[Tensor]:
    """weight [D, 3, p, p], bias [D], pos_embed [1, 1 + L, D], cls_token [1, 1, D]."""
    fan_in = 3 * size.p**2
    shapes = [(size.D, 3, size.p, size.p), (size.D,), (1, 1 + size.L, size.D), (1, 1, size.D)]
    return [(torch.randn(shape) * fan_in**-0.5).to(dtype).requires_grad_() for shape in shapes]


def floors(size: Size, kept: int, image_bytes: int, e: int) -> dict[str, Floor]:
    """Each kept patch read and multiplied once a pass; weights, tokens and gradients moved once; no image gradient."""
    K, D, M, rows = 3 * size.p**2, size.D, size.B * kept, size.B * (kept + 1)
    table = e * (K * D + D + (size.L + 1) * D)  # weight, bias, positions; or their gradients
    traffic = image_bytes * M * K + e * rows * D + table
    return {"forward": Floor(2 * M * K * D, traffic), "backward": Floor(2 * M * K * D, traffic)}


def embed_problem(size: Size, dtype: torch.dtype) -> Problem:
    """All patches of float images."""
    images = torch.randn(size.B, 3, size.side, size.side).to(dtype)
    functions = {"fvm_fast": ours, "timm's order": timm_embed}
    rivals = rivals_on([images, *parameters(size, dtype)], functions, {"timm's, torch.compile": timm_embed})
    return Problem(f"embed, {size}", rivals, dtype, **floors(size, size.L, dtype.itemsize, dtype.itemsize))


def masked_problem(size: Size, dtype: torch.dtype) -> Problem:
    """MAE's front end; the ids are given."""
    images = torch.randn(size.B, 3, size.side, size.side).to(dtype)
    ids_keep, _, _ = ops.random_masking(size.B, size.L, 0.75)
    functions = {"fvm_fast": ours, "MAE's order": mae_embed}
    rivals = rivals_on([images, *parameters(size, dtype), ids_keep], functions, {"MAE's, torch.compile": mae_embed})
    floor = floors(size, ids_keep.shape[1], dtype.itemsize, dtype.itemsize)
    return Problem(f"embed 25 % (MAE), {size}", rivals, dtype, **floor)


def uint8_problem(size: Size, dtype: torch.dtype) -> Problem:
    """Bytes as they come from a decoder, normalised on the way."""
    images = torch.randint(256, (size.B, 3, size.side, size.side), dtype=torch.uint8)
    functions = {"fvm_fast": ours, "normalise, timm's order": uint8_embed}
    rivals = rivals_on([images, *parameters(size, dtype)], functions, {"same, torch.compile": uint8_embed})
    return Problem(f"embed uint8, {size}", rivals, dtype, **floors(size, size.L, 1, dtype.itemsize))


def problems(args: Namespace) -> Iterator[Problem]:
    """ViT-B/16 at ImageNet's size, and the size of the emoji demo."""
    vit_base = Size(2, 224, 16, 768) if args.quick else Size(32, 224, 16, 768)
    for problem in (embed_problem, masked_problem, uint8_problem):
        for dtype in args.dtypes:
            yield problem(vit_base, dtype)
    if torch.float32 in args.dtypes:
        yield uint8_problem(Size(283, 48, 8, 128), torch.float32)


if __name__ == "__main__":
    main(__file__, __doc__, problems)
