# SPDX-License-Identifier: Apache-2.0
"""Lets the tests of this folder import the emulator, and compiles their own kernels once."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import device
import emulator
import pytest
import torch

from fvm_fast import doctor_cuda

HERE = Path(__file__).resolve().parent
OWN = sorted((HERE / "kernels").glob("*.cu"))


@pytest.fixture(scope="session")
def own_kernels() -> emulator.Library:
    """The kernels of tests/cusim/kernels."""
    return emulator.build(*OWN)


@pytest.fixture(scope="session")
def run_fragments(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Makes what runs kernels/fragments.cu: an Emulation, or under FVM_TEST_DEVICE=cuda the GPU."""
    if os.environ.get("FVM_TEST_DEVICE") != "cuda":
        return partial(emulator.Emulation, request.getfixturevalue("own_kernels"))
    source = HERE / "kernels" / "fragments.cu"
    return partial(device.OnDevice, source, device.compile_for_device(source, tmp_path_factory.mktemp("device")))


@pytest.fixture(scope="session")
def own_kernels_on_ucontext() -> emulator.Library:
    """The same with the fibers of other processors than x86-64."""
    return emulator.build(*OWN, ucontext=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test, whichever others run."""
    torch.manual_seed(0)


@pytest.fixture(params=emulator.SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> str:
    """Runs the test in each order of threads and blocks."""
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The emulator takes the types of CUDA from the toolkit's headers, so without the toolkit nothing runs here."""
    if doctor_cuda.find_nvcc() is not None:
        return
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason="there is no nvcc"))
