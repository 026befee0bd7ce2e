# SPDX-License-Identifier: Apache-2.0
"""Real processes that are killed: what `fvm-fast train` loses, says and continues."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fvm_fast.checkpoint import load_checkpoint
from fvm_fast.cli import main
from fvm_fast.data.tokenizer import BPETokenizer
from fvm_fast.run_folder import read_metrics

STEPS, INTERVAL = 60, 4
CONFIG = f"""
data: {{styles: [google], image_size: 32, tokenizer: TOKENIZER}}
model: {{name: clip_vit_test}}
optimizer: {{batch_size: 16}}
schedule: {{steps: {STEPS}, warmup_steps: 2}}
run: {{checkpoint_every: {INTERVAL}, log_every: 1, keep: 3, print_every: 1}}
eval: {{styles: [], figures: false}}
"""


@pytest.fixture
def config_file(tmp_path):
    folder = tmp_path
    BPETokenizer.from_merges([]).save(folder / "tokenizer.json")
    (folder / "toy.yaml").write_text(CONFIG.replace("TOKENIZER", str(folder / "tokenizer.json")))
    return folder / "toy.yaml"


def arguments(config: Path, out: Path, *options: str) -> list[str]:
    return ["train", "--config", str(config), "--run.out", str(out), *options]


def start(*words: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "fvm_fast.cli", *arguments(*words)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    """Return as soon as metrics.jsonl tells of step `step`."""
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_text().count("\n") >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    raise AssertionError(f"no step {step} within two minutes")


def losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(out / "metrics.jsonl")]


def kill(process: subprocess.Popen, out: Path, step: int) -> int:
    """Kill the process without warning at about `step`; returns the step of its newest checkpoint."""
    wait_for_step(process, out, step)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return max(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*"))


def interrupt(process: subprocess.Popen, out: Path, step: int) -> str:
    """Press Ctrl-C at about `step`; returns what was printed."""
    wait_for_step(process, out, step)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    return output


def test_killed_interrupted_and_resumed_equals_undisturbed(config_file, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "disturbed"
    assert main(arguments(config_file, whole)) == 0

    saved = kill(start(config_file, out), out, 10)
    assert saved >= losses(out)[-1][0] - INTERVAL  # what is lost is at most the interval

    output = interrupt(start(config_file, out, "--resume", "auto"), out, losses(out)[-1][0] + 5)
    step = losses(out)[-1][0]
    assert f"continuing from {out / 'checkpoints' / f'step-{saved:06d}'}" in output
    assert f"stopped at step {step} of {STEPS}, which is saved" in output
    assert "Traceback" not in output
    assert (out / "checkpoints" / "last").resolve().name == f"step-{step:06d}"

    output, _ = (process := start(config_file, out, "--resume", "auto")).communicate(timeout=120)
    assert process.returncode == 0, output
    assert losses(out) == losses(whole)
    last = [load_checkpoint((folder / "checkpoints" / "last").resolve()) for folder in (out, whole)]
    assert last[0].step == last[1].step == STEPS
    torch.testing.assert_close(last[0].model, last[1].model, rtol=0, atol=0)
    torch.testing.assert_close(last[0].optimizer, last[1].optimizer, rtol=0, atol=0)
