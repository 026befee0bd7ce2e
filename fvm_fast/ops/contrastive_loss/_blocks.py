# SPDX-License-Identifier: Apache-2.0
"""One block of rows and columns in the compiled core: a whole batch, or a process's rows against another's columns."""

from typing import NamedTuple

import torch
from torch import Tensor

from fvm_fast.ops._backend import call, workspace
from fvm_fast.ops.contrastive_loss._targets import loss_dtype, small_ids

Number = Tensor | float  # of :func:`number`: a tensor on CUDA


class Side(NamedTuple):
    """What the kernels know of each row, or column, of the joined batch.

    Attributes:
        features: [n, D].
        ids: [n] int32 row numbers or int64 ids, equal where a row and a column are positives of one another; None
            (in a whole batch): row numbers.
        weights: [3, n] float64: of the term in the loss, of each positive pair, and the teacher's log-sum-exp; None
            (in a whole batch): one positive each, without a teacher.
        teacher: [n, Dt] or None.
    """

    features: Tensor
    ids: Tensor | None
    weights: Tensor | None
    teacher: Tensor | None


class Softness(NamedTuple):
    """How targets are softened: by a teacher, and by smoothing over all rows and columns of the joined batch."""

    alpha: float
    teacher_scale: Number
    smoothing: float
    rows: int
    columns: int

    def kernel_numbers(self) -> tuple[Number, float, float, float]:
        """teacher_scale, teacher_weight, row_smoothing, col_smoothing of ``csrc/kernels.h``."""
        keep = 1 - self.smoothing
        return self.teacher_scale, keep * self.alpha, self.smoothing / self.columns, self.smoothing / self.rows


def side_weights(positives: Tensor, count: Tensor, softness: Softness) -> Tensor:
    """:attr:`Side.weights` of rows with so many ``positives``, ``count`` of them with any; no teacher's part yet."""
    weights = positives.new_zeros(3, len(positives))
    weights[0] = (positives > 0).double() / (2 * count.clamp(min=1))
    weights[1] = weights[0] / positives.clamp(min=1) * ((1 - softness.smoothing) * (1 - softness.alpha))
    return weights


def single_positive_weights(n: int, device: torch.device, softness: Softness) -> Tensor:
    """:attr:`Side.weights` of the n rows, or columns, of a batch with one positive each; no teacher's part yet."""
    weights = torch.full((3, n), 0.5 / n, dtype=torch.float64, device=device)
    weights[1] *= (1 - softness.smoothing) * (1 - softness.alpha)
    return weights


KEPT_FEATURES, KEPT_BYTES = 4, 128 << 20


