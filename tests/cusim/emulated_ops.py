# SPDX-License-Identifier: Apache-2.0
"""Sends the ops' CPU tensors to the emulated CUDA kernels: from public function to .cu file, all is as on a GPU."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from emulator import emulated_core

from fvm_fast.ops import _backend


@contextlib.contextmanager
def ops_on_emulated_cuda(*, check: bool = False) -> Iterator[None]:
    """Inside, tensors of the CPU count as CUDA tensors; ``check`` stands for ``FVM_FAST_CHECK=1``."""
    seam = {"_C_cuda": emulated_core(), "_CUDA_DEVICES": ("cuda", "cpu"), "_CHECK": check}
    with mock.patch.multiple(_backend, **seam):
        yield
