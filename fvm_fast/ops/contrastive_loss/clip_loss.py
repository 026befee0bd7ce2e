# SPDX-License-Identifier: Apache-2.0
"""CLIP's loss: each image finds its text among the columns, each text its image among the rows.

With ``S = logit_scale * image_features @ text_features.T`` [n, m] and targets ``q`` whose rows (columns) sum to one::

    clip_loss = 1/2 mean_i (logsumexp_j S_ij - sum_j q_ij S_ij) + 1/2 mean_j (logsumexp_i S_ij - sum_i q'_ij S_ij)

(Radford et al. 2021, https://arxiv.org/abs/2103.00020; several positives as in SupCon's L_out, Khosla et al. 2020,
https://arxiv.org/abs/2004.11362.) S is made in tiles, once forward and once backward. The forward keeps no more of it
for the backward than a few times the features, so that memory is O((n + m) D).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fvm_fast.ops._backend import number, on_cuda, use_native
from fvm_fast.ops._register import register_op
from fvm_fast.ops.contrastive_loss._blocks import (
    Side,
    Softness,
    clip_backward,
    clip_forward,
    kept_size,
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
    rows = cols = None  # the kernels know a batch of pairs
    if row_ids is not None:
        row_ids, col_ids = small_ids(row_ids, col_ids)
        row_positives, col_positives = count_positives(row_ids, col_ids)
        rows = side_weights(row_positives, (row_positives > 0).sum(), softness)
        cols = side_weights(col_positives, (col_positives > 0).sum(), softness)
    elif teacher_x is not None:
        rows, cols = (single_positive_weights(len(t), t.device, softness) for t in (x, y))
        teacher_x, teacher_y = teacher_x.contiguous(), teacher_y.contiguous()
    return Side(x.contiguous(), row_ids, rows, teacher_x), Side(y.contiguous(), col_ids, cols, teacher_y)


def _softness(x, y, teacher_scale, alpha, smoothing) -> Softness:
    teacher_scale = number(1.0 if teacher_scale is None else teacher_scale, x)
    return Softness(alpha, teacher_scale, smoothing, x.shape[0], y.shape[0])


def _set_teacher(rows: Side, cols: Side, lse: Tensor) -> None:
    rows.weights[2], cols.weights[2] = lse.split([len(rows.features), len(cols.features)])


def _clip_kernel(x, y, scale, row_ids, col_ids, teacher_x, teacher_y, teacher_scale, alpha, smoothing, keep):
    softness = _softness(x, y, teacher_scale, alpha, smoothing)
    rows, cols = _sides(x, y, row_ids, col_ids, teacher_x, teacher_y, softness)
    loss, teacher_lse, kept = _clip_outputs(x, y, teacher_x, keep)
    if teacher_x is not None:
        teacher_lse = clip_forward(without_teacher(rows), without_teacher(cols), softness.teacher_scale, softness)
        _set_teacher(rows, cols, teacher_lse)
    lse = clip_forward(rows, cols, number(scale, x), softness, loss=loss, kept=kept if kept.shape[0] else None)
    return loss, lse, teacher_lse, kept


def _clip_outputs(x, y, teacher_x, keep):
    """Loss, the teacher's log-sum-exps of rows and columns, and similarities kept for the backward: empty.

    On CUDA nothing is kept: tensor cores make similarities again in less time than memory would bring them.
    """
    (n, D), m, dtype = x.shape, y.shape[0], loss_dtype(x)
    return (
        x.new_empty((), dtype=dtype),
        x.new_empty(0 if teacher_x is None else n + m, dtype=torch.float64),
        x.new_empty(kept_size(n, m, D, dtype) if keep and not on_cuda(x) else 0, dtype=dtype),
    )


def _clip_fake(x, y, scale, row_ids, col_ids, teacher_x, teacher_y, teacher_scale, alpha, smoothing, keep):
    loss, teacher_lse, kept = _clip_outputs(x, y, teacher_x, keep)
    return loss, x.new_empty(x.shape[0] + y.shape[0], dtype=torch.float64), teacher_lse, kept


def _clip_bwd_kernel(
    dloss, x, y, scale, row_ids, col_ids, teacher_x, teacher_y, teacher_scale, lse, teacher_lse, kept, alpha, smoothing,
    want_x, want_y, want_scale,
):  # fmt: skip
    softness = _softness(x, y, teacher_scale, alpha, smoothing)
    rows, cols = _sides(x, y, row_ids, col_ids, teacher_x, teacher_y, softness)
    if teacher_x is not None:
        _set_teacher(rows, cols, teacher_lse)
    numbers = (number(scale, x), number(dloss, x))
    kept = kept if kept.shape[0] else None
    dx, dy, dscale = clip_backward(rows, cols, lse, *numbers, softness, want_x, want_y, kept)
    return (
        dx.to(x.dtype) if want_x else x.new_empty(0),
        dy.to(y.dtype) if want_y else y.new_empty(0),
        dscale if want_scale else scale.new_empty(0),
    )


def _clip_bwd_fake(dloss, x, y, scale, *rest):
    want_x, want_y, want_scale = rest[-3:]
    return (
        x.new_empty(x.shape if want_x else (0,)),
        y.new_empty(y.shape if want_y else (0,)),
        scale.new_empty(() if want_scale else (0,)),
    )


def _clip_setup(ctx, inputs, output) -> None:
    *tensors, alpha, smoothing, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.softness = (alpha, smoothing)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else autograd fills zeros for all that was kept


def _clip_backward(ctx, dloss: Tensor | None, *_):
    if dloss is None:
        return (None,) * 11
    want = ctx.needs_input_grad[:3]
    grads = _clip_bwd(dloss, *ctx.saved_tensors, *ctx.softness, *want)
    return *(g if wanted else None for g, wanted in zip(grads, want, strict=True)), *[None] * 8


_clip_bwd = register_op(
    "clip_loss_bwd(Tensor dloss, Tensor x, Tensor y, Tensor scale, Tensor? row_ids, Tensor? col_ids, "
    "Tensor? teacher_x, Tensor? teacher_y, Tensor? teacher_scale, Tensor lse, Tensor teacher_lse, Tensor kept, "
    "float alpha, float smoothing, bool want_x, bool want_y, bool want_scale) -> (Tensor, Tensor, Tensor)",
    kernel=_clip_bwd_kernel,
    fake=_clip_bwd_fake,
)
_clip = register_op(
    "clip_loss(Tensor x, Tensor y, Tensor scale, Tensor? row_ids, Tensor? col_ids, Tensor? teacher_x, "
    "Tensor? teacher_y, Tensor? teacher_scale, float alpha, float smoothing, bool keep) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
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
    keep = torch.is_grad_enabled()
    keep = keep and (image_features.requires_grad or text_features.requires_grad or scale.requires_grad)
    return _clip(image_features, text_features, scale, *ids, *teacher, float(label_smoothing), keep)[0]
