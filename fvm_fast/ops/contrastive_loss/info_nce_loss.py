# SPDX-License-Identifier: Apache-2.0
"""MoCo's loss: each query finds its positive key among the keys of a long queue.

With ``S_i+ = query_i . positive_key_i / temperature`` and ``S_ij = query_i . negative_keys_j / temperature`` [n, K]::

    info_nce_loss = 1/n sum_i (log(exp(S_i+) + sum_j exp(S_ij)) - S_i+)

(van den Oord et al. 2018, https://arxiv.org/abs/1807.03748; He et al. 2020, https://arxiv.org/abs/1911.05722; one
direction.) The gradient by query i is that of attention with the queue as keys and as values,
``(sum_j p_ij negative_keys_j - (1 - p_i+) positive_key_i) / (n temperature)``: one pass over the queue, in tiles, makes
it together with the loss, 4 n K D operations in all, and the backward is O(n D). Memory is O((n + K) D).

With ``targets`` the columns are, as in BLIP (Li et al. 2022, https://arxiv.org/abs/2201.12086), the positive keys of
all queries and then the queue, ``K+ = [positive_key; negative_keys]`` [n + K, D], each with a share q_ij of row i::

    info_nce_loss = 1/n sum_i (logsumexp_j S_ij - sum_j q_ij S_ij),    S = query @ K+.T / temperature
"""

from __future__ import annotations

import torch
from torch import Tensor

from fvm_fast.ops._backend import number, on_cuda, use_native
from fvm_fast.ops._register import register_op
from fvm_fast.ops.contrastive_loss._blocks import Number, info_nce_backward, info_nce_forward
from fvm_fast.ops.contrastive_loss._targets import (
    ClassIds,
    check_features,
    check_targets,
    loss_dtype,
    temperature_scalar,
)


def info_nce_loss_reference(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor,
    temperature: Tensor | float,
    *,
    targets: ClassIds | None = None,
) -> Tensor:
    """:func:`info_nce_loss` with the matrix of logits."""
    q, positive, negatives = (x.to(loss_dtype(query)) for x in (query, positive_key, negative_keys))
    with torch.autocast(q.device.type, enabled=False):
        if targets is None:
            logits = torch.cat([(q * positive).sum(1, keepdim=True), q @ negatives.T], 1) / temperature
            return (logits.logsumexp(1) - logits[:, 0]).mean()
        logits = q @ torch.cat([positive, negatives]).T / temperature
        equal = (targets.rows[:, None] == torch.cat([targets.rows, targets.cols])).to(logits.dtype)
        return (logits.logsumexp(1) - (equal / equal.sum(1, keepdim=True) * logits).sum(1)).mean()


# ---- several positives


