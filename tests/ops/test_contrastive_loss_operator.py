# SPDX-License-Identifier: Apache-2.0
"""clip_loss and siglip_loss as operators of torch: derivatives, compilation, threads, bad input."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from common import assert_same_on_any_threads, value_and_grads
from contrastive_common import TARGETS, class_ids, clip_options, features
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fvm_fast.ops import (
    ClassIds,
    Teacher,
    backend,
    clip_loss,
    clip_loss_reference,
    siglip_loss,
    siglip_loss_reference,
)

# ---- derivatives


def losses_of_small_batch() -> list[tuple]:
    """(loss of its differentiable tensors, those tensors), in float64."""
    x, y, s, b = features(4, 3), features(4, 3), torch.tensor(3.0).double(), torch.tensor([-1.0]).double()
    wide = features(6, 3)
    cases = [(partial(clip_loss, **clip_options(kind, 4, 4, torch.float64)), (x, y, s)) for kind in TARGETS]
    ids = class_ids(4, 6, 3)
    cases.append((partial(clip_loss, targets=ids), (x, wide, s)))
    cases.append((siglip_loss, (x, y, s, b)))
    cases.append((partial(siglip_loss, targets=ids), (x, wide, s, b)))
    return cases


def test_gradcheck() -> None:
    for loss, args in losses_of_small_batch():
        leaves = [a.clone().requires_grad_() for a in args]
        with backend("native"):
            assert torch.autograd.gradcheck(lambda *a, loss=loss: loss(*a) * 1.5, leaves)


@pytest.mark.parametrize("loss, count", [(clip_loss, 3), (siglip_loss, 4)])
def test_every_subset_of_requires_grad(loss, count: int) -> None:
    args = [features(20, 6, torch.float32), features(20, 6, torch.float32), torch.tensor(9.0), torch.tensor(-2.0)][
        :count
    ]
    _, expected = value_and_grads(loss, args, torch.float32)
    for flags in itertools.product([False, True], repeat=count):
        leaves = [a.clone().requires_grad_(flag) for a, flag in zip(args, flags, strict=True)]
        out = loss(*leaves)
        assert out.requires_grad == any(flags)
        if any(flags):
            out.backward()
        for leaf, flag, e in zip(leaves, flags, expected, strict=True):
            assert (leaf.grad is not None) == flag
            if flag:
                torch.testing.assert_close(leaf.grad, e)


def test_numbers_for_scale_and_bias() -> None:
    x, y = features(6, 4, torch.float32), features(6, 4, torch.float32)
    torch.testing.assert_close(clip_loss(x, y, 7.0), clip_loss(x, y, torch.tensor([7.0])))
    torch.testing.assert_close(siglip_loss(x, y, 7.0, -1.0), siglip_loss(x, y, torch.tensor(7.0), torch.tensor([-1.0])))


def test_no_gradient_reaches_the_teacher() -> None:
    t, u, s = (
        features(5, 4).requires_grad_(),
        features(5, 4).requires_grad_(),
        torch.tensor(4.0).double().requires_grad_(),
    )
    x = features(5, 3).requires_grad_()
    for name in ("native", "torch"):
        with backend(name):
            loss = clip_loss(x, features(5, 3), 5.0, targets=Teacher(t, u, s, 0.5))
        assert torch.autograd.grad(loss, (t, u, s), allow_unused=True) == (None, None, None)


def test_second_derivative_says_what_to_do() -> None:
    for loss, args in [losses_of_small_batch()[k] for k in (0, 4, 7)]:
        leaves = [a.clone().requires_grad_() for a in args]
        (first,) = torch.autograd.grad(loss(*leaves), leaves[:1], create_graph=True)
        with pytest.raises(RuntimeError, match=r"backend\('torch'\)"):
            first.sum().backward()
        with backend("torch"):
            assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("loss, more", [(clip_loss, ()), (siglip_loss, (-2.0,))])
def test_transforms_take_the_reference(loss, more: tuple) -> None:
    x, y = features(5, 4), features(5, 4)
    reference = {clip_loss: clip_loss_reference, siglip_loss: siglip_loss_reference}[loss]
    torch.testing.assert_close(grad(loss)(x, y, 3.0, *more), grad(reference)(x, y, 3.0, *more))
    stacked = torch.stack([x, y])
    torch.testing.assert_close(vmap(lambda a: loss(a, y, 3.0, *more))(stacked)[1], reference(y, y, 3.0, *more))
    _, tangent = jvp(lambda a: loss(a, y, 3.0, *more), (x,), (y,))
    torch.testing.assert_close(tangent, (grad(reference)(x, y, 3.0, *more) * y).sum())
    with backend("native"), pytest.raises(RuntimeError, match="torch.func transform"):
        grad(loss)(x, y, 3.0, *more)


# ---- as an operator of torch


def test_opcheck() -> None:
    x, y = features(5, 4, torch.float32), features(5, 4, torch.float32)
    s, b, ids = torch.tensor(3.0), torch.tensor(-1.0), torch.arange(5)
    for args in (
        (x, y, s, None, None, None, None, None, 0.0, 0.0, True),
        (x, y, s, ids, ids, None, None, None, 0.0, 0.1, False),
        (x, y, s, None, None, x, y, s, 0.5, 0.1, True),
    ):
        leaves = [a.clone().requires_grad_() if i < 3 else a for i, a in enumerate(args)]
        torch.library.opcheck(torch.ops.fvm_fast.clip_loss.default, leaves)
    for want in itertools.product([False, True], repeat=2):
        leaves = [x.clone().requires_grad_(want[0]), y.clone().requires_grad_(want[1]), s.clone().requires_grad_(), b]
        torch.library.opcheck(torch.ops.fvm_fast.siglip_loss.default, (*leaves, ids, ids, *want))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    def step(ids: Tensor, x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        return (
            clip_loss(x, y, s.exp())
            + clip_loss(x, y, s.exp(), targets=ClassIds(ids, ids), label_smoothing=0.1)
            + clip_loss(x, y, s.exp(), targets=Teacher(y, x, 3.0, 0.5))
            + siglip_loss(x, y, s.exp(), b)
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (6, 9):
        args = [torch.randn(n, 4), torch.randn(n, 4), torch.tensor(1.0), torch.tensor(-1.0)]
        ids = torch.randint(3, (n,))
        value, grads = value_and_grads(partial(compiled, ids), args, torch.float32)
        expected, expected_grads = value_and_grads(partial(step, ids), args, torch.float32)
        torch.testing.assert_close([value, *grads], [expected, *expected_grads])


def test_autocast_leaves_features_alone() -> None:
    x, y = features(9, 8, torch.float32), features(9, 8, torch.float32)
    for name in ("native", "torch"):
        with backend(name):
            expected = clip_loss(x, y, 20.0), siglip_loss(x, y, 20.0, -5.0)
            with torch.autocast("cpu", torch.bfloat16):
                got = clip_loss(x, y, 20.0), siglip_loss(x, y, 20.0, -5.0)
        assert torch.equal(torch.stack(got), torch.stack(expected))


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated
@pytest.mark.parametrize("op, more", [(clip_loss, ()), (siglip_loss, (-1.0,))])
def test_what_traces_sees_the_op(op, more: tuple) -> None:
    """The short way to the kernels is for plain computation alone."""
    args = features(5, 4, torch.float32), features(5, 4, torch.float32), torch.tensor(3.0)

    def loss(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return op(x, y, s, *more)

    graph = make_fx(loss)(*args)
    assert any(getattr(torch.ops.fvm_fast, op.__name__).default is node.target for node in graph.graph.nodes)
    with torch._subclasses.FakeTensorMode() as mode:
        assert loss(*(mode.from_tensor(a) for a in args)).shape == ()
    other = args[1], args[0], torch.tensor(4.0)
    torch.testing.assert_close(torch.jit.trace(loss, args, check_trace=False)(*other), loss(*other))


# ---- what is promised of order and input


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_nothing(isa: str, dtype: torch.dtype) -> None:
    x, y, s = features(600, 40, dtype), features(600, 40, dtype), torch.tensor(30.0)
    options = clip_options("smooth mixed teacher", 600, 600, dtype)

    def run() -> list[Tensor]:
        value, grads = value_and_grads(lambda a, b, c: clip_loss(a, b, c, **options), [x, y, s], dtype)
        other, more = value_and_grads(siglip_loss, [x, y, s, -s / 3], dtype)
        return [value, *grads, other, *more]

    assert_same_on_any_threads(run)


def test_layouts() -> None:
    x, y = features(30, 12, torch.float32), features(30, 12, torch.float32)
    strided = [torch.empty(12, 30).T.copy_(x), torch.cat([y, y], 1)[:, :12], torch.tensor(9.0)]
    dense = [x, y, torch.tensor(9.0)]
    bias = torch.tensor(-3.0)
    for loss, more in ((clip_loss, []), (siglip_loss, [bias])):
        value, grads = value_and_grads(loss, strided + more, torch.float32)
        expected, expected_grads = value_and_grads(loss, dense + more, torch.float32)
        torch.testing.assert_close([value, *grads], [expected, *expected_grads], rtol=0, atol=0)


def test_nan_in_nan_out(isa: str) -> None:
    for place in range(3):
        args = [features(40, 6, torch.float32), features(40, 6, torch.float32), torch.tensor(5.0)]
        if place < 2:
            args[place][17, 3] = torch.nan
        else:
            args[place] = torch.tensor(torch.nan)
        for loss, more in ((clip_loss, []), (siglip_loss, [torch.tensor(-3.0)])):
            value, grads = value_and_grads(loss, args + more, torch.float32)
            assert value.isnan() and grads[0].isnan().any() and grads[1].isnan().any() and grads[2].isnan()


def test_zero_width_takes_the_reference() -> None:
    x = torch.zeros(3, 0, requires_grad=True)
    torch.testing.assert_close(clip_loss(x, x, 5.0), torch.tensor(3.0).log())
    assert torch.autograd.grad(siglip_loss(x, x, 5.0, 0.0), x)[0].shape == (3, 0)


X, Y = torch.zeros(3, 4), torch.zeros(5, 4)
IDS = torch.arange(3)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: clip_loss(X[0], X, 1.0), ValueError, r"expected image_features \[n, D\], got 1 dimensions"),
        (lambda: clip_loss(X, X[:, :2], 1.0), ValueError, "of one width, got"),
        (lambda: clip_loss(X, Y, 1.0), ValueError, "as many rows as columns, .* got 3 and 5; give targets=ClassIds"),
        (lambda: siglip_loss(X, Y, 1.0, 0.0), ValueError, "as many rows as columns"),
        (lambda: clip_loss(X[:0], X[:0], 1.0), ValueError, "at least one pair .* got 0 rows and 0 columns"),
        (lambda: clip_loss(X, X.double(), 1.0), TypeError, "one floating dtype"),
        (lambda: clip_loss(X.long(), X.long(), 1.0), TypeError, "one floating dtype"),
        (lambda: clip_loss(X, X.to("meta"), 1.0), ValueError, "one device"),
        (
            lambda: clip_loss(X, X, torch.ones(2)),
            ValueError,
            r"logit_scale to be a number or a floating tensor \[\] or \[1\]",
        ),
        (lambda: siglip_loss(X, X, 1.0, torch.ones(1, 1)), ValueError, "logit_bias to be a number"),
        (lambda: clip_loss(X, X, 1.0, label_smoothing=1.5), ValueError, r"label_smoothing in \[0, 1\], got 1.5"),
        (lambda: clip_loss(X, X, 1.0, grad_reduction="none"), ValueError, "'mean' or 'sum', got 'none'"),
        (lambda: clip_loss(X, X, 1.0, targets=IDS), TypeError, "None, ClassIds or Teacher, got Tensor"),
        (lambda: clip_loss(X, Y, 1.0, targets=ClassIds(IDS, IDS)), ValueError, r"ClassIds.cols int64 \[5\]"),
        (lambda: clip_loss(X, X, 1.0, targets=ClassIds(IDS.float(), IDS)), ValueError, r"ClassIds.rows int64 \[3\]"),
        (
            lambda: clip_loss(X, X, 1.0, targets=Teacher(Y, X, 1.0, 1.0)),
            ValueError,
            "a Teacher of 3 images and 3 texts",
        ),
        (lambda: clip_loss(X, X, 1.0, targets=Teacher(X, X, 1.0, 2.0)), ValueError, r"alpha in \[0, 1\], got 2.0"),
        (
            lambda: clip_loss(X, X, 1.0, targets=Teacher(X.double(), X.double(), 1.0, 1.0)),
            TypeError,
            "one floating dtype",
        ),
        (lambda: clip_loss(X, Y, 1.0, targets=Teacher(X, Y, 1.0, 0.5)), ValueError, "as many rows as columns"),
        (
            lambda: siglip_loss(X, X, 1.0, 0.0, targets=Teacher(X, X, 1.0, 1.0)),
            TypeError,
            "soft targets belong to clip_loss",
        ),
    ],
)
def test_errors_are_sentences(call, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        call()
