# SPDX-License-Identifier: Apache-2.0
"""Runs the .cu files on the CPU and says what they did wrong::

    with Emulation(build("token_gather"), schedule="random:1") as e:
        e.call("gather_tokens_fwd", x, ids, out, B, L, K, D, x.dtype)
    assert not e.findings
    assert e.traffic.select(buffer="x", access="read").unique == B * K * D * x.element_size()

Launchers run unmodified, with the addresses of CPU tensors. README.md beside this file says what is seen and what not.
"""

import ctypes
import importlib.machinery
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType

import torch
from cusim_build import CUDA, all_sources, build_library, build_module, guard_offsets
from cusim_memory import dense, device_memory
from cusim_report import Finding, Launch, Report, SourceLines, Traffic
from cusim_signature import LaunchArgument, Parameter, Signature, signature
from torch import Tensor

SCHEDULES = ("forward", "reverse", "random:1")  # those that the tests of kernels go through

_DTYPE_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}
_ORDERS = ("forward", "reverse", "random")


# ---- Libraries


@dataclass(frozen=True)
class Variant:
    """A loaded library and the source lines of its code."""

    core: ctypes.CDLL
    lines: SourceLines


@dataclass(frozen=True)
class Library:
    """Kernels ready to run: with the detector (``checked``) and, compiled when it is asked for, without (``plain``)."""

    sources: tuple[Path, ...]
    defines: tuple[str, ...] = ()
    ucontext: bool = False

    @cached_property
    def checked(self) -> Variant:
        """Kernels that announce each access."""
        return self._variant(checked=True)

    @cached_property
    def plain(self) -> Variant:
        """Kernels as g++ optimises them."""
        return self._variant(checked=False)

    def signature(self, name: str) -> Signature:
        """What the sources say of a launcher."""
        return signature(self.sources, name)

    def _variant(self, checked: bool) -> Variant:
        path = build_library(self.sources, checked=checked, defines=self.defines, ucontext=self.ucontext)
        return Variant(_open(path), SourceLines(path))


def build(*names: str | Path, defines: Sequence[str] = (), ucontext: bool = False) -> Library:
    """Compile kernels with the emulator, or take them as they were compiled before.

    Args:
        names: files of ``cuda/`` without suffix, or paths of .cu files; if none is given, all of ``_C_cuda``.
        defines: macros for the .cu files, as ``NAME=value``.
        ucontext: fibers by the C library, as on other processors than x86-64.

    Raises:
        RuntimeError: what the compiler said, or what is missing.
    """
    paths = [CUDA / f"{n}.cu" if "/" not in n else Path(n).resolve() for n in map(str, names)]
    library = Library(tuple(paths or all_sources()), tuple(defines), ucontext)
    _ = library.checked  # now, so that a mistake is told here
    return library


def _open(path: Path) -> ctypes.CDLL:
    core = ctypes.CDLL(str(path))
    core.cusim_place.restype = ctypes.c_void_p
    core.cusim_start.restype = ctypes.c_size_t
    for name in ("cusim_findings", "cusim_lines", "cusim_launches", "cusim_blank_bytes"):
        getattr(core, name).restype = ctypes.c_int64
    guards = guard_offsets(path)
    core.cusim_ignore_guards((ctypes.c_uint64 * len(guards))(*guards), ctypes.c_size_t(len(guards)))
    return core


