# SPDX-License-Identifier: Apache-2.0
"""SimCLR's loss: each view of an image finds the other among all views of the batch but itself.

With ``z = [z1; z2]`` [2N, D], ``S = z @ z.T / temperature`` and ``p(i)`` the other view of row i::

    nt_xent_loss = 1/2N sum_i (logsumexp_{j != i} S_ij - S_ip(i))

(Chen et al. 2020, https://arxiv.org/abs/2002.05709; lightly's mean over 2N rows: the SimCLR repository adds the means
of the two halves, which is twice as much.) S is symmetric: its tiles above the diagonal are made, once forward and once
backward, and never kept. That is half the work of the dense formula, and memory is O(N D).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fvm_fast.ops._backend import number, use_native
from fvm_fast.ops._register import register_op
from fvm_fast.ops.contrastive_loss._blocks import nt_xent_backward, nt_xent_forward
from fvm_fast.ops.contrastive_loss._targets import (
    check_features,
    check_reduction,
    loss_dtype,
    temperature_scalar,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def nt_xent_loss_reference(
    z1: Tensor,
    z2: Tensor,
    temperature: Tensor | float,
    *,
    group: ProcessGroup | None = None,
    grad_reduction: str = "mean",
) -> Tensor:
    """:func:`nt_xent_loss` with the matrix of logits; in a group every process computes the joined batch."""
    if group is not None:
        from fvm_fast.ops.contrastive_loss._joined import join

        z1, z2, _ = join("nt_xent_loss", z1, z2, None, group, grad_reduction)
    z = torch.cat([z1, z2]).to(loss_dtype(z1))
    with torch.autocast(z.device.type, enabled=False):
        logits = z @ z.T / temperature
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        positive = logits.diagonal(len(z1)).repeat(2)
        return (logits.masked_fill(itself, -torch.inf).logsumexp(1) - positive).mean()


# ---- the op


def _nt_xent_kernel(z, temperature):
    return nt_xent_forward(z.contiguous(), 1 / number(temperature, z))[:2]


def _nt_xent_fake(z, temperature):
    return z.new_empty((), dtype=loss_dtype(z)), z.new_empty(z.shape[0], dtype=torch.float64)


def _nt_xent_bwd_kernel(dloss, z, temperature, lse, want_z, want_temperature):
    scale = 1 / number(temperature, z)
    dz, dscale = nt_xent_backward(z.contiguous(), lse, scale, 1 / z.shape[0], number(dloss, z), want_z)
    return (
        dz.to(z.dtype) if want_z else z.new_empty(0),
        dscale.mul_(-(scale**2)) if want_temperature else temperature.new_empty(0),
    )


def _nt_xent_bwd_fake(dloss, z, temperature, lse, want_z, want_temperature):
    return z.new_empty(z.shape if want_z else (0,)), temperature.new_empty(() if want_temperature else (0,))


def _nt_xent_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else autograd fills zeros for the log-sum-exps


def _nt_xent_backward(ctx, dloss: Tensor | None, _):
    if dloss is None:
        return None, None
    want = ctx.needs_input_grad
    grads = _nt_xent_bwd(dloss, *ctx.saved_tensors, *want)
    return tuple(g if wanted else None for g, wanted in zip(grads, want, strict=True))


_nt_xent_bwd = register_op(
    "nt_xent_loss_bwd(Tensor dloss, Tensor z, Tensor temperature, Tensor lse, bool want_z, bool want_temperature) -> "
    "(Tensor, Tensor)",
    kernel=_nt_xent_bwd_kernel,
    fake=_nt_xent_bwd_fake,
)
_nt_xent = register_op(
    "nt_xent_loss(Tensor z, Tensor temperature) -> (Tensor, Tensor)",
    kernel=_nt_xent_kernel,
    fake=_nt_xent_fake,
    setup_context=_nt_xent_setup,
    backward=_nt_xent_backward,
)


def nt_xent_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: Tensor | float,
    *,
    group: ProcessGroup | None = None,
    grad_reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of finding each row's other view, without the 2N x 2N matrix of logits.

    Args:
        z1, z2: [N, D], two views of the same N images in the same order, of one floating dtype; used as given:
            normalise them first. Autocast does not touch them.
        temperature: divides the similarities: a number above 0 (constant) or a tensor [] or [1].
        group, grad_reduction: as in :func:`clip_loss`; ``temperature`` is treated like ``logit_scale``. All rows of
            the joined batch are candidates; the two views of an image are in one process.

    Returns:
        The loss, 0-d float32 (float64 for float64): the mean over 2N rows. A batch of one image has nothing to tell
        its views apart from: its loss is 0.

    Raises:
        ValueError: shapes or devices that do not fit, no row at all, a number for the temperature that is not above 0.
        TypeError: mixed dtypes.
    """
    check_features("nt_xent_loss", z1, z2, ("z1", "z2"))
    if len(z1) != len(z2):
        raise ValueError(f"nt_xent_loss: expected two views of as many images, got {len(z1)} rows and {len(z2)}")
    if len(z1) == 0 and group is None:
        raise ValueError("nt_xent_loss: expected at least one pair of views to take the mean over, got none")
    check_reduction("nt_xent_loss", grad_reduction)
    temperature = temperature_scalar("nt_xent_loss", temperature, z1)
    if not use_native("nt_xent_loss", z1, z2, temperature) or z1.shape[1] == 0:
        return nt_xent_loss_reference(z1, z2, temperature, group=group, grad_reduction=grad_reduction)
    if group is not None:
        from fvm_fast.ops.contrastive_loss._joined_nt_xent import joined_nt_xent_loss

        return joined_nt_xent_loss(z1, z2, temperature, group=group, grad_reduction=grad_reduction)
    return _nt_xent(torch.cat([z1, z2]), temperature)[0]
