# SPDX-License-Identifier: Apache-2.0
"""nt_xent_loss as an operator of torch: derivatives, compilation, memory, threads, bad input."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from common import assert_same_on_any_threads, value_and_grads
from contrastive_common import features
from processes_common import extra_bytes
from torch import Tensor
from torch.func import grad, jvp, vmap

from fvm_fast.ops import backend, nt_xent_loss, nt_xent_loss_reference


def leaves(n: int, D: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Two views and a temperature, all requiring gradients."""
    temperature = torch.tensor([0.3], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return [t.requires_grad_() for t in (features(n, D, dtype), features(n, D, dtype), temperature)]


# ---- derivatives


@pytest.mark.parametrize("n", [1, 5])
def test_gradcheck(n: int) -> None:
    with backend("native"):
        assert torch.autograd.gradcheck(lambda *a: nt_xent_loss(*a) * 1.5, leaves(n, 3))


def test_every_subset_of_requires_grad() -> None:
    args = [t.detach() for t in leaves(20, 6, torch.float32)]
    _, expected = value_and_grads(nt_xent_loss_reference, args, torch.float32)
    for flags in itertools.product([False, True], repeat=3):
        own = [a.clone().requires_grad_(flag) for a, flag in zip(args, flags, strict=True)]
        with backend("native"):
            loss = nt_xent_loss(*own)
        assert loss.requires_grad == any(flags)
        if any(flags):
            loss.backward()
        for leaf, flag, e in zip(own, flags, expected, strict=True):
            assert (leaf.grad is not None) == flag
            if flag:
                torch.testing.assert_close(leaf.grad, e)


def test_both_views_in_one_tensor() -> None:
    """Views of one batch, as a model returns them, and the same view twice."""
    z = features(12, 6).requires_grad_()
    for pair in (z.chunk(2), (z, z)):
        (got,) = torch.autograd.grad(nt_xent_loss(*pair, 0.2), z, retain_graph=True)
        (expected,) = torch.autograd.grad(nt_xent_loss_reference(*pair, 0.2), z)
        torch.testing.assert_close(got, expected)


def test_numbers_for_the_temperature() -> None:
    z1, z2 = features(6, 4, torch.float32), features(6, 4, torch.float32)
    for temperature in (torch.tensor(0.3), torch.tensor([0.3]), torch.tensor([0.3]).double()):
        torch.testing.assert_close(nt_xent_loss(z1, z2, temperature), nt_xent_loss(z1, z2, 0.3))


def test_second_derivative_says_what_to_do() -> None:
    for which in range(3):
        args = leaves(4, 3)
        (first,) = torch.autograd.grad(nt_xent_loss(*args), args[which], create_graph=True)
        with pytest.raises(RuntimeError, match=r"nt_xent_loss: .*backend\('torch'\)"):
            first.sum().backward()
    with backend("torch"):
        assert torch.autograd.gradgradcheck(nt_xent_loss, leaves(4, 3))


def test_transforms_take_the_reference() -> None:
    z1, z2 = features(5, 4), features(5, 4)
    expected = grad(nt_xent_loss_reference)(z1, z2, 0.3)
    torch.testing.assert_close(grad(nt_xent_loss)(z1, z2, 0.3), expected)
    batched = vmap(lambda a: nt_xent_loss(a, z2, 0.3))(torch.stack([z1, z2]))
    torch.testing.assert_close(batched[1], nt_xent_loss_reference(z2, z2, 0.3))
    _, tangent = jvp(lambda a: nt_xent_loss(a, z2, 0.3), (z1,), (z2,))
    torch.testing.assert_close(tangent, (expected * z2).sum())
    with backend("native"), pytest.raises(RuntimeError, match="torch.func transform"):
        grad(nt_xent_loss)(z1, z2, 0.3)


# ---- as an operator of torch


def test_opcheck() -> None:
    for flags in itertools.product([False, True], repeat=2):
        values = (features(6, 4), torch.tensor(0.3).double())
        args = [t.requires_grad_(flag) for t, flag in zip(values, flags, strict=True)]
        torch.library.opcheck(torch.ops.fvm_fast.nt_xent_loss.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    def step(z1: Tensor, z2: Tensor, t: Tensor) -> Tensor:
        z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        return nt_xent_loss(z1, z2, t.exp()) + nt_xent_loss(z1, z2, 0.5)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (6, 9):
        args = [torch.randn(n, 4), torch.randn(n, 4), torch.tensor(-1.0)]
        value, grads = value_and_grads(compiled, args, torch.float32)
        expected, expected_grads = value_and_grads(step, args, torch.float32)
        torch.testing.assert_close([value, *grads], [expected, *expected_grads])


def test_autocast_leaves_features_alone() -> None:
    z1, z2 = features(9, 8, torch.float32), features(9, 8, torch.float32)
    for name in ("native", "torch"):
        with backend(name):
            expected = nt_xent_loss(z1, z2, 0.1)
            with torch.autocast("cpu", torch.bfloat16):
                got = nt_xent_loss(z1, z2, 0.1)
        assert torch.equal(got, expected)


# ---- what is promised of memory, order and input


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_threads_change_nothing(isa: str, dtype: torch.dtype) -> None:
    args = [t.detach() for t in leaves(600, 40, dtype)]

    def run() -> list[Tensor]:
        own = [a.clone().requires_grad_() for a in args]
        loss = nt_xent_loss(*own)
        return [loss.detach(), *torch.autograd.grad(loss, own)]

    assert_same_on_any_threads(run)


def test_memory_stays_far_below_the_matrix() -> None:
    """8192 images: the matrix of logits alone would take 1 GiB, its upper half 512 MiB."""
    setup = "run = lambda n: nt_xent_loss(*(torch.randn(n, 16, requires_grad=True) for _ in range(2)), 4.0).backward()"
    assert extra_bytes(setup, "run(64)", "run(8192)") < 70_000 * 1024


def test_only_small_tensors_are_saved() -> None:
    sizes = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), backend("native"):
        nt_xent_loss(*leaves(200, 8))
    assert 0 < sum(sizes) <= 400 * 8 + 400 + 2


def test_layouts() -> None:
    z1, z2, T = (t.detach() for t in leaves(30, 12, torch.float32))
    strided = [torch.empty(12, 30).T.copy_(z1), torch.cat([z2, z2], 1)[:, :12], T]
    value, grads = value_and_grads(nt_xent_loss, strided, torch.float32)
    expected, expected_grads = value_and_grads(nt_xent_loss, [z1, z2, T], torch.float32)
    torch.testing.assert_close([value, *grads], [expected, *expected_grads], rtol=0, atol=0)


def test_nan_in_nan_out(isa: str) -> None:
    for place in range(3):
        args = [t.detach() for t in leaves(40, 6, torch.float32)]
        args[place].view(-1)[-1] = torch.nan
        value, grads = value_and_grads(nt_xent_loss, args, torch.float32)
        assert value.isnan() and all(g.isnan().any() for g in grads)


def test_zero_width_takes_the_reference() -> None:
    z = torch.zeros(3, 0, requires_grad=True)
    loss = nt_xent_loss(z, z, 0.5)
    torch.testing.assert_close(loss, torch.tensor(5.0).log())
    assert torch.autograd.grad(loss, z)[0].shape == (3, 0)


X, Y = torch.zeros(3, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: nt_xent_loss(X[0], X, 1.0), ValueError, r"expected z1 \[n, D\], got 1 dimensions"),
        (lambda: nt_xent_loss(X, X[:, :2], 1.0), ValueError, "of one width, got"),
        (lambda: nt_xent_loss(X, Y, 1.0), ValueError, "two views of as many images, got 3 rows and 5"),
        (lambda: nt_xent_loss(X[:0], X[:0], 1.0), ValueError, "at least one pair of views .* got none"),
        (lambda: nt_xent_loss(X, X.double(), 1.0), TypeError, "one floating dtype"),
        (lambda: nt_xent_loss(X.long(), X.long(), 1.0), TypeError, "one floating dtype"),
        (lambda: nt_xent_loss(X, X.to("meta"), 1.0), ValueError, "one device"),
        (lambda: nt_xent_loss(X, X, torch.ones(2)), ValueError, r"temperature to be a number or a floating tensor"),
        (lambda: nt_xent_loss(X, X, 0.0), ValueError, "a temperature above 0, got 0.0"),
        (lambda: nt_xent_loss(X, X, -1), ValueError, "a temperature above 0, got -1"),
        (lambda: nt_xent_loss(X, X, 1.0, grad_reduction="none"), ValueError, "'mean' or 'sum', got 'none'"),
    ],
)
def test_errors_are_sentences(call, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        call()
