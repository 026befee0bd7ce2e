# SPDX-License-Identifier: Apache-2.0
"""What the doctor says about CUDA, with and without the module, a GPU and an nvcc."""

import json
from types import SimpleNamespace

import pytest
import torch

from fvm_fast import doctor, doctor_cuda
from fvm_fast.ops import _backend

MODULE = SimpleNamespace(__file__="/somewhere/_C_cuda.so", architectures=lambda: "90,120", kernels=())
REINSTALL = "python -m pip install fvm_fast"


@pytest.fixture
def machine(monkeypatch):
    """``machine(module, gpus, nvcc)``: what the doctor finds; a GPU is a pair (name, architecture)."""

    def make(module=None, gpus=(), nvcc=None) -> dict:
        monkeypatch.setattr(_backend, "_C_cuda", module)
        monkeypatch.setattr(_backend, "_why_no_cuda", None if module else "there are no CUDA kernels (no file)")
        monkeypatch.setattr(doctor_cuda, "find_nvcc", lambda: nvcc)
        monkeypatch.setattr(doctor_cuda, "Path", lambda _: SimpleNamespace(parent=SimpleNamespace(glob=lambda _: [])))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpus[index][0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: divmod(gpus[index][1], 10))
        return doctor_cuda.examine()

    return make


def test_neither_module_nor_gpu(machine):
    cuda = machine()
    wanted = "none: it was not built: there is no nvcc; tensors on a GPU take the torch path"
    assert doctor_cuda.format_line(cuda) == wanted
    assert doctor_cuda.remedies(cuda, REINSTALL) == []


def test_module_that_was_left_out(machine):
    cuda = machine(nvcc="/usr/bin/nvcc", gpus=[("H100", 90)])
    assert "none: it was left out when fvm_fast was installed" in doctor_cuda.format_line(cuda)
    (remedy,) = doctor_cuda.remedies(cuda, REINSTALL)
    assert remedy == f"an nvcc is here (/usr/bin/nvcc), so the CUDA module can be built: FVM_FAST_CUDA=1 {REINSTALL}"


def test_gpu_without_nvcc(machine):
    (remedy,) = doctor_cuda.remedies(machine(gpus=[("H100", 90)]), REINSTALL)
    assert remedy.startswith("no nvcc was found (set CUDA_HOME, or install the CUDA toolkit ")
    assert remedy.endswith(f"then: FVM_FAST_CUDA=1 {REINSTALL}")


def test_module_without_gpu(machine):
    cuda = machine(MODULE)
    assert doctor_cuda.format_line(cuda) == (
        "kernels for sm_90, sm_120 and later (verified by emulation, not yet run on hardware); torch finds no GPU here"
    )
    assert doctor_cuda.remedies(cuda, REINSTALL) == []


def test_each_gpu_is_told(machine):
    cuda = machine(MODULE, gpus=[("H100", 90), ("A100", 80), ("V100", 70)])
    line = doctor_cuda.format_line(cuda)
    assert "; H100: runs them; A100: cuda:1 is an sm_80 and the kernels are built for sm_90 and later; V100: " in line
    (remedy,) = doctor_cuda.remedies(cuda, REINSTALL)  # the V100 cannot be helped
    assert remedy == f"the GPU needs kernels of its own: FVM_FAST_CUDA_ARCHS=80 {REINSTALL}"


def test_gpu_that_is_too_old_has_no_remedy(machine):
    assert doctor_cuda.remedies(machine(MODULE, gpus=[("V100", 70)]), REINSTALL) == []


def test_module_that_does_not_load(machine, monkeypatch, tmp_path):
    machine()
    monkeypatch.setattr(doctor_cuda, "Path", lambda _: tmp_path / "doctor_cuda.py")
    (tmp_path / "_C_cuda.cpython.so").touch()
    said = doctor_cuda.why_no_module()
    assert said == f"{tmp_path}/_C_cuda.cpython.so does not load: there are no CUDA kernels (no file)"


def test_report_has_it(machine, capsys):
    machine(MODULE)
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cuda"]["architectures"] == ["sm_90", "sm_120"] and report["cuda"]["verified"] == doctor_cuda.VERIFIED
    assert "CUDA          kernels for sm_90, sm_120" in doctor.format_report(report)
