# SPDX-License-Identifier: Apache-2.0
"""What a benchmark is about: a problem, the rivals that solve it, and the least work that it takes."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

FORWARD, FORWARD_BACKWARD = "forward", "forward + backward"


@dataclass(frozen=True)
class Floor:
    """The least that a computation must do: ``flops`` (two per multiply-add) and ``bytes`` of compulsory traffic."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Floor") -> "Floor":
        return Floor(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Rival:
    """One way to solve a problem.

    Args:
        name: what the table says.
        forward: computes the output; called without arguments.
        wrt: the tensors whose gradients a backward pass computes, in the same order for all rivals of a problem.
        needs_compiler: runs under torch.compile, which needs a C++ compiler.
    """

    name: str
    forward: Callable[[], Tensor]
    wrt: Sequence[Tensor] = ()
    needs_compiler: bool = False


def rivals_on(
    inputs: Sequence[Any],
    functions: Mapping[str, Callable[..., Tensor]],
    compiled: Mapping[str, Callable[..., Tensor]] | None = None,
) -> list[Rival]:
    """Rivals that are called with the same ``*inputs``; gradients go to those that require one.

    Args:
        inputs: arguments of every function, tensors or not.
        functions: by the name in the table, ours first.
        compiled: functions to run under torch.compile, specialised to these sizes.
    """
    wrt = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    torch.compiler.reset()  # else a second size would be compiled for any size
    traced = {name: torch.compile(f, fullgraph=True, dynamic=False) for name, f in (compiled or {}).items()}
    rivals = [Rival(name, partial(f, *inputs), wrt) for name, f in functions.items()]
    return rivals + [Rival(name, partial(f, *inputs), wrt, needs_compiler=True) for name, f in traced.items()]


@dataclass(frozen=True)
class Problem:
    """What is computed, at which size, by whom.

    Args:
        title: operation and sizes.
        rivals: ours first.
        dtype: of the multiplications; chooses the ceiling and the tolerance.
        forward, backward: floors of the two passes; left out, the table shows no share of a floor.
        items, unit: how many of what a call handles (32, "images"), for a column of items a second.
        passes: what to measure, in this order.
        tolerance: greatest difference that validation lets pass, relative to the greatest value; None goes by dtype.
    """

    title: str
    rivals: Sequence[Rival]
    dtype: torch.dtype = torch.float32
    forward: Floor = Floor()
    backward: Floor = Floor()
    items: int = 0
    unit: str = "items"
    passes: Sequence[str] = (FORWARD, FORWARD_BACKWARD)
    tolerance: float | None = None

    @property
    def heading(self) -> str:
        """The title and the dtype."""
        return f"{self.title}, {str(self.dtype).removeprefix('torch.')}"

    def floor(self, which: str) -> Floor:
        """The floor of one of the ``passes``."""
        return self.forward if which == FORWARD else self.forward + self.backward


@dataclass(frozen=True)
class Measurement:
    """One row: seconds of each round (the same rounds for all rivals) and bytes at the peak (None: unknown)."""

    name: str
    seconds: Sequence[float]
    extra_bytes: int | None

    @property
    def median(self) -> float:
        """Median seconds of a call."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    def relative_to(self, other: "Measurement") -> float:
        """Median over the rounds of this rival's time divided by the other's in the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))
