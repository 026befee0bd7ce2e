# SPDX-License-Identifier: Apache-2.0
"""What an emulated launch says: findings and counters of memory traffic, by source line."""

import ctypes
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

# ---- What the library hands over: runtime/report.h and runtime/traffic.h


class RawFinding(ctypes.Structure):
    """``Finding`` of runtime/report.h."""

    _fields_ = [
        ("kind", ctypes.c_char * 16),
        ("pc", ctypes.c_size_t),
        ("file", ctypes.c_char_p),
        ("line", ctypes.c_int32),
        ("thread", ctypes.c_int32),
        ("block", ctypes.c_uint32 * 3),
        ("count", ctypes.c_uint32),
        ("text", ctypes.c_char * 256),
    ]


class RawLine(ctypes.Structure):
    """``Line`` of runtime/traffic.h."""

    _fields_ = [("pc", ctypes.c_size_t)]
    _fields_ += [(name, ctypes.c_int32) for name in ("launch", "region", "access", "bytes_per_lane")]
    _fields_ += [
        (name, ctypes.c_uint64) for name in ("requests", "bytes", "unique", "sectors", "wavefronts", "ideal_wavefronts")
    ]


class RawLaunch(ctypes.Structure):
    """``Launch`` of runtime/traffic.h."""

    _fields_ = [("kernel", ctypes.c_size_t), ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3)]
    _fields_ += [
        (name, ctypes.c_uint64)
        for name in ("shared_bytes", "static_shared_bytes", "mma", "ldmatrix", "cp_async", "barriers")
    ]


# ---- What tests look at


@dataclass(frozen=True)
class Frame:
    """A place in the source; inlined functions give one each, the innermost first."""

    function: str
    file: str
    line: int


