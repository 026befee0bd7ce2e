# SPDX-License-Identifier: Apache-2.0
"""The only file that imports the compiled cores: chooses native or torch, says why, turns tensors into addresses."""

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

try:
    from fvm_fast import _C_cuda
except ImportError as error:
    _C_cuda, _why_no_cuda = None, f"there are no CUDA kernels ({error}); `fvm-fast doctor` names the remedy"
else:
    _why_no_cuda = None

_MODES = ("auto", "native", "torch")
# Devices whose tensors go to _C_cuda. Tests add "cpu" and put the emulated kernels there.
_CUDA_DEVICES = ("cuda",)
# Read the word for bad indices after every CUDA kernel, which waits for it? The environment decides once.
_CHECK = os.environ.get("FVM_FAST_CHECK", "") not in ("", "0")
_set_up_devices: set[int] = set()
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


def use_native(op: str, *tensors: Tensor | None, not_on_cuda: str | None = None) -> bool:
    """Whether ``op`` runs in a compiled core for these tensors; raises when native was demanded and cannot be had.

    ``not_on_cuda`` is the reason why the CUDA kernels, if the tensors are for them, do not serve these arguments.
    """
    if _mode == "torch":
        return False
    why = why_not_native(*tensors) or _why_not_cuda(op, not_on_cuda, *tensors)
    if why is not None and _mode == "native":
        raise RuntimeError(f"{op}: the native backend was asked for, but {why}; use backend('auto') or 'torch'")
    return why is None


def why_not_native(*tensors: Tensor | None) -> str | None:
    """The reason why these tensors take the torch path whatever the op, or None when a compiled core takes them."""
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
        if t.device.type in _CUDA_DEVICES:
            if _C_cuda is None:
                return _why_no_cuda
        elif t.device.type != "cpu":
            return f"the tensor is on {t.device}, and there are kernels for CPU and CUDA only"
        elif _C is None:
            return _why_no_core
    return None


def _why_not_cuda(op: str, limit: str | None, *tensors: Tensor | None) -> str | None:
    """The reason why the CUDA kernels cannot run ``op`` on the device of these tensors; None on other devices."""
    device = next((t.device for t in tensors if t is not None), None)  # they are all on one
    if device is None or device.type not in _CUDA_DEVICES:
        return None
    if not any(kernel.startswith(op) for kernel in _C_cuda.kernels):
        return "it has no CUDA kernel in this build"
    return limit or (_why_not_on_gpu(device.index) if device.type == "cuda" else None)


@torch.compiler.assume_constant_result
def _why_not_on_gpu(index: int) -> str | None:
    """The reason why this GPU does not run the kernels: they serve the oldest architecture built for and all later."""
    oldest = int(_C_cuda.architectures().split(",")[0])
    major, minor = torch.cuda.get_device_capability(index)
    if 10 * major + minor >= oldest:
        return None
    return f"cuda:{index} is an sm_{major}{minor} and the kernels are built for sm_{oldest} and later"


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


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values of a floating ``dtype`` are computed in: float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to matrix products on this tensor's device, or None outside autocast."""
    device = tensor.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


def on_cuda(x: Tensor) -> bool:
    """Whether kernels of ``_C_cuda`` serve ``x``, so that reading a number out of it would wait for the device."""
    return x.device.type in _CUDA_DEVICES


def number(x: Tensor | float, like: Tensor) -> Tensor | float:
    """``x``, of one element, as kernels beside ``like`` take a number that came from a tensor.

    Returns:
        A float on the CPU; on CUDA a 0-d float64 tensor, which nobody waits for. Arithmetic reads the same on both.
    """
    if like.device.type not in _CUDA_DEVICES:
        return float(x)
    if isinstance(x, Tensor):
        return x.detach().reshape(()).to(torch.float64)
    return like.new_full((), x, dtype=torch.float64)


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
    """Run a kernel of ``csrc/kernels.h``, or its twin of ``cuda/kernels.h``, where the tensors among ``args`` are.

    On the CPU it runs on the calling thread's team. On a CUDA device it is enqueued on the current stream of that
    device: nothing is allocated and nothing waits, so a CUDA graph can capture it once the device was used before.

    Returns:
        What the CPU kernel returns. On CUDA None, or under ``FVM_FAST_CHECK=1`` the position of the first bad index.
    """
    for value in args:
        if isinstance(value, Tensor):
            if value.device.type in _CUDA_DEVICES:
                return _launch(kernel, value.device, args)
            break  # the ops have checked that all are on one device
    return getattr(_C, kernel)(*map(_argument, args), torch.get_num_threads())


def workspace(query: str, *sizes, like: Tensor) -> Tensor:
    """Bytes on the device of ``like``, as many as the function ``query`` of ``kernels.h`` tells for these sizes."""
    arguments = map(_argument, sizes)
    n = (
        getattr(_C_cuda, query)(*arguments)
        if on_cuda(like)
        else getattr(_C, query)(*arguments, torch.get_num_threads())
    )
    return like.new_empty(n, dtype=torch.uint8)


def _launch(kernel: str, device: torch.device, args: tuple) -> int | None:
    others = [value.device for value in args if isinstance(value, Tensor) and value.device != device]
    if others:
        got = f"{device} and {others[0]}"
        raise ValueError(f"{kernel}: expected all tensors on one device, got {got}; move them with .to(device)")
    index = stream = 0  # of the emulated device
    if device.type == "cuda":
        if device.index not in _set_up_devices:
            _set_up(kernel, device)
        index, stream = device.index, torch.cuda.current_stream(device).cuda_stream
    check = _CHECK and not _is_capturing(device)
    bad_id = torch.full((1,), -1, dtype=torch.int64, device=device) if check else None
    getattr(_C_cuda, kernel)(*map(_argument, args), (index, stream, _argument(bad_id)))
    return None if bad_id is None else int(bad_id)


def _set_up(kernel: str, device: torch.device) -> None:
    """The kernels' own CUDA runtime joins the context of a device at its first use, which no capture allows."""
    if _is_capturing(device):
        raise RuntimeError(
            f"{kernel}: expected a kernel to have run on {device} before a CUDA graph captures one, got the first; "
            "call the op once outside of the capture"
        )
    _C_cuda.set_up(device.index)
    _set_up_devices.add(device.index)


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def isa() -> str | None:
    """The active instruction set of the compiled core for the CPU, or None without it."""
    return None if _C is None else _C.isa()
