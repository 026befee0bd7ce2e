# SPDX-License-Identifier: Apache-2.0
"""What ``pip install .`` brings: built in a clean build environment, without torch, with all that the package reads."""

import os
import tarfile
import zipfile

import pytest

DATA = [
    "fvm_fast/py.typed",
    "fvm_fast/assets/clip_emoji.safetensors",
    "fvm_fast/configs/clip_emoji.yaml",
    "fvm_fast/data/emoji3/ATTRIBUTION.md",
    "fvm_fast/data/emoji3/google.tar.gz",
    "fvm_fast/data/emoji3/fluent.tar.gz",
    "fvm_fast/data/emoji3/twitter.tar.gz",
    "fvm_fast/data/emoji3/LICENSES/CC-BY-4.0.txt",
    "fvm_fast/data/bpe/NOTICE.md",
    "fvm_fast/data/bpe/clip_merges.txt.gz",
]


@pytest.fixture(scope="module")
def wheel(source, run, tmp_path_factory) -> zipfile.ZipFile:
    """Built by pip in isolation; one instruction set, to be quick."""
    folder = tmp_path_factory.mktemp("wheel")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FVM_FAST") and key != "PYTHONPATH"}
    pip = ("-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, source)
    quick = {"FVM_FAST_ISA_BUILD": "x86_64", "FVM_FAST_CORE": "1", "FVM_FAST_CUDA": "0"}
    built = run(*pip, cwd=source, env=kept | quick)
    assert built.returncode == 0, built.stdout
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_has_core_and_data(wheel, source):
    names = wheel.namelist()
    assert len([name for name in names if name.startswith("fvm_fast/_C.")]) == 1
    assert not set(DATA) - set(names)
    modules = {str(path.relative_to(source)) for path in (source / "fvm_fast").rglob("*.py")}
    assert not modules - set(names)
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "cuda/", "benchmarks/"))]


def test_wheel_has_licences_and_command(wheel):
    names = wheel.namelist()
    assert [name for name in names if name.endswith("dist-info/licenses/LICENSE")]
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "fvm-fast = fvm_fast.cli:main" in wheel.read(entry_points).decode()


def test_source_archive_can_be_built_from(source, run, tmp_path):
    ran = run("setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=source, env=dict(os.environ))
    assert ran.returncode == 0, ran.stdout
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[-1] for name in tar.getnames()}
    sources = {str(path.relative_to(source)) for folder in ("csrc", "cuda") for path in (source / folder).iterdir()}
    assert not (sources | {"CMakeLists.txt", "setup.py", "pyproject.toml"} | set(DATA)) - names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
