# SPDX-License-Identifier: Apache-2.0
"""What each CUDA kernel takes of each architecture, read from the compiled module: no GPU is needed.

    python benchmarks/cuda_resources.py            # compare the module with cuda/RESOURCES.csv
    python benchmarks/cuda_resources.py --write    # after a change of kernels: record it
    python benchmarks/cuda_resources.py --summary  # one line a kernel, as Markdown

A row is a kernel on an architecture: threads of a block, registers of a thread, bytes of shared memory of a block and
of local memory of a thread (where spills would be: always 0), counts of tensor-core, ldmatrix and cp.async instructions
in the machine code, and the theoretical occupancy with what limits it. cuobjdump comes with triton, which torch brings.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "cuda" / "RESOURCES.csv"

# Bytes of dynamic shared memory that a typical launch asks for, by kernel; the machine code does not tell them. The
# first pattern that matches the whole name counts.
DYNAMIC_SHARED = {
    r"(embed|image_gradient|weight_gradient|log_sums|make_gradient|product)<.*>": 32
    << 10,  # both operands of two steps
    # Swin's windows of 49 tokens with heads of 32 channels, and of 128 where the kernel is for more
    r"attend<(bf16|fp16), 32>": 16_057,
    r"attend<fp32, 32>": 19_001,
    r"attend<(bf16|fp16), 128>": 52_921,
    r"attend<fp32, 128>": 55_865,
    r"attend<fp64, 128>": 52_793,
    r"differentiate<(bf16|fp16)>": 44_985,
    r"differentiate<fp32>": 32_953,
    r"differentiate<fp64>": 27_065,
    r"invert_index": 8 * 197,  # the patches of a ViT at 224 px
}


class Limits(NamedTuple):
    """What an SM has: "Technical Specifications per Compute Capability" of the CUDA programming guide."""

    warps: int
    blocks: int
    shared: int


LIMITS = {
    80: Limits(warps=64, blocks=32, shared=164 << 10),
    86: Limits(warps=48, blocks=16, shared=100 << 10),
    89: Limits(warps=48, blocks=24, shared=100 << 10),
    90: Limits(warps=64, blocks=32, shared=228 << 10),
    100: Limits(warps=64, blocks=32, shared=228 << 10),
    120: Limits(warps=48, blocks=24, shared=100 << 10),
}
REGISTERS, REGISTER_UNIT, WARP_UNIT = 65536, 256, 4  # of an SM; a warp's registers and a block's warps come in these
SHARED_UNIT, RESERVED_SHARED = 128, 1024  # the system's part of every block's shared memory


class Row(NamedTuple):
    """One line of the table."""

    file: str
    kernel: str
    arch: int
    threads: int
    registers: int
    shared: int  # static
    dynamic: int
    local: int
    hmma: int
    ldsm: int
    ldgsts: int
    blocks: int  # on an SM
    occupancy: int  # percent
    limit: str  # warps, blocks, registers or shared


# ---- reading the module


def read_module(module: Path) -> list[Row]:
    """The rows of a compiled module, sorted.

    Raises:
        RuntimeError: no cuobjdump, or a kernel with dynamic shared memory of unknown size.
    """
    blocks, uses, instructions = read_ptx(module), read_resource_usage(module), count_instructions(module)
    symbols = sorted({symbol for symbol, _ in uses})
    names = dict(zip(symbols, map(short_name, demangled(symbols)), strict=True))
    rows = []
    for (symbol, arch), use in uses.items():
        file, kernel = source_file(symbol), names[symbol]
        threads, is_dynamic = blocks[symbol]
        dynamic = dynamic_shared(file, kernel) if is_dynamic else 0
        reserved = RESERVED_SHARED if arch >= 90 else 0  # the tool counts it in from there on
        shared, local = use["SHARED"] - reserved, use["STACK"] + use["LOCAL"]
        occupancy = theoretical_occupancy(arch, threads, use["REG"], shared + dynamic)
        counts = instructions[symbol, arch]
        rows.append(Row(file, kernel, arch, threads, use["REG"], shared, dynamic, local, *counts, *occupancy))
    return sorted(rows)


def read_ptx(module: Path) -> dict[str, tuple[int, bool]]:
    """Threads of a block by symbol, from the kernel's launch bounds, and whether it takes dynamic shared memory."""
    ptx = cuobjdump("-ptx", module)
    arrays = re.findall(r"\.extern \.shared .*?(\w+)\[\]", ptx)
    found = {}
    for entry in re.split(r"^(?:\.visible |\.weak )?\.entry ", ptx, flags=re.MULTILINE)[1:]:
        entry = entry.partition("\n}")[0]  # what follows is the next file's
        symbol, bounds = entry.partition("(")[0].strip(), re.search(r"\.maxntid (\d+), (\d+), (\d+)", entry)
        if bounds is None:
            raise RuntimeError(f"cuda_resources: expected __launch_bounds__ on every kernel, got none on {symbol}")
        threads = int(bounds[1]) * int(bounds[2]) * int(bounds[3])
        found[symbol] = threads, any(array in entry for array in arrays)
    return found


