# SPDX-License-Identifier: Apache-2.0
"""clip_loss and siglip_loss: the references against plain formulas, the kernels against those."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from common import DTYPES, EPS
from contrastive_common import TARGETS, class_ids, clip_options, features
from torch import Tensor

from fvm_fast.ops import (
    ClassIds,
    Teacher,
    backend,
    clip_loss,
    clip_loss_reference,
    siglip_loss,
    siglip_loss_reference,
)

SIZES = [(1, 1), (2, 3), (3, 1), (13, 16), (14, 64), (15, 129), (31, 16), (33, 3), (97, 512), (283, 64)]  # rows, width


def in_dtype(options: dict, dtype: torch.dtype) -> dict:
    """The same options with a teacher of another dtype."""
    targets = options.get("targets")
    if isinstance(targets, Teacher):
        targets = targets._replace(image=targets.image.to(dtype), text=targets.text.to(dtype))
    return options | {"targets": targets}


# ---- references against oracles


def test_reference_of_label_smoothing_equals_torch() -> None:
    x, y = features(9, 5), features(9, 5)
    logits, labels = 20 * x @ y.T, torch.arange(9)
    expected = sum(F.cross_entropy(s, labels, label_smoothing=0.3) for s in (logits, logits.T)) / 2
    torch.testing.assert_close(clip_loss_reference(x, y, 20.0, label_smoothing=0.3), expected)


def test_reference_of_class_ids_equals_loops() -> None:
    rows, cols = [4, 4, 7, 9, 5], [4, 7, 7, 4, 5, 1, 2]
    logits = 5 * features(5, 6) @ features(7, 6).T
    losses = []
    for ids, others, S in ((rows, cols, logits), (cols, rows, logits.T)):
        log_p = S.log_softmax(1)
        per_row = []
        for i, own in enumerate(ids):
            positives = [j for j, other in enumerate(others) if other == own]
            if positives:
                per_row.append(-sum(log_p[i, j] for j in positives) / len(positives))
        losses.append(sum(per_row) / len(per_row))
    torch.manual_seed(0)
    x, y = features(5, 6), features(7, 6)
    ids = ClassIds(torch.tensor(rows), torch.tensor(cols))
    torch.testing.assert_close(clip_loss_reference(x, y, 5.0, targets=ids), sum(losses) / 2)
    sign = torch.tensor([[1.0 if a == b else -1.0 for b in cols] for a in rows], dtype=torch.float64)
    pairs = torch.log1p(torch.exp(-sign * (5 * x @ y.T - 1)))
    torch.testing.assert_close(siglip_loss_reference(x, y, 5.0, -1.0, targets=ids), pairs.sum() / 5)


# ---- kernels against the references


def eager_clip(x: Tensor, y: Tensor, scale: Tensor, options: dict) -> Tensor:
    """What torch makes in the dtype of the features."""
    if not options.get("targets") and not options.get("label_smoothing"):
        logits, labels = scale * x @ y.T, torch.arange(len(x))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        return loss if x.dtype == torch.float64 else loss.float()
    return clip_loss_reference(x, y, scale, **in_dtype(options, x.dtype))


def eager_siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, options: dict) -> Tensor:
    if not options:
        logits = scale * x @ y.T + bias
        loss = -F.logsigmoid((2 * torch.eye(len(x), dtype=x.dtype) - 1) * logits).sum() / len(x)
        return loss if x.dtype == torch.float64 else loss.float()
    return siglip_loss_reference(x, y, scale, bias, **options)


def sizes_of_terms(eager, args: list[Tensor]) -> list[float]:
    """How large the terms of value and gradients are before they cancel: what rounding errors go with."""
    x, y, scale, *bias = (a.double() for a in args)
    similarities = x @ y.T
    # the logits as features of unit texts: their gradient is G = dL/dS
    logits = (similarities * scale + sum(bias)).requires_grad_()
    unit, one, no_bias = (
        torch.eye(len(y), dtype=torch.float64),
        torch.tensor(1.0).double(),
        [torch.zeros_like(b) for b in bias],
    )
    loss = eager(logits, unit, one, *no_bias)
    (G,) = torch.autograd.grad(loss, logits)
    # G itself is a difference of a probability and a target: 1 / n each
    G, scale = G.abs() + torch.eye(len(x), len(y)) / min(G.shape), abs(float(scale))
    dx, dy = scale * float(G.sum(1).max()), scale * float(G.sum(0).max())
    return [float((logits.abs().max() + loss).detach()), dx, dy, float((G * similarities.abs()).sum()), float(G.sum())]


def check(ours, eager, args: list[Tensor], dtype: torch.dtype, what: str) -> None:
    """Value and gradients: at most twice torch's error in the same dtype, and eight roundings of the terms.

    The scalars stay in the dtype of the loss, as in training.
    """
    rounded = [a.to(dtype) if a.dim() else a for a in args]

    def run(f, features_dtype: torch.dtype, scalar_dtype: torch.dtype) -> list[Tensor]:
        leaves = [a.to(features_dtype if a.dim() else scalar_dtype).clone().requires_grad_() for a in rounded]
        loss = f(*leaves)
        grads = torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.75))
        return [loss.detach(), *grads]

    scalar_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    with backend("native"):
        got = run(ours, dtype, scalar_dtype)
    assert [t.dtype for t in got] == [scalar_dtype, dtype, dtype, *[scalar_dtype] * (len(args) - 2)]
    same, exact = run(eager, dtype, scalar_dtype), run(eager, torch.float64, torch.float64)
    names, sizes = ["value", "dx", "dy", "dscale", "dbias"], sizes_of_terms(eager, rounded)
    for name, a, b, c, size in zip(names, got, same, exact, sizes, strict=False):
        error, torchs = (float((t.double() - c).abs().max()) for t in (a, b))
        # in float64 torch is the measure, and no better than the kernels
        limit = 1e-12 * size if dtype == torch.float64 else 2 * torchs + 8 * EPS[a.dtype] * size
        assert error <= limit, (
            f"{what}: {name}: error {error:.2e}, expected at most {limit:.2e} (torch makes {torchs:.2e})"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip_loss_is_as_exact_as_torch(isa: str, dtype: torch.dtype) -> None:
    for (n, D), kind in itertools.product(SIZES, TARGETS):
        args = [features(n, D), features(n, D), torch.tensor(20.0).double()]
        options = clip_options(kind, n, n, dtype)
        check(
            lambda *a, o=options: clip_loss(*a, **o),
            lambda *a, o=options: eager_clip(*a, o),
            args,
            dtype,
            f"{n}x{D} {kind}",
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_siglip_loss_is_as_exact_as_torch(isa: str, dtype: torch.dtype) -> None:
    for (n, D), classes in itertools.product(SIZES, (False, True)):
        args = [features(n, D), features(n, D), torch.tensor(20.0).double(), torch.tensor(-8.0).double()]
        options = {"targets": class_ids(n, n, max(n // 3, 2))} if classes else {}
        check(
            lambda *a, o=options: siglip_loss(*a, **o),
            lambda *a, o=options: eager_siglip(*a, o),
            args,
            dtype,
            f"{n}x{D}",
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, m", [(1, 40), (29, 3), (130, 250)])
def test_rectangles(isa: str, dtype: torch.dtype, n: int, m: int) -> None:
    for kind in ("classes", "smooth classes", "teacher"):
        args, options = [features(n, 20), features(m, 20), torch.tensor(9.0).double()], clip_options(kind, n, m, dtype)
        check(lambda *a, o=options: clip_loss(*a, **o), lambda *a, o=options: eager_clip(*a, o), args, dtype, kind)
    options = {"targets": class_ids(n, m, 5)}
    args = [features(n, 20), features(m, 20), torch.tensor(9.0).double(), torch.tensor(-2.0).double()]
    check(lambda *a: siglip_loss(*a, **options), lambda *a: eager_siglip(*a, options), args, dtype, "siglip")


@pytest.mark.parametrize("scale", [100.0, -100.0, 0.0, 1e-4])
def test_any_scale(isa: str, scale: float) -> None:
    """Logits of 200 in a tile: no row and no column is lost to overflow or underflow."""
    x, y = features(60, 4), features(60, 4)
    x[7], y[7] = -y.mean(0), -x.mean(0)  # far from everything
    for dtype in (torch.float64, torch.float32):
        args = [x, y, torch.tensor(scale).double()]
        for kind in TARGETS:
            options = clip_options(kind, 60, 60, dtype)
            check(lambda *a, o=options: clip_loss(*a, **o), lambda *a, o=options: eager_clip(*a, o), args, dtype, kind)
        args.append(torch.tensor(-10.0).double())
        check(siglip_loss, lambda *a: eager_siglip(*a, {}), args, dtype, "siglip")


FEATURES = {
    "unrelated": lambda: (features(40, 3), features(40, 3)),
    "opposite": lambda: (lambda x: (x, -x))(features(40, 3)),
    "identical": lambda: (features(1, 3).expand(40, 3), features(1, 3).expand(40, 3)),
    "zero": lambda: (torch.zeros(40, 3).double(), torch.zeros(40, 3).double()),
}


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_no_overflow_and_no_underflow(isa: str, kind: str, scale: float) -> None:
    """Logits of a thousand, of which those of a row may be all far below zero, or far above."""
    args = [*FEATURES[kind](), torch.tensor(scale).double()]
    for dtype in (torch.float32, torch.bfloat16):
        for options in ({}, {"label_smoothing": 0.1}):
            check(lambda *a, o=options: clip_loss(*a, **o), lambda *a, o=options: eager_clip(*a, o), args, dtype, kind)
        for bias in (-10.0, 0.0):
            more = [*args, torch.tensor(bias).double()]
            check(siglip_loss, lambda *a: eager_siglip(*a, {}), more, dtype, f"siglip {kind}")


def test_pairs_that_are_told_apart_well(isa: str) -> None:
    """A loss of 1e-5 is a small difference of large numbers, and has to be right for all that."""
    x = features(100, 64)
    y = F.normalize(x + 0.01 * torch.randn_like(x), dim=1)
    for ours, reference, scalars in (
        (clip_loss, clip_loss_reference, (25.0,)),
        (siglip_loss, siglip_loss_reference, (50.0, -35.0)),
    ):
        got, same, exact = (
            f(x.to(dtype), y.to(dtype), *scalars)
            for f, dtype in ((ours, torch.float32), (reference, torch.float32), (reference, torch.float64))
        )
        assert 1e-7 < exact < 1e-3
        assert abs(got - exact) <= 2 * abs(same - exact) + 2 * EPS[torch.float32] * (1 if ours is clip_loss else exact)


def test_nothing_to_learn_from_rows_without_positives(isa: str) -> None:
    x, y = (features(5, 8).requires_grad_() for _ in range(2))
    loss = clip_loss(x, y, 10.0, targets=ClassIds(torch.arange(5), torch.arange(5) + 10))
    dx, dy = torch.autograd.grad(loss, (x, y))
    assert loss == 0 and not dx.any() and not dy.any()


def test_several_chunks_of_rows(isa: str) -> None:
    """Enough rows for two chunks of the backward and many stripes of the forward."""
    args = [features(1100, 5), features(1100, 5), torch.tensor(12.0).double()]
    check(clip_loss, lambda *a: eager_clip(*a, {}), args, torch.float32, "clip")
    check(siglip_loss, lambda *a: eager_siglip(*a, {}), [*args, torch.tensor(-5.0).double()], torch.float32, "siglip")
