# SPDX-License-Identifier: Apache-2.0
"""Compiles .cu files and the emulator with g++; every object is kept under the hash of all that went into it."""

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CUDA = REPO / "cuda"
RUNTIME = Path(__file__).resolve().parent / "runtime"

_COMMON = [
    "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DFVM_CUSIM",
    "-fno-extern-tls-init",  # else thread-local arrays of other files are reached through a null pointer
    "-fno-gnu-unique",  # else two libraries share the static arrays of one template
]  # fmt: skip
_KERNELS = ["-std=c++17", "-Wno-unused-parameter", "-include", str(RUNTIME / "cuda_on_cpu.h"), "-x", "c++"]
# Scalar replacement and loop distribution would change which accesses there are.
_CHECKED = ["-O1", "-fsanitize=thread", "-fsanitize=bounds", "-fno-tree-sra", "-fno-tree-loop-distribute-patterns"]
_CHECKED += ["--param", "tsan-instrument-func-entry-exit=0", "--param", "tsan-distinguish-volatile=1"]
_PLAIN = ["-O2"]
_RUNTIME = ["-std=c++20", "-O2"]
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def all_sources() -> list[Path]:
    """The .cu files that the build of ``_C_cuda`` takes: those of FVM_CUDA_OPS."""
    ops = re.search(r"set\(FVM_CUDA_OPS\s+([^)]*)\)", (CUDA / "CMakeLists.txt").read_text())
    return [CUDA / f"{op}.cu" for op in ops.group(1).split()]


def build_library(
    sources: Sequence[Path], *, checked: bool, defines: Sequence[str] = (), ucontext: bool = False
) -> Path:
    """The shared library of these .cu files and the emulator.

    Args:
        sources: the .cu files.
        checked: with the hooks of the detector; plain runs the same kernels without, many times as fast.
        defines: macros for the .cu files, as ``NAME=value``.
        ucontext: fibers by the C library, as on other processors than x86-64.

    Raises:
        RuntimeError: no g++, no headers of the CUDA toolkit, or the compiler's own words.
    """
    kernel_flags = [*_KERNELS, *(_CHECKED if checked else _PLAIN), *(f"-D{d}" for d in defines)]
    fiber_flags = [*_RUNTIME, *(["-DCUSIM_UCONTEXT"] if ucontext else [])]
    jobs = [(source, kernel_flags) for source in sources]
    for source in sorted(RUNTIME.glob("*.cpp")):
        jobs.append((source, fiber_flags if source.stem == "fibers" else _RUNTIME))
    return link(compile_all(jobs), "libcusim")


def build_module(suffix: str) -> Path:
    """``_C_cuda``: its own bindings over the plain library of all kernels.

    It gets its own copy of the CUDA runtime's interface, for torch may have loaded the real one for everybody; kernels
    stay in their library, whose thread-local memory is shared memory and nothing else.
    """
    import pybind11

    kernels = build_library(all_sources(), checked=False)
    paths = [pybind11.get_include(), sysconfig.get_path("include")]
    bindings = ["-std=c++17", "-O1", "-fvisibility=hidden", *(f"-isystem{p}" for p in paths)]
    jobs = [(CUDA / "bindings.cpp", bindings), (RUNTIME / "cuda_api.cpp", _RUNTIME)]
    return link([*compile_all(jobs), kernels], "_C_cuda", suffix=suffix)


def compile_all(jobs: Sequence[tuple[Path, list[str]]]) -> list[Path]:
    """Objects of (source, flags), compiled only where they are not there yet."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: _compile(*job), jobs))


def link(objects: Sequence[Path], name: str, suffix: str = ".so") -> Path:
    """The shared library of these objects."""
    folder = _folder() / _digest([_compiler_version(), *map(str, objects)])
    library = folder / f"{name}{suffix}"
    # -Bsymbolic: the runtime functions of CUDA are ours even where torch has loaded the real ones
    _make(library, ["-shared", "-Wl,-Bsymbolic", *map(str, objects)])
    return library


def guard_offsets(library: Path) -> list[int]:
    """Where in the thread-local segment the compiler's guard variables are."""
    symbols = subprocess.run(["readelf", "-sW", str(library)], capture_output=True, text=True, check=True).stdout
    return sorted({int(value, 16) for value in re.findall(r": (\w+) .* TLS .* _ZGV", symbols)})


def _compile(source: Path, flags: list[str]) -> Path:
    includes = [CUDA, RUNTIME, source.parent]
    texts = [p.read_text() for p in sorted(_closure(source, includes))] + [p.read_text() for p in _prefix(flags)]
    flags = [*_COMMON, *(f"-I{p}" for p in includes), f"-I{cuda_include()}", *flags]
    target = _folder() / "objects" / f"{source.stem}-{_digest([_compiler_version(), str(source), *flags, *texts])}.o"
    _make(target, [*flags, "-c", str(source)])
    return target


def _prefix(flags: Iterable[str]) -> list[Path]:
    return [Path(f) for f in flags if f.endswith("cuda_on_cpu.h")]


def _closure(source: Path, includes: Sequence[Path]) -> set[Path]:
    """The file and, recursively, the files of the project that it includes."""
    found, pending = set(), [source.resolve()]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found.add(path)
        for name in _INCLUDE.findall(path.read_text()):
            pending += [p.resolve() for p in (folder / name for folder in (path.parent, *includes)) if p.exists()][:1]
    return found


def _make(target: Path, arguments: Sequence[str]) -> None:
    """Runs g++ unless the target exists; another process may be at it, so the target appears whole or not at all."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        run = subprocess.run([_compiler(), *arguments, "-o", str(made)], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"cusim: g++ failed on {arguments[-1]}:\n{run.stderr}")
        os.replace(made, target)


def _folder() -> Path:
    return Path(os.environ.get("FVM_CUSIM_BUILD", REPO / "build" / "cusim"))


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@cache
def _compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("cusim: expected g++ 12 or newer on PATH, got none; apt-get install g++")
    return compiler


@cache
def _compiler_version() -> str:
    return subprocess.run([_compiler(), "-v"], capture_output=True, text=True, check=True).stderr


@cache
def cuda_include() -> Path:
    """Where the headers of the CUDA toolkit are: CUDA_HOME, beside nvcc, or /usr/local/cuda."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    for home in filter(None, homes):
        if (Path(home) / "include" / "cuda_runtime_api.h").exists():
            return Path(home) / "include"
    raise RuntimeError("cusim: expected the headers of a CUDA toolkit, got none; set CUDA_HOME to where it is")
