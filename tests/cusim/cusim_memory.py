# SPDX-License-Identifier: Apache-2.0
"""The memory of an emulated device: copies of the tensors of a call, far apart, each with exact bounds."""

import contextlib
import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

_GUARD = 1 << 20  # bytes around each buffer that belong to nobody


def dense(name: str, value) -> Tensor | None:
    """A tensor whose address can be given away, from a tensor, a numpy array or None."""
    if value is None:
        return None
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(value)
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        got = f"{tensor.device} with strides {tensor.stride()}"
        raise ValueError(f"{name}: expected a contiguous CPU tensor, got {got}")
    return tensor


class DeviceMemory:
    """Buffers for the tensors of a call, at the same alignment; a tensor that is given twice is one buffer.

    Args:
        core: the library of the kernels.
        tensors: by the names of the parameters.
        outputs: names of what may be written.
        blank: names of what has no contents yet, and is NaN.
    """

    def __init__(self, core: ctypes.CDLL, tensors: dict[str, Tensor], outputs: set[str], blank: set[str]) -> None:
        self.names: list[str] = []  # of the buffers, in their order
        self.addresses: dict[str, int] = {}
        self._core, self._tensors, self._outputs, self._blank = core, tensors, outputs, blank
        offsets, self._size = {}, _GUARD
        for t in tensors.values():
            if t.data_ptr() not in offsets:
                offsets[t.data_ptr()] = self._size + t.data_ptr() % 256
                self._size += (t.nbytes // 4096 + 2) * 4096 + max(_GUARD, t.nbytes // 4096 * 4096)
        self._room = core.cusim_place(ctypes.c_size_t(self._size))
        for name, t in tensors.items():
            self.addresses[name] = self._room + offsets[t.data_ptr()]
        for name in tensors:
            self._register(name)

    def _register(self, name: str) -> None:
        t, address = self._tensors[name], self.addresses[name]
        same = {other for other in self._tensors if self.addresses[other] == address}
        if same & set(self.names):
            return
        if blank := same <= self._blank:
            ctypes.memset(address, 0xFF, t.nbytes)
        else:
            ctypes.memmove(address, t.data_ptr(), t.nbytes)
        flags = (ctypes.c_int(not blank), ctypes.c_int(not same & self._outputs))
        self._core.cusim_register(ctypes.c_void_p(address), ctypes.c_size_t(t.nbytes), name.encode(), *flags)
        self.names.append(name)

    def copy_back(self) -> None:
        """Copies what may have been written into the tensors."""
        for name in self._outputs & self._tensors.keys():
            t = self._tensors[name]
            ctypes.memmove(t.data_ptr(), self.addresses[name], t.nbytes)

    def blank_bytes(self) -> dict[str, int]:
        """How many bytes of what was blank still are."""
        names = [name for name in self.names if name in self._blank]
        return {name: self._core.cusim_blank_bytes(self.names.index(name)) for name in names}

    def release(self) -> None:
        """Gives the room back."""
        self._core.cusim_forget_buffers()
        self._core.cusim_unplace(ctypes.c_void_p(self._room), ctypes.c_size_t(self._size))


@contextlib.contextmanager
def device_memory(core: ctypes.CDLL, tensors: dict, outputs: set[str], blank: set[str]) -> Iterator[DeviceMemory]:
    """Device memory for a call, which is copied back when it went well, and released."""
    memory = DeviceMemory(core, tensors, outputs, blank)
    try:
        yield memory
        memory.copy_back()
    finally:
        memory.release()
