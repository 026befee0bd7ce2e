# SPDX-License-Identifier: Apache-2.0
"""Whether the CUDA module is built: auto never fails an installation, 1 says what is missing, 0 leaves it out."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(monkeypatch) -> SimpleNamespace:
    """What setup.py defines, without running it."""
    for name in ("FVM_FAST_CORE", "FVM_FAST_CUDA", "FVM_FAST_CUDA_ARCHS", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))  # for cmake
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


@pytest.fixture
def toolkit(monkeypatch, tmp_path):
    """``toolkit(script)``: CUDA_HOME is a folder whose nvcc is this shell script."""

    def make(script: str) -> str:
        nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\n{script}\n")
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(nvcc.parents[1]))
        return str(nvcc)

    return make


@pytest.fixture
def command(recipe, tmp_path, monkeypatch):
    """The build command, with nothing to compile and a module of an earlier build lying about."""
    built = recipe.CMakeBuild(setuptools.Distribution({"name": "fvm_fast", "ext_modules": extensions(recipe)}))
    built.initialize_options()
    built.build_lib, built.inplace = str(tmp_path / "lib"), False
    built.extensions = extensions(recipe)
    (tmp_path / "lib" / "fvm_fast").mkdir(parents=True)
    for name in ("_C", "_C_cuda"):
        (tmp_path / "lib" / "fvm_fast" / f"{name}.cpython.so").write_text("an earlier build")
    return built


def extensions(recipe) -> list[setuptools.Extension]:
    return [setuptools.Extension(module, sources=[]) for module in recipe.PARTS]


def left(command) -> tuple[list[str], list[str]]:
    """Extensions still to be built, and files of earlier builds still there."""
    files = sorted(path.name for path in Path(command.build_lib, "fvm_fast").iterdir())
    return [ext.name for ext in command.extensions], files


# ---- the compiler


def test_nvcc_of_cuda_home_comes_first(recipe, toolkit):
    nvcc = toolkit("exit 0")
    assert recipe.find_nvcc() == nvcc


def test_nvcc_on_the_path_is_found(recipe, toolkit, monkeypatch):
    nvcc = toolkit("exit 0")
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(Path(nvcc).parent))
    assert recipe.find_nvcc() == nvcc


def test_without_nvcc_the_places_are_named(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert recipe.build_cuda(tmp_path) == "no nvcc was found (looked in CUDA_HOME, on the PATH and in /usr/local/cuda)"


def test_an_older_nvcc_builds_the_architectures_it_knows(recipe, toolkit, monkeypatch):
    nvcc = toolkit("echo compute_75; echo compute_80; echo compute_90")
    assert recipe.cuda_archs(nvcc) == "80;90"
    monkeypatch.setenv("FVM_FAST_CUDA_ARCHS", "86")
    assert recipe.cuda_archs(nvcc) == "86"


def test_a_compiler_that_fails_is_a_reason_and_no_error(recipe, toolkit, tmp_path):
    nvcc = toolkit('[ "$1" = --list-gpu-arch ] && echo compute_80 && exit 0; echo broken >&2; exit 1')
    why_not = recipe.build_cuda(tmp_path / "build")
    assert why_not.startswith(f"{nvcc} could not build it (") and why_not.endswith("the first error above says why")


# ---- the choice


def test_auto_goes_on_without_the_module(recipe, command, capsys):
    command.leave_out(recipe.CUDA, "no nvcc was found")
    assert left(command) == ([recipe.CORE], ["_C.cpython.so"])
    said = capsys.readouterr().err
    assert "installing without the CUDA module: no nvcc was found." in said
    assert "tensors on a GPU take the torch path; `fvm-fast doctor` names the remedy" in said


def test_it_is_left_out_with_the_core(recipe, command, capsys):
    command.leave_out(recipe.CORE, "no working C++ compiler was found")
    assert left(command) == ([], [])
    assert "without the CUDA module: it comes with the compiled core only" in capsys.readouterr().err


def test_one_fails_with_a_sentence(recipe, command, monkeypatch):
    monkeypatch.setenv("FVM_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match="FVM_FAST_CUDA=1 asks for the CUDA module, but it cannot be built: no nvcc"):
        command.leave_out(recipe.CUDA, "no nvcc was found")


def test_zero_compiles_nothing(recipe, command, monkeypatch):
    monkeypatch.setenv("FVM_FAST_CUDA", "0")
    monkeypatch.setitem(recipe.CMakeBuild.build_extension.__globals__, "build_core", lambda build: "stop here")
    monkeypatch.setitem(recipe.CMakeBuild.build_extension.__globals__, "build_cuda", lambda build: pytest.fail("built"))
    command.build_temp = command.build_lib
    command.run()
    assert left(command) == ([], [])


def test_other_values_are_refused(recipe, command, monkeypatch):
    monkeypatch.setenv("FVM_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="expected FVM_FAST_CUDA to be auto, 0 or 1, got 'yes'"):
        command.run()


# ---- the recipe


@pytest.mark.parametrize("archs", ("75", "80,ninety"))
def test_impossible_architectures_are_a_sentence(recipe, archs, tmp_path):
    command = ["cmake", "-S", ROOT / "cuda", "-B", tmp_path, f"-DFVM_CUDA_ARCHS={archs}"]
    ran = subprocess.run(command, text=True, capture_output=True)
    assert ran.returncode
    said = " ".join(ran.stderr.split())
    assert f"FVM_FAST_CUDA_ARCHS: expected numbers of 80 or more such as 80;90, got '{archs.split(',')[-1]}'" in said