@cache
def emulated_core() -> ModuleType:
    """A stand-in for ``fvm_fast._C_cuda``: its own bindings and kernels, on the CPU, without the detector."""
    path = build_module(importlib.machinery.EXTENSION_SUFFIXES[0])
    loader = importlib.machinery.ExtensionFileLoader("_C_cuda", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C_cuda", loader))
    loader.exec_module(module)
    return module


# ---- Emulation


class Emulation:
    """One or more launches; findings and traffic add up over the calls.

    Args:
        library: from :func:`build`; all of ``_C_cuda`` if not given.
        schedule: the order of threads and blocks: ``"forward"``, ``"reverse"`` or ``"random:SEED"``.
        check: with the detector and the counters. The plain build is many times as fast; NaN in fresh shared memory and
            cp.async as late as allowed are all that it has to show a mistake by.

    Attributes:
        findings: what was wrong, as :class:`~cusim_report.Finding`.
        launches: of kernels, as :class:`~cusim_report.Launch`.
        traffic: the :class:`~cusim_report.Traffic` of all of them.
    """

    def __init__(self, library: Library | None = None, *, schedule: str = "forward", check: bool = True) -> None:
        order, _, seed = schedule.partition(":")
        if order not in _ORDERS:
            raise ValueError(f"Emulation: expected schedule forward, reverse or random:SEED, got {schedule!r}")
        self.library = library or build()
        self.findings: list[Finding] = []
        self.launches: list[Launch] = []
        self.traffic = Traffic()
        self._check, self._order, self._seed = check, _ORDERS.index(order), int(seed or 0)
        self._variant = self.library.checked if check else self.library.plain

    def __enter__(self) -> "Emulation":
        return self

    def __exit__(self, *exception) -> None:
        pass

    def call(self, name: str, *args, bad_id: Tensor | None = None, in_out: Sequence[str] = (), **named) -> int | None:
        """Run a launcher and collect what it did.

        Args:
            name: a function of the .cu files.
            args: its arguments as ``fvm_fast.ops._backend.call`` takes them: contiguous tensors (or numpy arrays) for
                addresses, a dtype for its code, None for null, numbers. A stream or the Launch is left out.
            bad_id: [1] int64, that of the Launch.
            in_out: names of pointer parameters that are not const, but whose contents the kernel may read.
            named: arguments by the names of the parameters.

        Returns:
            What the launcher returned: a cudaError (0 is success; others are findings too), or a size.

        Raises:
            TypeError: the arguments are not those of the function. ValueError: no such function, no such tensor.
        """
        launcher = self.library.signature(name)
        values = launcher.bind(args, named)
        pointers = {p.name: p for p in launcher.parameters if p.is_pointer}
        if not pointers.keys() >= set(in_out):
            raise TypeError(f"{name}: expected pointers among {', '.join(pointers)} in in_out, got {', '.join(in_out)}")
        tensors = {p: dense(p, values[p]) for p in pointers} | {"bad_id": bad_id}
        given = {p: t for p, t in tensors.items() if t is not None}
        if not self._check:
            return self._run(launcher, values, {p: t.data_ptr() for p, t in given.items()}, [])
        outputs = {p for p in given if p == "bad_id" or not pointers[p].is_input}
        with device_memory(self._variant.core, given, outputs, blank=outputs - {"bad_id", *in_out}) as memory:
            result = self._run(launcher, values, memory.addresses, memory.names)
            self._note_unwritten({p: n for p, n in memory.blank_bytes().items() if not pointers[p].is_workspace})
        return result

    def _run(self, launcher: Signature, values: dict, addresses: dict[str, int], buffers: Sequence[str]) -> int | None:
        core, launch = self._variant.core, LaunchArgument(0, None, addresses.get("bad_id"))
        core.cusim_configure(self._order, self._seed, int(self._check))
        core.cusim_clear()
        result = launcher.prepare(core)(*(_argument(p, values, addresses, launch) for p in launcher.parameters))
        report = Report(core, self._variant.lines, buffers, len(self.launches))
        self.launches += report.launches
        self.findings += report.findings
        self.traffic.lines += report.lines
        if launcher.result == "cudaError_t" and result and not self.findings:
            self.findings.append(Finding("launch", launcher.name, 0, f"the launcher returned the CUDA error {result}"))
        return result

    def _note_unwritten(self, blank: dict[str, int]) -> None:
        for name, n in blank.items():
            if n and not self.findings:
                self.findings.append(Finding("unwritten", name, 0, f"{n} bytes of {name} were never written"))


def _argument(p: Parameter, values: dict, addresses: dict[str, int], launch: LaunchArgument):
    if p.is_pointer:
        return addresses.get(p.name)
    if p.type == "Launch":
        return launch
    value = values[p.name]
    return _DTYPE_CODES[value] if isinstance(value, torch.dtype) else value
