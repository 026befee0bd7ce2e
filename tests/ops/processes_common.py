# SPDX-License-Identifier: Apache-2.0
"""Tests that need processes of their own: to measure memory, or to be the members of a group."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"  # memory.py is there


def _environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | more


def extra_bytes(setup: str, small: str, large: str) -> int:
    """How far the expression ``large`` raises the memory of a native process of one thread that has run ``small``.

    ``setup`` is run before; the ops and torch are imported.
    """
    code = f"""
import sys
import torch
from fvm_fast.ops import *
sys.path.append({str(BENCHMARKS)!r})
from memory import peak_extra_bytes
torch.set_num_threads(1)
{setup}
{small}
print(peak_extra_bytes(lambda: {large}))
"""
    environment = _environment(FVM_FAST_BACKEND="native")
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    return int(run.stdout)


def run_group(worker: str, world: int, folder: Path) -> list[dict]:
    """Runs ``python worker RANK WORLD FOLDER`` for all ranks at once, and loads what each saved as FOLDER/RANK.pt."""
    command, environment = [sys.executable, worker], _environment()
    processes = [subprocess.Popen([*command, str(r), str(world), str(folder)], env=environment) for r in range(world)]
    try:
        assert [p.wait(timeout=120) for p in processes] == [0] * world
    finally:
        for p in processes:
            p.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def said(*attempts: Callable[[], object]) -> list[str]:
    """The sentence that each attempt fails with, or "nothing"."""
    sentences = []
    for attempt in attempts:
        try:
            attempt()
            sentences.append("nothing")
        except (ValueError, RuntimeError) as error:
            sentences.append(str(error))
    return sentences
