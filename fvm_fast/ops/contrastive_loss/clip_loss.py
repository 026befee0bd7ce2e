# SPDX-License-Identifier: Apache-2.0
"""CLIP's loss: each image finds its text among the columns, each text its image among the rows.

With ``S = logit_scale * image_features @ text_features.T`` [n, m] and targets ``q`` whose rows (columns) sum to one::

    clip_loss = 1/2 mean_i (logsumexp_j S_ij - sum_j q_ij S_ij) + 1/2 mean_j (logsumexp_i S_ij - sum_i q'_ij S_ij)

(Radford et al. 2021, https://arxiv.org/abs/2103.00020; several positives as in SupCon's L_out, Khosla et al. 2020,
https://arxiv.org/abs/2004.11362.) S is made in tiles, once forward and once backward, and never kept: memory is
O((n + m) D).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fvm_fast.ops._backend import use_native
from fvm_fast.ops._register import register_op
from fvm_fast.ops.contrastive_loss._blocks import (
    Side,
    Softness,
    clip_block_backward,
    clip_block_forward,
    side_weights,
    single_positive_weights,
    without_teacher,
)
from fvm_fast.ops.contrastive_loss._targets import (
    ClassIds,
    Teacher,
    check_features,
    check_reduction,
    check_sizes,
    check_targets,
    count_positives,
    loss_dtype,
    row_numbers,
    scalar,
    small_ids,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# ---- reference


def clip_loss_reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    targets: ClassIds | Teacher | None = None,
    label_smoothing: float = 0.0,
    group: ProcessGroup | None = None,
    grad_reduction: str = "mean",
) -> Tensor:
    """:func:`clip_loss` with the matrix of logits; in a group every process computes the joined batch."""
    if group is not None:
        from fvm_fast.ops.contrastive_loss._joined import join

        image_features, text_features, targets = join(
            "clip_loss", image_features, text_features, targets, group, grad_reduction
        )
    dtype = loss_dtype(image_features)
    with torch.autocast(image_features.device.type, enabled=False):
        logits = image_features.to(dtype) @ text_features.to(dtype).T * logit_scale
        by_row, by_column = _target_matrices(targets, logits)
        return (
            _cross_entropy(logits, by_row, label_smoothing) + _cross_entropy(logits.T, by_column, label_smoothing)
        ) / 2


def _target_matrices(targets: ClassIds | Teacher | None, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Targets [n, m] of the rows and [m, n] of the columns; a row without a positive is zero."""
    if isinstance(targets, ClassIds):
        equal = (targets.rows[:, None] == targets.cols).to(logits.dtype)
        return equal / equal.sum(1, keepdim=True).clamp(min=1), equal.T / equal.T.sum(1, keepdim=True).clamp(min=1)
    positives = torch.eye(*logits.shape, dtype=logits.dtype, device=logits.device)
    if targets is None:
        return positives, positives.T
    image, text = targets.image.detach().to(logits.dtype), targets.text.detach().to(logits.dtype)
    scale = targets.logit_scale.detach() if isinstance(targets.logit_scale, Tensor) else targets.logit_scale
    teacher, rest = image @ text.T * scale, (1 - targets.alpha) * positives
    return targets.alpha * teacher.softmax(1) + rest, targets.alpha * teacher.T.softmax(1) + rest.T


def _cross_entropy(logits: Tensor, q: Tensor, smoothing: float) -> Tensor:
    has_positive = (q.sum(1) > 0).to(logits.dtype)
    q = (1 - smoothing) * q + smoothing / logits.shape[1]
    losses = -(q * logits.log_softmax(1)).sum(1)
    return (losses * has_positive).sum() / has_positive.sum().clamp(min=1)


# ---- the op


