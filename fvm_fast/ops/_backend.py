# SPDX-License-Identifier: Apache-2.0
"""The only file that imports the compiled core: chooses native or torch, says why, and turns tensors into addresses."""

import contextlib
import os
from collections.abc import Iterator

import torch  # first: the compiled core then shares torch's OpenMP runtime
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

try:
    from fvm_fast import _C
except ImportError as error:
    _C, _why_no_core = None, f"the compiled core could not be imported ({error}); `fvm-fast doctor` names the remedy"
else:
    _why_no_core = None
    if _C.isa_error():
        raise RuntimeError(_C.isa_error())

_MODES = ("auto", "native", "torch")
_PLAIN_TYPES = (Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)
_DTYPE_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}


def _checked_mode(name: str, source: str) -> str:
    if name not in _MODES:
        raise ValueError(f"{source}: expected one of {', '.join(_MODES)}, got {name!r}")
    return name


# A plain module global, so that torch.compile can guard on it.
_mode = _checked_mode(os.environ.get("FVM_FAST_BACKEND", "auto") or "auto", "FVM_FAST_BACKEND")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation of every op inside the block.

    Args:
        name: ``"auto"`` (native where it can run), ``"native"`` (raise a sentence where it cannot) or ``"torch"`` (the
            reference in plain torch: slower, differentiable any number of times, exportable).
    """
    global _mode
    before, _mode = _mode, _checked_mode(name, "fvm_fast.backend")
    try:
        yield
    finally:
        _mode = before


def use_native(op: str, *tensors: Tensor | None) -> bool:
    """Whether ``op`` runs in the compiled core for these tensors; raises when native was demanded and cannot be had."""
    if _mode == "torch":
        return False
    why = why_not_native(*tensors)
    if why is not None and _mode == "native":
        raise RuntimeError(f"{op}: the native backend was asked for, but {why}; use backend('auto') or 'torch'")
    return why is None


def why_not_native(*tensors: Tensor | None) -> str | None:
    """The reason why these tensors take the torch path, or None when the compiled core takes them."""
    if _C is None:
        return _why_no_core
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active, which needs the differentiable reference"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active, which needs the differentiable reference"
    for t in tensors:
        if t is None:
            continue
        if hasattr(t, "to_local"):
            raise TypeError("expected plain tensors, got a DTensor; pass its .to_local() and gather what comes out")
        if type(t) not in _PLAIN_TYPES:
            return f"{type(t).__name__} is not a plain torch.Tensor"
        if t.device.type != "cpu":
            return f"the tensor is on {t.device}, and this build has kernels for the CPU only"
    return None


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """Raise unless all given tensors are on one device."""
    given = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(given.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in given.items())
        raise ValueError(f"{op}: expected all tensors on one device, got {got}; move them with .to(device)")


def check_same_dtype(op: str, **tensors: Tensor | None) -> None:
    """Raise unless all given tensors have one floating dtype."""
    given = {name: t.dtype for name, t in tensors.items() if t is not None}
    if len(set(given.values())) > 1 or not all(d.is_floating_point for d in given.values()):
        got = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in given.items())
        raise TypeError(f"{op}: expected one floating dtype for all, got {got}; cast with .to(dtype) or use autocast")


def check_ids(op: str, name: str, ids: Tensor, size: int, bad: int | None) -> None:
    """Raise for the flat position ``bad`` that a kernel reported in ``ids`` (-1: none)."""
    if bad is not None and bad >= 0:
        where = [int(i) for i in torch.unravel_index(torch.tensor(bad), ids.shape)]
        raise IndexError(f"{op}: expected {name} in [0, {size}), got {int(ids.flatten()[bad])} at {where}")


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to matrix products on this tensor's device, or None outside autocast."""
    device = tensor.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


def _argument(value):
    """A Tensor as its address, a dtype as its code, None as null; numbers pass."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_conj() or value.is_neg():
            raise TypeError(
                f"expected a dense tensor without lazy conjugation or negation, got {value.layout}; use "
                ".resolve_conj().resolve_neg() or .to_dense()"
            )
        if not value.is_contiguous():
            raise RuntimeError(
                f"internal: expected a contiguous tensor, got strides {value.stride()} for shape {tuple(value.shape)}"
            )
        return value.data_ptr()
    if isinstance(value, torch.dtype):
        return _DTYPE_CODES[value]
    return 0 if value is None else value


def call(kernel: str, *args) -> int | None:
    """Run a kernel of ``csrc/kernels.h`` on the calling thread's team; ``args`` stay alive until it returns."""
    return getattr(_C, kernel)(*map(_argument, args), torch.get_num_threads())


def isa() -> str | None:
    """The active instruction set of the compiled core, or None without it."""
    return None if _C is None else _C.isa()
