# SPDX-License-Identifier: Apache-2.0
"""The doctor names every op, says the truth about each, and has a remedy for what is missing."""

import json
import shutil

import pytest
import torch

import fvm_fast
from fvm_fast import doctor, ops
from fvm_fast.ops import _backend


@pytest.fixture
def no_core(monkeypatch):
    monkeypatch.setattr(_backend, "_C", None)
    monkeypatch.setattr(_backend, "_why_no_core", "the compiled core could not be imported (broken)")


def test_json_report_is_complete(capsys):
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["fvm_fast"] == fvm_fast.__version__
    assert report["core"]["active"] == _backend.isa()
    assert report["threads"] == torch.get_num_threads()
    assert report["openmp"]["verdict"] == "one runtime, shared with torch"
    assert report["remedies"] == []
    public = {name.removesuffix("_reference") for name in ops.__all__ if name.endswith("_reference")}
    assert set(report["ops"]) == public


def test_every_op_with_a_kernel_is_native():
    for name in doctor.op_names():
        native = doctor.examine_op(name)["backend"] == "native"
        assert native == (name != "random_masking"), f"{name}: {doctor.examine_op(name)}"


def test_torch_backend_is_reported():
    with fvm_fast.backend("torch"):
        assert doctor.examine_op("patch_embed") == {"backend": "torch", "why": "FVM_FAST_BACKEND=torch asks for it"}


def test_wrong_op_is_reported(monkeypatch):
    monkeypatch.setattr(ops, "gather_tokens", lambda x, ids: torch.zeros(1, 2, 5))
    assert doctor.examine_op("gather_tokens")["backend"] == "broken"


def test_without_core_and_compiler(no_core, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "apt-get").write_text("#!/bin/sh\n")
    (tmp_path / "apt-get").chmod(0o755)
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert (
        "remedy: no C++ compiler was found (looked for c++, g++, clang++): apt-get install -y g++ python3-dev && "
        in text
    )
    assert "patch_embed       torch     there is no compiled core" in text


def test_compiler_that_is_too_old(monkeypatch, tmp_path):
    old = tmp_path / "c++"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    assert doctor.compiler_problem() == f"{old} is too old (GCC 12 or Clang 15 is needed)"


def test_compiler_of_this_machine_serves(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    assert shutil.which("c++") and doctor.compiler_problem() is None and doctor.header_problem() is None


def test_core_that_does_not_load(no_core):
    assert "does not load: the compiled core could not be imported (broken)" in doctor.why_no_core()
    (remedy,) = doctor.remedies(doctor.examine_core())
    assert remedy.startswith("a compiler is here") and "pip install --force-reinstall" in remedy
