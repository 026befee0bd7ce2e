# SPDX-License-Identifier: Apache-2.0
"""CLIP's and SigLIP's losses over large batches: ours against the dense n x n matrix and against chunks of it.

python benchmarks/bench_contrastive_loss.py
"""

from argparse import Namespace
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from harness import main
from open_clip.loss import ClipLoss, SigLipLoss
from problem import FORWARD_BACKWARD, Floor, Problem, rivals_on
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fvm_fast import backend, ops

CHUNK = 512  # rows of the logits that the chunked rivals hold at a time


def ours_clip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    with backend("native"):
        return ops.clip_loss(image_features, text_features, logit_scale)


def dense_clip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """The formula of the paper's figure 3."""
    logits = logit_scale * image_features @ text_features.T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def chunked_clip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """What one writes in plain torch to save memory: rows in chunks, each recomputed in the backward pass."""
    row_lse, column_lse = [], []
    for rows in image_features.split(CHUNK):
        by_row, by_column = checkpoint(_lse_both_ways, rows, text_features, logit_scale, use_reentrant=False)
        row_lse.append(by_row)
        column_lse.append(by_column)
    positives = logit_scale * (image_features.float() * text_features.float()).sum(1)
    return (torch.cat(row_lse).mean() + torch.stack(column_lse).logsumexp(0).mean()) / 2 - positives.mean()


def _lse_both_ways(rows: Tensor, text_features: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    logits = logit_scale * torch.mm(rows, text_features.T).float()
    return logits.logsumexp(1), logits.logsumexp(0)


def ours_siglip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    with backend("native"):
        return ops.siglip_loss(image_features, text_features, logit_scale, logit_bias)


def dense_siglip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """The formula of the paper's algorithm 1."""
    logits = logit_scale * image_features @ text_features.T + logit_bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def chunked_siglip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """All pairs as negatives, in recomputed chunks; then the positives, since softplus(-x) = softplus(x) - x."""
    total = 0.0
    for rows in image_features.split(CHUNK):
        total = total + checkpoint(_softplus_sum, rows, text_features, logit_scale, logit_bias, use_reentrant=False)
    positives = logit_scale * (image_features.float() * text_features.float()).sum(1) + logit_bias
    return (total - positives.sum()) / len(image_features)


def _softplus_sum(rows: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    return F.softplus(logit_scale * torch.mm(rows, text_features.T).float() + logit_bias).sum()


def paired_features(n: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    """Unit image and text features [n, D], the pairs at a cosine of 0.3 or so, as early in training."""
    image = torch.randn(n, D)
    text = 0.3 * image + torch.randn(n, D)
    return [F.normalize(x, dim=1).to(dtype).requires_grad_() for x in (image, text)]


def scalar(value: float) -> Tensor:
    """A learned scale or bias."""
    return torch.tensor(value, requires_grad=True)


def loss_problem(title: str, inputs: list[Tensor], rivals: list[Callable[..., Tensor]], products: int) -> Problem:
    """Both passes of a loss at once, since an op is free to prepare its gradients in the forward pass.

    Args:
        title: of the op.
        inputs: features [n, D] of images and texts, then the scalars.
        rivals: ours, open_clip's, the chunks, the dense formula.
        products: products of n x n x D multiply-adds that the two passes need.
    """
    (n, D), dtype = inputs[0].shape, inputs[0].dtype
    ours, open_clip, chunked, dense = rivals
    functions = {"fvm_fast": ours, "open_clip": open_clip, f"mm by {CHUNK} rows, recomputed": chunked}
    features = 2 * n * D * dtype.itemsize  # read in each pass, their gradients written once
    statistics = 2 * n * 4  # a float32 log-sum-exp for each row and each column, written and read
    return Problem(
        f"{title}, n {n}, D {D}",
        rivals_on(inputs, functions, {"dense formula, torch.compile": dense}),
        dtype,
        forward=Floor(2 * products * n * n * D, 3 * features + 2 * statistics),
        passes=[FORWARD_BACKWARD],
    )


def clip_problem(n: int, D: int, dtype: torch.dtype) -> Problem:
    """Four products: logits; logits again, and the two feature gradients."""
    inputs = [*paired_features(n, D, dtype), scalar(1 / 0.07)]
    return loss_problem("clip_loss", inputs, [ours_clip, ClipLoss(), chunked_clip, dense_clip], products=4)


def siglip_problem(n: int, D: int, dtype: torch.dtype) -> Problem:
    """Three products: no logit depends on another, so gradients can be made while the logits are there."""
    inputs = [*paired_features(n, D, dtype), scalar(10.0), scalar(-10.0)]
    return loss_problem("siglip_loss", inputs, [ours_siglip, SigLipLoss(), chunked_siglip, dense_siglip], products=3)


# (n, D) by dtype, from the emoji demo's batch to a large one; bfloat16 where it matters, to spare the reader's time.
CLIP_SIZES = {
    torch.float32: [(n, D) for n in (283, 1024, 4096, 8192) for D in (128, 512)],
    torch.bfloat16: [(1024, 512), (8192, 512)],
}
SIGLIP_SIZES = {torch.float32: [(4096, 512)], torch.bfloat16: [(4096, 512), (8192, 512)]}
QUICK_SIZES = [(283, 128), (1024, 512)]


def problems(args: Namespace) -> Iterator[Problem]:
    """CLIP's loss at many sizes, SigLIP's at large ones."""
    for dtype in args.dtypes:
        for n, D in QUICK_SIZES if args.quick else CLIP_SIZES[dtype]:
            yield clip_problem(n, D, dtype)
        for n, D in QUICK_SIZES if args.quick else SIGLIP_SIZES[dtype]:
            yield siglip_problem(n, D, dtype)


if __name__ == "__main__":
    main(__file__, __doc__, problems)
