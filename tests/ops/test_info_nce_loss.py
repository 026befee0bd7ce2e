# SPDX-License-Identifier: Apache-2.0
"""info_nce_loss: the reference against loops, the kernels against the reference."""

import pytest
import torch
import torch.nn.functional as F
from common import DTYPES, EPS
from contrastive_common import features
from temperature_common import check_accuracy
from torch import Tensor

from fvm_fast.ops import ClassIds, backend, info_nce_loss, info_nce_loss_reference

# queries, negative keys, width: no key, fewer than a tile, a whole and a partial block; one and several of each
SIZES = [(1, 0, 1), (1, 1, 40), (2, 3, 3), (7, 500, 16), (14, 32, 64), (15, 225, 33), (37, 449, 129), (61, 100, 5)]
SEVERAL_BLOCKS = [(300, 700, 17), (283, 1300, 64)]


def ids(n: int, K: int, classes: int = 6) -> ClassIds:
    """Large ids; some keys of no query's class."""
    return ClassIds(*((torch.randint(low, classes, (size,)) - 2) * 2**40 for low, size in ((1, n), (0, K))))


def test_reference_equals_loops() -> None:
    q, k, queue, T = features(4, 5), features(4, 5), features(7, 5), 0.3
    losses = []
    for i in range(4):
        logits = torch.stack([q[i] @ k[i], *(q[i] @ key for key in queue)]) / T
        losses.append(-logits.log_softmax(0)[0])
    torch.testing.assert_close(info_nce_loss_reference(q, k, queue, T), sum(losses) / 4)


def test_reference_of_class_ids_equals_loops() -> None:
    rows, cols = [4, 7, 4, 9], [7, 7, 1, 4, 2]
    q, k, queue, T = features(4, 6), features(4, 6), features(5, 6), 0.5
    losses = []
    for i in range(4):
        log_p = (torch.stack([q[i] @ key for key in (*k, *queue)]) / T).log_softmax(0)
        positives = [j for j, other in enumerate((*rows, *cols)) if other == rows[i]]
        assert i in positives
        losses.append(-sum(log_p[j] for j in positives) / len(positives))
    targets = ClassIds(torch.tensor(rows), torch.tensor(cols))
    torch.testing.assert_close(info_nce_loss_reference(q, k, queue, T, targets=targets), sum(losses) / 4)


def test_reference_equals_the_formulas_of_the_papers() -> None:
    """MoCo's algorithm 1; BLIP's image-text contrast of one direction, in its fine-tuning for retrieval."""
    q, k, queue, T, targets = features(6, 5), features(6, 5), features(9, 5), 0.07, ids(6, 9)
    logits = torch.cat([torch.einsum("nc,nc->n", q, k)[:, None], torch.einsum("nc,ck->nk", q, queue.T)], 1)
    moco = F.cross_entropy(logits / T, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(info_nce_loss_reference(q, k, queue, T), moco)
    positives = torch.eq(targets.rows.view(-1, 1), torch.cat([targets.rows, targets.cols]).view(1, -1)).double()
    similarities = q @ torch.cat([k, queue]).T / T
    blip = -torch.sum(F.log_softmax(similarities, 1) * (positives / positives.sum(1, keepdim=True)), 1).mean()
    torch.testing.assert_close(info_nce_loss_reference(q, k, queue, T, targets=targets), blip)


# ---- kernels against the reference


def eager(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor, temperature: Tensor, targets: ClassIds | None = None
) -> Tensor:
    """What one writes in torch, in the dtype of the features."""
    if targets is None:
        logits = torch.cat([(query * positive_key).sum(1, keepdim=True), query @ negative_keys.T], 1) / temperature
        loss = F.cross_entropy(logits.to(query.dtype), torch.zeros(len(query), dtype=torch.long))
    else:
        logits = (query @ torch.cat([positive_key, negative_keys]).T / temperature).to(query.dtype)
        loss = F.cross_entropy(logits, _shares(targets).to(query.dtype))
    return loss if query.dtype == torch.float64 else loss.float()


def _shares(targets: ClassIds) -> Tensor:
    equal = (targets.rows[:, None] == torch.cat(targets)).double()
    return equal / equal.sum(1, keepdim=True)


def sizes_of_terms(args: list[Tensor], targets: ClassIds | None) -> list[float]:
    """Of the value, the three gradients of features and that of the temperature, before they cancel."""
    q, k, queue, temperature = args
    n, T = len(q), abs(float(temperature))
    if targets is None:
        similarities = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1)
        shares = torch.zeros_like(similarities)
        shares[:, 0] = 1
    else:
        similarities, shares = q @ torch.cat([k, queue]).T, _shares(targets)
    logits = similarities / temperature
    shares = (shares + logits.softmax(1)) / n
    own = 1 if targets is None else n
    largest = float(similarities.abs().max()) / T
    # a probability is off by the rounding of its logit: as much as one of the eight, where logits reach 8
    longest = max(1.0, *(float(x.abs().max()) for x in (q, k))) * (1 + largest / 8)
    dkeys = [float(s.max()) if s.numel() else 0.0 for s in (shares[:, :own].sum(0), shares[:, own:].sum(0))]
    return [
        largest + float(logits.logsumexp(1).abs().max()),
        *(size * longest / T for size in (float(shares.sum(1).max()), *dkeys)),
        float((shares * similarities.abs()).sum()) / T**2 * (1 + largest / 8),
    ]


