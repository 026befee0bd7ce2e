# SPDX-License-Identifier: Apache-2.0
"""nt_xent_loss of a batch that the processes of a group hold in parts.

Each process keeps its rows and takes them against every block of rows that comes by: its own, of which the triangle
above the diagonal is enough, and the others, which have no positives for it. The gradient of row i is the sum over j of
``G_ij z_j`` with ``G_ij = w (exp(S_ij - lse_i) + exp(S_ij - lse_j))``: it asks for the other row's log-sum-exp and
nothing else. So the log-sum-exps travel with the features, and no gradient travels home. A pair of processes makes its
block of logits once on either side: half as much work again as if one of them served both, and the ring is spared a
float32 gradient of every row at every step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fvm_fast.ops._backend import number
from fvm_fast.ops.contrastive_loss._blocks import (
    Side,
    Softness,
    clip_block_backward,
    clip_block_forward,
    nt_xent_backward,
    nt_xent_forward,
)
from fvm_fast.ops.contrastive_loss._joined import refuse_graph
from fvm_fast.ops.contrastive_loss._ring import Ring
from fvm_fast.ops.contrastive_loss._targets import check_sizes, loss_dtype, row_numbers


def _sides(rows: Tensor, columns: Tensor, weight: float) -> tuple[Side, Side]:
    """A block without positives as CLIP's kernels take it; each row and each column has ``weight``."""
    ids = row_numbers(len(rows) + len(columns), rows.device).split([len(rows), len(columns)])
    sides = []
    for features, own_ids in zip((rows, columns), ids, strict=True):
        weights = torch.zeros(3, len(features), dtype=torch.float64, device=rows.device)
        weights[0] = weight
        sides.append(Side(features, own_ids, weights, None))
    return tuple(sides)


class _JoinedNtXentLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, temperature, group, factor):
        ring = Ring(group, len(z), device=z.device)
        (sizes,) = ring.sizes
        total = sum(sizes)
        check_sizes("nt_xent_loss in a group", None, total, total)
        z, scale, softness = z.contiguous(), 1 / number(temperature, z), Softness(0.0, 1.0, 0.0, total, total)
        lse = torch.full((len(z),), -torch.inf, dtype=torch.float64, device=z.device)
        positive_sum = lse.new_zeros(1)

        def visit(fixed, carried):
            (others,) = fixed
            if len(z) == 0 or len(others) == 0:
                return
            if others is z:
                _, block_lse, block_sum = nt_xent_forward(z, scale)
                positive_sum.add_(block_sum)
            else:
                block_lse, _, _ = clip_block_forward(*_sides(z, others, 1 / total), scale, softness)
            torch.logaddexp(lse, block_lse, out=lse)

        ring.turn(sizes, [z], [], visit)
        ctx.save_for_backward(z, lse, temperature)
        ctx.ring, ctx.softness, ctx.factor = ring, softness, factor
        return (ring.sum(lse.sum() - 2 * positive_sum)[0] / total).to(loss_dtype(z))

    @staticmethod
    def backward(ctx, dloss):
        refuse_graph("nt_xent_loss")
        z, lse, temperature = ctx.saved_tensors
        want_z, want_temperature = ctx.needs_input_grad[:2]
        scale, dloss, total = 1 / number(temperature, z), number(dloss, z), ctx.softness.rows
        dz = torch.zeros_like(z, dtype=loss_dtype(z))
        dscale = lse.new_zeros(1)

        def visit(fixed, carried):
            others, other_lse = fixed
            if len(z) == 0 or len(others) == 0:
                return
            if others is z:
                block_dz, block_dscale = nt_xent_backward(z, lse, scale, 1 / total, dloss, want_z)
            else:
                sides = _sides(z, others, 1 / total)
                block_dz, _, block_dscale = clip_block_backward(
                    *sides, lse, other_lse, scale, dloss, ctx.softness, want_z, False
                )
                block_dscale /= 2  # the other process counts these pairs, too
            if want_z:
                dz.add_(block_dz)
            dscale.add_(block_dscale)

        ctx.ring.turn(ctx.ring.sizes[0], [z, lse], [], visit)
        dtemperature = (ctx.ring.sum(dscale)[0] * -(scale**2)).to(temperature.dtype)
        return (dz * ctx.factor).to(z.dtype) if want_z else None, dtemperature if want_temperature else None, None, None


@torch.compiler.disable
def joined_nt_xent_loss(
    z1: Tensor, z2: Tensor, temperature: Tensor, *, group: dist.ProcessGroup, grad_reduction: str
) -> Tensor:
    """:func:`nt_xent_loss` of the joined batch; arguments are checked but for the sizes of all."""
    factor = dist.get_world_size(group) if grad_reduction == "mean" else 1
    return _JoinedNtXentLoss.apply(torch.cat([z1, z2]), temperature, group, factor)
