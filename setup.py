# SPDX-License-Identifier: Apache-2.0
"""Builds fvm_fast/_C and fvm_fast/_C_cuda with CMake. A machine that cannot compile them still gets a working install.

Environment:
    FVM_FAST_CORE: auto (the default: build the core if there is a compiler), 0 (leave it out), 1 (fail without it).
    FVM_FAST_ISA_BUILD: all (the default), native, or some of x86_64,avx2,avx512,avx512_bf16 (neon on aarch64).
    FVM_FAST_CUDA: auto (the default: build the CUDA module if there is an nvcc and a core), 0 or 1 likewise.
    FVM_FAST_CUDA_ARCHS: architectures, such as 80;90. The default is 80;86;89;90;100;120, of which an older nvcc builds
        those that it knows.
    CUDA_HOME: where the CUDA toolkit is, if nvcc is neither on the PATH nor in /usr/local/cuda.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")


class Part(NamedTuple):
    """A module that may be left out."""

    variable: str
    name: str
    without: str

    def mode(self) -> str:
        """auto, 0 or 1, as the environment says."""
        mode = os.environ.get(self.variable) or "auto"
        if mode not in ("auto", "0", "1"):
            sys.exit(f"fvm_fast: expected {self.variable} to be auto, 0 or 1, got {mode!r}")
        return mode


PARTS = {
    "fvm_fast._C": Part("FVM_FAST_CORE", "the compiled core", "every op runs on plain torch"),
    "fvm_fast._C_cuda": Part("FVM_FAST_CUDA", "the CUDA module", "tensors on a GPU take the torch path"),
}
CORE, CUDA = PARTS


class CMakeBuild(build_ext):
    """Build both extensions; where that is impossible, say why and install without."""

    def run(self) -> None:
        for module, part in PARTS.items():
            if part.mode() == "0":
                self.leave_out(module, f"{part.variable}=0")
        super().run()  # does nothing for extensions that are left out

    def build_extension(self, ext: Extension) -> None:
        if ext not in self.extensions:  # left out together with the one before
            return
        build = Path(self.build_temp).resolve() / ("cmake" if ext.name == CORE else "cmake_cuda")
        why_not = build_core(build) if ext.name == CORE else build_cuda(build)
        if why_not:
            self.leave_out(ext.name, why_not)
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        shutil.copy2(next(build.glob("_C*.so")), partial)
        os.replace(partial, target)  # a process that has the old one mapped keeps it

    def leave_out(self, module: str, why: str) -> None:
        """Go on without this module, and without the one an earlier build may have left behind."""
        part = PARTS[module]
        if part.mode() == "1":
            sys.exit(f"fvm_fast: {part.variable}=1 asks for {part.name}, but it cannot be built: {why}")
        print(
            f"fvm_fast: installing without {part.name}: {why}.\n"
            f"fvm_fast: {part.without}; `fvm-fast doctor` names the remedy.",
            file=sys.stderr,
            flush=True,
        )
        in_wheel = Path(self.build_lib, "fvm_fast")
        for folder in (in_wheel, ROOT / "fvm_fast") if self.inplace else (in_wheel,):
            for old in folder.glob(f"{module.removeprefix('fvm_fast.')}.*"):
                old.unlink()
        self.extensions = [ext for ext in self.extensions if ext.name != module]
        if module == CORE and any(ext.name == CUDA for ext in self.extensions):
            self.leave_out(CUDA, "it comes with the compiled core only")


def build_core(build: Path) -> str | None:
    """Build the core; why there is nothing to build with, or None. A failing compiler ends the installation."""
    try:
        configure(ROOT, build, f"-DFVM_ISA_BUILD={os.environ.get('FVM_FAST_ISA_BUILD') or 'all'}")
        why_not = build / "no_core.txt"  # written by CMakeLists.txt where nothing can be compiled
        if why_not.exists():
            return why_not.read_text().strip()
        compile_all(build)
    except (subprocess.CalledProcessError, ImportError, OSError) as error:
        sys.exit(
            f"fvm_fast: the compiled core could not be built ({error}); the first error above says why. "
            "FVM_FAST_CORE=0 in the environment installs without it: every op then runs on plain torch."
        )
    return None


def build_cuda(build: Path) -> str | None:
    """Build the CUDA module; why that was impossible, or None."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "no nvcc was found (looked in CUDA_HOME, on the PATH and in /usr/local/cuda)"
    try:
        configure(ROOT / "cuda", build, f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DFVM_CUDA_ARCHS={cuda_archs(nvcc)}")
        compile_all(build)
    except (subprocess.CalledProcessError, ImportError, OSError) as error:
        return f"{nvcc} could not build it ({error}); the first error above says why"
    return None


def find_nvcc() -> str | None:
    """The compiler of CUDA_HOME, else of the PATH, else of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    places = [home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, filter(None, places))), None)


def cuda_archs(nvcc: str) -> str:
    """FVM_FAST_CUDA_ARCHS, or those of the default that this nvcc knows."""
    if os.environ.get("FVM_FAST_CUDA_ARCHS"):
        return os.environ["FVM_FAST_CUDA_ARCHS"]
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, text=True, capture_output=True).stdout
    known = re.findall(r"compute_(\d+)", listed)
    return ";".join(arch for arch in CUDA_ARCHS if arch in known)


def configure(source: Path, build: Path, *options: str) -> None:
    """Run CMake from the start (pip's build environments come and go) but keep the objects that are still good."""
    import pybind11

    for old in [build / "CMakeCache.txt", build / "no_core.txt", *build.glob("CMakeFiles/[0-9]*/*.cmake")]:
        old.unlink(missing_ok=True)
    command = [
        "cmake", "-S", str(source), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options,
    ]  # fmt: skip
    if shutil.which("ninja"):
        command += ["-G", "Ninja"]
    subprocess.run(command, check=True)


def compile_all(build: Path) -> None:
    """Run the compilers, as many at once as this process may use processors."""
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    subprocess.run(["cmake", "--build", str(build), "--parallel", str(jobs)], check=True)


setup(ext_modules=[Extension(module, sources=[]) for module in PARTS], cmdclass={"build_ext": CMakeBuild})
