# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses over large batches and queues: ours against the dense matrix of logits and against chunks of it.

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

TEMPERATURE = 0.1  # of nt_xent_loss and info_nce_loss
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


def ours_nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    with backend("native"):
        return ops.nt_xent_loss(z1, z2, TEMPERATURE)


def dense_nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    """SimCLR's formula: each row's cross-entropy over all rows but itself."""
    z = torch.cat([z1, z2])
    logits = (z @ z.T).float() / TEMPERATURE
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z1)))


def ours_info_nce(query: Tensor, positive_key: Tensor, queue: Tensor) -> Tensor:
    with backend("native"):
        return ops.info_nce_loss(query, positive_key, queue, TEMPERATURE)


def dense_info_nce(query: Tensor, positive_key: Tensor, queue: Tensor) -> Tensor:
    """MoCo's algorithm 1."""
    positive = (query.float() * positive_key.float()).sum(1, keepdim=True)
    logits = torch.cat([positive, (query @ queue.T).float()], 1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


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
    """Four products: logits; logits again, but for those that were kept, and the two feature gradients."""
    inputs = [*paired_features(n, D, dtype), scalar(1 / 0.07)]
    return loss_problem("clip_loss", inputs, [ours_clip, ClipLoss(), chunked_clip, dense_clip], products=4)


def siglip_problem(n: int, D: int, dtype: torch.dtype) -> Problem:
    """Three products: no logit depends on another, so gradients can be made while the logits are there."""
    inputs = [*paired_features(n, D, dtype), scalar(10.0), scalar(-10.0)]
    return loss_problem("siglip_loss", inputs, [ours_siglip, SigLipLoss(), chunked_siglip, dense_siglip], products=3)


def nt_xent_problem(n: int, D: int, dtype: torch.dtype) -> Problem:
    """Half a product (the triangle above the diagonal of logits) for each of logits, logits again, rows and columns."""
    inputs, rows = paired_features(n, D, dtype), 2 * n
    return Problem(
        f"nt_xent_loss, n {n}, D {D}",
        rivals_on(
            inputs,
            {"fvm_fast": ours_nt_xent, "dense formula": dense_nt_xent},
            {"dense formula, torch.compile": dense_nt_xent},
        ),
        dtype,
        forward=Floor(4 * rows**2 * D, 3 * rows * D * dtype.itemsize + 2 * rows * 8),
        passes=[FORWARD_BACKWARD],
    )


def info_nce_problem(n: int, K: int, D: int, dtype: torch.dtype) -> Problem:
    """Two products: logits, and the mean of the queue by their softmax, which is the gradient."""
    query, positive_key = paired_features(n, D, dtype)
    inputs = [query, positive_key.detach(), F.normalize(torch.randn(K, D), dim=1).to(dtype)]
    return Problem(
        f"info_nce_loss, n {n}, queue {K}, D {D}",
        rivals_on(
            inputs,
            {"fvm_fast": ours_info_nce, "dense formula": dense_info_nce},
            {"dense formula, torch.compile": dense_info_nce},
        ),
        dtype,
        forward=Floor(4 * n * K * D, (K + 4 * n) * D * dtype.itemsize),
        passes=[FORWARD_BACKWARD],
    )


# (n, D) by dtype, from the emoji demo's batch to a large one; bfloat16 where it matters, to spare the reader's time.
CLIP_SIZES = {
    torch.float32: [(8, 512), *((n, D) for n in (283, 1024, 4096, 8192) for D in (128, 512))],
    torch.bfloat16: [(1024, 512), (8192, 512)],
}
SIGLIP_SIZES = {
    torch.float32: [(8, 512), (1024, 512), (4096, 512), (8192, 512)],
    torch.bfloat16: [(1024, 512), (8192, 512)],
}
NT_XENT_SIZES = [(8, 128), (256, 128), (2048, 128), (4096, 512)]
INFO_NCE_SIZES = [(8, 4096, 128), (256, 65536, 128), (256, 57600, 256)]  # the last is BLIP's
QUICK_SIZES = [(283, 128), (1024, 512)]


def problems(args: Namespace) -> Iterator[Problem]:
    """CLIP's loss at many sizes, SigLIP's at large ones; SimCLR's and MoCo's at theirs."""
    for dtype in args.dtypes:
        for n, D in QUICK_SIZES if args.quick else CLIP_SIZES[dtype]:
            yield clip_problem(n, D, dtype)
        for n, D in QUICK_SIZES if args.quick else SIGLIP_SIZES[dtype]:
            yield siglip_problem(n, D, dtype)
        for n, D in QUICK_SIZES if args.quick else NT_XENT_SIZES:
            yield nt_xent_problem(n, D, dtype)
        for n, K, D in [(64, 4096, 128)] if args.quick else INFO_NCE_SIZES:
            yield info_nce_problem(n, K, D, dtype)


if __name__ == "__main__":
    main(__file__, __doc__, problems)
