# SPDX-License-Identifier: Apache-2.0
"""gather_tokens and restore_tokens on the emulated GPU: values, gradients, bad indices, and the bytes they move."""

import sys
from pathlib import Path

import pytest
import torch
from common import DTYPES, check_against_torch
from emulated_ops import ops_on_emulated_cuda
from emulator import SCHEDULES, Emulation, Library, build
from torch import Tensor

from fvm_fast.ops import (
    backend,
    gather_tokens,
    gather_tokens_reference,
    restore_tokens,
    restore_tokens_reference,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cuda_on_paper as on_paper  # noqa: E402

GATHER = {  # B, L, K, D
    "one": (1, 1, 1, 1),
    "packs of 16 bytes": (2, 5, 3, 40),
    "rows that are not aligned": (2, 5, 7, 33),
    "more ids than a warp has lanes": (1, 50, 71, 8),
    "more packs than lanes": (2, 3, 4, 264),
    "counts beyond shared memory": (1, 4200, 65, 1),
    "no images": (0, 4, 3, 8),
    "no ids": (2, 4, 0, 8),
}
RESTORE = {  # B, P, K, L, D, positions: of all, of the patches, none
    "one": (1, 0, 1, 1, 1, "all"),
    "nothing masked": (3, 1, 6, 6, 8, "patches"),
    "everything masked behind a prefix": (2, 2, 0, 6, 5, "all"),
    "no position": (2, 1, 2, 7, 33, "none"),
    "more images than warps": (11, 1, 2, 5, 16, "all"),
    "more packs than lanes": (2, 2, 3, 7, 264, "patches"),
    "more patches than lanes": (1, 0, 30, 77, 8, "all"),
}


@pytest.fixture(scope="module")
def library() -> Library:
    return build("token_gather")


def make_gather(B: int, L: int, K: int, D: int, repeated: bool = False) -> list[Tensor]:
    distinct = torch.rand(B, L).argsort(1)[:, :K].contiguous()
    ids = torch.randint(0, L, (B, K)) if repeated or K > L else distinct
    return [torch.randn(B, L, D, dtype=torch.float64), ids]


def make_restore(B, P, K, L, D, positions, repeated: bool = False) -> list[Tensor | None]:
    ids = torch.randint(0, L, (B, L)) if repeated else torch.rand(B, L).argsort(1)
    rows = {"all": P + L, "patches": L, "none": None}[positions]
    pos_embed = None if rows is None else torch.randn(rows, D, dtype=torch.float64)
    return [torch.randn(B, P + K, D, dtype=torch.float64), ids, torch.randn(D, dtype=torch.float64), pos_embed]


# ---- launchers, as the ops call them


def gather(e: Emulation, x: Tensor, ids: Tensor, **kwargs) -> Tensor:
    (B, L, D), K = x.shape, ids.shape[1]
    out = x.new_empty(B, K, D)
    e.call("gather_tokens_fwd", x, ids, out, B, L, K, D, x.dtype, **kwargs)
    return out


def gather_bwd(e: Emulation, dout: Tensor, ids: Tensor, L: int) -> Tensor:
    B, K, D = dout.shape
    dx = dout.new_empty(B, L, D)
    e.call("gather_tokens_bwd", dout, ids, dx, ids.new_empty(B * (L + 1 + K)), B, L, K, D, dout.dtype)
    return dx


def restore(e: Emulation, x, ids, mask_token, pos_embed, P: int, **kwargs) -> Tensor:
    (B, N, D), L = x.shape, ids.shape[1]
    out = x.new_empty(B, P + L, D)
    rows = 0 if pos_embed is None else len(pos_embed)
    e.call("restore_tokens_fwd", x, ids, mask_token, pos_embed, out, B, P, N - P, L, D, rows, x.dtype, **kwargs)
    return out


def restore_bwd(e: Emulation, dout: Tensor, ids: Tensor, P: int, K: int, rows: int, want=(True, True, True)):
    B, L, D = dout.shape[0], ids.shape[1], dout.shape[2]
    shapes = ((B, P + K, D), (D,), (rows, D))
    grads = [dout.new_empty(shape) if wanted else None for shape, wanted in zip(shapes, want, strict=True)]
    wide = torch.float64 if dout.dtype == torch.float64 else torch.float32
    sums, workspace = dout.new_empty(P + L, D, dtype=wide), ids.new_empty(B * (K + 1 + L))
    e.call("restore_tokens_bwd", dout, ids, *grads, workspace, sums, B, P, K, L, D, rows, dout.dtype)
    return grads


def assert_clean(e: Emulation) -> None:
    assert not e.findings, "\n".join(map(str, e.findings))


# ---- no finding, and the same bits, in every order of threads and blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", GATHER.values(), ids=GATHER)
@pytest.mark.parametrize("repeated", (False, True), ids=("distinct", "repeated"))
def test_gather(library, sizes, dtype, repeated):
    x, ids = make_gather(*sizes, repeated)
    x, dout = x.to(dtype), torch.randn(sizes[0], sizes[2], sizes[3]).to(dtype)
    found = []
    for schedule in SCHEDULES:
        with Emulation(library, schedule=schedule) as e:
            found.append((gather(e, x, ids), gather_bwd(e, dout, ids, sizes[1])))
        assert_clean(e)
    out, dx = found[0]
    assert torch.equal(out, gather_tokens_reference(x, ids))
    exact = torch.zeros(x.shape, dtype=torch.float64)
    exact.scatter_add_(1, ids[..., None].expand(-1, -1, sizes[3]), dout.double())
    torch.testing.assert_close(dx, exact.to(dtype))
    for other_out, other_dx in found[1:]:
        assert torch.equal(other_out, out) and torch.equal(other_dx, dx)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", RESTORE.values(), ids=RESTORE)
@pytest.mark.parametrize("repeated", (False, True), ids=("a permutation", "repeated"))
def test_restore(library, sizes, dtype, repeated):
    B, P, K, L, D, _ = sizes
    x, ids, mask_token, pos_embed = (
        t if t is None or not t.is_floating_point() else t.to(dtype) for t in make_restore(*sizes, repeated)
    )
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, mask_token, pos_embed)]
    exact = restore_tokens_reference(leaves[0], ids, *leaves[1:], num_prefix_tokens=P)
    dout = torch.randn(B, P + L, D).to(dtype)
    exact.backward(dout.double())
    found = []
    for schedule in SCHEDULES:
        with Emulation(library, schedule=schedule) as e:
            out = restore(e, x, ids, mask_token, pos_embed, P)
            want = (True, True, pos_embed is not None)
            found.append((out, *restore_bwd(e, dout, ids, P, K, 0 if pos_embed is None else len(pos_embed), want)))
        assert_clean(e)
    wanted = (exact.detach(), *(None if leaf is None else leaf.grad for leaf in leaves))
    for i, reference in enumerate(wanted):
        if reference is not None:
            torch.testing.assert_close(found[0][i], reference.to(dtype), msg=lambda text, i=i: f"result {i}: {text}")
            assert all(torch.equal(other[i], found[0][i]) for other in found[1:])


