# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: one alone, or those that torchrun started (gloo on CPU, NCCL on CUDA)."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among the processes of the run.

    Attributes:
        rank: 0 for the process that writes files and talks.
        size: number of processes.
        device: where this process computes.
        group: the group of all processes, None for one alone.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def largest(self, value: int) -> int:
        """The largest ``value`` of any process, so that all of them act on one event alike."""
        if self.group is None:
            return value
        flag = torch.tensor(value, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return int(flag)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.group is not None:
            dist.barrier(group=self.group)


def join_world(device: str = "auto") -> World:
    """Find the device and, under torchrun, join the process group; ``device`` is ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ValueError: CUDA was asked for and is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"run.device: got {device!r}, and torch sees no CUDA device here; use run.device=cpu")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, torch.device(device), None)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return World(dist.get_rank(), size, torch.device(device), dist.group.WORLD)


def leave_world() -> None:
    """Undo :func:`join_world`."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
