# SPDX-License-Identifier: Apache-2.0
"""Time and memory of calls on a GPU, in the place of the CPU's clock and of the operating system's count."""

import random
from collections.abc import Callable

import torch

ROUNDS = 5


def is_used() -> bool:
    """Whether the benchmark makes its tensors on a GPU."""
    return torch.get_default_device().type == "cuda"


def describe() -> str:
    """The name of the GPU, its compute capability, and CUDA's version."""
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}), CUDA {torch.version.cuda}, torch {torch.__version__}"


def time_in_turns(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds a call of each, one median of triton's do_bench a round, in a new order each round."""
    from triton.testing import do_bench

    samples: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    milliseconds = max(20.0, 1e3 * seconds / (ROUNDS * len(runs)))
    for _ in range(ROUNDS):
        shuffle(order)
        for name in order:
            samples[name].append(do_bench(runs[name], rep=milliseconds, return_mode="median") / 1e3)
    return samples


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Bytes that torch's allocator has at most while ``call`` runs, beyond those that it had before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before)
