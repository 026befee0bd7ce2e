# SPDX-License-Identifier: Apache-2.0
"""Each seeded defect is caught, in every order of threads and blocks, and the same kernel without it is found right."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import emulator
import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Defect:
    """``caught_by`` is the kind of finding; or, where there is none, the counter or "numerics"."""

    name: str
    caught_by: str
    mistake: str
    n: int = 128
    expected: Callable[[Tensor], Tensor] = lambda x: x.flip(0)
    outputs: int | None = None  # n
    in_out: tuple[str, ...] = ()

    def run(self, library: emulator.Library, schedule: str, *, right: bool, check: bool = True) -> "Outcome":
        """Runs the kernel; x and out lie in the middle of more memory, as the plain build stops at no border."""
        x, out = torch.zeros(2 * MARGIN + self.n), torch.zeros(2 * MARGIN + (self.outputs or self.n))
        x, out = x[MARGIN : MARGIN + self.n], out[MARGIN : len(out) - MARGIN]
        x += torch.arange(1.0, self.n + 1)
        with emulator.Emulation(library, schedule=schedule, check=check) as e:
            e.call(f"run_{self.name}", right, x, out, in_out=self.in_out)
        return Outcome(e, torch.equal(out, self.expected(x)))


@dataclass(frozen=True)
class Outcome:
    """What an emulation found, and whether the result is what it should be."""

    emulation: emulator.Emulation
    is_right: bool

    @property
    def kinds(self) -> set[str]:
        """Of the findings."""
        return {finding.kind for finding in self.emulation.findings}

    @property
    def counters(self) -> list[str]:
        """Those that are too high."""
        return [name for name, is_bad in COUNTERS.items() if is_bad(self.emulation.traffic)]


COUNTERS = {
    "sectors": lambda t: t.sectors * 32 > 1.1 * t.bytes,
    "wavefronts": lambda t: t.wavefronts > t.ideal_wavefronts,
    "unique bytes": lambda t: t.select(space="global").bytes > t.unique,
}
MARGIN = 1 << 18
DEFECTS = [
    Defect("missing_barrier", "race", "no __syncthreads between writing and reading shared memory"),
    Defect("missing_barrier_in_reduction", "race", "no __syncthreads after the last step of a tree sum"),
    Defect("missing_barrier_before_reuse", "race", "no second __syncthreads in a loop over one tile"),
    Defect("missing_warp_barrier", "race", "no __syncwarp between lanes of one warp", n=32),
    Defect("warp_barrier_of_half", "race", "__syncwarp with the mask of half a warp", n=32),
    Defect("shuffle_for_a_barrier", "race", "a shuffle taken for a barrier", n=32),
    Defect(
        "sum_without_atomic",
        "race",
        "blocks add to one number without atomicAdd",
        n=4,
        outputs=1,
        expected=lambda x: x.sum()[None],
        in_out=("out",),
    ),
    Defect("block_reads_what_another_writes", "race", "a block reads what another block of the launch writes"),
    Defect("wait_without_barrier", "race", "cp.async waited for, but no barrier for the other threads"),
    Defect("barrier_in_a_branch", "divergence", "half of the block waits at another __syncthreads"),
    Defect("shuffle_in_a_branch", "divergence", "halves of a warp call different shuffles", n=32),
    Defect("lane_outside_its_mask", "divergence", "a lane calls a shuffle whose mask leaves it out", n=32),
    Defect("mma_in_half_a_warp", "divergence", "mma after half of the warp has returned"),
    Defect("mma_in_a_branch", "divergence", "mma by half of the warp"),
    Defect("barrier_against_warp_barrier", "deadlock", "half of each warp at __syncwarp, half at __syncthreads"),
    Defect("shuffle_from_a_returned_lane", "shuffle", "an early return before a shuffle of all lanes", n=20),
    Defect("missing_wait", "in_flight", "no wait for cp.async"),
    Defect("wait_for_too_few", "in_flight", "a wait that leaves a needed group under way"),
    Defect("returns_with_a_copy_under_way", "in_flight", "a thread returns before its cp.async arrives"),
    Defect("one_too_many", "out_of_bounds", "<= for < at the end of a buffer that blocks do not divide", n=100),
    Defect("before_the_start", "out_of_bounds", "an index of -1"),
    Defect("far_behind_the_end", "out_of_bounds", "a wrong stride, into some other buffer"),
    Defect("dynamic_shared_too_small", "out_of_bounds", "the launch gives one float too little"),
    Defect("behind_a_shared_array", "out_of_bounds", "an index past a shared array, into the next one"),
    Defect("behind_a_local_array", "out_of_bounds", "an index past an array of registers"),
    Defect("adds_to_blank_output", "uninitialised", "+= to an output that nobody cleared"),
    Defect("blank_shared", "uninitialised", "shared memory not filled to the end"),
    Defect("forgets_the_last", "unwritten", "an output not filled to the end"),
    Defect("misaligned_vector", "misaligned", "float4 from an address that is no multiple of 16"),
    Defect("misaligned_copy", "misaligned", "cp.async of 16 bytes to a multiple of 8"),
    Defect("misaligned_rows_for_ldmatrix", "misaligned", "rows of 24 bytes for ldmatrix"),
    Defect("writes_to_its_input", "read_only", "a const_cast"),
    Defect("block_too_large", "launch", "1056 threads in a block"),
    Defect("grid_too_high", "launch", "65536 blocks in y"),
    Defect("large_shared_without_leave", "launch", "60000 bytes of shared memory without the attribute"),
    Defect("shared_beyond_the_device", "launch", "100 KB of shared memory, which sm_86, 89 and 120 do not have"),
    Defect(
        "static_and_dynamic_shared",
        "launch",
        "20 KB of static and 29 KB of dynamic shared memory without the attribute",
    ),
    Defect("swapped_fragments", "numerics", "the two registers of mma's second operand swapped"),
    Defect("strided_loads", "sectors", "neighbouring lanes read 128 bytes apart", n=1024),
    Defect("bank_conflicts", "wavefronts", "a tile of 32 x 32 without padding, by columns", n=1024),
    Defect("reads_twice", "unique bytes", "every value is fetched by two threads", n=1024),
]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name)
def test_defect_is_caught_and_only_it(defect: Defect, own_kernels, schedule: str) -> None:
    check(defect, own_kernels, schedule)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name)
def test_defect_is_caught_with_the_fibers_of_the_c_library(defect: Defect, own_kernels_on_ucontext) -> None:
    check(defect, own_kernels_on_ucontext, "forward")


def check(defect: Defect, library: emulator.Library, schedule: str) -> None:
    """Nothing is found in the right kernel, and the mistake in the wrong one."""
    right = defect.run(library, schedule, right=True)
    assert not right.kinds, "\n".join(map(str, right.emulation.findings))
    assert right.is_right, "the kernel without the defect computes something else"
    assert defect.caught_by not in COUNTERS or not right.counters

    wrong = defect.run(library, schedule, right=False)
    if defect.caught_by == "numerics":
        assert not wrong.is_right and not wrong.kinds
    elif defect.caught_by in COUNTERS:
        assert wrong.is_right and not wrong.kinds and wrong.counters == [defect.caught_by]
    else:
        assert defect.caught_by in wrong.kinds, "\n".join(map(str, wrong.emulation.findings))


# ---- the table: python tests/cusim/test_seeded_defects.py writes it

TABLE = Path(__file__).with_name("seeded_defects.md")
HEAD = """# The seeded defects and what catches them

