# SPDX-License-Identifier: Apache-2.0
"""No op on CUDA reads on the host what the device computes: it would wait, and could not be captured into a graph.

The tensors of the emulated device are the CPU's, so that what would wait on a GPU can be forbidden by name.
"""

from collections.abc import Callable

import pytest
import torch
from emulated_ops import ops_on_emulated_cuda
from op_calls import make_calls, run
from torch import Tensor

from fvm_fast.ops import backend

# What gives a number to the host, or a result whose size the host has to learn, or copies to it or from it
METHODS = ("item", "tolist", "numpy", "cpu", "nonzero", "unique", "bincount", "masked_select", "equal", "__array__")
CONVERSIONS = ("__bool__", "__int__", "__float__", "__index__", "__complex__")
FUNCTIONS = ("tensor", "as_tensor", "nonzero", "unique", "unique_consecutive", "bincount", "masked_select", "equal")


@pytest.fixture
def refuse_to_wait(monkeypatch) -> Callable[[], None]:
    """Once it is called, all of these raise."""

    def refusal(name: str) -> Callable:
        def refuse(*args, **kwargs):
            raise AssertionError(f"{name} waits for the device")

        return refuse

    def get_by_numbers(self: Tensor, key) -> Tensor:
        for k in key if isinstance(key, tuple) else (key,):
            assert not isinstance(k, Tensor) or k.dtype != torch.bool, "an index of booleans waits for the device"
        return get(self, key)

    def start() -> None:
        for name in (*METHODS, *CONVERSIONS):
            monkeypatch.setattr(Tensor, name, refusal(f"Tensor.{name}"))
        for name in FUNCTIONS:
            monkeypatch.setattr(torch, name, refusal(f"torch.{name}"))
        monkeypatch.setattr(Tensor, "__getitem__", get_by_numbers)

    get = Tensor.__getitem__
    return start


@pytest.mark.parametrize("name", make_calls())
def test_no_op_waits(name, refuse_to_wait):
    call = make_calls()[name]
    with ops_on_emulated_cuda(), backend("native"):
        call()  # the first use of constants copies them to the device
        refuse_to_wait()
        run(call)


def test_waiting_would_be_seen(refuse_to_wait):
    numbers, mask = torch.ones(3), torch.ones(3, dtype=torch.bool)
    refuse_to_wait()
    for wait in (
        lambda: float(numbers[0]),
        lambda: numbers.sum().item(),
        lambda: numbers[mask],
        lambda: torch.unique(numbers),
    ):
        with pytest.raises(AssertionError, match="waits for the device"):
            wait()