def kept_size(n: int, m: int, D: int, dtype: torch.dtype) -> int:
    """How many similarities of n rows and m columns a forward pass keeps, so that the backward need not make them.

    All of a small batch (with the padding of the kernels' tiles), and of a large one no more than ``KEPT_FEATURES``
    times its features, or ``KEPT_BYTES``: memory stays O((n + m) D), and bounded beyond that.
    """
    itemsize = 8 if dtype == torch.float64 else 4
    return min((n + 16) * (m + 64), KEPT_FEATURES * (n + m) * D, KEPT_BYTES // itemsize)


def clip_forward(
    x: Side,
    y: Side,
    scale: Number,
    softness: Softness,
    *,
    target_sum: Tensor | None = None,
    loss: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Log-sum-exps [n + m] of the rows and columns of a block of logits, float64.

    Fills what is given: ``target_sum`` [1], the sum of targets times logits, float64; ``loss`` [] of a block that is
    the whole batch, in the loss's dtype; ``kept`` [:func:`kept_size`] of that dtype, for :func:`clip_backward`.
    """
    (n, D), m = x.features.shape, y.features.shape[0]
    Dt = 0 if x.teacher is None else x.teacher.shape[1]
    dtype = x.features.dtype
    lse = x.features.new_empty(n + m, dtype=torch.float64)
    call(
        "clip_loss_fwd", x.features, y.features, x.ids, y.ids, x.weights, y.weights, x.teacher, y.teacher, lse,
        target_sum, loss, kept, workspace("clip_loss_fwd_workspace", n, m, D, Dt, dtype, like=lse), scale,
        *softness.kernel_numbers(), n, m, D, Dt, 0 if kept is None else kept.shape[0], dtype,
    )  # fmt: skip
    return lse


def clip_backward(
    x: Side,
    y: Side,
    lse: Tensor,
    scale: Number,
    dloss: Number,
    softness: Softness,
    want_x: bool,
    want_y: bool,
    kept: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of a block for x [n, D] and y [m, D] (or None) and for the scale [], in the loss's dtype."""
    (n, D), m = x.features.shape, y.features.shape[0]
    Dt = 0 if x.teacher is None else x.teacher.shape[1]
    dtype, gradient_dtype = x.features.dtype, loss_dtype(x.features)
    dx = x.features.new_empty((n, D), dtype=gradient_dtype) if want_x else None
    dy = x.features.new_empty((m, D), dtype=gradient_dtype) if want_y else None
    dscale = x.features.new_empty((), dtype=gradient_dtype)
    call(
        "clip_loss_bwd", x.features, y.features, x.ids, y.ids, x.weights, y.weights, x.teacher, y.teacher, lse, kept,
        dx, dy, dscale, workspace("clip_loss_bwd_workspace", n, m, D, Dt, want_x, want_y, dtype, like=lse), scale,
        dloss, *softness.kernel_numbers(), n, m, D, Dt, 0 if kept is None else kept.shape[0], dtype,
    )  # fmt: skip
    return dx, dy, dscale


def clip_block_forward(x: Side, y: Side, scale: Number, softness: Softness) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps [n] and [m] of a block of logits and the sum [1] of its targets times logits, all float64."""
    x, y = _with_small_ids(x, y)
    target_sum = x.weights.new_empty(1)
    lse = clip_forward(x, y, scale, softness, target_sum=target_sum)
    return *lse.split([len(x.features), len(y.features)]), target_sum


def clip_block_backward(
    x: Side,
    y: Side,
    row_lse: Tensor,
    col_lse: Tensor,
    scale: Number,
    dloss: Number,
    softness: Softness,
    want_x: bool,
    want_y: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of a block for x [n, D] and y [m, D] (or None) and for the scale [], in the loss's dtype."""
    lse = torch.cat([row_lse, col_lse])
    return clip_backward(*_with_small_ids(x, y), lse, scale, dloss, softness, want_x, want_y)


def _with_small_ids(x: Side, y: Side) -> tuple[Side, Side]:
    row_ids, col_ids = small_ids(x.ids, y.ids)
    return x._replace(ids=row_ids), y._replace(ids=col_ids)


def without_teacher(side: Side) -> Side:
    """The teacher's features in the place of the student's, to learn their log-sum-exp."""
    return Side(side.teacher, side.ids, side.weights, None)


def siglip_block(
    x: Tensor,
    y: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    scale: Number,
    bias: Number,
    weight: float,
    want_x: bool,
    want_y: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``weight`` times the sum over a block's pairs of their losses, and its gradients, all in the loss's dtype.

    Returns:
        The sum []; its derivatives [2] by scale and bias; its gradients for x [n, D] and y [m, D], or None.
    """
    (n, D), m, dtype = x.shape, y.shape[0], loss_dtype(x)
    if row_ids is not None:
        row_ids, col_ids = small_ids(row_ids, col_ids)
    loss, slopes = x.new_empty((), dtype=dtype), x.new_empty(2, dtype=dtype)
    dx = x.new_empty((n, D), dtype=dtype) if want_x else None
    dy = x.new_empty((m, D), dtype=dtype) if want_y else None
    call(
        "siglip_loss", x, y, row_ids, col_ids, scale, bias, weight, loss, slopes, dx, dy,
        workspace("siglip_loss_workspace", n, m, D, want_x, want_y, x.dtype, like=x), n, m, D, x.dtype,
    )  # fmt: skip
    return loss, slopes, dx, dy


def nt_xent_forward(z: Tensor, scale: Number) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows z [R, D], i and i + R/2 two views of one image.

    Returns:
        Their loss [], were they the whole batch, in its dtype; their log-sum-exps [R] and the sum [1] of the logits of
        the R/2 positive pairs, float64.
    """
    (R, D), dtype = z.shape, z.dtype
    loss, lse = z.new_empty((), dtype=loss_dtype(z)), z.new_empty(R, dtype=torch.float64)
    positive_sum = lse.new_empty(1)
    scratch = workspace("nt_xent_loss_fwd_workspace", R, D, dtype, like=z)
    call("nt_xent_loss_fwd", z, lse, positive_sum, loss, scratch, scale, R, D, dtype)
    return loss, lse, positive_sum


def nt_xent_backward(
    z: Tensor, lse: Tensor, scale: Number, weight: float, dloss: Number, want_z: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients for z [R, D] (or None) and for the scale [], in the loss's dtype; a row has ``weight`` in the loss."""
    (R, D), dtype, gradient_dtype = z.shape, z.dtype, loss_dtype(z)
    dz = z.new_empty((R, D), dtype=gradient_dtype) if want_z else None
    dscale = z.new_empty((), dtype=gradient_dtype)
    scratch = workspace("nt_xent_loss_bwd_workspace", R, D, dtype, like=z)
    call("nt_xent_loss_bwd", z, lse, dz, dscale, scratch, scale, weight, dloss, R, D, dtype)
    return dz, dscale


def info_nce_forward(
    query: Tensor, positive: Tensor | None, keys: Tensor, scale: Number, want_pull: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries [n, D] against keys [K, D], beside the own ``positive`` [n, D] of each.

    Returns:
        The mean [] of log-sum-exps minus own logits, in the loss's dtype; [3, n] float64: those differences, one minus
        the own probability, log-sum-exp; the gradients [n, D] of those differences by the queries, divided by the
        scale, in the loss's dtype, or None. Without ``positive`` the own logit counts as 0 and its probability, too:
        the gradients are the means of the keys by their probabilities.
    """
    (n, D), K, dtype, gradient_dtype = query.shape, keys.shape[0], query.dtype, loss_dtype(query)
    loss, stats = query.new_empty((), dtype=gradient_dtype), query.new_empty((3, n), dtype=torch.float64)
    pull = query.new_empty((n, D), dtype=gradient_dtype) if want_pull else None
    scratch = workspace("info_nce_loss_fwd_workspace", n, K, D, want_pull, dtype, like=query)
    keys = keys if K else None
    call("info_nce_loss_fwd", query, positive, keys, stats, loss, pull, scratch, scale, n, K, D, dtype)
    return loss, stats, pull


def info_nce_backward(
    query: Tensor,
    keys: Tensor,
    targets: tuple[Tensor, Tensor, Tensor] | None,
    lse: Tensor,
    scale: Number,
    dloss: Number,
) -> Tensor:
    """Gradient [K, D], in the loss's dtype, for keys [K, D] that queries [n, D] of known ``lse`` [n] were compared to.

    ``targets`` are int32 ids of queries [n] and keys [K], positives where they are equal, and the share [n] float64
    that each of its positives has of a row; None: no key is a positive one.
    """
    (n, D), K, dtype = query.shape, keys.shape[0], query.dtype
    dkeys = query.new_empty((K, D), dtype=loss_dtype(query))
    if K == 0:
        return dkeys
    row_ids, key_ids, share = targets or (None, None, None)
    scratch = workspace("info_nce_loss_bwd_workspace", n, K, D, dtype, like=query)
    call("info_nce_loss_bwd", query, keys, row_ids, key_ids, lse, share, dkeys, scratch, scale, dloss, n, K, D, dtype)
    return dkeys
