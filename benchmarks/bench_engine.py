# SPDX-License-Identifier: Apache-2.0
"""How near the packed products of csrc/gemm.h come to what the processor can do: a 512^3 product on one thread.

For every instruction set that this processor has, and float64, float32 and bfloat16, in turn:

- *bare*: multiply-adds of registers, independent of each other, without any memory;
- *tile*: one register tile of gemm.h again and again, its operands in the first-level cache;
- *product*: 512 x 512 x 512 of packed operands, each tile copied to the result;
- *packed*: the same with the packing of both operands.

Rates are medians over rounds that measure all four, in processor time of the one thread; percentages, of *bare* in the
same round. float16 is widened to float32 while it is packed, as bfloat16 is where there is no vdpbf16ps.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import harness
import machine
import report

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "engine"


class Rates(NamedTuple):
    """GFLOP/s of one instruction set and dtype, and shares of the bare rate."""

    isa: str
    dtype: str
    bare: float
    tile: float
    product: float
    packed: float
    product_share: float
    packed_share: float


def build(folder: Path, isas: str = "all") -> Path:
    """Compile ``engine_rates`` with the flags of the kernels; ``isas`` as FVM_FAST_ISA_BUILD. Returns the program.

    Raises:
        RuntimeError: there is no cmake, or it failed.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise RuntimeError("bench_engine: expected cmake beside Python or on the PATH, got none; pip install cmake")
    options = ["-DFVM_BINDINGS=OFF", "-DFVM_ENGINE_BENCHMARK=ON", f"-DFVM_ISA_BUILD={isas}"]
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(folder), *options],
        [cmake, "--build", str(folder), "--target", "engine_rates", "--parallel", "2"],
    ):
        ran = subprocess.run(command, env=os.environ | {"PATH": path}, text=True, capture_output=True)
        if ran.returncode:
            raise RuntimeError(f"bench_engine: {' '.join(command)} failed:\n{ran.stdout}{ran.stderr}")
    return folder / "benchmarks" / "engine" / "engine_rates"


def measure(program: Path, rounds: int) -> list[Rates]:
    """Run the program and read what it printed, a line for each instruction set and dtype."""
    printed = subprocess.run([program, str(rounds)], check=True, text=True, capture_output=True).stdout
    rows = [line.split() for line in printed.splitlines()]
    return [Rates(isa, dtype, *map(float, numbers)) for isa, dtype, *numbers in rows]


def table(rows: Sequence[Rates]) -> str:
    """A Markdown table of the rates."""
    header = ["instruction set", "dtype", "bare GFLOP/s", "tile", "product", "of bare", "packed", "of bare"]
    cells = [
        [r.isa, r.dtype, *map(report.number, (r.bare, r.tile, r.product)), f"{r.product_share:.0%}"]
        + [report.number(r.packed), f"{r.packed_share:.0%}"]
        for r in rows
    ]
    return report.table(header, cells)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; with ``--write`` also record."""
    args = harness.parse_arguments(__doc__, argv)
    rows = measure(build(BUILD, "native" if args.quick else "all"), 3 if args.quick else 25)
    dtypes = {str(dtype).removeprefix("torch.") for dtype in args.dtypes} | {"float64"}
    rows = [r for r in rows if r.dtype in dtypes and args.only in f"{r.isa} {r.dtype}"]
    text = f"## bench_engine\n\n{machine.describe()}.\n\n### product, 512 x 512 x 512, one thread\n\n{table(rows)}\n"
    print(text, flush=True)
    if args.write:
        report.write_section("bench_engine", text, report.RESULTS)


if __name__ == "__main__":
    main()
