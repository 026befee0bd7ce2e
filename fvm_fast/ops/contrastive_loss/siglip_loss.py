# SPDX-License-Identifier: Apache-2.0
"""SigLIP's loss: each pair of the batch is told to match or not, on its own.

With ``S = logit_scale * image_features @ text_features.T + logit_bias`` [n, m], z = 1 for positives, -1 for others::

    siglip_loss = 1/n sum_ij log(1 + exp(-z_ij S_ij))

(Zhai et al. 2023, https://arxiv.org/abs/2303.15343.) The gradient of a pair needs that pair alone, so that the forward
makes the gradients on its way, in tiles: 6 n m D operations in all, and memory O((n + m) D).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fvm_fast.ops._backend import number, use_native
from fvm_fast.ops._register import register_op
from fvm_fast.ops.contrastive_loss._blocks import siglip_block
from fvm_fast.ops.contrastive_loss._targets import (
    ClassIds,
    check_features,
    check_reduction,
    check_sizes,
    check_targets,
    loss_dtype,
    scalar,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def siglip_loss_reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    targets: ClassIds | None = None,
    group: ProcessGroup | None = None,
    grad_reduction: str = "mean",
) -> Tensor:
    """:func:`siglip_loss` with the matrix of logits; in a group every process computes the joined batch."""
    if group is not None:
        from fvm_fast.ops.contrastive_loss._joined import join

        image_features, text_features, targets = join(
            "siglip_loss", image_features, text_features, targets, group, grad_reduction
        )
    dtype = loss_dtype(image_features)
    with torch.autocast(image_features.device.type, enabled=False):
        logits = image_features.to(dtype) @ text_features.to(dtype).T * logit_scale + logit_bias
        if targets is None:
            positive = torch.eye(*logits.shape, dtype=dtype, device=logits.device)
        else:
            positive = (targets.rows[:, None] == targets.cols).to(dtype)
        return -F.logsigmoid((2 * positive - 1) * logits).sum() / len(logits)


# ---- the op


def _siglip_kernel(x, y, scale, bias, row_ids, col_ids, want_x, want_y):
    loss, slopes, dx, dy = siglip_block(
        x.contiguous(),
        y.contiguous(),
        row_ids,
        col_ids,
        number(scale, x),
        number(bias, x),
        1 / x.shape[0],
        want_x,
        want_y,
    )
    return loss, slopes, scale.new_empty(0) if dx is None else dx, scale.new_empty(0) if dy is None else dy


def _siglip_fake(x, y, scale, bias, row_ids, col_ids, want_x, want_y):
    shapes = ((), (2,), x.shape if want_x else (0,), y.shape if want_y else (0,))
    return tuple(scale.new_empty(shape) for shape in shapes)


# The features and scalars are arguments so that a second derivative finds its way here, to be refused.
def _siglip_bwd_kernel(dloss, x, y, scale, bias, slopes, dx, dy, want_x, want_y, want_scale, want_bias):
    return (
        (dx * dloss).to(x.dtype) if want_x else x.new_empty(0),
        (dy * dloss).to(y.dtype) if want_y else y.new_empty(0),
        dloss * slopes[0] if want_scale else scale.new_empty(0),
        dloss * slopes[1] if want_bias else bias.new_empty(0),
    )


def _siglip_bwd_fake(dloss, x, y, scale, bias, slopes, dx, dy, want_x, want_y, want_scale, want_bias):
    wanted = (want_x, want_y, want_scale, want_bias)
    return tuple(t.new_empty(t.shape if want else (0,)) for t, want in zip((x, y, scale, bias), wanted, strict=True))


def _siglip_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else autograd fills zeros for the gradients that the forward has made


def _siglip_backward(ctx, dloss: Tensor | None, *_):
    if dloss is None:
        return (None,) * 8
    want = ctx.needs_input_grad[:4]
    grads = _siglip_bwd(dloss, *ctx.saved_tensors, *want)
    return *(g if wanted else None for g, wanted in zip(grads, want, strict=True)), *[None] * 4


_siglip_bwd = register_op(
    "siglip_loss_bwd(Tensor dloss, Tensor x, Tensor y, Tensor scale, Tensor bias, Tensor slopes, Tensor dx, Tensor dy, "
    "bool want_x, bool want_y, bool want_scale, bool want_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_siglip_bwd_kernel,
    fake=_siglip_bwd_fake,
)
_siglip = register_op(
    "siglip_loss(Tensor x, Tensor y, Tensor scale, Tensor bias, Tensor? row_ids, Tensor? col_ids, bool want_x, "
    "bool want_y) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_siglip_kernel,
    fake=_siglip_fake,
    setup_context=_siglip_setup,
    backward=_siglip_backward,
)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    targets: ClassIds | None = None,
    group: ProcessGroup | None = None,
    grad_reduction: str = "mean",
) -> Tensor:
    """Sigmoid loss of all image-text pairs, without the n x m matrix of logits.

    Args:
        image_features: [n, D], text_features: [m, D], of one floating dtype; used as given: normalise them first.
            Autocast does not touch them.
        logit_scale, logit_bias: of the logits, the scale already exponentiated: numbers (constant) or tensors [], [1].
        targets: None (pair (i, i) is the positive one, n = m) or :class:`ClassIds` (pairs of equal ids are).
        group, grad_reduction: as in :func:`clip_loss`; ``logit_bias`` is treated like ``logit_scale``.

    Returns:
        The loss, 0-d float32 (float64 for float64): the sum over pairs divided by n, as in open_clip.

    Raises:
        ValueError: shapes, sizes or devices that do not fit, or no pair at all. TypeError: mixed dtypes, a ``Teacher``.
    """
    check_features("siglip_loss", image_features, text_features, ("image_features", "text_features"))
    if targets is not None and not isinstance(targets, ClassIds):
        raise TypeError(
            f"siglip_loss: expected targets to be None or ClassIds, got {type(targets).__name__}; "
            "soft targets belong to clip_loss"
        )
    check_targets("siglip_loss", targets, image_features, text_features)
    check_reduction("siglip_loss", grad_reduction)
    scale = scalar("siglip_loss", "logit_scale", logit_scale, image_features)
    bias = scalar("siglip_loss", "logit_bias", logit_bias, image_features)
    if group is None:
        check_sizes("siglip_loss", targets, len(image_features), len(text_features))
    args = (image_features, text_features, scale, bias)
    if not use_native("siglip_loss", *args) or image_features.shape[1] == 0:
        return siglip_loss_reference(*args, targets=targets, group=group, grad_reduction=grad_reduction)
    if group is not None:
        from fvm_fast.ops.contrastive_loss._joined import joined_siglip_loss

        return joined_siglip_loss(*args, targets=targets, group=group, grad_reduction=grad_reduction)
    ids = targets if targets is not None else (None, None)
    want = torch.is_grad_enabled()
    want_x, want_y = want and image_features.requires_grad, want and text_features.requires_grad
    return _siglip(*args, *ids, want_x, want_y)[0]