def _sides(x, y, row_ids, col_ids, teacher_x, teacher_y, softness: Softness) -> tuple[Side, Side]:
    """Rows and columns of a batch that is complete in this process; the teacher's log-sum-exps are still to come."""
    (n, m), device = (len(x), len(y)), x.device
    if row_ids is not None:
        row_ids, col_ids = small_ids(row_ids, col_ids)
        row_positives, col_positives = count_positives(row_ids, col_ids)
        rows = side_weights(row_positives, int((row_positives > 0).sum()), softness)
        cols = side_weights(col_positives, int((col_positives > 0).sum()), softness)
    else:
        row_ids, rows = row_numbers(n, device), single_positive_weights(n, n, device, softness)
        # the same for the columns; but a teacher, whose log-sum-exps differ, needs tensors of their own
        shared = n == m and teacher_x is None
        col_ids = row_ids if shared else row_numbers(m, device)
        cols = rows if shared else single_positive_weights(m, m, device, softness)
    return Side(x.contiguous(), row_ids, rows, _contiguous(teacher_x)), Side(
        y.contiguous(), col_ids, cols, _contiguous(teacher_y)
    )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _softness(x, y, teacher_scale, alpha, smoothing) -> Softness:
    return Softness(alpha, 1.0 if teacher_scale is None else float(teacher_scale), smoothing, len(x), len(y))


def _clip_kernel(x, y, scale, row_ids, col_ids, teacher_x, teacher_y, teacher_scale, alpha, smoothing):
    softness = _softness(x, y, teacher_scale, alpha, smoothing)
    rows, cols = _sides(x, y, row_ids, col_ids, teacher_x, teacher_y, softness)
    teacher_row_lse, teacher_col_lse = rows.weights.new_empty(0), rows.weights.new_empty(0)
    if teacher_x is not None:
        teachers = without_teacher(rows), without_teacher(cols)
        teacher_row_lse, teacher_col_lse, _ = clip_block_forward(*teachers, softness.teacher_scale, softness)
        rows.weights[2], cols.weights[2] = teacher_row_lse, teacher_col_lse
    row_lse, col_lse, target_sum = clip_block_forward(rows, cols, float(scale), softness)
    loss = rows.weights[0] @ row_lse + cols.weights[0] @ col_lse - target_sum[0]
    return loss.to(loss_dtype(x), copy=True), row_lse, col_lse, teacher_row_lse, teacher_col_lse


def _clip_fake(x, y, scale, row_ids, col_ids, teacher_x, teacher_y, teacher_scale, alpha, smoothing):
    n, m = x.shape[0], y.shape[0]
    sizes = (n, m, 0, 0) if teacher_x is None else (n, m, n, m)
    return x.new_empty((), dtype=loss_dtype(x)), *(x.new_empty(size, dtype=torch.float64) for size in sizes)


def _clip_bwd_kernel(
    dloss, x, y, scale, row_ids, col_ids, row_lse, col_lse, teacher_x, teacher_y, teacher_scale, teacher_row_lse,
    teacher_col_lse, alpha, smoothing, want_x, want_y, want_scale,
):  # fmt: skip
    softness = _softness(x, y, teacher_scale, alpha, smoothing)
    rows, cols = _sides(x, y, row_ids, col_ids, teacher_x, teacher_y, softness)
    if teacher_x is not None:
        rows.weights[2], cols.weights[2] = teacher_row_lse, teacher_col_lse
    dx, dy, dscale = clip_block_backward(
        rows, cols, row_lse, col_lse, float(scale), float(dloss), softness, want_x, want_y
    )
    return (
        dx.to(x.dtype) if want_x else x.new_empty(0),
        dy.to(y.dtype) if want_y else y.new_empty(0),
        dscale[0].to(scale.dtype, copy=True) if want_scale else scale.new_empty(0),
    )


def _clip_bwd_fake(dloss, x, y, scale, *rest):
    want_x, want_y, want_scale = rest[-3:]
    return (
        x.new_empty(x.shape if want_x else (0,)),
        y.new_empty(y.shape if want_y else (0,)),
        scale.new_empty(() if want_scale else (0,)),
    )


def _clip_setup(ctx, inputs, output) -> None:
    x, y, scale, row_ids, col_ids, teacher_x, teacher_y, teacher_scale, alpha, smoothing = inputs
    _, row_lse, col_lse, *teacher_lses = output
    ctx.save_for_backward(
        x, y, scale, row_ids, col_ids, row_lse, col_lse, teacher_x, teacher_y, teacher_scale, *teacher_lses
    )
    ctx.softness = (alpha, smoothing)
    ctx.mark_non_differentiable(*output[1:])