@pytest.mark.parametrize("want", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_any_subset_of_gradients(library, want):
    B, P, K, L, D = 3, 1, 2, 5, 8
    ids, dout = torch.tensor([[0, 1, 2, 3, 4], [1, 1, 4, 3, 3], [4, 4, 4, 4, 4]]), torch.randn(B, P + L, D)
    with Emulation(library) as e:
        some, everything = (restore_bwd(e, dout, ids, P, K, P + L, wanted) for wanted in (want, (1, 1, 1)))
    assert_clean(e)
    for ours, reference in zip(some, everything, strict=True):
        assert ours is None or torch.equal(ours, reference)


# ---- bad indices are never followed


def test_bad_ids_give_nan_rows_and_no_gradient(library):
    (B, L, K, D), good = (2, 5, 4, 8), torch.tensor([[True, False, True, True], [False, True, False, True]])
    ids = torch.tensor([[0, 5, 1, 4], [-1, 2, 1 << 40, 2]])
    x, dout, bad_id = torch.randn(B, L, D), torch.randn(B, K, D), torch.tensor([-1])
    with Emulation(library) as e:
        out, dx = gather(e, x, ids, bad_id=bad_id), gather_bwd(e, dout, ids, L)
    assert_clean(e)
    assert bad_id.item() == 1  # the first, in flat order
    assert out[~good].isnan().all()
    safe = ids.where(good, 0)
    assert torch.equal(out[good], gather_tokens_reference(x, safe)[good])
    exact = torch.zeros(B, L, D).scatter_add_(1, safe[..., None].expand(-1, -1, D), dout * good[..., None])
    torch.testing.assert_close(dx, exact)


def test_bad_ids_to_restore_give_nan_rows_and_no_gradient(library):
    B, P, K, L, D = 2, 1, 2, 4, 8
    ids, bad_id = torch.tensor([[0, 1, 2, 3], [1, -7, 0, 4]]), torch.tensor([-1])
    good = torch.tensor([[True] * 5, [True, True, False, True, False]])
    x, mask_token, dout = torch.randn(B, P + K, D), torch.randn(D), torch.randn(B, P + L, D)
    with Emulation(library) as e:
        out = restore(e, x, ids, mask_token, None, P, bad_id=bad_id)
        dx, dmask_token, dpos = restore_bwd(e, dout, ids, P, K, P + L)
    assert_clean(e)
    assert bad_id.item() == L + 1  # positions are those of ids
    assert torch.equal(out.isnan().all(2), ~good) and torch.equal(out.isnan().any(2), ~good)
    torch.testing.assert_close(dmask_token, dout[0, P + 2 :].sum(0))
    torch.testing.assert_close(dpos, (dout * good[..., None]).sum(0))
    torch.testing.assert_close(dx, torch.stack([dout[0, :3], dout[1, [0, 3, 1]]]))


def test_without_the_word_bad_ids_are_left_alone(library):
    with Emulation(library) as e:
        assert gather(e, torch.ones(1, 2, 8), torch.tensor([[2]])).isnan().all()
    assert_clean(e)


# ---- traffic: MAE's decoder at a quarter kept, aligned rows


B, P, K, L = 3, 1, 5, 20
BULK = ("x", "out", "dout", "dx")


@pytest.fixture(params=(torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def bytes_moved(request, library):
    """``bytes_moved(launchers) -> Emulation`` with data of one dtype; checks what holds for all."""
    D, dtype = 128, request.param
    x, dout = torch.randn(B, P + K, D).to(dtype), torch.randn(B, P + L, D).to(dtype)
    ids, pos_embed, mask_token = torch.rand(B, L).argsort(1), torch.randn(P + L, D).to(dtype), torch.randn(D).to(dtype)

    def run(f) -> tuple[Emulation, int]:
        with Emulation(library) as e:
            f(e, x, ids, mask_token, pos_embed, dout)
        assert_clean(e)
        for name in BULK:
            group = e.traffic.select(space="global", buffer=name)
            assert group.bytes == group.unique, f"{name} is moved twice"
            assert 32 * group.sectors <= 1.1 * group.bytes, f"{name} is moved in parts of sectors"
        for (kernel,), group in e.traffic.select(space="shared").by("kernel").items():
            scattered = kernel == "invert_index"  # counts lie where the ids say, so lanes may meet in a bank
            assert scattered or group.wavefronts == group.ideal_wavefronts, f"{kernel} has bank conflicts"
        return e, D * x.element_size()

    return run


def moved(e: Emulation, buffer: str, access: str) -> int:
    return e.traffic.select(space="global", buffer=buffer, access=access).unique


def test_gather_moves_each_byte_once(bytes_moved):
    kept = torch.rand(B, P + K).argsort(1)[:, :4].contiguous()
    e, row = bytes_moved(lambda e, x, *rest: gather(e, x, kept))
    assert moved(e, "x", "read") == moved(e, "out", "write") == 4 * B * row


def test_gather_backward_moves_each_byte_once(bytes_moved):
    kept = torch.rand(B, L).argsort(1)[:, : P + K].contiguous()
    e, row = bytes_moved(lambda e, x, *rest: gather_bwd(e, x, kept, L))
    assert moved(e, "dout", "read") == B * (P + K) * row and moved(e, "dx", "write") == B * L * row


def test_restore_moves_each_byte_once(bytes_moved):
    """Positions and the mask token are read for each image again, out of the L2 cache: both are small."""
    e, row = bytes_moved(lambda e, x, ids, mask_token, pos_embed, dout: restore(e, x, ids, mask_token, pos_embed, P))
    assert moved(e, "x", "read") == B * (P + K) * row
    assert moved(e, "out", "write") == B * (P + L) * row
    assert moved(e, "pos", "read") == (P + L) * row and moved(e, "mask_token", "read") == row
    assert e.traffic.select(buffer="pos").bytes == B * (P + L) * row


def test_restore_backward_moves_each_byte_once(bytes_moved):
    e, row = bytes_moved(lambda e, x, ids, mask_token, pos_embed, dout: restore_bwd(e, dout, ids, P, K, P + L))
    assert moved(e, "dout", "read") == B * (P + L) * row
    assert moved(e, "dx", "write") == B * (P + K) * row
    assert moved(e, "dpos", "write") == (P + L) * row and moved(e, "dmask_token", "write") == row


def test_bytes_are_those_on_paper(bytes_moved):
    """Of indices the paper counts one reading; their inverse stays in the L2 cache."""
    order, kept = torch.rand(B, P + K).argsort(1), torch.rand(B, L).argsort(1)[:, : P + K].contiguous()
    passes = {
        on_paper.gather_tokens_fwd: ((P + K, P + K), lambda e, x, *rest: gather(e, x, order)),
        on_paper.gather_tokens_bwd: ((L, P + K), lambda e, x, *rest: gather_bwd(e, x, kept, L)),
        on_paper.restore_tokens_fwd: ((P, K, L), lambda e, x, i, m, p, dout: restore(e, x, i, m, p, P)),
        on_paper.restore_tokens_bwd: ((P, K, L), lambda e, x, i, m, p, dout: restore_bwd(e, dout, i, P, K, P + L)),
    }
    for paper, (sizes, run) in passes.items():
        e, row = bytes_moved(run)
        bulk = sum(group.unique for (name,), group in e.traffic.select(space="global").by("buffer").items()
                   if name not in ("ids", "workspace", "partial_sums"))  # fmt: skip
        ids = 8 * B * (L if len(sizes) == 3 else P + K)
        assert bulk + ids == paper(B, *sizes, 128, row // 128).bytes, paper.__name__


# ---- the ops, from Python down


def ours(P: int):
    return lambda x, ids, mask_token, pos_embed: restore_tokens(x, ids, mask_token, pos_embed, num_prefix_tokens=P)


def reference(P: int):
    return lambda x, ids, mask_token, pos_embed: restore_tokens_reference(
        x, ids, mask_token, pos_embed, num_prefix_tokens=P
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", (False, True), ids=("unchecked", "checked"))
def test_ops(dtype, check):
    with ops_on_emulated_cuda(check=check):
        for sizes in ((2, 5, 7, 33), (2, 0, 0, 8), (0, 4, 3, 8)):
            x, ids = make_gather(*sizes)
            check_against_torch(
                gather_tokens, gather_tokens_reference, (x, ids), dtype, torch.randn(ids.shape + x.shape[2:])
            )
        for B, P, K, L, D, positions in RESTORE.values():
            dout = torch.randn(B, P + L, D)
            for repeated in (False, True):
                args = make_restore(B, P, K, L, D, positions, repeated)
                check_against_torch(ours(P), reference(P), args, dtype, dout)


def test_gradients_of_float64_by_differences():
    with ops_on_emulated_cuda(), backend("native"):
        x, ids, mask_token, pos_embed = make_restore(2, 1, 2, 3, 3, "all", repeated=True)
        leaves = [t.requires_grad_() for t in (x, mask_token, pos_embed)]
        assert torch.autograd.gradcheck(lambda x, m, p: ours(1)(x, ids, m, p), leaves)
        assert torch.autograd.gradcheck(lambda x: gather_tokens(x, ids % 3), (x,))


def test_bad_ids_raise_only_where_they_are_asked_for():
    x, ids, restore_ids = torch.ones(2, 5, 3), torch.tensor([[0, 1], [2, 5]]), torch.tensor([[0, 1, 2], [0, 3, 1]])
    with ops_on_emulated_cuda():
        assert gather_tokens(x, ids).isnan().any(2).tolist() == [[False, False], [False, True]]
    with ops_on_emulated_cuda(check=True):
        with pytest.raises(IndexError, match=r"gather_tokens: expected ids in \[0, 5\), got 5 at \[1, 1\]"):
            gather_tokens(x, ids)
        with pytest.raises(IndexError, match=r"restore_tokens: expected ids_restore in \[0, 3\), got 3 at \[1, 1\]"):
            restore_tokens(x[:, :2], restore_ids, torch.ones(3))