def read_resource_usage(module: Path) -> dict[tuple[str, int], dict[str, int]]:
    """Registers and memory by (symbol, architecture)."""
    found, arch, symbol = {}, 0, ""
    for line in cuobjdump("-res-usage", module).splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.match(r"\s*Function (\S+):", line):
            symbol = match[1]
        elif "REG:" in line:
            found[symbol, arch] = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
    return found


def count_instructions(module: Path) -> dict[tuple[str, int], tuple[int, int, int]]:
    """HMMA, LDSM and LDGSTS in the machine code, by (symbol, architecture)."""
    found: dict[tuple[str, int], list[int]] = {}
    arch, counts = 0, [0, 0, 0]
    for line in cuobjdump_lines("-sass", module):
        if match := re.match(r"\s*code for sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.match(r"\s*Function : (\S+)", line):
            counts = found[match[1], arch] = [0, 0, 0]
        else:
            for i, name in enumerate((" HMMA.", " LDSM.", " LDGSTS.")):
                counts[i] += name in line
    return {key: tuple(value) for key, value in found.items()}


def cuobjdump(option: str, module: Path) -> str:
    """The output of one run."""
    return "".join(cuobjdump_lines(option, module))


def cuobjdump_lines(option: str, module: Path) -> Iterator[str]:
    """The output line by line: machine code is large."""
    process = subprocess.Popen([find_cuobjdump(), option, str(module)], stdout=subprocess.PIPE, text=True)
    with process:
        yield from process.stdout
    if process.returncode:
        raise RuntimeError(f"cuda_resources: cuobjdump {option} {module} failed; its message is above")


def find_cuobjdump() -> str:
    """The tool of triton, or of the PATH."""
    triton = importlib.util.find_spec("triton")
    bundled = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled and bundled.exists() else shutil.which("cuobjdump")
    if tool is None:
        raise RuntimeError(
            "cuda_resources: expected cuobjdump in triton or on the PATH, got none; pip install nvidia-cuda-cuobjdump"
        )
    return tool


# ---- names


def demangled(symbols: list[str]) -> list[str]:
    """C++ names, by c++filt."""
    run = subprocess.run(["c++filt"], input="\n".join(symbols), text=True, capture_output=True, check=True)
    return run.stdout.splitlines()


def short_name(name: str) -> str:
    """``gather_rows<bf16, 8>`` of ``void fvm::cuda::(anonymous namespace)::gather_rows<__nv_bfloat16, 8>(...)``."""
    name = re.sub(r"\(fvm::[\w:]+\)(?=\d)", "", name.replace("(anonymous namespace)::", ""))  # the types of enumerators
    name = re.sub(r"fvm::(cuda::)?", "", name.partition("(")[0].removeprefix("void "))
    for long, short in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("float", "fp32"), ("double", "fp64")):
        name = re.sub(rf"\b{long}\b", short, name)
    return name


def source_file(symbol: str) -> str:
    """The .cu file whose anonymous namespace holds the kernel."""
    match = re.search(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}", symbol)
    return match[1] if match else ""


def dynamic_shared(file: str, kernel: str) -> int:
    """The bytes of DYNAMIC_SHARED."""
    for pattern, size in DYNAMIC_SHARED.items():
        if re.fullmatch(pattern, kernel):
            return size
    raise RuntimeError(
        f"cuda_resources: expected the dynamic shared memory of {kernel} ({file}.cu) in DYNAMIC_SHARED, got no entry"
    )


# ---- occupancy