def _clip_backward(ctx, dloss: Tensor, *_):
    want = ctx.needs_input_grad[:3]
    grads = torch.ops.fvm_fast.clip_loss_bwd(dloss, *ctx.saved_tensors, *ctx.softness, *want)
    return *(g if wanted else None for g, wanted in zip(grads, want, strict=True)), *[None] * 7


register_op(
    "clip_loss_bwd(Tensor dloss, Tensor x, Tensor y, Tensor scale, Tensor? row_ids, Tensor? col_ids, Tensor row_lse, "
    "Tensor col_lse, Tensor? teacher_x, Tensor? teacher_y, Tensor? teacher_scale, Tensor teacher_row_lse, "
    "Tensor teacher_col_lse, float alpha, float smoothing, bool want_x, bool want_y, bool want_scale) -> "
    "(Tensor, Tensor, Tensor)",
    kernel=_clip_bwd_kernel,
    fake=_clip_bwd_fake,
)
register_op(
    "clip_loss(Tensor x, Tensor y, Tensor scale, Tensor? row_ids, Tensor? col_ids, Tensor? teacher_x, "
    "Tensor? teacher_y, Tensor? teacher_scale, float alpha, float smoothing) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_clip_kernel,
    fake=_clip_fake,
    setup_context=_clip_setup,
    backward=_clip_backward,
)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    targets: ClassIds | Teacher | None = None,
    label_smoothing: float = 0.0,
    group: ProcessGroup | None = None,
    grad_reduction: str = "mean",
) -> Tensor:
    """Symmetric cross-entropy of image-text pairs, without the n x m matrix of logits.

    Args:
        image_features: [n, D], text_features: [m, D], of one floating dtype; used as given: normalise them first.
            Autocast does not touch them.
        logit_scale: multiplies the similarities, already exponentiated: a number (constant) or a tensor [] or [1].
        targets: None (pair (i, i) is the positive one, n = m), :class:`ClassIds` (several positives; rows and columns
            without any are left out) or a :class:`Teacher` (soft targets).
        label_smoothing: e in [0, 1]: targets become (1 - e) q + e / m.
        group: None is this process alone (not the world, as elsewhere in torch). A process group joins the local
            batches, which may differ in size: the value is the joined batch's on every process, while features travel
            around a ring and memory stays O(local batch). Every process must call it, with features that require
            gradients on all or on none.
        grad_reduction: in a group, ``"mean"`` multiplies the gradients of features by the number of processes, so that
            the averaging of DDP and FSDP gives those of the joined batch; ``"sum"`` leaves them as they are. Those of
            ``logit_scale`` are the joined batch's on every process, either way.

    Returns:
        The loss, 0-d float32 (float64 for float64): half the mean over rows plus half the mean over columns.

    Raises:
        ValueError: shapes, sizes or devices that do not fit, or no pair at all. TypeError: mixed dtypes.
    """
    check_features("clip_loss", image_features, text_features, ("image_features", "text_features"))
    check_targets("clip_loss", targets, image_features, text_features)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"clip_loss: expected label_smoothing in [0, 1], got {label_smoothing}")
    check_reduction("clip_loss", grad_reduction)
    scale = scalar("clip_loss", "logit_scale", logit_scale, image_features)
    if group is None:
        check_sizes("clip_loss", targets, len(image_features), len(text_features))
    options = {"targets": targets, "label_smoothing": label_smoothing}
    if not use_native("clip_loss", image_features, text_features, scale) or image_features.shape[1] == 0:
        return clip_loss_reference(
            image_features, text_features, scale, **options, group=group, grad_reduction=grad_reduction
        )
    if group is not None:
        from fvm_fast.ops.contrastive_loss._joined import joined_clip_loss

        return joined_clip_loss(
            image_features, text_features, scale, **options, group=group, grad_reduction=grad_reduction
        )
    ids = targets if isinstance(targets, ClassIds) else (None, None)
    teacher = (None, None, None, 0.0)
    if isinstance(targets, Teacher):
        teacher_scale = scalar("clip_loss", "Teacher.logit_scale", targets.logit_scale, image_features)
        teacher = (targets.image.detach(), targets.text.detach(), teacher_scale.detach(), float(targets.alpha))
    return torch.ops.fvm_fast.clip_loss(image_features, text_features, scale, *ids, *teacher, float(label_smoothing))[0]
