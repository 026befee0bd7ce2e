# SPDX-License-Identifier: Apache-2.0
"""What the figures were measured on, and the fastest that it can multiply and copy."""

import os
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import gpu
import torch

from fvm_fast.ops._backend import isa


def describe() -> str:
    """One line that names processor, cores, instruction set, torch, threads, and how busy others keep the machine."""
    if gpu.is_used():
        return gpu.describe()
    core = f"compiled core on {isa()}" if isa() else "no compiled core"
    blas = torch.backends.cpu.get_cpu_capability()
    return (
        f"{_cpu_model()}, {platform.system()} {platform.machine()}, {torch.get_num_threads()} of {_cores()} cores, "
        f"{core}, torch {torch.__version__} on {blas}, {_busy()}"
    )


def matmul_ceiling(dtype: torch.dtype) -> float:
    """FLOP/s of the best large ``torch.mm`` in ``dtype`` with the present number of threads."""
    return _matmul_ceiling(dtype, torch.get_num_threads())


def copy_ceiling(nbytes: float) -> float:
    """Bytes/s, reads plus writes, of a ``copy_`` that moves ``nbytes`` in all: caches help it as they help an op."""
    megabytes = max(1, round(nbytes / 2**20))
    return _copy_ceiling(megabytes, torch.get_num_threads())


@cache
def _matmul_ceiling(dtype: torch.dtype, threads: int) -> float:
    best = 0.0
    for n in (1024, 2048):
        a, b, out = (torch.randn(n, n).to(dtype) for _ in range(3))
        best = max(best, 2 * n**3 / _best_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)))
    return best


@cache
def _copy_ceiling(megabytes: int, threads: int) -> float:
    source = torch.ones(megabytes * 2**20 // 8)  # float32: half of the traffic
    target = torch.ones_like(source)
    return megabytes * 2**20 / _best_seconds(lambda: target.copy_(source))


def _best_seconds(call: Callable[[], object], seconds: float = 0.1) -> float:
    """The least time of one call among those that fit in ``seconds``, and among three at least."""
    call()
    best, calls, end = float("inf"), 0, time.perf_counter() + seconds
    while calls < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if gpu.is_used():
            torch.cuda.synchronize()
        best, calls = min(best, time.perf_counter() - start), calls + 1
    return best


def _cpu_model() -> str:
    if platform.system() != "Linux":
        return platform.processor() or platform.machine()
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _busy(seconds: float = 0.5) -> str:
    """The share of all cores that other processes take while this one sleeps."""
    if platform.system() != "Linux":
        return "load unknown"
    before = _cpu_ticks()
    time.sleep(seconds)
    idle, total = (after - start for after, start in zip(_cpu_ticks(), before, strict=True))
    return f"{1 - idle / max(total, 1):.0%} busy before the run"


def _cpu_ticks() -> tuple[int, int]:
    """(idle, all) clock ticks of all cores since boot."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return ticks[3] + ticks[4], sum(ticks)
