# SPDX-License-Identifier: Apache-2.0
"""The one timer: rivals that compute the same thing are checked against each other, then timed in turns.

A script makes `Problem`s and calls `main`. Of each problem the harness

1. runs every rival and compares output and gradients with the first rival's (ours): a wrong answer stops the benchmark;
2. measures the peak memory of one call of each;
3. times them round after round in one process, each once a round in a new order, so that noise hits all alike;
4. prints medians and spread, FLOP/s and bytes/s beside what the machine can do at best, and the ratio to ours.
"""

import argparse
import gc
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import gpu
import machine
import report
import torch
from memory import peak_extra_bytes
from problem import FORWARD, Measurement, Problem, Rival
from torch import Tensor

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Disagreement(ValueError):
    """Rivals that should compute the same thing do not."""


def measure(problem: Problem, which: str, seconds: float) -> list[Measurement]:
    """Validate, weigh and time one pass of a problem.

    Raises:
        Disagreement: a rival's answer is not ours.
    """
    runs = check(problem, which)
    peak, timer = (gpu.peak_extra_bytes, gpu.time_in_turns) if gpu.is_used() else (peak_extra_bytes, time_in_turns)
    extra = {name: peak(run) for name, run in runs.items()}
    samples = timer(runs, seconds)
    return [Measurement(name, samples[name], extra[name]) for name in runs]


def check(problem: Problem, which: str) -> dict[str, Callable[[], list[Tensor]]]:
    """What is to be timed, by the rival's name, after each ran once and `validate` found that they agree."""
    one_pass = _forward if which == FORWARD else _forward_backward
    runs = {rival.name: partial(one_pass, rival) for rival in problem.rivals}
    tolerance = TOLERANCE[problem.dtype] if problem.tolerance is None else problem.tolerance
    validate({name: run() for name, run in runs.items()}, tolerance)
    return runs


def _forward(rival: Rival) -> list[Tensor]:
    with torch.no_grad():
        return [rival.forward()]


def _forward_backward(rival: Rival) -> list[Tensor]:
    output = rival.forward()
    seed = None if output.dim() == 0 else _output_gradient(output.shape, output.dtype)
    return [output.detach(), *torch.autograd.grad(output, rival.wrt, seed)]


@lru_cache(maxsize=2)
def _output_gradient(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Noise, made once: ones would let a rival get away with mixing up tokens."""
    noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return noise.to(torch.get_default_device(), dtype)


def validate(results: dict[str, Sequence[Tensor]], tolerance: float) -> None:
    """Stop unless all rivals gave the first one's output and gradients.

    Args:
        results: by the rival's name, its output and then its gradients.
        tolerance: greatest difference relative to the greatest value of the tensor.

    Raises:
        Disagreement: names the rival and the tensor that differ, and by how much.
    """
    (ours, expected), *others = results.items()
    largest = max((float(t.abs().max()) for t in expected if t.numel()), default=0.0)
    for name, got in others:
        shapes, expected_shapes = ([tuple(t.shape) for t in tensors] for tensors in (got, expected))
        if shapes != expected_shapes:
            raise Disagreement(f"{name!r} should give the shapes of {ours!r}, {expected_shapes}, got {shapes}")
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            # A gradient that is zero but for rounding (a key's bias, say) is measured against the size of the others.
            error = _difference(a, b, least_scale=1e-3 * largest)
            if not error <= tolerance:  # so that NaN fails
                what = "output" if i == 0 else f"gradient {i - 1}"
                raise Disagreement(
                    f"{name!r} and {ours!r} should agree to {tolerance:g} before they are timed, "
                    f"got a difference of {error:.2g} in the {what} {tuple(b.shape)}; one of them is wrong"
                )


def _difference(a: Tensor, b: Tensor, least_scale: float) -> float:
    """Greatest difference relative to the greatest value."""
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    a, b = a.double(), b.double()
    scale = max(float(a.abs().max()), float(b.abs().max()), least_scale)
    return float((a - b).abs().max()) / scale


def time_in_turns(
    runs: dict[str, Callable[[], object]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    min_rounds: int = 3,
    max_rounds: int = 200,
) -> dict[str, list[float]]:
    """Seconds a call of each, one sample a round.

    Args:
        runs: what to time, by name. Call each once before: first calls compile and load.
        seconds: time to spend; exceeded if ``min_rounds`` take longer.
        clock: seconds since anywhere.
        min_rounds, max_rounds: bounds of the number of samples.
    """
    repeats = {name: _repeats(run, clock) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        end = clock() + seconds
        for rounds in range(max_rounds):
            if rounds >= min_rounds and clock() >= end:
                break
            shuffle(order)
            for name in order:
                samples[name].append(_seconds_a_call(runs[name], repeats[name], clock))
    finally:
        gc.enable()
    return samples


def _repeats(run: Callable[[], object], clock: Callable[[], float], least: float = 2e-3) -> int:
    """Calls that a sample needs to last ``least`` seconds, so that the clock and the loop do not count."""
    return max(1, math.ceil(least / max(_seconds_a_call(run, 1, clock), 1e-7)))


def _seconds_a_call(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats


def parse_arguments(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options that all benchmarks share; ``dtypes`` of the result holds torch's."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, little time: does it run, roughly how fast")
    parser.add_argument("--dtype", choices=[*DTYPES, "all"], default="all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, help="time for each table (2; quick 0.3); three rounds at least")
    parser.add_argument("--only", default="", metavar="WORDS", help="only the problems whose title has these words")
    parser.add_argument("--no-compile", action="store_true", help="without the torch.compile rivals, which need g++")
    parser.add_argument("--write", action="store_true", help="record the tables in RESULTS.md")
    args = parser.parse_args(argv)
    if args.write and (args.quick or args.only or args.no_compile or args.dtype != "all"):
        parser.error("--write records complete runs: drop --quick, --only, --no-compile and --dtype")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a GPU, torch sees none")
    if args.seconds is None:
        args.seconds = 0.3 if args.quick else 2.0
    args.dtypes = list(DTYPES.values()) if args.dtype == "all" else [DTYPES[args.dtype]]
    return args


def main(
    script: str,
    description: str,
    problems: Callable[[argparse.Namespace], Iterable[Problem]],
    argv: Sequence[str] | None = None,
) -> None:
    """Measure and print what ``problems`` makes; with ``--write`` also record it under the script's name.

    Args:
        script: the script's ``__file__``.
        description: for ``--help``.
        problems: makes the problems from the parsed options, one at a time, so that their inputs do not pile up.
        argv: options, instead of the command line's.
    """
    args = parse_arguments(description, argv)
    torch.set_num_threads(args.threads)
    torch.set_default_device(args.device)
    torch.manual_seed(0)
    name = report.section_name(Path(script).stem)
    parts = [f"## {name}\n\n{machine.describe()}.\n"]
    print(parts[0], flush=True)
    for problem in problems(args):
        if args.only not in problem.heading:
            continue
        for which in problem.passes:
            parts.append(_section(problem, which, args))
            print(parts[-1], flush=True)
    if args.write:
        report.write_section(name, "\n".join(parts), report.RESULTS)


def _section(problem: Problem, which: str, args: argparse.Namespace) -> str:
    rivals = [rival for rival in problem.rivals if not (args.no_compile and rival.needs_compiler)]
    try:
        rows = measure(replace(problem, rivals=rivals), which, args.seconds)
    except Disagreement as error:
        raise SystemExit(f"{problem.heading}, {which}: {error}") from None
    heading = f"### {problem.heading}\n\n" if which == problem.passes[0] else ""
    return heading + report.render(problem, which, rows)
