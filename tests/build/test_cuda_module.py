# SPDX-License-Identifier: Apache-2.0
"""The CUDA module as it was compiled: it loads without a driver, needs no torch, and spills nothing anywhere.

These are the tests that need an nvcc, and the only ones that are skipped where there is none.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fvm_fast import doctor_cuda
from fvm_fast.ops import _backend

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cuda_resources  # noqa: E402

pytestmark = pytest.mark.skipif(doctor_cuda.find_nvcc() is None, reason="there is no nvcc")

# Loads the module by itself, as a program without torch would, and uses a GPU that is not there.
LOAD_MODULE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print("torch" in sys.modules, module.architectures(), len(module.kernels))
try:
    module.set_up(99)
except RuntimeError as error:
    print(error)
"""
SPILLING = """
__global__ void __launch_bounds__(1024, 2) crowded(float* x) {
  float all[64];
  for (int i = 0; i < 64; i++) all[i] = x[threadIdx.x + 1024 * i];
  for (int k = 0; k < 64; k++)
    for (int i = 0; i < 64; i++) all[i] = all[i] * all[(i + 1) % 64] + x[k];
  for (int i = 0; i < 64; i++) x[threadIdx.x + 1024 * i] = all[i];
}
"""


@pytest.fixture(scope="module")
def module() -> Path:
    assert _backend._C_cuda is not None, f"these tests need the CUDA module: {_backend._why_no_cuda}"
    return Path(_backend._C_cuda.__file__)


@pytest.fixture(scope="module")
def rows(module) -> list[cuda_resources.Row]:
    return cuda_resources.read_module(module)


def output(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], check=True, text=True, capture_output=True).stdout


# ---- the library


def test_loads_without_driver_and_without_torch(module):
    loaded, error = output(sys.executable, "-c", LOAD_MODULE, module).splitlines()
    core = _backend._C_cuda
    assert loaded.split() == ["False", core.architectures(), str(len(core.kernels))]
    assert re.match(r"cuda\w+: expected CUDA to do it, got the error '.+'", error)


def test_links_neither_torch_nor_a_cuda_library(module):
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", module))
    assert any(name.startswith("libstdc++") for name in needed)
    assert not [name for name in needed if re.search("torch|c10|cuda|cublas", name)]


def test_every_kernel_of_the_list_is_defined(module):
    undefined = [line.split()[-1] for line in output("nm", "-DC", "--undefined-only", module).splitlines()]
    assert any(name.startswith("PyObject_") for name in undefined)
    assert not [name for name in undefined if "fvm" in name or name in _backend._C_cuda.kernels]
    exported = output("nm", "-D", "--defined-only", module)
    assert not [name for name in _backend._C_cuda.kernels if name in exported], "kernels are private to the module"


def test_every_cuda_kernel_has_a_cpu_twin():
    assert set(_backend._C_cuda.kernels) <= set(dir(_backend._C))


def test_every_file_is_built():
    (listed,) = re.findall(r"set\(FVM_CUDA_OPS ([^)]+)\)", (ROOT / "cuda" / "CMakeLists.txt").read_text())
    assert listed.split() == sorted(path.stem for path in (ROOT / "cuda").glob("*.cu"))


def test_architectures_and_ptx(module):
    archs = _backend._C_cuda.architectures().split(",")
    lists = output(cuda_resources.find_cuobjdump(), "-lelf", "-lptx", module)
    assert sorted(re.findall(r"sm_(\d+)\.cubin", lists), key=int) == sorted([*archs] * cubins_an_arch(), key=int)
    assert set(re.findall(r"sm_(\d+)\.ptx", lists)) == {archs[0]}


def cubins_an_arch() -> int:
    """Each .cu file brings its own."""
    return len(list((ROOT / "cuda").glob("*.cu")))


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (0, 0, "expected the address of a tensor, got null"),
        (3, -1, "expected a size that is not negative, got -1"),
        (7, 9, "expected a dtype code of 0 to 4, got 9"),
        (8, (-1, 0, 0), "expected a device of 0 or more, got -1"),
    ],
)
def test_bad_arguments_are_refused_before_cuda_is_asked(place, value, sentence):
    arguments = [16, 16, 16, 1, 1, 1, 1, 1, (0, 0, 0)]
    arguments[place] = value
    with pytest.raises(ValueError, match=sentence):
        _backend._C_cuda.gather_tokens_fwd(*arguments)


