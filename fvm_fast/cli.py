# SPDX-License-Identifier: Apache-2.0
"""The command ``fvm-fast``: train | eval | bench | doctor | export | data."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

BUNDLED = Path(__file__).parent / "assets" / "clip_emoji.safetensors"
DEBUG_HINT = "FVM_FAST_DEBUG=1 in the environment shows the traceback of an error"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 (training diverged), 2 (bad input) or 128 + signal."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"fvm-fast {import_module('fvm_fast').__version__}")
        return 0
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        print(f"fvm-fast: there is no command {command!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    _log_to_stderr()
    try:
        return COMMANDS[command](rest) or 0
    except KeyboardInterrupt:
        print(f"fvm-fast {command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("FVM_FAST_DEBUG", "0") not in ("", "0"):
            raise
        if isinstance(error, RuntimeError) and not hasattr(error, "exit_code"):
            raise  # not ours: a traceback helps more than its message
        print(f"fvm-fast {command}: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)


def train(argv: list[str]) -> int:
    """Train a model from a configuration, then evaluate it and draw its figures."""
    from fvm_fast.configs import parse_config

    config, resume = parse_config(argv)
    from fvm_fast.experiment import run_experiment

    print(f"done: {run_experiment(config, resume)}")
    return 0


def evaluate(argv: list[str]) -> int:
    """Zero-shot and retrieval scores of a checkpoint; search images by words."""
    parser = argparse.ArgumentParser(prog="fvm-fast eval", description=evaluate.__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, default=BUNDLED, help="run folder or .safetensors (default: bundled)"
    )
    parser.add_argument(
        "--style", nargs="*", default=["twitter"], help="emoji drawing styles; none with an empty --style"
    )
    parser.add_argument("--pairs", help="your own pairs for retrieval: a folder, a tar or a quoted glob of tars")
    parser.add_argument("--template", nargs="*", default=["{}"], help="sentences around a label, averaged")
    parser.add_argument(
        "--search", nargs="*", default=[], metavar="WORDS", help="print the emoji nearest to these words"
    )
    parser.add_argument("--figures", type=Path, help="folder for PNG pictures")
    parser.add_argument("--out", type=Path, help="write the scores to this JSON file")
    parser.add_argument("--seed", type=int, default=0, help="of the random places in the 'anywhere' setting")
    options = parser.parse_args(argv)
    from fvm_fast import experiment
    from fvm_fast.build import load_trained

    trained = load_trained(options.checkpoint)
    results = experiment.evaluate(trained, options.style, options.pairs, options.template, options.seed)
    for query, labels in experiment.search_emoji(trained, options.style, options.search):
        print(f"{query}: {', '.join(labels)}")
    if options.figures:
        for path in experiment.draw(trained, options.figures, options.style, options.search, options.seed):
            print(path)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def bench(argv: list[str]) -> int:
    """Run a benchmark of a checkout: benchmarks/bench_<name>.py or benchmarks/<name>.py."""
    import runpy

    folders = [Path(__file__).parents[1] / "benchmarks", Path.cwd() / "benchmarks"]
    scripts = {path.stem.removeprefix("bench_"): path for folder in folders for path in sorted(folder.glob("*.py"))}
    for helper in ("harness", "machine", "memory", "problem", "report"):
        scripts.pop(helper, None)
    names = ", ".join(sorted(scripts)) or "none here: run it in a checkout of the repository"
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: fvm-fast bench NAME [options of the benchmark]\n\n{bench.__doc__}\nbenchmarks: {names}")
        return 0
    if argv[0] not in scripts:
        raise ValueError(f"there is no benchmark {argv[0]!r}; benchmarks: {names}")
    script = scripts[argv[0]]
    sys.argv = [str(script), *argv[1:]]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
    return 0


def doctor(argv: list[str]) -> int:
    """Say what is native on this machine, what is not, why, and the remedy."""
    return import_module("fvm_fast.doctor").main(argv)


def export(argv: list[str]) -> int:
    """Write the weights of a checkpoint in another library's names."""
    parser = argparse.ArgumentParser(prog="fvm-fast export", description=export.__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, default=BUNDLED, help="run folder or .safetensors (default: bundled)"
    )
    parser.add_argument(
        "--to", default="safetensors", help="timm, transformers, open_clip, ... or safetensors (own names)"
    )
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file, or a folder for the library")
    parser.add_argument(
        "--half", action="store_true", help="weights in float16, half the size; loading widens them again"
    )
    options = parser.parse_args(argv)
    from fvm_fast.build import load_trained
    from fvm_fast.checkpoint import save_model

    trained = load_trained(options.checkpoint)
    if options.half:
        trained.model.half()
    if options.to == "safetensors":
        weights = trained.model.state_dict()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        save_model(options.out, weights, trained.spec)
    else:
        weights = import_module("fvm_fast").export_weights(trained.model, to=options.to, path=options.out)
    print(f"{len(weights)} tensors in {options.out}")
    return 0


def data(argv: list[str]) -> int:
    """Look at a pair data set before training on it."""
    parser = argparse.ArgumentParser(prog="fvm-fast data", description=data.__doc__)
    parser.add_argument("action", choices=["describe"])
    parser.add_argument("pairs", metavar="SPEC", help="emoji3, a folder of images, a tar or a quoted glob of tars")
    parser.add_argument("--image-size", type=int, default=64)
    options = parser.parse_args(argv)
    from fvm_fast.data import open_pairs
    from fvm_fast.data.describe import describe_pairs

    print(describe_pairs(open_pairs(options.pairs, options.image_size)))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": train,
    "eval": evaluate,
    "bench": bench,
    "doctor": doctor,
    "export": export,
    "data": data,
}


def _usage() -> str:
    lines = [f"  {name:8}{(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items()]
    return "usage: fvm-fast COMMAND [--help] [options]\n\n" + "\n".join(lines) + f"\n\n{DEBUG_HINT}"


class _Stderr(logging.Handler):
    """Prints through the current sys.stderr, which a live progress bar replaces while it runs."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "only_file", False):
            print(self.format(record), file=sys.stderr)


def _log_to_stderr() -> None:
    log = logging.getLogger("fvm_fast")
    log.setLevel(logging.INFO)
    if not any(isinstance(handler, _Stderr) for handler in log.handlers):
        log.addHandler(_Stderr())


if __name__ == "__main__":
    sys.exit(main())
