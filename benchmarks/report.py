# SPDX-License-Identifier: Apache-2.0
"""Measurements as plain tables, which are Markdown too, and the file that keeps them."""

import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import gpu
import machine
from problem import Floor, Measurement, Problem

from fvm_fast.ops._backend import isa

RESULTS = Path(__file__).with_name("RESULTS.md")
_PREFACE = """# Results

Each section is written by its script: `python benchmarks/<name>.py --write`. README.md says how to read the columns.
"""


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads well in a terminal; numbers to the right of the first column."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def padded(line: Sequence[str]) -> str:
        first, *rest = (c.rjust(w) for c, w in zip(line, widths, strict=True))
        return "| " + " | ".join([first.strip().ljust(widths[0]), *rest]) + " |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join(map(padded, [lines[0], rule, *lines[1:]]))


def render(problem: Problem, which: str, rows: Sequence[Measurement]) -> str:
    """One pass of a problem: a sentence about its floor and a row for each rival, ours first."""
    floor = problem.floor(which)
    flops = machine.matmul_ceiling(problem.dtype) if floor.flops else math.inf
    bandwidth = machine.copy_ceiling(floor.bytes) if floor.bytes else math.inf
    least = max(floor.flops / flops, floor.bytes / bandwidth)

    columns: dict[str, Callable[[Measurement], str]] = {
        which: lambda m: m.name,
        "ms": lambda m: number(m.median * 1e3),
        "spread": lambda m: f"{m.spread:.0%}",
    }
    if problem.items:
        columns[f"{problem.unit}/s"] = lambda m: number(problem.items / m.median)
    if floor.flops:
        columns["GFLOP/s"] = lambda m: number(floor.flops / m.median / 1e9)
        columns["of mm"] = lambda m: f"{floor.flops / m.median / flops:.0%}"
    if floor.bytes:
        columns["GB/s"] = lambda m: number(floor.bytes / m.median / 1e9)
        columns["of copy"] = lambda m: f"{floor.bytes / m.median / bandwidth:.0%}"
    if least:
        columns["of floor"] = lambda m: f"{least / m.median:.0%}"
    columns["extra MB"] = lambda m: "?" if m.extra_bytes is None else f"{m.extra_bytes / 1e6:.1f}"
    columns["time / ours"] = lambda m: f"{m.relative_to(rows[0]):.2f}"

    sentence = _floor_sentence(floor, flops, bandwidth) if least else ""
    return sentence + table(list(columns), [[cell(m) for cell in columns.values()] for m in rows]) + "\n"


def _floor_sentence(floor: Floor, flops: float, bandwidth: float) -> str:
    computing, moving = floor.flops / flops, floor.bytes / bandwidth
    parts = []
    if floor.flops:
        work, rate = number(floor.flops / 1e9), number(flops / 1e9)
        parts.append(f"{work} GFLOP take {number(computing * 1e3)} ms at mm's {rate} GFLOP/s")
    if floor.bytes:
        work, rate = number(floor.bytes / 1e6), number(bandwidth / 1e9)
        parts.append(f"{work} MB take {number(moving * 1e3)} ms at a copy's {rate} GB/s")
    return f"Floor {number(max(computing, moving) * 1e3)} ms: {'; '.join(parts)}.\n\n"


def section_name(script: str) -> str:
    """The script's name, with the GPU or the set of ``FVM_FAST_ISA`` behind it, so that all tables are kept."""
    if gpu.is_used():
        return f"{script}_cuda"
    return f"{script}_{isa()}" if os.environ.get("FVM_FAST_ISA") else script


def write_section(name: str, text: str, path: Path) -> None:
    """Replace the section ``name`` of ``path``, or add it in alphabetical order, in one step on the disk."""
    sections = read_sections(path) | {name: text.strip()}
    body = "\n".join(f"<!-- {key} -->\n\n{sections[key]}\n\n<!-- end {key} -->\n" for key in sorted(sections))
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(f"{_PREFACE}\n{body}")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def read_sections(path: Path) -> dict[str, str]:
    """The sections of a results file by name; none if there is no file."""
    if not path.exists():
        return {}
    found = re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end \1 -->", path.read_text(), flags=re.DOTALL)
    return {name: text.strip() for name, text in found}
