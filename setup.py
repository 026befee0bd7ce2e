# SPDX-License-Identifier: Apache-2.0
"""Builds fvm_fast/_C with CMake. A machine without a C++ compiler still gets a working install, on the torch path.

Environment:
    FVM_FAST_CORE: auto (the default: build the core if there is a compiler), 0 (leave it out), 1 (fail without it).
    FVM_FAST_ISA_BUILD: all (the default), native, or some of x86_64,avx2,avx512,avx512_bf16 (neon on aarch64).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configure and build the one extension; where that is impossible, say why and install without it."""

    def run(self) -> None:
        mode = os.environ.get("FVM_FAST_CORE") or "auto"
        if mode not in ("auto", "0", "1"):
            sys.exit(f"fvm_fast: expected FVM_FAST_CORE to be auto, 0 or 1, got {mode!r}")
        if mode == "0":
            self.leave_out("FVM_FAST_CORE=0")
        super().run()  # does nothing once the extension is left out

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve() / "cmake"
        try:
            configure(build)
            why_not = build / "no_core.txt"  # written by CMakeLists.txt where nothing can be compiled
            if why_not.exists():
                self.leave_out(why_not.read_text().strip())
                return
            subprocess.run(["cmake", "--build", str(build), "--parallel", str(jobs())], check=True)
        except (subprocess.CalledProcessError, ImportError, OSError) as error:
            sys.exit(
                f"fvm_fast: the compiled core could not be built ({error}); the first error above says why. "
                "FVM_FAST_CORE=0 in the environment installs without it: every op then runs on plain torch."
            )
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        shutil.copy2(next(build.glob("_C*.so")), partial)
        os.replace(partial, target)  # a process that has the old core mapped keeps it

    def leave_out(self, why: str) -> None:
        """Go on without the core, and without the one an earlier build may have left behind."""
        if os.environ.get("FVM_FAST_CORE") == "1":
            sys.exit(f"fvm_fast: FVM_FAST_CORE=1 asks for the compiled core, but it cannot be built: {why}")
        print(
            f"fvm_fast: installing without the compiled core: {why}.\n"
            "fvm_fast: every op runs on plain torch; `fvm-fast doctor` names the remedy.",
            file=sys.stderr,
            flush=True,
        )
        in_wheel = Path(self.build_lib, "fvm_fast")
        for folder in (in_wheel, ROOT / "fvm_fast") if self.inplace else (in_wheel,):
            for old in folder.glob("_C*.so"):
                old.unlink()
        self.extensions = []


def configure(build: Path) -> None:
    """Run CMake from the start (pip's build environments come and go) but keep the objects that are still good."""
    import pybind11

    for old in [build / "CMakeCache.txt", build / "no_core.txt", *build.glob("CMakeFiles/[0-9]*/*.cmake")]:
        old.unlink(missing_ok=True)
    command = [
        "cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DFVM_ISA_BUILD={os.environ.get('FVM_FAST_ISA_BUILD') or 'all'}",
    ]  # fmt: skip
    if shutil.which("ninja"):
        command += ["-G", "Ninja"]
    subprocess.run(command, check=True)


def jobs() -> int:
    """Compilers to run at once: the processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


setup(ext_modules=[Extension("fvm_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
