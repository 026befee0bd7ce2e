# SPDX-License-Identifier: Apache-2.0
"""One block of rows and columns in the compiled core: a whole batch, or a process's rows against another's columns."""

from typing import NamedTuple

import torch
from torch import Tensor

from fvm_fast.ops._backend import call
from fvm_fast.ops.contrastive_loss._targets import loss_dtype, small_ids


class Side(NamedTuple):
    """What the kernels know of each row, or column, of the joined batch.

    Attributes:
        features: [n, D].
        ids: [n] int32 row numbers or int64 ids, equal where a row and a column are positives of one another.
        weights: [3, n] float64: of the term in the loss, of each positive pair, and the teacher's log-sum-exp.
        teacher: [n, Dt] or None.
    """

    features: Tensor
    ids: Tensor
    weights: Tensor
    teacher: Tensor | None


class Softness(NamedTuple):
    """How targets are softened: by a teacher, and by smoothing over all rows and columns of the joined batch."""

    alpha: float
    teacher_scale: float
    smoothing: float
    rows: int
    columns: int

    def kernel_numbers(self) -> tuple[float, float, float, float]:
        """teacher_scale, teacher_weight, row_smoothing, col_smoothing of ``csrc/kernels.h``."""
        keep = 1 - self.smoothing
        return self.teacher_scale, keep * self.alpha, self.smoothing / self.columns, self.smoothing / self.rows


def side_weights(positives: Tensor, count: int, softness: Softness) -> Tensor:
    """:attr:`Side.weights` of rows with so many ``positives``, ``count`` of them with any; no teacher's part yet."""
    weights = positives.new_zeros(3, len(positives))
    weights[0] = (positives > 0).double() / (2 * max(count, 1))
    weights[1] = weights[0] / positives.clamp(min=1) * ((1 - softness.smoothing) * (1 - softness.alpha))
    return weights


def single_positive_weights(n: int, count: int, device: torch.device, softness: Softness) -> Tensor:
    """:attr:`Side.weights` of n rows with one positive each, among ``count`` in all; no teacher's part yet."""
    weights = torch.full((3, n), 0.5 / count, dtype=torch.float64, device=device)
    hard = (1 - softness.smoothing) * (1 - softness.alpha)
    if hard != 1:
        weights[1] *= hard
    return weights


def clip_block_forward(x: Side, y: Side, scale: float, softness: Softness) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps [n] and [m] of a block of logits and the sum [1] of its targets times logits, all float64."""
    (n, D), m = x.features.shape, len(y.features)
    Dt = 0 if x.teacher is None else x.teacher.shape[1]
    dtype = x.features.dtype
    rows, cols = small_ids(x.ids, y.ids)
    row_lse, col_lse, target_sum = (x.weights.new_empty(size) for size in (n, m, 1))
    workspace = _bytes(call("clip_loss_fwd_workspace", n, m, D, Dt, dtype))
    call(
        "clip_loss_fwd", x.features, y.features, rows, cols, x.weights, y.weights, x.teacher, y.teacher, row_lse,
        col_lse, target_sum, workspace, scale, *softness.kernel_numbers(), n, m, D, Dt, dtype,
    )  # fmt: skip
    return row_lse, col_lse, target_sum


def clip_block_backward(
    x: Side,
    y: Side,
    row_lse: Tensor,
    col_lse: Tensor,
    scale: float,
    dloss: float,
    softness: Softness,
    want_x: bool,
    want_y: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of a block for x [n, D] and y [m, D] in the loss's dtype (or None), and for the scale, [1] float64."""
    (n, D), m = x.features.shape, len(y.features)
    Dt = 0 if x.teacher is None else x.teacher.shape[1]
    dtype = x.features.dtype
    rows, cols = small_ids(x.ids, y.ids)
    dx = x.features.new_empty(n, D, dtype=loss_dtype(x.features)) if want_x else None
    dy = x.features.new_empty(m, D, dtype=loss_dtype(x.features)) if want_y else None
    dscale = row_lse.new_empty(1)
    workspace = _bytes(call("clip_loss_bwd_workspace", n, m, D, Dt, want_x, want_y, dtype))
    call(
        "clip_loss_bwd", x.features, y.features, rows, cols, x.weights, y.weights, x.teacher, y.teacher, row_lse,
        col_lse, dx, dy, dscale, workspace, scale, dloss, *softness.kernel_numbers(), n, m, D, Dt, dtype,
    )  # fmt: skip
    return dx, dy, dscale


def _bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def without_teacher(side: Side) -> Side:
    """The teacher's features in the place of the student's, to learn their log-sum-exp."""
    return Side(side.teacher, side.ids, side.weights, None)


def siglip_block(
    x: Tensor, y: Tensor, row_ids: Tensor, col_ids: Tensor, scale: float, bias: float, want_x: bool, want_y: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sums over a block's pairs and their gradients.

    Returns:
        [3] float64: the sum of the pairs' losses and its derivatives by scale and bias; its gradients for x [n, D]
        and y [m, D] in the loss's dtype, or None.
    """
    (n, D), m = x.shape, len(y)
    row_ids, col_ids = small_ids(row_ids, col_ids)
    sums = x.new_empty(3, dtype=torch.float64)
    dx = x.new_empty(n, D, dtype=loss_dtype(x)) if want_x else None
    dy = x.new_empty(m, D, dtype=loss_dtype(x)) if want_y else None
    workspace = _bytes(call("siglip_loss_workspace", n, m, D, want_x, want_y, x.dtype))
    call("siglip_loss", x, y, row_ids, col_ids, scale, bias, sums, dx, dy, workspace, n, m, D, x.dtype)
    return sums, dx, dy
