# SPDX-License-Identifier: Apache-2.0
"""The contrastive losses on the emulated GPU: values, gradients, the bytes they move and the tensor cores they use.

The public functions run as on a GPU, but for the last step: each kernel they call goes through the detector. Chunks are
one tile of rows here and parts one tile of columns, so that few rows make several of them.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from common import DTYPES, EPS
from contrastive_common import TARGETS, class_ids, clip_options, features
from emulated_ops import ops_through
from emulator import SCHEDULES, Emulation, Library, build
from temperature_common import value_and_gradients
from torch import Tensor

from fvm_fast.ops import (
    clip_loss,
    clip_loss_reference,
    info_nce_loss,
    info_nce_loss_reference,
    nt_xent_loss,
    nt_xent_loss_reference,
    siglip_loss,
    siglip_loss_reference,
)

FILES = (
    "clip_loss", "clip_loss_backward", "contrastive_products", "info_nce_loss", "nt_xent_loss",
    "nt_xent_loss_backward", "siglip_loss",
)  # fmt: skip
SIZES = {
    "one": (1, 1, 8),
    "prime": (7, 5, 13),
    "chunks of 16 bytes": (9, 30, 24),
    "several tiles": (137, 131, 16),
}


@pytest.fixture(scope="module")
def library() -> Library:
    return build(*FILES, defines=("FVM_CHUNK_BYTES=1", "FVM_TERMS_OF_PART=64"))


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which losses and the gradients of scalars are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(library, loss, reference, args, dtype: torch.dtype, size: float, schedules=SCHEDULES, eager=None) -> None:
    """No finding and the same bits in each schedule; errors at most twice torch's and eight roundings.

    ``size`` is that of the terms of the loss and its scalar gradients, which cancel. ``eager`` is the measure
    where the reference computes in float what is computed in the dtype of the features; a scalar's gradient is then a
    sum of many roundings, of which two samples are compared, so that a sixteenth of one is allowed beside.
    """
    rounded = [a.to(dtype).double() if a.dim() else a for a in args]
    found = []
    for schedule in schedules:
        with Emulation(library, schedule=schedule) as e, ops_through(e):
            found.append(value_and_gradients(loss, rounded, dtype, wide(dtype)))
        assert not e.findings, "\n".join(map(str, e.findings))
    same = value_and_gradients(eager or reference, rounded, dtype, wide(dtype))
    exact = value_and_gradients(reference, rounded, torch.float64, torch.float64)
    for i, (ours, theirs, right, *others) in enumerate(zip(found[0], same, exact, *found[1:], strict=True)):
        name = f"gradient of argument {i - 1}" if i else "value"
        assert ours.dtype == theirs.dtype and ours.shape == right.shape, name
        assert all(torch.equal(ours, other) for other in others), f"{name} depends on the schedule"
        if not right.numel():
            continue
        error, torchs = (float((t.double() - right).abs().max()) for t in (ours, theirs))
        terms = float(right.abs().max()) if right.dim() else size
        limit = 2 * torchs + (64 if dtype == torch.float64 else 8) * EPS[ours.dtype] * terms
        if eager and not right.dim():
            limit += EPS[dtype] * terms / 16
        assert error <= limit, f"{name}: error {error:.2e}, expected at most {limit:.2e} (torch makes {torchs:.2e})"


def eager_info_nce(query, positive, negatives, temperature, targets=None) -> Tensor:
    """With probabilities in the dtype of the features, as the kernels round them for the product with the keys."""
    if targets is None:
        logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ negatives.T], 1)
        q = torch.eye(1, logits.shape[1], dtype=query.dtype).expand_as(logits)
    else:
        logits = query @ torch.cat([positive, negatives]).T
        equal = (targets.rows[:, None] == torch.cat(targets)).to(query.dtype)
        q = equal / equal.sum(1, keepdim=True)
    return F.cross_entropy((logits / temperature).to(query.dtype), q).to(wide(query.dtype))


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def schedules_of(n: int, dtype: torch.dtype) -> tuple[str, ...]:
    """Large products in float and double have one order: the emulator is slow, and their blocks those of halves."""
    return SCHEDULES if n < 100 or dtype == torch.bfloat16 else SCHEDULES[2:]


# ---- values and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "D"), SIZES.values(), ids=SIZES)
def test_clip_loss(library, n, m, D, dtype):
    options = {"targets": class_ids(n, m, max(n // 3, 2))} if n > 1 else {}
    loss, reference = (partial(f, **options) for f in (clip_loss, clip_loss_reference))
    args = (features(n, D), features(m, D), number(9.0))
    check(library, loss, reference, args, dtype, 9.0, schedules_of(n, dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("kind", TARGETS)
def test_clip_loss_targets(library, kind, dtype):
    n, m, D = 21, 21, 16
    options = clip_options(kind, n, m, dtype)
    loss, reference = (partial(f, **options) for f in (clip_loss, clip_loss_reference))
    check(library, loss, reference, (features(n, D), features(m, D), number(-4.0)), dtype, 4.0, SCHEDULES[1:2])


def test_clip_loss_teacher_over_several_chunks(library):
    n = m = 137
    options = clip_options("smooth mixed teacher", n, m, torch.bfloat16)
    loss, reference = (partial(f, **options) for f in (clip_loss, clip_loss_reference))
    args = (features(n, 8), features(m, 8), number(9.0))
    check(library, loss, reference, args, torch.bfloat16, 9.0, SCHEDULES[2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "D"), SIZES.values(), ids=SIZES)
def test_siglip_loss(library, n, m, D, dtype):
    options = {"targets": class_ids(n, m, max(n // 3, 2))} if n > 1 else {}
    loss, reference = (partial(f, **options) for f in (siglip_loss, siglip_loss_reference))
    args = (features(n, D), features(m, D), number(8.0), number(-3.0))
    check(library, loss, reference, args, dtype, float(n), schedules_of(n, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "D"), [(1, 8), (7, 13), (20, 24), (67, 16)])
def test_nt_xent_loss(library, n, D, dtype):
    args = (features(n, D), features(n, D), number(0.2))
    schedules = schedules_of(2 * n, dtype)
    check(library, nt_xent_loss, nt_xent_loss_reference, args, dtype, 25.0, schedules)


def test_nt_xent_loss_of_three_tiles(library):
    args = (features(130, 8), features(130, 8), number(0.2))
    check(library, nt_xent_loss, nt_xent_loss_reference, args, torch.bfloat16, 25.0, SCHEDULES[2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "K", "D"), [(1, 0, 8), (5, 1, 13), (9, 30, 24), (21, 261, 16), (131, 5, 8)])
def test_info_nce_loss(library, n, K, D, dtype):
    args = (features(n, D), features(n, D), features(K, D), number(0.1))
    schedules = schedules_of(max(n, K), dtype)
    check(library, info_nce_loss, info_nce_loss_reference, args, dtype, 100.0, schedules, eager_info_nce)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_info_nce_loss_of_several_positives(library, dtype):
    n, K, D = 12, 19, 16
    options = {"targets": class_ids(n, K, 6)}
    loss, reference, eager = (partial(f, **options) for f in (info_nce_loss, info_nce_loss_reference, eager_info_nce))
    args = (features(n, D), features(n, D), features(K, D), number(0.1))
    check(library, loss, reference, args, dtype, 100.0, SCHEDULES[1:2], eager)


# ---- what is told apart well, or badly


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_small_gradients_of_halves_are_kept(library, dtype):
    """Pairs that are told apart by far have gradients below the smallest number of half, before they are scaled up."""
    x = torch.eye(24, 24, dtype=torch.float64)
    for loss, reference, args in (
        (clip_loss, clip_loss_reference, (x, x, number(12.0))),
        (nt_xent_loss, nt_xent_loss_reference, (x, x, number(1 / 12))),
    ):
        with Emulation(library) as e, ops_through(e):
            ours = value_and_gradients(loss, args, dtype, torch.float32)
        assert not e.findings, "\n".join(map(str, e.findings))
        exact = value_and_gradients(reference, args, torch.float64, torch.float64)
        for got, right in zip(ours[1:], exact[1:], strict=True):
            torch.testing.assert_close(got.double(), right, rtol=0.02, atol=2 * EPS[dtype] * float(right.abs().max()))


def test_features_that_are_not_a_number_are_seen(library):
    x, y = features(6, 8, torch.float32), features(6, 8, torch.float32)
    x[3, 2] = float("nan")
    with Emulation(library) as e, ops_through(e):
        for loss in (clip_loss(x, y, 5.0), siglip_loss(x, y, 5.0, 0.0), nt_xent_loss(x, y, 0.2)):
            assert loss.isnan()
        assert info_nce_loss(x, y, y, 0.2).isnan()
    assert not e.findings, "\n".join(map(str, e.findings))


def test_what_the_cpu_keeps_is_refused(library):
    x, lse, scale = features(4, 8, torch.float32), torch.empty(8, dtype=torch.float64), number(5.0)
    with Emulation(library) as e:
        space = torch.empty(e.call("clip_loss_fwd_workspace", 4, 4, 8, 0, x.dtype), dtype=torch.uint8)
        numbers = (scale, scale, 0.0, 0.0, 0.0, 4, 4, 8, 0, 16)
        e.call("clip_loss_fwd", x, x, *(None,) * 6, lse, None, None, torch.zeros(16), space, *numbers, x.dtype)
    assert [f.kind for f in e.findings] == ["launch"]


# ---- traffic and tensor cores: one tile of rows against two of columns

n, m, D = 128, 256, 64


def moved(e: Emulation, buffer: str, access: str, bytes_: int, *, times: int = 1, **where) -> None:
    """Each of these bytes is moved, ``times`` over, in whole sectors."""
    group = e.traffic.select(space="global", buffer=buffer, access=access, **where)
    assert group.unique == bytes_, f"{buffer}: {group.unique} different bytes, expected {bytes_}"
    assert group.bytes == times * bytes_, f"{buffer}: {group.bytes} bytes, expected {times} times {bytes_}"
    assert 32 * group.sectors <= 1.1 * group.bytes, f"{buffer} is moved in parts of sectors"


def no_conflicts(e: Emulation) -> None:
    for (kernel, line), group in e.traffic.select(space="shared").by("kernel", "line").items():
        assert group.wavefronts == group.ideal_wavefronts, f"{kernel} has bank conflicts in line {line}"


def mma_of(rows: int, columns: int, terms: int) -> int:
    """Tensor-core instructions of 16 x 8 x 16 in whole tiles."""
    return -(-rows // 128) * -(-columns // 128) * 8 * 16 * -(-terms // 32) * 2


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_bytes_of_siglip_loss(library, dtype):
    """Similarities and both products: x is read for each tile of columns, and G stays in the L2 cache."""
    x, y, size = features(n, D, dtype), features(m, D, dtype), torch.finfo(dtype).bits // 8
    make = SimpleNamespace(loss=torch.empty(()), slopes=torch.empty(2), dx=torch.empty(n, D), dy=torch.empty(m, D))
    with Emulation(library) as e:
        space = torch.empty(e.call("siglip_loss_workspace", n, m, D, True, True, dtype), dtype=torch.uint8)
        e.call(
            "siglip_loss", x, y, torch.arange(n).int(), torch.arange(m).int(), number(5.0), number(0.0), 1.0, make.loss,
            make.slopes, make.dx, make.dy, space, n, m, D, dtype,
        )  # fmt: skip
    assert not e.findings, "\n".join(map(str, e.findings))
    no_conflicts(e)
    moved(e, "x", "read", n * D * size, times=2, kernel="make_gradient")
    moved(e, "y", "read", m * D * size, kernel="make_gradient")
    moved(e, "dy", "write", m * D * 4)
    moved(e, "dx", "write", n * D * 4)
    halves = dtype == torch.bfloat16
    work = mma_of(n, m, D) + mma_of(n, D, m) + mma_of(m, D, n)  # 6 n m D, and the half of a tile that D leaves empty
    assert sum(k.mma for k in e.launches) == halves * work


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_bytes_of_clip_loss_forward(library, dtype):
    x, y, size = features(n, D, dtype), features(m, D, dtype), torch.finfo(dtype).bits // 8
    lse, nothing = torch.empty(n + m, dtype=torch.float64), (None,) * 6
    with Emulation(library) as e:
        space = torch.empty(e.call("clip_loss_fwd_workspace", n, m, D, 0, dtype), dtype=torch.uint8)
        e.call(
            "clip_loss_fwd", x, y, *nothing, lse, None, torch.empty(()), None, space, number(5.0), number(1.0), 0.0,
            0.0, 0.0, n, m, D, 0, 0, dtype,
        )  # fmt: skip
    assert not e.findings, "\n".join(map(str, e.findings))
    no_conflicts(e)
    moved(e, "x", "read", n * D * size, times=2)
    moved(e, "y", "read", m * D * size)
    moved(e, "lse", "write", (n + m) * 8)
    assert sum(k.mma for k in e.launches) == (dtype == torch.bfloat16) * mma_of(n, m, D)
