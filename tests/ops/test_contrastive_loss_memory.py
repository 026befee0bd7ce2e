# SPDX-License-Identifier: Apache-2.0
"""What clip_loss and siglip_loss hold in memory: never the matrix, and similarities kept only where they are few."""

import pytest
import torch
from common import assert_same_on_any_threads
from contrastive_common import TARGETS, clip_options, features
from processes_common import extra_bytes
from torch import Tensor

from fvm_fast.ops import ClassIds, Teacher, backend, clip_loss, siglip_loss
from fvm_fast.ops.contrastive_loss._blocks import KEPT_BYTES, KEPT_FEATURES, kept_size

MIB = 2**20
OPS = torch.ops.fvm_fast

# ---- at the peak, as the operating system counts


def peak_bytes(loss: str, n: int, D: int) -> int:
    """By how much forward and backward of n pairs raise the memory of a process that has computed 64 pairs before.

    ``loss`` is an expression of features x, y [n, D], which require gradients.
    """
    setup = f"""
def run(n):
    x, y = (torch.randn(n, {D}, requires_grad=True) for _ in range(2))
    {loss}.backward()
"""
    return extra_bytes(setup, "run(64)", f"run({n})")


@pytest.mark.parametrize("loss", ["clip_loss(x, y, 10.0)", "siglip_loss(x, y, 10.0, -10.0)"])
def test_large_batches_stay_far_below_the_matrix(loss: str) -> None:
    """16384 pairs: the matrix of logits alone would take 1 GiB; features and gradients are 16 MiB."""
    assert peak_bytes(loss, 16384, 64) < 128 * MIB


def test_the_measure_sees_a_matrix() -> None:
    assert peak_bytes("clip_loss_reference(x, y, 10.0)", 2048, 64) > 2048 * 2048 * 4


def test_only_small_tensors_are_saved() -> None:
    n, D = 1000, 4
    x, y, sizes = features(n, D).requires_grad_(), features(n, D), []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    for loss in (lambda: clip_loss(x, y, 10.0), lambda: siglip_loss(x, y, 10.0, -3.0)):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), backend("native"):
            loss()
    assert sizes and sum(sizes) < 8 * (n + n) * D  # the matrix would be fifteen times as much


# ---- similarities that the forward keeps for the backward


def test_few_similarities_are_kept() -> None:
    for n, m, D in ((8, 8, 512), (1024, 1024, 512), (4096, 4096, 128), (30, 65536, 128), (65536, 65536, 512)):
        for dtype, itemsize in ((torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)):
            size = kept_size(n, m, D, dtype)
            assert size <= KEPT_FEATURES * (n + m) * D and size * itemsize <= KEPT_BYTES
    assert kept_size(1024, 1024, 512, torch.float32) >= 1024 * 1024  # all of them
    assert kept_size(4096, 4096, 128, torch.float32) < 4096 * 4096 // 2


def test_nothing_is_kept_without_gradients() -> None:
    x = features(20, 64, torch.float32)
    for keep in (False, True):
        *_, kept = OPS.clip_loss(x, x, torch.tensor(5.0), None, None, None, None, None, 0.0, 0.0, keep)
        assert (kept.numel() > 0) == keep
    x.requires_grad_()
    with torch.no_grad():
        assert not clip_loss(x, x, 5.0).requires_grad


# (n, m, D): all rows are kept; most; a part, of several chunks of the backward; fewer than a tile holds
KEPT_SIZES = [(60, 60, 40), (90, 140, 12), (1100, 1100, 12), (40, 40, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_kept_similarities_change_nothing(isa: str, dtype: torch.dtype) -> None:
    """Gradients from what was kept have the bits of those for which everything is computed again."""
    for n, m, D in KEPT_SIZES:
        for kind in TARGETS if n == m and n < 100 else ["smooth classes"]:
            arguments = op_arguments(n, m, D, kind, dtype)
            _, lse, teacher_lse, kept = OPS.clip_loss(*arguments, True)
            assert (kept.count_nonzero() == n * m) == ((n, m, D) == KEPT_SIZES[0])
            with_kept = backward(arguments, lse, teacher_lse, kept)
            without = backward(arguments, lse, teacher_lse, kept[:0])
            for name, a, b in zip(("dx", "dy", "dscale"), with_kept, without, strict=True):
                assert torch.equal(a, b), f"{name} of {n} x {m} x {D}, {kind}"


def test_the_backward_reads_what_was_kept(isa: str) -> None:
    """Other similarities, other gradients: else the tests above would compare a computation with itself."""
    arguments = op_arguments(60, 60, 40, "none", torch.float32)
    _, lse, teacher_lse, kept = OPS.clip_loss(*arguments, True)
    changed = backward(arguments, lse, teacher_lse, kept * 0.9)
    assert not torch.equal(changed[0], backward(arguments, lse, teacher_lse, kept)[0])


def test_threads_change_nothing_that_is_kept(isa: str) -> None:
    arguments = op_arguments(1100, 1100, 12, "none", torch.float32)

    def run() -> list[Tensor]:
        loss, lse, teacher_lse, kept = OPS.clip_loss(*arguments, True)
        return [loss, lse, kept, *backward(arguments, lse, teacher_lse, kept)]

    assert_same_on_any_threads(run)


def op_arguments(n: int, m: int, D: int, kind: str, dtype: torch.dtype) -> tuple:
    """Arguments of the op but for its last, ``keep``."""
    x, y, scale = features(n, D, dtype), features(m, D, dtype), torch.tensor(9.0)
    options = clip_options(kind, n, m, dtype)
    targets = options.get("targets")
    ids = targets if isinstance(targets, ClassIds) else (None, None)
    teacher = (None, None, None, 0.0)
    if isinstance(targets, Teacher):
        teacher = (targets.image, targets.text, torch.tensor(targets.logit_scale), targets.alpha)
    scale = scale.double() if dtype == torch.float64 else scale
    return (x, y, scale, *ids, *teacher, options.get("label_smoothing", 0.0))


def backward(arguments: tuple, lse: Tensor, teacher_lse: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features and scale."""
    *tensors, alpha, smoothing = arguments
    dloss = torch.tensor(0.75)
    return OPS.clip_loss_bwd(dloss, *tensors, lse, teacher_lse, kept, alpha, smoothing, True, True, True)