def theoretical_occupancy(arch: int, threads: int, registers: int, shared: int) -> tuple[int, int, str]:
    """Blocks on an SM, warps of them in percent of what it can hold, and the scarcest resource."""
    limits = LIMITS[arch]
    warps = -(-threads // 32)
    of_a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    warps_by_registers = REGISTERS // of_a_warp // WARP_UNIT * WARP_UNIT
    of_a_block = -(-(shared + RESERVED_SHARED) // SHARED_UNIT) * SHARED_UNIT
    blocks = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": warps_by_registers // warps,
        "shared": limits.shared // of_a_block,
    }
    limit = min(blocks, key=blocks.get)
    return blocks[limit], round(100 * blocks[limit] * warps / limits.warps), limit


# ---- the table


def write_table(rows: list[Row], compiler: str, path: Path = TABLE) -> None:
    """The rows as CSV under a line that names the compiler; files and architectures that were not built keep theirs."""
    built = {(row.file, row.arch) for row in rows}
    recorded = read_table(path)[1] if path.exists() else []
    kept = [row for row in recorded if (row.file, row.arch) not in built and is_source(row.file)]
    with path.open("w", newline="") as file:
        file.write(f"# {compiler}; made by benchmarks/cuda_resources.py --write\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(sorted([*rows, *kept]))


def is_source(file: str) -> bool:
    """Whether there is a .cu file of this name."""
    return (ROOT / "cuda" / f"{file}.cu").exists()


def read_table(path: Path = TABLE) -> tuple[str, list[Row]]:
    """The compiler and the rows of the table."""
    with path.open(newline="") as file:
        compiler = file.readline().removeprefix("# ").partition(";")[0]
        rows = [Row(*(int(v) if v.isdigit() else v for v in line.values())) for line in csv.DictReader(file)]
    return compiler, rows


def differences(measured: list[Row], recorded: list[Row]) -> list[str]:
    """What changed, as lines; architectures that were not built are left out."""
    archs = {row.arch for row in measured}
    before = {row[:3]: row for row in recorded if row.arch in archs}
    after = {row[:3]: row for row in measured}
    lines = [f"gone: {' '.join(map(str, key))}" for key in before.keys() - after.keys()]
    lines += [f"new: {' '.join(map(str, key))}" for key in after.keys() - before.keys()]
    for key in before.keys() & after.keys():
        changed = [
            f"{name} {old} -> {new}"
            for name, old, new in zip(Row._fields, before[key], after[key], strict=True)
            if old != new
        ]
        lines += [f"changed: {' '.join(map(str, key))}: {', '.join(changed)}"] if changed else []
    return sorted(lines)


def summary(rows: list[Row]) -> str:
    """One line a kernel in Markdown: the span over its instances, on sm_80 and over all architectures."""
    lines = [
        "| file | kernel | instances | threads | shared KB | registers | HMMA | LDSM | LDGSTS | occupancy % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.file, row.kernel.partition("<")[0]), []).append(row)
    for (file, kernel), group in groups.items():
        shared = span([round((row.shared + row.dynamic) / 1024, 1) for row in group])
        cells = [span([getattr(row, n) for row in group]) for n in ("registers", "hmma", "ldsm", "ldgsts", "occupancy")]
        instances, threads = len({row.kernel for row in group}), span([row.threads for row in group])
        lines.append(f"| {file} | {kernel} | {instances} | {threads} | {shared} | {' | '.join(cells)} |")
    return "\n".join(lines)


def span(values: list[float]) -> str:
    """``32`` or ``32-64``."""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def main() -> int:
    """Compare, write or summarise; 1 where the module differs from the table or a kernel uses local memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record what the module has")
    parser.add_argument("--summary", action="store_true", help="print the recorded table by kernel")
    parser.add_argument("--module", type=Path, help="a _C_cuda*.so elsewhere than beside fvm_fast")
    options = parser.parse_args()
    if options.summary:
        print(summary(read_table()[1]))
        return 0
    module, compiler = load(options.module)
    rows = read_module(module)
    in_local = [f"{row.kernel} on sm_{row.arch}: {row.local} bytes of local memory" for row in rows if row.local]
    if options.write:
        write_table(rows, compiler)
        changes = []
    else:
        changes = differences(rows, read_table()[1])
    print("\n".join([*in_local, *changes, f"{len(rows)} rows, {compiler}"]))
    return int(bool(in_local or changes))


def load(path: Path | None) -> tuple[Path, str]:
    """File and compiler of the CUDA module: that of fvm_fast, or the one at ``path``."""
    if path is None:
        from fvm_fast import _C_cuda

        return Path(_C_cuda.__file__), _C_cuda.compiler()
    spec = importlib.util.spec_from_file_location("_C_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return path, module.compiler()


if __name__ == "__main__":
    sys.exit(main())
