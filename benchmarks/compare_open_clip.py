# SPDX-License-Identifier: Apache-2.0
"""A whole training step against a plain open_clip loop, on the same batches and weights, side by side.

    fvm-fast bench compare_open_clip --config clip_emoji --steps 30
    python benchmarks/compare_open_clip.py --steps 30 --optimizer.batch_size 128

Prints the largest relative difference of the loss, the time and the memory of a step, and our ops' share of our step.
"""

from __future__ import annotations

import argparse
import json
import logging

import torch

from fvm_fast.compare import compare_open_clip
from fvm_fast.configs import parse_config


def main() -> None:
    """Read the options, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--config", default="clip_emoji", help="what is trained; its values can be overridden as in train"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options, overrides = parser.parse_known_args()
    config, _ = parse_config(["--config", options.config, *overrides])
    comparison = compare_open_clip(config, options.steps)
    print(json.dumps(comparison.as_dict()) if options.json else comparison.sentence())
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
