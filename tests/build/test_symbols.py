# SPDX-License-Identifier: Apache-2.0
"""The compiled core needs no torch, keeps its instruction sets apart, and runs the one that is asked for."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fvm_fast.ops import _backend

ROOT = Path(__file__).resolve().parents[2]
X86_64 = {
    "x86_64": ["-march=x86-64"],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
}
FLAGS = X86_64 if platform.machine() in ("x86_64", "AMD64") else {"neon": []}
ISAS = list(FLAGS)  # plainest first
TORCH_LIBRARY = re.compile(r"torch|c10|caffe", re.IGNORECASE)
TORCH_SYMBOL = re.compile(r"\b(at|c10|torch|caffe2)::|^TH[CP]|^aoti_torch")
# Loads the core by itself, as a program without torch would.
LOAD_CORE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
print("torch" in sys.modules, core.isa_error() or core.isa())
"""


@pytest.fixture(scope="module")
def core() -> Path:
    assert _backend._C is not None, f"these tests need the compiled core: {_backend._why_no_core}"
    return Path(_backend._C.__file__)


def output(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], check=True, text=True, capture_output=True).stdout


def needed_libraries(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", library))


def undefined_symbols(library: Path) -> list[str]:
    return [line.split("U ")[1] for line in output("nm", "-DCu", library).splitlines() if "U " in line]


# ---- no torch


def test_needs_no_torch_library(core):
    needed = needed_libraries(core)
    assert any(name.startswith("libstdc++") for name in needed)
    assert not [name for name in needed if TORCH_LIBRARY.search(name)]


def test_needs_no_torch_symbol(core):
    undefined = undefined_symbols(core)
    assert any(name.startswith("PyObject_") for name in undefined)
    assert not [name for name in undefined if TORCH_SYMBOL.search(name)]


def test_the_search_would_find_torch():
    library = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    assert [name for name in needed_libraries(library) if TORCH_LIBRARY.search(name)]
    assert [name for name in undefined_symbols(library) if TORCH_SYMBOL.search(name)]


# ---- instruction sets kept apart


@pytest.mark.parametrize("isa", ISAS)
def test_no_symbol_is_shared_between_instruction_sets(isa, tmp_path):
    """Of a weak symbol the linker keeps any one copy: it may be one that this processor cannot run.

    At -O1 more functions stay functions than in the real build, so this finds those that its inlining hides. All
    kernels are compiled for the plainest set and for the widest, one for those between.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    assert compiler, "these tests need the C++ compiler that built the core"
    for kernel in listed_kernels() if isa in (ISAS[0], ISAS[-1]) else ["token_gather"]:
        target = tmp_path / f"{kernel}.o"
        flags = ["-std=gnu++20", "-O1", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w", *FLAGS[isa]]
        output(compiler, *flags, f"-DFVM_ISA={isa}", "-c", ROOT / "csrc" / f"{kernel}.cpp", "-o", target)
        assert not shared_symbols(target, isa), kernel


def listed_kernels() -> list[str]:
    (ops,) = re.findall(r"set\(FVM_OPS ([^)]+)\)", (ROOT / "CMakeLists.txt").read_text())
    return ["kernel_table", *ops.split()]


def shared_symbols(object_file: Path, isa: str) -> list[str]:
    """Weak symbols outside the namespace of ``isa``; DW.ref.* are pointers into the C++ library, the same for all."""
    symbols = [line.split(maxsplit=2)[1:] for line in output("nm", "-C", "--defined-only", object_file).splitlines()]
    weak = [name for kind, name in symbols if kind in "WwVvu"]
    return [name for name in weak if f"fvm::{isa}::" not in name and not name.startswith("DW.ref.")]


def test_the_search_would_find_a_shared_symbol(tmp_path):
    program = tmp_path / "shared.cpp"
    program.write_text(
        "namespace fvm { template <class T> T twice(T x) { return x + x; }\n"
        "namespace avx2 { template <class T> T own(T x) { return twice(x); } int f(int x) { return own(x); } } }\n"
    )
    output("c++", "-O0", "-c", program, "-o", tmp_path / "shared.o")
    assert shared_symbols(tmp_path / "shared.o", "avx2") == ["int fvm::twice<int>(int)"]


# ---- the choice at run time


def test_instruction_sets_are_ordered(core):
    built, usable = _backend._C.isas_built(), _backend._C.isas_usable()
    assert built == [isa for isa in ISAS if isa in built]
    assert usable and usable == [isa for isa in built if isa in usable]


def load_core(core: Path, isa: str | None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "FVM_FAST_ISA"}
    environment |= {} if isa is None else {"FVM_FAST_ISA": isa}
    command = [sys.executable, "-c", LOAD_CORE, str(core)]
    return subprocess.run(command, env=environment, check=True, text=True, capture_output=True).stdout.strip()


def test_the_best_is_the_default(core):
    assert load_core(core, None) == f"False {_backend._C.isas_usable()[-1]}"


def test_every_usable_instruction_set_can_be_chosen(core):
    for isa in _backend._C.isas_usable():
        assert load_core(core, isa) == f"False {isa}"


def test_impossible_instruction_set_is_a_sentence(core):
    usable = ", ".join(_backend._C.isas_usable())
    said = load_core(core, "avx9")
    assert f"FVM_FAST_ISA: expected one of {usable}" in said and "got 'avx9'" in said
