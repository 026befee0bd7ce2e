# SPDX-License-Identifier: Apache-2.0
"""For the day a GPU is there: what only a GPU can say about the CUDA kernels, each step on the ground of those before.

    make test-gpu                                # all steps; the first one that fails ends it
    make test-gpu ARGS="--from ops"              # go on from a step
    make test-gpu ARGS="--list"                  # the commands

1. `fragments`: tensor cores, ldmatrix and cp.async do what the emulator's twins do.
2. `memcheck`, `racecheck`, `initcheck`, `synccheck`: compute-sanitizer over a short call of every op.
3. `ops`: the tests of the ops with all tensors on the GPU.
4. `counters`: sectors and bank conflicts that the hardware counts beside those that the emulator counted.
5. `bench`: the benchmarks on the GPU, timed by triton's do_bench, beside eager torch, torch.compile and their peers.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
BENCHMARKS = ("token_gather", "patch_embed", "window_attention", "contrastive_loss")
# What tests the CPU's core, its threads and instruction sets, or processes of its own: nothing that a GPU changes.
NOT_OF_A_GPU = "isa or thread or memory or joined or environment or ring or distributed or fork or known or backend"


class Step(NamedTuple):
    """A command that has to succeed."""

    name: str
    command: list[str]
    environment: dict[str, str] = {}
    tool: str = PYTHON

    def line(self) -> str:
        """As it would be typed."""
        return " ".join([*(f"{k}={v}" for k, v in self.environment.items()), shlex.join(self.command)])


def steps() -> list[Step]:
    """All of them, in their order."""
    on_gpu = {"FVM_TEST_DEVICE": "cuda", "PYTHONPATH": str(ROOT)}
    uncached = {**on_gpu, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else one allocation hides the borders of many
    calls = [PYTHON, "tests/cusim/op_calls.py", "--device", "cuda"]
    pytest = [PYTHON, "-m", "pytest", "-q"]
    sanitize = ["compute-sanitizer", "--error-exitcode", "1", "--tool"]
    return [
        Step("fragments", [*pytest, "tests/cusim/test_fragments.py"], on_gpu),
        *(Step(tool, [*sanitize, tool, *calls], uncached, "compute-sanitizer") for tool in SANITIZERS),
        Step("ops", [*pytest, "tests/ops", "-k", f"not ({NOT_OF_A_GPU})"], on_gpu),
        Step("counters", [PYTHON, "benchmarks/gpu_counters.py"], on_gpu, "ncu"),
        *(
            Step(f"bench {name}", [PYTHON, f"benchmarks/bench_{name}.py", "--device", "cuda"], on_gpu)
            for name in BENCHMARKS
        ),
    ]


def why_not(chosen: list[Step]) -> str | None:
    """What is missing to run these steps, as a sentence, or None."""
    import torch

    from fvm_fast.ops import _backend

    if not torch.cuda.is_available():
        return "expected a GPU, torch sees none; without one `make test ARGS=tests/cusim` emulates one"
    if _backend._C_cuda is None:
        return f"expected the CUDA module, but {_backend._why_no_cuda}"
    for step in chosen:
        if shutil.which(step.tool) is None:
            return (
                f"expected {step.tool} on the PATH for the step {step.name!r}, got none; it is part of the CUDA toolkit"
            )
    if any(step.name.startswith("bench") for step in chosen) and importlib.util.find_spec("triton") is None:
        return "expected triton for its timer, got none; pip install 'fvm_fast[bench-gpu]'"
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the steps; the exit code is that of the first that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in steps()]
    parser.add_argument("--from", dest="first", metavar="STEP", choices=names, help="skip those before")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    options = parser.parse_args(argv)
    chosen = steps()[names.index(options.first) if options.first else 0 :]
    if options.list:
        print("\n".join(step.line() for step in chosen))
        return 0
    if missing := why_not(chosen):
        print(f"test_gpu: {missing}", file=sys.stderr)
        return 2
    for step in chosen:
        print(f"== {step.name}: {step.line()}", flush=True)
        code = subprocess.run(step.command, cwd=ROOT, env={**os.environ, **step.environment}).returncode
        if code:
            print(f"test_gpu: the step {step.name!r} failed ({code}); go on from it with --from", file=sys.stderr)
            return code
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