@dataclass(frozen=True)
class Finding:
    """A defect, once for each place; ``text`` tells the first instance.

    ``kind`` is race, out_of_bounds, uninitialised, misaligned, read_only, in_flight, divergence, deadlock, shuffle,
    launch or unwritten.
    """

    kind: str
    file: str
    line: int
    text: str
    stack: tuple[Frame, ...] = ()
    block: tuple[int, int, int] = (0, 0, 0)
    thread: int = -1
    count: int = 1

    def __str__(self) -> str:
        where = " in ".join(f"{f.file}:{f.line} ({f.function})" for f in self.stack) or f"{self.file}:{self.line}"
        return f"{self.kind} at {where}, block {self.block}, thread {self.thread}: {self.text} ({self.count} times)"


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel; ``mma``, ``ldmatrix`` count warps, ``cp_async`` threads, ``barriers`` blocks."""

    kernel: str
    instance: str  # with its template arguments
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    static_shared_bytes: int
    mma: int
    ldmatrix: int
    cp_async: int
    barriers: int


@dataclass(frozen=True)
class TrafficLine:
    """Counters of one instruction and buffer in one launch.

    ``bytes`` were asked for by lanes; ``unique`` are those among them that no earlier access of the launch had read (or
    written); ``sectors`` of 32 bytes are global, ``wavefronts`` (and what they would be without bank conflicts) shared.
    """

    launch: int
    kernel: str
    file: str
    line: int
    stack: tuple[Frame, ...]
    space: str  # global or shared
    access: str  # read, write or atomic
    buffer: str  # the argument's name, or "shared"
    bytes_per_lane: int
    requests: int
    bytes: int
    unique: int
    sectors: int
    wavefronts: int
    ideal_wavefronts: int


_ACCESSES = ("read", "write", "atomic")
_COUNTERS = ("requests", "bytes", "unique", "sectors", "wavefronts", "ideal_wavefronts")


class Traffic:
    """Lines with their sums: ``traffic.select(buffer="x", access="read").unique``."""

    def __init__(self, lines: Iterable[TrafficLine] = ()) -> None:
        self.lines = list(lines)

    def select(self, **where) -> "Traffic":
        """The lines whose fields have these values, e.g. ``space="global", kernel="gather_rows"``."""
        unknown = where.keys() - {f.name for f in fields(TrafficLine)}
        if unknown:
            raise TypeError(f"select: expected fields of TrafficLine, got {sorted(unknown)}")
        return Traffic(x for x in self.lines if all(getattr(x, name) == value for name, value in where.items()))

    def by(self, *names: str) -> dict[tuple, "Traffic"]:
        """The lines grouped by fields, e.g. ``by("file", "line", "space", "access")``."""
        groups: dict[tuple, Traffic] = {}
        for x in self.lines:
            groups.setdefault(tuple(getattr(x, name) for name in names), Traffic()).lines.append(x)
        return groups

    def __getattr__(self, name: str) -> int:
        if name not in _COUNTERS:
            raise AttributeError(f"Traffic: expected one of {', '.join(_COUNTERS)}, got {name!r}")
        return sum(getattr(x, name) for x in self.lines)

    def table(self) -> str:
        """One row a source line, space, access and buffer."""
        head = ("line", "", "", "buffer", *_COUNTERS)
        rows = [head]
        for (kernel, file, line, *rest), group in sorted(
            self.by("kernel", "file", "line", "space", "access", "buffer").items()
        ):
            rows.append((f"{kernel} {file}:{line}", *rest, *(str(getattr(group, c)) for c in _COUNTERS)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


# ---- Source lines


class SourceLines:
    """Turns addresses within a library into places, all at once and each only once."""

    def __init__(self, library: Path) -> None:
        self._library, self._known = library, {}

    def resolve(self, addresses: Iterable[int]) -> None:
        """Looks the addresses (relative to the library's start) up."""
        new = sorted(set(addresses) - self._known.keys())
        if not new:
            return
        run = subprocess.run(
            ["addr2line", "-a", "-i", "-f", "-C", "-e", str(self._library)],
            input="\n".join(map(hex, new)), capture_output=True, text=True, check=True,
        )  # fmt: skip
        blocks = re.split(r"^0x([0-9a-f]+)\n", run.stdout, flags=re.MULTILINE)[1:]
        for address, block in zip(blocks[::2], blocks[1::2], strict=True):
            lines = block.splitlines()
            frames = [_frame(f, where) for f, where in zip(lines[::2], lines[1::2], strict=True)]
            self._known[int(address, 16)] = frames

    def frames(self, address: int) -> list[Frame]:
        """All frames of an address that was resolved."""
        return self._known[address]

    def stack(self, address: int) -> tuple[Frame, ...]:
        """The frames that belong to kernels, the innermost first: not primitives, nor headers of the toolkit."""
        frames = self._known[address]
        ours = [f for f in frames if f.file.endswith((".cu", ".cuh")) and Path(f.file).name != "primitives.cuh"]
        return tuple(Frame(f.function, Path(f.file).name, f.line) for f in ours or frames[:1])


def place(stack: Sequence[Frame]) -> Frame:
    """The innermost frame in a .cu file, which is where a function of a .cuh was called; else the innermost."""
    return next((f for f in stack if f.file.endswith(".cu")), stack[0])


def _frame(function: str, where: str) -> Frame:
    file, _, line = where.rpartition(":")
    digits = re.match(r"\d+", line)
    return Frame(base_name(function), file, int(digits.group()) if digits else 0)


def base_name(function: str) -> str:
    """The name in a signature, without result, namespaces and parameters, e.g. ``gather_rows<float, 4>``."""
    function = function.replace("(anonymous namespace)::", "").partition("(")[0]
    name, bracket, arguments = function.partition("<")
    return name.split("::")[-1].split(" ")[-1] + bracket + arguments


# ---- One call


class Report:
    """What a library has to say since it was last cleared.

    Args:
        core: the library.
        lines: its source lines.
        buffers: the names of the buffers.
        launches_before: the number of the first launch.
    """

    def __init__(self, core: ctypes.CDLL, lines: SourceLines, buffers: Sequence[str], launches_before: int) -> None:
        self._source, self._start = lines, core.cusim_start()
        launches, findings = _read(core.cusim_launches, RawLaunch), _read(core.cusim_findings, RawFinding)
        traffic = _read(core.cusim_lines, RawLine)
        entries = [x.kernel for x in launches] + [x.pc for x in findings if x.kind == b"launch"]
        returns = [x.pc for x in findings if x.kind != b"launch"] + [x.pc for x in traffic]
        lines.resolve({self._entry(pc) for pc in entries} | {self._call(pc) for pc in returns if pc})
        self.launches = [self._launch(raw) for raw in launches]
        self.findings = [self._finding(raw) for raw in findings]
        self.lines = [self._line(raw, buffers, launches_before) for raw in traffic]

    def _entry(self, pc: int) -> int:
        """The address in the library of a function that starts there."""
        return pc - self._start

    def _call(self, pc: int) -> int:
        """The address in the library of a call that returns there."""
        return pc - self._start - 1

    def _launch(self, raw: RawLaunch) -> Launch:
        instance = self._source.stack(self._entry(raw.kernel))[0].function
        counts = (getattr(raw, name) for name, _ in RawLaunch._fields_[3:])
        return Launch(instance.partition("<")[0], instance, tuple(raw.grid), tuple(raw.block), *counts)

    def _finding(self, raw: RawFinding) -> Finding:
        if raw.pc:
            stack = self._source.stack((self._entry if raw.kind == b"launch" else self._call)(raw.pc))
        else:
            stack = (Frame("", Path((raw.file or b"?").decode()).name, raw.line),)
        at = place(stack)
        words = (raw.text.decode(), stack, tuple(raw.block), raw.thread, raw.count)
        return Finding(raw.kind.decode(), at.file, at.line, *words)

    def _line(self, raw: RawLine, buffers: Sequence[str], launches_before: int) -> TrafficLine:
        stack = self._source.stack(self._call(raw.pc)) if raw.pc else (Frame("", "cudaMemsetAsync", 0),)
        at, kernel = place(stack), self.launches[raw.launch].kernel
        space, buffer = ("shared", "shared") if raw.region < 0 else ("global", buffers[raw.region])
        counts = (getattr(raw, name) for name, _ in RawLine._fields_[4:])
        where = (raw.launch + launches_before, kernel, at.file, at.line, stack, space, _ACCESSES[raw.access], buffer)
        return TrafficLine(*where, *counts)


def _read(function, kind: type) -> list:
    first = ctypes.POINTER(kind)()
    return [first[i] for i in range(function(ctypes.byref(first)))]
