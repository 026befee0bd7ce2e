# SPDX-License-Identifier: Apache-2.0
"""The parameters of a launcher, read from the .cu file that defines it."""

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path


class LaunchArgument(ctypes.Structure):
    """``fvm::cuda::Launch`` of cuda/kernels.h."""

    _fields_ = [("device", ctypes.c_int), ("stream", ctypes.c_void_p), ("bad_id", ctypes.c_void_p)]


_SCALARS = {
    "int64_t": ctypes.c_int64, "int": ctypes.c_int, "unsigned": ctypes.c_uint, "size_t": ctypes.c_size_t,
    "bool": ctypes.c_bool, "float": ctypes.c_float, "double": ctypes.c_double, "Dtype": ctypes.c_int,
    "cudaStream_t": ctypes.c_void_p, "Launch": LaunchArgument, "cudaError_t": ctypes.c_int, "void": None,
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One parameter of a launcher."""

    name: str
    type: str

    @property
    def is_pointer(self) -> bool:
        """Whether it is an address."""
        return self.type.endswith("*") or self.type.startswith("Maybe<")

    @property
    def is_input(self) -> bool:
        """Whether it points to what must not change."""
        return "const" in self.type

    @property
    def is_workspace(self) -> bool:
        """Whether it points to memory that need not be filled."""
        return "workspace" in self.name or self.name == "partial_sums"

    @property
    def is_launch(self) -> bool:
        """Whether it says where to launch, which a caller may leave out."""
        return self.type in ("cudaStream_t", "Launch")

    @property
    def ctype(self) -> type:
        """What ctypes passes."""
        return ctypes.c_void_p if self.is_pointer else _SCALARS[self.type]


@dataclass(frozen=True)
class Signature:
    """A launcher as its source declares it."""

    name: str
    result: str
    parameters: tuple[Parameter, ...]

    def prepare(self, library: ctypes.CDLL):
        """The function of a library, ready to be called."""
        function = getattr(library, self.name)
        function.argtypes = [p.ctype for p in self.parameters]
        function.restype = _SCALARS[self.result]
        return function

    def bind(self, args: Sequence, named: dict) -> dict:
        """The arguments by name; the launch is None where it is left out."""
        values = {p.name: None for p in self.parameters if p.is_launch}
        values.update(zip((p.name for p in self.parameters), args, strict=False))
        values.update(named)
        if len(args) > len(self.parameters) or values.keys() != {p.name for p in self.parameters}:
            expected, got = ", ".join(p.name for p in self.parameters), ", ".join([f"{len(args)} in order", *named])
            raise TypeError(f"{self.name}: expected the arguments {expected}, got {got}")
        return values


@cache
def signature(sources: tuple[Path, ...], name: str) -> Signature:
    """What the sources say of a function.

    Raises:
        ValueError: none of them defines it.
    """
    pattern = re.compile(rf"([\w:]+)\s+{name}\s*\(([^()]*)\)\s*\{{")
    for source in sources:
        found = pattern.search(re.sub(r"//.*", "", source.read_text()))
        if found:
            parameters = [re.sub(r"\s+", " ", p).strip() for p in found.group(2).split(",")]
            return Signature(name, found.group(1), tuple(_parameter(p) for p in parameters if p))
    raise ValueError(f"expected a definition of {name}(...) in {', '.join(s.name for s in sources)}, got none")


def _parameter(text: str) -> Parameter:
    type_, name = re.fullmatch(r"(.*?[\s*>])(\w+)", text).groups()
    return Parameter(name, type_.replace("fvm::", "").replace("cuda::", "").replace(" *", "*").strip())