# ---- what the kernels take


def test_nothing_is_spilled(rows):
    assert rows and not [row for row in rows if row.local]


def test_resources_are_those_recorded(rows):
    compiler, recorded = cuda_resources.read_table()
    assert {row.arch for row in recorded} == set(cuda_resources.LIMITS) and not [row for row in recorded if row.local]
    if _backend._C_cuda.compiler() == compiler:  # another nvcc gives other numbers
        remedy = "python benchmarks/cuda_resources.py --write records what changed"
        assert not cuda_resources.differences(rows, recorded), remedy


def test_a_change_of_resources_would_be_seen(rows):
    (first, second), others = rows[:2], rows[2:]
    changed = first._replace(registers=first.registers + 1)
    assert cuda_resources.differences([changed, *others], rows) == [
        f"changed: {first.file} {first.kernel} {first.arch}: registers {first.registers} -> {changed.registers}",
        f"gone: {second.file} {second.kernel} {second.arch}",
    ]


def test_what_was_not_built_keeps_its_rows(tmp_path):
    other = cuda_resources.Row("token_gather", "f<fp32>", 80, 256, 32, 0, 0, 0, 0, 0, 0, 8, 100, "warps")
    gone, newer = other._replace(file="no_such_file"), other._replace(arch=90)
    table = tmp_path / "table.csv"
    cuda_resources.write_table([other, gone], "nvcc 1", table)
    cuda_resources.write_table([newer], "nvcc 2", table)
    assert cuda_resources.read_table(table) == ("nvcc 2", [other, newer])


def test_a_spill_does_not_compile(tmp_path):
    flags = re.search(r"-Xptxas=\S+", (ROOT / "cuda" / "CMakeLists.txt").read_text())[0].rstrip(")")
    (tmp_path / "crowded.cu").write_text(SPILLING)
    command = [doctor_cuda.find_nvcc(), "-arch=sm_80", flags, "-cubin", "crowded.cu", "-o", "crowded.cubin"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    ran = subprocess.run([*command, "-Werror=all-warnings"], cwd=tmp_path, text=True, capture_output=True)
    assert ran.returncode and "spilled to local memory" in ran.stderr


# ---- occupancy is what NVIDIA's own calculator says


CALCULATOR = """
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int major, minor, warps, shared, threads, registers;
  while (scanf("%d %d %d %d %d %d", &major, &minor, &warps, &shared, &threads, &registers) == 6) {
    int bytes;
    if (scanf("%d", &bytes) != 1) return 1;
    cudaOccDeviceProp device;
    device.computeMajor = major, device.computeMinor = minor, device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 32 * warps, device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32, device.sharedMemPerBlock = 48 << 10, device.sharedMemPerMultiprocessor = shared;
    device.numSms = 1, device.sharedMemPerBlockOptin = shared - 1024, device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = threads, kernel.numRegs = registers, kernel.sharedSizeBytes = 0;
    kernel.maxDynamicSharedSizeBytes = shared - 1024, kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    cudaOccDeviceState state;
    cudaOccResult result;
    cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, bytes);
    printf("%d\\n", error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1);
  }
}
"""


def test_occupancy_agrees_with_nvidias_calculator(tmp_path):
    (tmp_path / "calculator.cpp").write_text(CALCULATOR)
    output(doctor_cuda.find_nvcc(), "-w", tmp_path / "calculator.cpp", "-o", tmp_path / "calculator")
    cases = [
        (arch, threads, registers, shared)
        for arch in cuda_resources.LIMITS
        for threads in (32, 96, 128, 256, 1024)
        for registers in (16, 33, 64, 65, 128, 255)
        for shared in (0, 1000, 17_000, 49_152, 98_304)
        if registers * threads <= 65536
    ]
    questions = []
    for arch, threads, registers, shared in cases:
        limits = cuda_resources.LIMITS[arch]
        questions.append((arch // 10, arch % 10, limits.warps, limits.shared, threads, registers, shared))
    text = "\n".join(" ".join(map(str, question)) for question in questions)
    ran = subprocess.run([tmp_path / "calculator"], input=text, text=True, capture_output=True, check=True)
    for case, wanted in zip(cases, map(int, ran.stdout.split()), strict=True):
        assert cuda_resources.theoretical_occupancy(*case)[0] == wanted, case