Made by `python tests/cusim/test_seeded_defects.py`. The test there runs each kernel, right and with its mistake, in the
orders {orders}. The last column tells in how many of these orders the numbers alone, without the
detector, would have been wrong; in the rest the mistake would have passed.

| defect | the mistake | caught by | wrong numbers |
|---|---|---|---|
"""


def wrong_numbers(defect: Defect, library: emulator.Library) -> str:
    """In how many orders the result without detector is wrong."""
    if defect.caught_by == "misaligned":
        return "none: a fault"
    orders = emulator.SCHEDULES
    right = sum(defect.run(library, schedule, right=False, check=False).is_right for schedule in orders)
    return f"{len(orders) - right} of {len(orders)}"


def table(library: emulator.Library) -> str:
    """One row a defect, as measured."""
    rows = [f"| {d.name} | {d.mistake} | {d.caught_by} | {wrong_numbers(d, library)} |\n" for d in DEFECTS]
    return HEAD.format(orders=", ".join(emulator.SCHEDULES)) + "".join(rows)


def test_the_table_is_up_to_date() -> None:
    rows = [tuple(line.split(" | ")[:3]) for line in TABLE.read_text().splitlines()[8:]]
    assert rows == [(f"| {d.name}", d.mistake, d.caught_by) for d in DEFECTS]


if __name__ == "__main__":
    TABLE.write_text(table(emulator.build(*sorted((Path(__file__).parent / "kernels").glob("*.cu")))))
