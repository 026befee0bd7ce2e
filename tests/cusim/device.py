# SPDX-License-Identifier: Apache-2.0
"""The same launchers on a real GPU: .cu files compiled by nvcc, called as an Emulation calls them."""

import ctypes
import subprocess
from functools import cache
from pathlib import Path

import torch
from cusim_build import CUDA
from cusim_memory import dense
from cusim_signature import LaunchArgument, signature
from torch import Tensor

from fvm_fast import doctor_cuda


@cache
def compile_for_device(source: Path, folder: Path) -> Path:
    """The shared library of a .cu file, in PTX that any GPU from sm_80 on assembles for itself.

    Raises:
        subprocess.CalledProcessError: nvcc's words are on the standard error.
    """
    library = folder / f"{source.stem}.so"
    code = "arch=compute_80,code=compute_80"
    command = [doctor_cuda.find_nvcc(), "-std=c++17", "-shared", "-Xcompiler=-fPIC", f"-I{CUDA}", "-gencode", code]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return library


class OnDevice:
    """In the place of an Emulation: no findings and no counters, for the hardware keeps these to itself.

    Args:
        source, library: a .cu file and what :func:`compile_for_device` made of it.
        schedule: what it is on a GPU; the argument of an Emulation.
    """

    findings: tuple = ()
    launches = traffic = None

    def __init__(self, source: Path, library: Path, *, schedule: str = "") -> None:
        self._source, self._core = source, ctypes.CDLL(str(library))

    def __enter__(self) -> "OnDevice":
        return self

    def __exit__(self, *exception) -> None:
        pass

    def call(self, name: str, *args, **named) -> None:
        """Copy the tensors to the GPU, run a launcher on the default stream, and copy the outputs back.

        Raises:
            RuntimeError: the launcher returned an error.
        """
        launcher = signature((self._source,), name)
        values = launcher.bind(args, named)
        pointers = [p for p in launcher.parameters if p.is_pointer]
        host = {p.name: dense(p.name, values[p.name]) for p in pointers}
        there = {n: t.cuda() for n, t in host.items() if t is not None}
        error = launcher.prepare(self._core)(*(self._argument(p, values, there) for p in launcher.parameters))
        if error:
            raise RuntimeError(f"{name}: expected the GPU to run it, got the CUDA error {error}")
        torch.cuda.synchronize()
        for p in pointers:
            if not p.is_input and p.name in there:
                host[p.name].copy_(there[p.name])

    @staticmethod
    def _argument(parameter, values: dict, there: dict[str, Tensor]):
        if parameter.is_pointer:
            return there[parameter.name].data_ptr() if parameter.name in there else None
        return LaunchArgument(0, None, None) if parameter.type == "Launch" else values[parameter.name]