def check(features_: list[Tensor], temperature: float, dtype: torch.dtype, what: str, targets: ClassIds | None) -> None:
    args = [*features_, torch.tensor(temperature).double()]
    check_accuracy(
        lambda *a: info_nce_loss(*a, targets=targets),
        lambda *a: eager(*a, targets),
        args,
        dtype,
        sizes_of_terms(args, targets),
        f"{what}, temperature {temperature}, targets {targets is not None}",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_exact_as_torch(isa: str, dtype: torch.dtype) -> None:
    for n, K, D in SIZES + SEVERAL_BLOCKS * (dtype != torch.float16):
        args = [features(n, D), features(n, D), features(K, D)]
        for targets in (None, ids(n, K)):
            check(args, 0.1, dtype, f"{n}x{K}x{D}", targets)


@pytest.mark.parametrize("temperature", [0.001, 0.01, 0.5, 1e4, -0.05])
@pytest.mark.parametrize("kind", ["unrelated", "identical", "opposite", "zero", "rising", "falling"])
def test_no_overflow_and_no_underflow(isa: str, kind: str, temperature: float) -> None:
    """Logits far above and far below the positive one; in the queue's order or against it."""
    q, k, queue = features(20, 512), features(20, 512), features(500, 512)
    if kind == "identical":
        q = k = q[:1].repeat(20, 1)
        queue = q[:1].repeat(500, 1)
    elif kind == "opposite":
        k = -q
    elif kind == "zero":
        q, k, queue = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(queue)
    elif kind in ("rising", "falling"):
        queue = q[:1] * torch.linspace(-1, 1, 500)[:, None] * (1 if kind == "rising" else -1)
    for dtype in (torch.float64, torch.float32):
        for targets in (None, ids(20, 500)):
            check([q, k, queue], temperature, dtype, kind, targets)


def test_queries_that_are_told_apart_well(isa: str) -> None:
    """A loss of 1e-6, and the gradients that go with it, to full relative precision: nothing is left to cancel."""
    k, queue = features(50, 64, torch.float32), features(300, 64, torch.float32)
    q = F.normalize(k + 0.01 * torch.randn_like(k), dim=1)
    args = [q, k, queue]

    def run(loss, dtype: torch.dtype) -> list[Tensor]:
        own = [a.to(dtype).requires_grad_() for a in args]
        value = loss(*own, 0.03)
        return [value.detach(), *torch.autograd.grad(value, own[:2])]

    exact = run(info_nce_loss_reference, torch.float64)
    assert 1e-9 < exact[0] < 1e-4
    for got, e in zip(run(info_nce_loss, torch.float32), exact, strict=True):
        assert float((got.double() - e).abs().max()) <= 200 * EPS[torch.float32] * float(e.abs().max())


def test_nothing_to_tell_apart(isa: str) -> None:
    """Without negative keys a query has its own key to choose from, and loses nothing."""
    args = [features(3, 8).requires_grad_(), features(3, 8).requires_grad_(), features(0, 8).requires_grad_()]
    for name in ("native", "torch"):
        with backend(name):
            loss = info_nce_loss(*args, 0.1)
        grads = torch.autograd.grad(loss, args)
        assert loss == 0 and not any(g.any() for g in grads) and grads[2].shape == (0, 8)
