# SPDX-License-Identifier: Apache-2.0
"""What `make test-gpu` takes from here: the emulator's counters of every kernel, and kernels compiled for a GPU."""

import ctypes
import re
import sys
from pathlib import Path

import device
from cusim_build import CUDA
from op_calls import make_calls

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))

import gpu_counters  # noqa: E402


def test_every_kernel_is_compared_with_what_the_emulator_counts():
    kernels = {kernel for name in make_calls() for kernel in gpu_counters.emulated(name)}
    files = [path.read_text() for path in (*CUDA.glob("*.cu"), *CUDA.glob("*.cuh"))]
    declared = {name for text in files for name in re.findall(r"__global__ void [^;{]*?\b(\w+)\((?!k)", text)}
    assert kernels <= declared
    # other layouts, sizes and dtypes need these
    assert declared - kernels <= {"copy_weight", "sum_parts", "clear_unseen"}


def test_launchers_compile_for_a_gpu(tmp_path):
    library = device.compile_for_device(HERE / "kernels" / "fragments.cu", tmp_path)
    assert ctypes.CDLL(str(library)).run_mma
