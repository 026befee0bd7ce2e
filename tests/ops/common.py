# SPDX-License-Identifier: Apache-2.0
"""What the tests of the ops share: dtypes, the accuracy rule, gradients and the checks every op has to pass."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fvm_fast.ops._backend import backend

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (torch.float64, *FLOATS)
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


def assert_no_worse_than_torch(
    ours: Tensor, torch_same_dtype: Tensor, reference64: Tensor, what: str = "value"
) -> None:
    """The error of ``ours`` against float64 is at most twice what torch makes in the same dtype.

    Compared are the largest and the root-mean-square error. The floor is one rounding of the largest value, so that a
    case in which torch happens to be exact does not ask for exactness. float64 itself has no reference to err from: it
    may differ by the roundings of sums in another order.
    """
    assert ours.shape == reference64.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(reference64.shape)}"
    if not ours.numel():
        return
    ours, torch_same_dtype, reference64 = ours.detach(), torch_same_dtype.detach(), reference64.detach()
    floor = (256 if ours.dtype == torch.float64 else 1) * EPS[ours.dtype] * float(reference64.abs().max())
    error, allowed = (ours.double() - reference64).abs(), (torch_same_dtype.double() - reference64).abs()
    for name, size in (("largest", Tensor.max), ("root-mean-square", lambda e: e.square().mean().sqrt())):
        got, limit = float(size(error)), 2 * float(size(allowed)) + floor
        assert got <= limit, (
            f"{what}: {name} error {got:.3e}, expected at most {limit:.3e} (torch makes {float(size(allowed)):.3e})"
        )


def clone_with_grad(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """Leaves with the same values (strides kept); floating ones in ``dtype`` and requiring gradients."""
    leaves: list[Tensor | None] = []
    for t in tensors:
        if t is None or not t.is_floating_point():
            leaves.append(t)
            continue
        leaf = torch.empty_like(t, dtype=dtype or t.dtype).copy_(t.detach())
        leaves.append(leaf.requires_grad_())
    return leaves


def value_and_grads(
    f: Callable[..., Tensor], args: Sequence[Tensor | None], dtype: torch.dtype, dout: Tensor | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """``f(*args)`` in ``dtype`` and its gradients: (value, [one for each argument, None where it is not floating])."""
    leaves = clone_with_grad(*args, dtype=dtype)
    out = f(*leaves)
    dout = torch.ones_like(out) if dout is None else dout.to(out.dtype)
    wanted = [i for i, t in enumerate(leaves) if t is not None and t.is_floating_point()]
    grads: list[Tensor | None] = [None] * len(leaves)
    for i, grad in zip(wanted, torch.autograd.grad(out, [leaves[i] for i in wanted], dout), strict=True):
        grads[i] = grad
    return out.detach(), grads


def check_against_torch(
    op: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    args: Sequence[Tensor | None],
    dtype: torch.dtype,
    dout: Tensor | None = None,
) -> None:
    """Value and every gradient of native ``op`` obey the accuracy rule; ``oracle`` is plain torch, run in both."""
    rounded = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in args]
    dout = None if dout is None else dout.to(dtype)
    with backend("native"):
        out, grads = value_and_grads(op, rounded, dtype, dout)
    out_torch, grads_torch = value_and_grads(oracle, rounded, dtype, dout)
    out_64, grads_64 = value_and_grads(oracle, rounded, torch.float64, dout)
    assert out.dtype == out_torch.dtype, f"dtype {out.dtype}, expected {out_torch.dtype}"
    assert_no_worse_than_torch(out, out_torch, out_64)
    for i, (ours, theirs, exact) in enumerate(zip(grads, grads_torch, grads_64, strict=True)):
        if exact is not None:
            assert_no_worse_than_torch(ours, theirs, exact, f"gradient of argument {i}")


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Run the block on ``n`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_on_any_threads(f: Callable[[], Sequence[Tensor | None]], counts: Sequence[int] = (1, 2, 3)) -> None:
    """``f()`` gives the same bits on every number of threads, and when it is repeated."""
    expected = None
    for n in (*counts, counts[-1]):
        with threads(n):
            got = [t for t in f() if t is not None]
        expected = expected or got
        for i, (a, b) in enumerate(zip(expected, got, strict=True)):
            assert torch.equal(a, b), f"result {i} differs between {counts[0]} and {n} threads"
