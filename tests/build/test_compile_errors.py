# SPDX-License-Identifier: Apache-2.0
"""What the compiler or CMake complains about is shown, and the way round it is named."""

import os

import pytest


@pytest.fixture
def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FVM_FAST")}
    return kept | {"FVM_FAST_ISA_BUILD": "x86_64"}


def test_compiler_message_is_shown(source, run, environment):
    sources = {path: path.read_text() for path in (source / "csrc").glob("*.cpp")}
    for path, text in sources.items():
        path.write_text('#include "no_such_header.h"\n' + text)
    try:
        ran = run("setup.py", "-q", "build_ext", cwd=source, env=environment)
    finally:
        for path, text in sources.items():
            path.write_text(text)
    assert ran.returncode != 0
    assert "no_such_header.h" in ran.stdout and "error" in ran.stdout
    assert "FVM_FAST_CORE=0 in the environment installs without it" in ran.stdout


def test_unknown_instruction_set(source, run, environment):
    ran = run("setup.py", "-q", "build_ext", cwd=source, env=environment | {"FVM_FAST_ISA_BUILD": "avx2,avx9"})
    assert ran.returncode != 0
    assert "expected all, native or some of x86_64, avx2" in " ".join(ran.stdout.split())
    assert "got 'avx9'" in " ".join(ran.stdout.split())


def test_unknown_op(source, run, environment):
    recipe = source / "CMakeLists.txt"
    good = recipe.read_text()
    recipe.write_text(good.replace("set(FVM_OPS ", "set(FVM_OPS no_such_op "))
    try:
        ran = run("setup.py", "-q", "build_ext", cwd=source, env=environment)
    finally:
        recipe.write_text(good)
    assert ran.returncode != 0
    assert "expected a file csrc/no_such_op.cpp" in " ".join(ran.stdout.split())
