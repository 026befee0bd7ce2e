# SPDX-License-Identifier: Apache-2.0
"""The losses of a batch that the processes of a group hold in parts.

Each process keeps its rows; the columns of all travel around a :class:`Ring` with what the rows add to them. Nobody
holds more than its own part and the one that passes by, and every block of pairs is computed once (in CLIP's loss once
more, backward).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fvm_fast.ops._backend import number
from fvm_fast.ops.contrastive_loss._blocks import (
    Number,
    Side,
    Softness,
    clip_block_backward,
    clip_block_forward,
    side_weights,
    siglip_block,
    without_teacher,
)
from fvm_fast.ops.contrastive_loss._ring import Ring
from fvm_fast.ops.contrastive_loss._targets import (
    ClassIds,
    Teacher,
    check_sizes,
    count_positives,
    loss_dtype,
    row_numbers,
)

Targets = ClassIds | Teacher | None


def _ids(targets: Targets, ring: Ring) -> tuple[Tensor, Tensor]:
    """Ids of this process's rows and columns, in the numbering of the joined batch."""
    if isinstance(targets, ClassIds):
        return targets.rows.contiguous(), targets.cols.contiguous()
    rows, columns = ring.sizes[:2]
    return tuple(row_numbers(sizes[ring.rank], ring.device, ring.offset(sizes)) for sizes in (rows, columns))


def refuse_graph(op: str) -> None:
    """Raise when a second derivative through ``op`` is prepared."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op} in a group: expected to be differentiated once, got create_graph=True; its native kernels are once "
            "differentiable: compute it under `with fvm_fast.backend('torch'):`"
        )


# ---- clip_loss


def _weights(targets: Targets, ids: tuple[Tensor, Tensor], softness: Softness, ring: Ring) -> list[Tensor]:
    """:attr:`Side.weights` of this process's rows and columns; the positives of each are counted around the ring."""
    row_ids, col_ids = ids
    rows, cols = (torch.zeros(len(i), dtype=torch.float64, device=ring.device) for i in ids)
    if isinstance(targets, ClassIds):

        def count(fixed, carried):
            if len(row_ids) and len(fixed[0]):
                of_rows, of_cols = count_positives(row_ids, fixed[0])
                rows.add_(of_rows), carried[0].add_(of_cols)

        (cols,) = ring.turn(ring.sizes[1], [col_ids], [cols], count)
    else:
        rows, cols = rows + 1, cols + 1
    counts = ring.sum(torch.stack([(rows > 0).sum(), (cols > 0).sum()]))
    return [side_weights(positives, n, softness) for positives, n in zip((rows, cols), counts, strict=True)]


