# SPDX-License-Identifier: Apache-2.0
"""info_nce_loss as an operator of torch: derivatives, compilation, memory, threads, bad input."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from common import assert_same_on_any_threads, value_and_grads
from contrastive_common import features
from processes_common import extra_bytes
from torch import Tensor
from torch.func import grad, jvp, vmap

from fvm_fast.ops import ClassIds, Teacher, backend, info_nce_loss, info_nce_loss_reference


def leaves(n: int, K: int, D: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, their keys, a queue and a temperature, all requiring gradients."""
    temperature = torch.tensor([0.3], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    tensors = (*(features(rows, D, dtype) for rows in (n, n, K)), temperature)
    return [t.requires_grad_() for t in tensors]


def ids(n: int, K: int) -> ClassIds:
    return ClassIds(torch.randint(3, (n,)), torch.randint(-1, 3, (K,)))


# ---- derivatives


@pytest.mark.parametrize("n, K", [(1, 0), (4, 6)])
def test_gradcheck(n: int, K: int) -> None:
    for targets in (None, ids(n, K)):
        with backend("native"):
            assert torch.autograd.gradcheck(lambda *a, t=targets: info_nce_loss(*a, targets=t) * 1.5, leaves(n, K, 3))


def test_every_subset_of_requires_grad() -> None:
    args = [t.detach() for t in leaves(20, 30, 6, torch.float32)]
    for targets in (None, ids(20, 30)):
        _, expected = value_and_grads(lambda *a, t=targets: info_nce_loss_reference(*a, targets=t), args, torch.float32)
        for flags in itertools.product([False, True], repeat=4):
            own = [a.clone().requires_grad_(flag) for a, flag in zip(args, flags, strict=True)]
            with backend("native"):
                loss = info_nce_loss(*own, targets=targets)
            assert loss.requires_grad == any(flags)
            if any(flags):
                loss.backward()
            for leaf, flag, e in zip(own, flags, expected, strict=True):
                assert (leaf.grad is not None) == flag
                if flag:
                    torch.testing.assert_close(leaf.grad, e)


def test_the_queue_may_be_overwritten_before_the_backward() -> None:
    """MoCo puts the batch's keys into its queue between the two passes."""
    q, k, queue, _ = leaves(6, 9, 5)
    queue = queue.detach()
    (expected,) = torch.autograd.grad(info_nce_loss_reference(q, k, queue.clone(), 0.2), q)
    for targets in (None, ClassIds(torch.arange(6), torch.arange(9) + 6)):
        own = queue.clone()
        loss = info_nce_loss(q, k.detach(), own, 0.2, targets=targets)
        own.zero_()
        (got,) = torch.autograd.grad(loss, q)
        if targets is None:
            torch.testing.assert_close(got, expected)
        assert got.isfinite().all() and got.any()


def test_numbers_for_the_temperature() -> None:
    args = [t.detach() for t in leaves(6, 7, 4, torch.float32)[:3]]
    for temperature in (torch.tensor(0.3), torch.tensor([0.3]), torch.tensor([0.3]).double()):
        torch.testing.assert_close(info_nce_loss(*args, temperature), info_nce_loss(*args, 0.3))


def test_second_derivative_says_what_to_do() -> None:
    for which in range(4):
        args = leaves(4, 5, 3)
        (first,) = torch.autograd.grad(info_nce_loss(*args), args[which], create_graph=True)
        with pytest.raises(RuntimeError, match=r"info_nce_loss: .*backend\('torch'\)"):
            first.sum().backward()
    with backend("torch"):
        assert torch.autograd.gradgradcheck(info_nce_loss, leaves(4, 5, 3))


def test_transforms_take_the_reference() -> None:
    q, k, queue = features(5, 4), features(5, 4), features(6, 4)
    expected = grad(info_nce_loss_reference)(q, k, queue, 0.3)
    torch.testing.assert_close(grad(info_nce_loss)(q, k, queue, 0.3), expected)
    batched = vmap(lambda a: info_nce_loss(a, k, queue, 0.3))(torch.stack([q, k]))
    torch.testing.assert_close(batched[1], info_nce_loss_reference(k, k, queue, 0.3))
    _, tangent = jvp(lambda a: info_nce_loss(a, k, queue, 0.3), (q,), (k,))
    torch.testing.assert_close(tangent, (expected * k).sum())
    with backend("native"), pytest.raises(RuntimeError, match="torch.func transform"):
        grad(info_nce_loss)(q, k, queue, 0.3)


# ---- as an operator of torch


def test_opcheck() -> None:
    for flags in ((True, True, True, True), (True, False, False, False), (False, False, True, False)):
        for targets in ((None, None), ids(4, 5)):
            args = [t.detach().requires_grad_(flag) for t, flag in zip(leaves(4, 5, 3), flags, strict=True)]
            args[3] = args[3].detach().reshape(()).requires_grad_(flags[3])
            torch.library.opcheck(torch.ops.fvm_fast.info_nce_loss.default, (*args, *targets, flags[0] or flags[3]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    def step(rows: Tensor, cols: Tensor, q: Tensor, k: Tensor, queue: Tensor, t: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        several = info_nce_loss(q, k, queue, 0.5, targets=ClassIds(rows, cols))
        return info_nce_loss(q, k.detach(), queue.detach(), t.exp()) + several

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, K in ((6, 9), (9, 12)):
        args = [*ids(n, K), torch.randn(n, 4), torch.randn(n, 4), torch.randn(K, 4), torch.tensor(-1.0)]
        value, grads = value_and_grads(compiled, args, torch.float32)
        expected, expected_grads = value_and_grads(step, args, torch.float32)
        torch.testing.assert_close([value, *grads[2:]], [expected, *expected_grads[2:]])


def test_autocast_leaves_features_alone() -> None:
    args = [t.detach() for t in leaves(9, 20, 8, torch.float32)]
    for name in ("native", "torch"):
        with backend(name):
            expected = info_nce_loss(*args)
            with torch.autocast("cpu", torch.bfloat16):
                got = info_nce_loss(*args)
        assert torch.equal(got, expected)


# ---- what is promised of memory, order and input


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_threads_change_nothing(isa: str, dtype: torch.dtype) -> None:
    args = [t.detach() for t in leaves(310, 900, 40, dtype)]

    def run() -> list[Tensor]:
        results = []
        for targets in (None, ClassIds(torch.arange(310) % 7, torch.arange(900) % 9)):
            own = [a.clone().requires_grad_() for a in args]
            loss = info_nce_loss(*own, targets=targets)
            results += [loss.detach(), *torch.autograd.grad(loss, own)]
        return results

    assert_same_on_any_threads(run)


def test_memory_stays_far_below_the_matrix() -> None:
    """4096 queries and 65536 keys: the matrix of logits alone would take 1 GiB; the queue takes 4 MiB."""
    setup = """
def run(n, K):
    q, k, queue = torch.randn(n, 16, requires_grad=True), torch.randn(n, 16), torch.randn(K, 16)
    info_nce_loss(q, k, queue, 4.0).backward()
"""
    assert extra_bytes(setup, "run(64, 256)", "run(4096, 65536)") < 50_000 * 1024


def test_a_queue_without_gradients_is_not_saved() -> None:
    sizes = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    q, k, queue, _ = leaves(20, 400, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), backend("native"):
        info_nce_loss(q, k.detach(), queue.detach(), 0.1)
    assert 0 < sum(sizes) <= 3 * 20 * 8 + 3 * 20 + 1


def test_layouts() -> None:
    q, k, queue, T = (t.detach() for t in leaves(30, 50, 12, torch.float32))
    strided = [torch.empty(12, 30).T.copy_(q), torch.cat([k, k], 1)[:, :12], torch.empty(12, 50).T.copy_(queue), T]
    value, grads = value_and_grads(info_nce_loss, strided, torch.float32)
    expected, expected_grads = value_and_grads(info_nce_loss, [q, k, queue, T], torch.float32)
    torch.testing.assert_close([value, *grads], [expected, *expected_grads], rtol=0, atol=0)


def test_nan_in_nan_out(isa: str) -> None:
    for place, targets in itertools.product(range(4), (None, ids(20, 300))):
        args = [t.detach() for t in leaves(20, 300, 6, torch.float32)]
        args[place].view(-1)[-1] = torch.nan
        value, grads = value_and_grads(lambda *a, t=targets: info_nce_loss(*a, targets=t), args, torch.float32)
        assert value.isnan() and grads[0].isnan().any() and grads[1].isnan().any() and grads[3].isnan()


def test_zero_width_takes_the_reference() -> None:
    q = torch.zeros(3, 0, requires_grad=True)
    loss = info_nce_loss(q, q, torch.zeros(4, 0), 0.5)
    torch.testing.assert_close(loss, torch.tensor(5.0).log())
    assert torch.autograd.grad(loss, q)[0].shape == (3, 0)


X, Y = torch.zeros(3, 4), torch.zeros(5, 4)
ROWS, COLS = torch.arange(3), torch.arange(5)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: info_nce_loss(X[0], X, Y, 1.0), ValueError, r"expected query \[n, D\], got 1 dimensions"),
        (lambda: info_nce_loss(X, X, Y[0], 1.0), ValueError, r"expected negative_keys \[n, D\], got 1 dimensions"),
        (lambda: info_nce_loss(X, X[:, :2], Y, 1.0), ValueError, "query and positive_key of one width, got"),
        (lambda: info_nce_loss(X, X, Y[:, :2], 1.0), ValueError, "query and negative_keys of one width, got"),
        (lambda: info_nce_loss(X, Y, Y, 1.0), ValueError, "one positive key for each query, got 3 and 5"),
        (lambda: info_nce_loss(X[:0], X[:0], Y, 1.0), ValueError, "at least one query .* got none"),
        (lambda: info_nce_loss(X, X, Y.double(), 1.0), TypeError, "one floating dtype"),
        (lambda: info_nce_loss(X, X, Y.to("meta"), 1.0), ValueError, "one device"),
        (lambda: info_nce_loss(X, X, Y, torch.ones(1, 1)), ValueError, "temperature to be a number or"),
        (lambda: info_nce_loss(X, X, Y, 0), ValueError, "a temperature above 0, got 0"),
        (lambda: info_nce_loss(X, X, Y, 1.0, targets=COLS), TypeError, "None or ClassIds, got Tensor"),
        (lambda: info_nce_loss(X, X, Y, 1.0, targets=Teacher(X, Y, 1.0)), TypeError, "None or ClassIds, got Teacher"),
        (lambda: info_nce_loss(X, X, Y, 1.0, targets=ClassIds(COLS, COLS)), ValueError, r"ClassIds.rows int64 \[3\]"),
        (lambda: info_nce_loss(X, X, Y, 1.0, targets=ClassIds(ROWS, ROWS)), ValueError, r"ClassIds.cols int64 \[5\]"),
    ],
)
def test_errors_are_sentences(call, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        call()
