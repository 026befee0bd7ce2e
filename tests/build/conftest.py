# SPDX-License-Identifier: Apache-2.0
"""A copy of the sources to build in, so that no test touches the checkout or the core that other tests use."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The files that make a package, without anything built."""
    copy = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy2(ROOT / name, copy)
    for folder in ("csrc", "cuda", "fvm_fast"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return copy


@pytest.fixture(scope="session")
def without_compiler() -> dict[str, str]:
    """An environment whose PATH has Python, cmake and ninja but no compiler."""
    hidden = {"CC", "CXX", "PYTHONPATH"}
    kept = {key: value for key, value in os.environ.items() if key not in hidden and not key.startswith("FVM_FAST")}
    path = str(Path(sys.executable).parent)
    assert not any(shutil.which(name, path=path) for name in ("c++", "g++", "clang++", "cc"))
    return {**kept, "PATH": path}


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess]:
    """``run(*command, cwd=..., env=...)`` with Python in front: output and errors in one text."""

    def run_python(*command: str | Path, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )

    return run_python