def _lse_around(x: Side, y: Side, scale: Number, softness: Softness, ring: Ring) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of this process's rows and columns over the joined batch; its rows' share of the sum of targets."""
    row_lse, col_lse = (torch.full_like(side.weights[0], -torch.inf) for side in (x, y))
    target_sum = row_lse.new_zeros(1)

    def visit(fixed, carried):
        if len(x.ids) and len(fixed[0]):
            block_row_lse, block_col_lse, block_sum = clip_block_forward(x, _arrived(fixed), scale, softness)
            torch.logaddexp(row_lse, block_row_lse, out=row_lse)
            carried[0] = torch.logaddexp(carried[0], block_col_lse)
            target_sum.add_(block_sum)

    (col_lse,) = ring.turn(ring.sizes[1], _departing(y), [col_lse], visit)
    return row_lse, col_lse, target_sum


def _departing(side: Side) -> list[Tensor | None]:
    return [side.features, side.ids, side.weights.T.contiguous(), side.teacher]


def _arrived(fixed: list[Tensor | None]) -> Side:
    features, ids, weights, teacher = fixed[:4]
    return Side(features, ids, weights.T.contiguous(), teacher)


class _JoinedClipLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, targets, teacher_scale, smoothing, group, factor):
        teacher = targets if isinstance(targets, Teacher) else Teacher(None, None, 1.0, 0.0)
        ring = Ring(group, len(x), len(y), ctx.needs_input_grad[1], device=x.device)
        n, m = (sum(sizes) for sizes in ring.sizes[:2])
        check_sizes("clip_loss in a group", targets, n, m)
        softness = Softness(teacher.alpha, number(teacher_scale, x), smoothing, n, m)
        ids = _ids(targets, ring)
        weights = _weights(targets, ids, softness, ring)
        rows, cols = (
            Side(features.contiguous(), i, w, None if t is None else t.contiguous())
            for features, i, w, t in zip((x, y), ids, weights, teacher[:2], strict=True)
        )
        if teacher.image is not None:
            lses = _lse_around(without_teacher(rows), without_teacher(cols), softness.teacher_scale, softness, ring)
            rows.weights[2], cols.weights[2] = lses[:2]
        row_lse, col_lse, target_sum = _lse_around(rows, cols, number(scale, x), softness, ring)
        ctx.save_for_backward(*rows, *cols, row_lse, col_lse, scale)
        ctx.ring, ctx.softness, ctx.factor = ring, softness, factor
        local = _dot(rows.weights[0], row_lse) + _dot(cols.weights[0], col_lse) - target_sum
        return ring.sum(local)[0].to(loss_dtype(x))

    @staticmethod
    def backward(ctx, dloss):
        refuse_graph("clip_loss")
        *sides, row_lse, col_lse, scale = ctx.saved_tensors
        rows, cols, ring = Side(*sides[:4]), Side(*sides[4:]), ctx.ring
        want_x, want_scale = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        want_y = any(ring.sizes[2])
        dx = torch.zeros_like(rows.features, dtype=loss_dtype(rows.features))
        dy = torch.zeros_like(cols.features, dtype=loss_dtype(rows.features)) if want_y else None
        dscale = row_lse.new_zeros(1)
        numbers = (number(scale, row_lse), number(dloss, row_lse))

        def visit(fixed, carried):
            if len(rows.ids) and len(fixed[0]):
                grads = clip_block_backward(
                    rows, _arrived(fixed), row_lse, fixed[4], *numbers, ctx.softness, want_x, want_y
                )
                if want_x:
                    dx.add_(grads[0])
                if want_y:
                    carried[0].add_(grads[1])
                dscale.add_(grads[2])

        (dy,) = ring.turn(ring.sizes[1], [*_departing(cols), col_lse], [dy], visit)
        dscale = ring.sum(dscale)[0].to(scale.dtype)
        return (
            (dx * ctx.factor).to(rows.features.dtype) if want_x else None,
            (dy * ctx.factor).to(cols.features.dtype) if ctx.needs_input_grad[1] else None,
            dscale if want_scale else None,
            *[None] * 5,
        )


def _dot(weights: Tensor, lse: Tensor) -> Tensor:
    return (weights * lse).sum().reshape(1)


@torch.compiler.disable
def joined_clip_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    *,
    targets: Targets,
    label_smoothing: float,
    group: dist.ProcessGroup,
    grad_reduction: str,
) -> Tensor:
    """:func:`clip_loss` of the joined batch; arguments are checked but for the sizes of all."""
    teacher_scale = targets.logit_scale if isinstance(targets, Teacher) else 1.0
    factor = dist.get_world_size(group) if grad_reduction == "mean" else 1
    return _JoinedClipLoss.apply(x, y, scale, targets, teacher_scale, label_smoothing, group, factor)


# ---- siglip_loss


class _JoinedSigLipLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, bias, targets, group, factor):
        ring = Ring(group, len(x), len(y), *ctx.needs_input_grad[:2], device=x.device)
        n, m = (sum(sizes) for sizes in ring.sizes[:2])
        check_sizes("siglip_loss in a group", targets, n, m)
        x, y = x.contiguous(), y.contiguous()
        want_x, want_y = (any(flags) for flags in ring.sizes[2:])
        row_ids, col_ids = _ids(targets, ring)
        dx = torch.zeros_like(x, dtype=loss_dtype(x))
        dy = torch.zeros_like(y, dtype=loss_dtype(x)) if want_y else None
        sums = torch.zeros(3, dtype=torch.float64, device=x.device)
        numbers = (number(scale, x), number(bias, x))

        def visit(fixed, carried):
            if len(x) and len(fixed[0]):
                loss, slopes, block_dx, block_dy = siglip_block(
                    x, fixed[0], row_ids, fixed[1], *numbers, 1 / n, want_x, want_y
                )
                sums[0] += loss
                sums[1:] += slopes
                if want_x:
                    dx.add_(block_dx)
                if want_y:
                    carried[0].add_(block_dy)

        (dy,) = ring.turn(ring.sizes[1], [y, col_ids], [dy], visit)
        loss, dscale, dbias = ring.sum(sums).to(scale.dtype)
        ctx.save_for_backward(dx, dy, dscale, dbias)
        ctx.factor, ctx.dtype = factor, x.dtype
        return loss

    @staticmethod
    def backward(ctx, dloss):
        refuse_graph("siglip_loss")
        dx, dy, dscale, dbias = ctx.saved_tensors
        want_x, want_y = ctx.needs_input_grad[:2]
        return (
            (dx * (dloss * ctx.factor)).to(ctx.dtype) if want_x else None,
            (dy * (dloss * ctx.factor)).to(ctx.dtype) if want_y else None,
            dloss * dscale,
            dloss * dbias,
            *[None] * 3,
        )


@torch.compiler.disable
def joined_siglip_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    targets: ClassIds | None,
    group: dist.ProcessGroup,
    grad_reduction: str,
) -> Tensor:
    """:func:`siglip_loss` of the joined batch; arguments are checked but for the sizes of all."""
    factor = dist.get_world_size(group) if grad_reduction == "mean" else 1
    return _JoinedSigLipLoss.apply(x, y, scale, bias, targets, group, factor)


# ---- the reference's way: everybody gathers everything


def join(
    op: str, x: Tensor, y: Tensor, targets: Targets, group: dist.ProcessGroup, grad_reduction: str
) -> tuple[Tensor, Tensor, Targets]:
    """The joined batch on every process; gradients flow to this process's own part of it."""
    ring = Ring(group, len(x), len(y), device=x.device)
    check_sizes(f"{op} in a group", targets, *(sum(sizes) for sizes in ring.sizes))
    factor = ring.world if grad_reduction == "mean" else 1

    def gather(own: Tensor, sizes: list[int], scaled: bool = False) -> Tensor:
        parts = _gather_rows(own.detach(), sizes, ring)
        # the value of `own`, with a gradient of `factor` times the usual
        parts[ring.rank] = own.detach() + (own - own.detach()) * factor if scaled else own
        return torch.cat(parts)

    rows, columns = ring.sizes
    if targets is not None:
        first, second, *rest = targets
        targets = type(targets)(gather(first, rows), gather(second, columns), *rest)
    return gather(x, rows, scaled=True), gather(y, columns, scaled=True), targets


def _gather_rows(own: Tensor, sizes: list[int], ring: Ring) -> list[Tensor]:
    padded = own.new_zeros(max(sizes), *own.shape[1:])
    padded[: len(own)] = own
    return [part[:size] for part, size in zip(ring.gather(padded), sizes, strict=True)]
