# SPDX-License-Identifier: Apache-2.0
"""Sends the ops' CPU tensors to the emulated CUDA kernels: from public function to .cu file, all is as on a GPU."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
from emulator import Emulation, emulated_core

from fvm_fast.ops import _backend, backend


@contextlib.contextmanager
def ops_on_emulated_cuda(*, check: bool = False) -> Iterator[None]:
    """Inside, tensors of the CPU count as CUDA tensors; ``check`` stands for ``FVM_FAST_CHECK=1``."""
    seam = {"_C_cuda": emulated_core(), "_CUDA_DEVICES": ("cuda", "cpu"), "_CHECK": check}
    with mock.patch.multiple(_backend, **seam):
        yield


class Detector:
    """Stands for ``_C_cuda``: sizes of workspaces, and the names of the kernels."""

    kernels = ("clip_loss", "gather_tokens", "info_nce_loss", "nt_xent_loss", "patch_embed", "restore_tokens",
               "siglip_loss", "window_attention")  # fmt: skip

    def __init__(self, e: Emulation) -> None:
        self._e = e

    def __getattr__(self, name: str) -> Callable:
        return partial(self._e.call, name)


@contextlib.contextmanager
def ops_through(e: Emulation) -> Iterator[None]:
    """Inside, the ops' kernels run in this emulation, under the detector."""

    def launch(kernel: str, device: torch.device, args: tuple) -> None:
        e.call(kernel, *args)

    seam = {"_C_cuda": Detector(e), "_CUDA_DEVICES": ("cuda", "cpu"), "_launch": launch}
    with mock.patch.multiple(_backend, **seam), backend("native"):
        yield
