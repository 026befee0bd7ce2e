# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the op tests."""

import os
from collections.abc import Iterator

import pytest
import torch

from fvm_fast.ops import _backend

_ISAS = _backend._C.isas_usable() if _backend._C is not None else []


@pytest.fixture(params=_ISAS or [None])  # without a core the tests fail: no parameters at all would skip them
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every instruction set that was built and that this processor has."""
    assert _backend._C is not None, _backend._why_no_core
    before = _backend._C.isa()
    _backend._C.set_isa(request.param)
    yield request.param
    _backend._C.set_isa(before)


@pytest.fixture(autouse=True, scope="session")
def device() -> Iterator[None]:
    """FVM_TEST_DEVICE=cuda makes the tensors of all tests on the GPU, so that the ops run there."""
    if (wanted := os.environ.get("FVM_TEST_DEVICE") or "cpu") == "cpu":
        yield
        return
    if not torch.cuda.is_available():
        pytest.exit(f"FVM_TEST_DEVICE={wanted}: expected a GPU, torch sees none; unset it for the CPU", returncode=2)
    with torch.device(wanted):
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test, whichever others run."""
    torch.manual_seed(0)
