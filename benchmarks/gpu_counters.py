# SPDX-License-Identifier: Apache-2.0
"""What a GPU counts beside what the emulator counted: sectors of global memory and bank conflicts, kernel by kernel.

    python benchmarks/gpu_counters.py                  # all calls of tests/cusim/op_calls.py; needs a GPU and ncu
    python benchmarks/gpu_counters.py --only clip_loss

The emulator's counters are what tests/cusim holds the kernels to; here the hardware says whether they are right. A
kernel passes with at most a tenth more of either: nvcc may merge accesses that g++ does not.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

CUSIM = Path(__file__).resolve().parents[1] / "tests" / "cusim"
sys.path.insert(0, str(CUSIM))

SECTORS = tuple(f"l1tex__t_sectors_pipe_lsu_mem_global_op_{op}.sum" for op in ("ld", "st", "ldgsts"))
CONFLICTS = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum"
SLACK = 1.1


class Counters(NamedTuple):
    """Of all launches of a kernel."""

    sectors: int
    conflicts: int


def kernel_name(text: str) -> str:
    """``embed`` of ``void fvm::cuda::<unnamed>::embed<float, (int)4>(...)``."""
    for unnamed in ("<unnamed>::", "(anonymous namespace)::"):
        text = text.replace(unnamed, "")
    return text.partition("(")[0].partition("<")[0].split("::")[-1].split()[-1]


def measured(output: str) -> dict[str, Counters]:
    """The counters in the output of ``ncu --csv``, which has a line for each metric of each launch.

    Raises:
        ValueError: there is no such table, or a metric is missing or has no number.
    """
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError(f"gpu_counters: expected the table of ncu --csv, got {output[-500:]!r}")
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in csv.DictReader(lines[start:]):
        value = row["Metric Value"].replace(",", "")
        if not value.isdigit():
            raise ValueError(f"gpu_counters: expected a number for {row['Metric Name']}, got {row['Metric Value']!r}")
        found[kernel_name(row["Kernel Name"])][row["Metric Name"]] += int(value)
    for kernel, metrics in found.items():
        if missing := {*SECTORS, CONFLICTS} - metrics.keys():
            raise ValueError(f"gpu_counters: expected {', '.join(sorted(missing))} of {kernel}, got no such line")
    return {k: Counters(sum(m[s] for s in SECTORS), m[CONFLICTS]) for k, m in found.items()}


def emulated(name: str) -> dict[str, Counters]:
    """The counters of a call of op_calls.py under the emulator."""
    from emulated_ops import ops_through
    from emulator import Emulation
    from op_calls import make_calls, run

    torch.manual_seed(0)
    with Emulation() as e, ops_through(e):
        run(make_calls()[name])
    sectors = {k: group.sectors for (k,), group in e.traffic.select(space="global").by("kernel").items()}
    shared = e.traffic.select(space="shared").by("kernel")
    conflicts = {k: group.wavefronts - group.ideal_wavefronts for (k,), group in shared.items()}
    return {k: Counters(sectors.get(k, 0), conflicts.get(k, 0)) for k in {*sectors, *conflicts}}


def compare(pinned: dict[str, Counters], counted: dict[str, Counters]) -> tuple[list[str], bool]:
    """Lines of a table, and whether every kernel ran and stayed within SLACK."""
    lines, passed = [], True
    for kernel, expected in sorted(pinned.items()):
        got = counted.get(kernel)
        fits = got is not None and all(g <= SLACK * e for g, e in zip(got, expected, strict=True))
        passed = passed and fits
        cells = [f"{e} / {'-' if got is None else g}" for e, g in zip(expected, got or expected, strict=True)]
        remark = "" if fits else "did not run" if got is None else "more than pinned"
        lines.append(f"| {kernel} | {' | '.join(cells)} | {remark} |")
    return lines, passed


def count(name: str) -> dict[str, Counters]:
    """The counters of a call on the GPU."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SystemExit("gpu_counters: expected ncu on the PATH, got none; it comes with the CUDA toolkit")
    command = [ncu, "--csv", "--metrics", ",".join((*SECTORS, CONFLICTS)), sys.executable, CUSIM / "op_calls.py"]
    ran = subprocess.run([*map(str, command), "--device", "cuda", "--only", name], text=True, capture_output=True)
    if ran.returncode:
        raise SystemExit(f"gpu_counters: ncu failed on {name}:\n{ran.stdout}{ran.stderr}")
    return measured(ran.stdout)


def main(argv: list[str] | None = None) -> int:
    """Compare, and 1 where a kernel does more than the emulator counted."""
    from op_calls import make_calls

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="the name of a call")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("gpu_counters: expected a GPU, torch sees none; tests/cusim counts without one")
    everything = True
    print("| kernel | sectors, emulated / measured | bank conflicts, emulated / measured | |\n|---|---|---|---|")
    for name in make_calls():
        if options.only in (None, name):
            lines, passed = compare(emulated(name), count(name))
            everything = everything and passed
            print(f"| *{name}* | | | |", *lines, sep="\n", flush=True)
    return int(not everything)


if __name__ == "__main__":
    sys.exit(main())