def _classes(row_ids: Tensor, col_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers below n of the classes of the rows [n] and of the columns [K], n where no row has a column's id; and how
    many columns each row's class has [n], among the rows' own and the K.
    """
    n, ordered = len(row_ids), row_ids.sort().values
    rows, places = (torch.searchsorted(ordered, ids.contiguous()) for ids in (row_ids, col_ids))
    cols = torch.where(ordered[places.clamp(max=n - 1)] == col_ids, places, n)
    classes = torch.cat([rows, cols])
    counts = classes.new_zeros(n + 1).scatter_add_(0, classes, torch.ones_like(classes))
    return rows, cols, counts[rows]


def _add_by_class(sums: Tensor, x: Tensor, classes: Tensor) -> None:
    """Add the rows of ``x`` [m, D] to ``sums`` [n, D] by their classes [m]; those of class n are left out."""
    n = len(sums)
    if on_cuda(x):  # where which ones to leave out is known to the device alone: they get sums of their own
        places = torch.where(classes < n, classes, torch.arange(n, n + len(x), device=x.device))
        padded = sums.new_zeros(n + len(x), x.shape[1])
        # index_put_ adds in a fixed order on CUDA, which index_add_ does not
        sums += padded.index_put_((places,), x.to(sums.dtype), accumulate=True)[:n]
        return
    kept = (classes < n).nonzero().squeeze(1)
    sums.index_add_(0, classes[kept], x[kept].to(sums.dtype))


def _mean_positives(positive_key: Tensor, negative_keys: Tensor, row_ids: Tensor, col_ids: Tensor) -> Tensor:
    """For each row [n, D] the mean of the keys with its id, in the loss's dtype."""
    rows, cols, counts = _classes(row_ids, col_ids)
    sums = torch.zeros_like(positive_key, dtype=loss_dtype(positive_key))
    _add_by_class(sums, positive_key, rows)
    _add_by_class(sums, negative_keys, cols)
    return sums[rows] / counts[:, None]


def _several_positives(query, positive_key, negative_keys, scale, row_ids, col_ids, want_pull):
    """As :func:`info_nce_forward`, over the columns of all."""
    _, stats, pull = info_nce_forward(query, None, positive_key, scale, want_pull)
    if len(negative_keys):
        _, more, more_pull = info_nce_forward(query, None, negative_keys, scale, want_pull)
        lse = torch.logaddexp(stats[2], more[2])
        if want_pull:
            pull = pull * (stats[2] - lse).exp()[:, None] + more_pull * (more[2] - lse).exp()[:, None]
        stats[2] = lse
    target = _mean_positives(positive_key, negative_keys, row_ids, col_ids)
    stats[0] = stats[2] - (query.double() * target.double()).sum(1) * scale
    loss = stats[0].mean().to(target.dtype, copy=True)
    return loss, stats, (pull - target).to(target.dtype) if want_pull else None


# ---- the op


def _info_nce_kernel(query, positive_key, negative_keys, temperature, row_ids, col_ids, want_pull):
    features = (query.contiguous(), positive_key.contiguous(), negative_keys.contiguous())
    scale = 1 / number(temperature, query)
    if row_ids is None:
        loss, stats, pull = info_nce_forward(*features, scale, want_pull)
    else:
        loss, stats, pull = _several_positives(*features, scale, row_ids, col_ids, want_pull)
    return loss, stats, loss.new_empty(0) if pull is None else pull


def _info_nce_fake(query, positive_key, negative_keys, temperature, row_ids, col_ids, want_pull):
    return (
        temperature.new_empty(()),
        temperature.new_empty((3, query.shape[0]), dtype=torch.float64),
        temperature.new_empty(query.shape if want_pull else (0,)),
    )


def _info_nce_bwd_kernel(
    dloss, query, positive_key, negative_keys, temperature, row_ids, col_ids, stats, pull, want_query, want_positive,
    want_negatives, want_temperature,
):  # fmt: skip
    scale = 1 / number(temperature, query)
    dloss = number(dloss, query)
    factor = dloss * scale / len(query)
    rows = (
        _Rows(query, stats[2], row_ids, col_ids) if want_negatives or (want_positive and row_ids is not None) else None
    )
    dquery, dpositive, dnegatives, dtemperature = (x.new_empty(0) for x in (query, query, query, temperature))
    if want_query:
        dquery = (pull * factor).to(query.dtype)
    if want_positive and row_ids is None:
        dpositive = (query * (stats[1:2].T * -factor)).to(query.dtype)
    elif want_positive:
        dpositive = rows.key_gradient(positive_key, rows.ids, scale, dloss)
    if want_negatives:
        dnegatives = rows.key_gradient(negative_keys, rows.negative_ids, scale, dloss)
    if want_temperature:
        dtemperature = ((pull * query).sum(dtype=torch.float64) * (-factor * scale)).to(temperature.dtype)
    return dquery, dpositive, dnegatives, dtemperature


class _Rows:
    """What gradients of keys need to know of the queries: their log-sum-exps, and which keys are their positives."""

    def __init__(self, query: Tensor, lse: Tensor, row_ids: Tensor | None, col_ids: Tensor | None) -> None:
        self.query, self.lse = query.contiguous(), lse
        self.ids = self.negative_ids = self.share = None
        if row_ids is not None:
            rows, cols, counts = _classes(row_ids, col_ids)
            self.ids, self.share, self.negative_ids = rows.int(), 1 / counts.double(), cols.int()

    def key_gradient(self, keys: Tensor, ids: Tensor | None, scale: Number, dloss: Number) -> Tensor:
        """Gradient [m, D] of keys [m, D] with these ids."""
        targets = None if ids is None else (self.ids, ids, self.share)
        return info_nce_backward(self.query, keys.contiguous(), targets, self.lse, scale, dloss).to(keys.dtype)


def _info_nce_bwd_fake(
    dloss, query, positive_key, negative_keys, temperature, row_ids, col_ids, stats, pull, want_query, want_positive,
    want_negatives, want_temperature,
):  # fmt: skip
    return (
        query.new_empty(query.shape if want_query else (0,)),
        query.new_empty(query.shape if want_positive else (0,)),
        query.new_empty(negative_keys.shape if want_negatives else (0,)),
        temperature.new_empty(() if want_temperature else (0,)),
    )


def _info_nce_setup(ctx, inputs, output) -> None:
    query, positive_key, negative_keys, temperature, row_ids, col_ids, _ = inputs
    # A queue without gradients is not kept: it may be overwritten before the backward, as MoCo does.
    kept = negative_keys if ctx.needs_input_grad[2] else None
    ctx.save_for_backward(query, positive_key, kept, temperature, row_ids, col_ids, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else autograd fills zeros for what the forward has prepared


def _info_nce_backward(ctx, dloss: Tensor | None, *_):
    if dloss is None:
        return (None,) * 7
    want = ctx.needs_input_grad[:4]
    grads = _info_nce_bwd(dloss, *ctx.saved_tensors, *want)
    return *(g if wanted else None for g, wanted in zip(grads, want, strict=True)), None, None, None


_info_nce_bwd = register_op(
    "info_nce_loss_bwd(Tensor dloss, Tensor query, Tensor positive_key, Tensor? negative_keys, Tensor temperature, "
    "Tensor? row_ids, Tensor? col_ids, Tensor stats, Tensor pull, bool want_query, bool want_positive, "
    "bool want_negatives, bool want_temperature) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_info_nce_bwd_kernel,
    fake=_info_nce_bwd_fake,
)
_info_nce = register_op(
    "info_nce_loss(Tensor query, Tensor positive_key, Tensor negative_keys, Tensor temperature, Tensor? row_ids, "
    "Tensor? col_ids, bool want_pull) -> (Tensor, Tensor, Tensor)",
    kernel=_info_nce_kernel,
    fake=_info_nce_fake,
    setup_context=_info_nce_setup,
    backward=_info_nce_backward,
)


def info_nce_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor,
    temperature: Tensor | float,
    *,
    targets: ClassIds | None = None,
) -> Tensor:
    """Cross-entropy of finding each query's positive key, without the n x K matrix of logits.

    Args:
        query, positive_key: [n, D]; negative_keys: [K, D], K = 0 included; of one floating dtype; used as given:
            normalise them first. Autocast does not touch them. Keys that require no gradient cost no backward pass, and
            such ``negative_keys`` may be overwritten right after the call.
        temperature: divides the similarities: a number above 0 (constant) or a tensor [] or [1].
        targets: None (row i's columns are its own key and the negative ones, as in MoCo) or
            ``ClassIds(rows [n], cols [K])``: ids of the queries, which their positive keys share, and of the negative
            keys. Then every row has all n positive keys and all K others as columns, as in BLIP, and those of the
            row's id are its positives, in equal parts: its own key always is one.

    Returns:
        The loss, 0-d float32 (float64 for float64): the mean over the queries.

    Raises:
        ValueError: shapes, sizes or devices that do not fit, no query at all, a number for the temperature that is not
        above 0. TypeError: mixed dtypes, targets of another kind.
    """
    check_features("info_nce_loss", query, positive_key, ("query", "positive_key"))
    check_features("info_nce_loss", query, negative_keys, ("query", "negative_keys"))
    if len(query) != len(positive_key):
        raise ValueError(
            f"info_nce_loss: expected one positive key for each query, got {len(query)} and {len(positive_key)}"
        )
    if len(query) == 0:
        raise ValueError("info_nce_loss: expected at least one query to take the mean over, got none")
    if targets is not None and not isinstance(targets, ClassIds):
        raise TypeError(f"info_nce_loss: expected targets to be None or ClassIds, got {type(targets).__name__}")
    check_targets("info_nce_loss", targets, query, negative_keys)
    temperature = temperature_scalar("info_nce_loss", temperature, query)
    args = (query, positive_key, negative_keys, temperature)
    if not use_native("info_nce_loss", *args) or query.shape[1] == 0:
        return info_nce_loss_reference(*args, targets=targets)
    ids = (None, None) if targets is None else targets
    want_pull = torch.is_grad_enabled() and (query.requires_grad or temperature.requires_grad)
    return _info_nce(*args, *ids, want_pull)[0]
