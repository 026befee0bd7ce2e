# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ means on the CPU what its manual says."""

import emulator
import numpy as np
import pytest
import torch


def run(library: emulator.Library, schedule: str, name: str, *args, **options) -> emulator.Emulation:
    """The emulation of one call, which has to be without findings."""
    with emulator.Emulation(library, schedule=schedule) as e:
        assert e.call(name, *args, **options) == 0
    assert not e.findings, "\n".join(map(str, e.findings))
    return e


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("operand", [0, 1, 3, 8, 17])
def test_shuffles_stay_in_their_segment(width: int, operand: int, own_kernels) -> None:
    x = torch.arange(100, 132, dtype=torch.int32)
    out = torch.empty(4, 32, dtype=torch.int32)
    run(own_kernels, "random:7", "run_shuffles", x, out, width, operand)
    lane = np.arange(32)
    first, last = lane // width * width, lane // width * width + width - 1
    sources = [
        first + operand % width,
        np.where(lane - operand >= first, lane - operand, lane),
        np.where(lane + operand <= last, lane + operand, lane),
        np.where((lane ^ operand) <= last, lane ^ operand, lane),
    ]
    torch.testing.assert_close(out, torch.from_numpy(100 + np.stack(sources)).int())


def test_halves_of_a_warp_shuffle_apart(own_kernels, schedule: str) -> None:
    x = torch.arange(32, dtype=torch.float64) / 3
    out = torch.empty_like(x)
    run(own_kernels, schedule, "run_shuffle_halves", x, out)
    torch.testing.assert_close(out, x.view(2, 16).sum(1, keepdim=True).expand(2, 16).reshape(32))


@pytest.mark.parametrize("threads", [32, 96])
def test_votes(threads: int, own_kernels, schedule: str) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 3, (threads,), dtype=torch.int32)
    x[:32] = 5 if threads > 32 else x[:32]
    out = torch.empty(7, threads, dtype=torch.int32)
    run(own_kernels, schedule, "run_votes", x, out, threads)
    warps = x.view(-1, 32).numpy()
    bits = (1 << np.arange(32, dtype=np.uint64)).astype(np.uint64)
    ballot = ((warps != 0) * bits).sum(1).astype(np.uint32).view(np.int32)
    match = ((warps[:, :, None] == warps[:, None, :]) * bits).sum(2).astype(np.uint32).view(np.int32)
    per_lane = [np.repeat(v, 32) for v in (ballot, (warps != 0).any(1), (warps != 0).all(1))]
    of_block = [np.full(threads, v) for v in ((x != 0).sum(), (x != 0).any(), (x != 0).all())]
    want = np.stack([*per_lane, match.reshape(-1), *of_block]).astype(np.int32)
    torch.testing.assert_close(out, torch.from_numpy(want))


def test_blocks_and_grids_of_three_dimensions(own_kernels, schedule: str) -> None:
    out = torch.empty(24, 30, dtype=torch.int32)
    e = run(own_kernels, schedule, "run_three_dimensions", out)
    block = [z * 100 + y * 10 + x for z in range(4) for y in range(3) for x in range(2)]
    thread = [z * 100 + y * 10 + x for z in range(2) for y in range(3) for x in range(5)]
    torch.testing.assert_close(out, (torch.tensor(block)[:, None] * 1000 + torch.tensor(thread)).int())
    assert e.launches[0].grid == (2, 3, 4) and e.launches[0].block == (5, 3, 2)


def test_atomics(own_kernels, schedule: str) -> None:
    torch.manual_seed(0)
    n = 75
    x = torch.randint(1, 1000, (n,), dtype=torch.int32)
    out = torch.tensor([0, 10**6, 0, 0, -1, 0, 0], dtype=torch.int32)
    total, smallest = torch.zeros(1, dtype=torch.float64), torch.tensor([-1])
    run(own_kernels, schedule, "run_atomics", x, out, total, smallest, n, in_out=("out", "sum", "smallest"))
    bits = np.bitwise_or.reduce(1 << (x.numpy() % 31))
    want = [int(x.sum()), int(x.min()), int(x.max()), int(bits), ~int(bits), 2 * n, 7]
    assert out.tolist() == want and float(total) == n / 2 and int(smallest) == 5


@pytest.mark.parametrize(("dtype", "name", "factor"), [(torch.float64, "f64", 3), (torch.int32, "i32", 2)])
@pytest.mark.parametrize("n", [1, 100, 5000])
def test_dynamic_shared_memory(n: int, dtype, name: str, factor: int, own_kernels, schedule: str) -> None:
    x = torch.arange(n).to(dtype)
    out = torch.empty_like(x)
    e = run(own_kernels, schedule, f"run_turn_dynamic_{name}", x, out, n)
    torch.testing.assert_close(out, factor * x.flip(0))
    assert e.launches[0].shared_bytes == n * x.element_size()
    assert e.launches[0].instance.startswith("turn_dynamic<")


@pytest.mark.parametrize("bf16", [False, True])
def test_halves_in_static_shared_memory(bf16: bool, own_kernels, schedule: str) -> None:
    x, out = torch.randn(32), torch.empty(32)
    run(own_kernels, schedule, "run_turn_halves", x, out, bf16)
    torch.testing.assert_close(out, x.flip(0).to(torch.bfloat16 if bf16 else torch.float16).float(), rtol=0, atol=0)


def test_a_struct_as_an_argument(own_kernels, schedule: str) -> None:
    out = torch.empty(12, dtype=torch.int32)
    run(own_kernels, schedule, "run_takes_a_struct", out)
    torch.testing.assert_close(out, 7 * torch.arange(12, dtype=torch.int32))


def test_integer_functions(own_kernels) -> None:
    x = torch.tensor([0, 1, -1, 2, 3, 40, 2**31 - 1, -(2**31), *range(100, 124)], dtype=torch.int32)
    out = torch.empty(4, 32, dtype=torch.int32)
    run(own_kernels, "forward", "run_integers", x, out)
    bits = [int(v) % 2**32 for v in x]
    want = [
        [b.bit_count() for b in bits],
        [32 - b.bit_length() for b in bits],
        [(b & -b).bit_length() for b in bits],
        [b // 2 for b in bits],
    ]
    torch.testing.assert_close(out, torch.tensor(want, dtype=torch.int64).int())


def test_memcpy_and_memset_are_seen(own_kernels) -> None:
    x = torch.arange(37, dtype=torch.uint8)
    out = torch.empty_like(x)
    e = run(own_kernels, "forward", "run_copy_by_bytes", x, out, 37)
    torch.testing.assert_close(out, x)
    assert e.traffic.select(access="read").unique == e.traffic.select(access="write").unique == 37
    zeros = torch.empty(33)
    e = run(own_kernels, "forward", "run_memset", zeros, 132)
    assert not zeros.any() and e.traffic.unique == 132


def test_a_grid_without_blocks_does_nothing_and_a_negative_one_is_refused(own_kernels) -> None:
    out = torch.empty(0)
    assert not run(own_kernels, "forward", "run_empty_grid", out, 0).launches
    with emulator.Emulation(own_kernels) as e:
        assert e.call("run_empty_grid", out, -1) != 0 and e.call("run_empty_grid", out, 2**32 + 1) != 0
    assert {f.kind for f in e.findings} == {"launch"}
