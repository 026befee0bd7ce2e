# SPDX-License-Identifier: Apache-2.0
"""A machine without a compiler gets a package that works, and is told; a compiler's complaint is never hidden."""

import sysconfig
import zipfile

import pytest

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
EVERY_OP = """
import torch
from fvm_fast import backend, ops
from fvm_fast.ops import _backend

assert _backend._C is None
ids_keep, ids_restore, mask = ops.random_masking(2, 4, 0.5)
images = torch.rand(2, 3, 8, 8)
weight = torch.rand(5, 3, 4, 4, requires_grad=True)
tokens = ops.gather_tokens(ops.patch_embed(images, weight), ids_keep)
features = ops.restore_tokens(tokens, ids_restore, torch.zeros(5)).mean(1)
loss = ops.clip_loss(features, features, torch.tensor(2.0))
loss = loss + ops.siglip_loss(features, features, torch.tensor(2.0), torch.tensor(-1.0))
loss.backward()
assert weight.grad.isfinite().all() and weight.grad.any()
try:
    with backend("native"):
        ops.gather_tokens(tokens, ids_keep[:, :1])
except RuntimeError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def plain(source, without_compiler, run, tmp_path_factory):
    """The package as it is installed where no compiler is; an older core lies about in the build folder."""
    platform = sysconfig.get_platform()
    old = source / "build" / f"lib.{platform}-cpython-{sysconfig.get_python_version().replace('.', '')}" / "fvm_fast"
    old.mkdir(parents=True)
    (old / f"_C{SUFFIX}").write_bytes(b"an older build")
    wheels = tmp_path_factory.mktemp("wheels")
    pip = ("-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source)
    built = run(*pip, cwd=source, env=without_compiler)
    assert built.returncode == 0, built.stdout
    (wheel,) = wheels.glob("*.whl")
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site, built.stdout


def test_install_succeeds_and_says_what_is_missing(plain):
    site, output = plain
    assert "installing without the compiled core: no working C++ compiler was found" in output
    assert "`fvm-fast doctor` names the remedy" in output
    assert (site / "fvm_fast" / "ops" / "patch_embed.py").exists()
    assert not list((site / "fvm_fast").glob("_C*")), "the core of an older build must not be packed"


def test_every_op_runs_on_torch(plain, without_compiler, run):
    site, _ = plain
    ran = run("-c", EVERY_OP, cwd=site, env=without_compiler | {"PYTHONPATH": str(site)})
    assert ran.returncode == 0, ran.stdout
    assert "gather_tokens: the native backend was asked for, but the compiled core could not be imported" in ran.stdout


def test_doctor_names_the_remedy(plain, without_compiler, run):
    site, _ = plain
    ran = run("-m", "fvm_fast.doctor", cwd=site, env=without_compiler | {"PYTHONPATH": str(site)})
    assert ran.returncode == 0, ran.stdout
    assert "none: it was left out when fvm_fast was installed" in ran.stdout
    (remedy,) = [line for line in ran.stdout.splitlines() if line.startswith("remedy: ")]
    assert "no C++ compiler was found (looked for c++, g++, clang++)" in remedy
    assert "pip install --force-reinstall --no-deps" in remedy


@pytest.mark.parametrize(
    "environment, sentence",
    [
        ({"CXX": "/nonexistent"}, "installing without the compiled core: no working C++ compiler was found"),
        ({"FVM_FAST_CORE": "0"}, "installing without the compiled core: FVM_FAST_CORE=0"),
        ({"FVM_FAST_CORE": "1"}, "FVM_FAST_CORE=1 asks for the compiled core, but it cannot be built: no working C++"),
        ({"FVM_FAST_CORE": "yes"}, "expected FVM_FAST_CORE to be auto, 0 or 1, got 'yes'"),
    ],
)
def test_fvm_fast_core(source, without_compiler, run, environment, sentence):
    ran = run("setup.py", "-q", "build_ext", cwd=source, env=without_compiler | environment)
    assert sentence in ran.stdout
    assert (ran.returncode == 0) == ("installing" in sentence), ran.stdout
