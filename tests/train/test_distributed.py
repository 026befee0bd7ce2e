# SPDX-License-Identifier: Apache-2.0
"""Two processes under DDP take the steps that one process takes on the whole batch."""

import json
import os
import socket
from pathlib import Path

import torch
import torch.multiprocessing as mp
from toy import ALONE, toy_config, toy_trainer

from fvm_fast.checkpoint import load_checkpoint
from fvm_fast.distributed import World, join_world, leave_world


def config_of():
    config = toy_config(checkpoint_every=100)
    config.optimizer.batch_size = 6
    config.schedule.steps = 5
    return config


def train_as(rank: int, port: int, size: int, path: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    train_in(path / f"rank{rank}", join_world("cpu"))
    leave_world()


def train_in(path: Path, world: World) -> None:
    trainer = toy_trainer(path, config_of(), world=world)
    trainer.model.visual.patch_dropout = 0.0  # each process draws it for its own images
    trainer.loader.transform = lambda images, generator: images  # and so it does with augmentation
    trainer.loader.label_share = 1.0
    trainer.fit()
    torch.save(trainer.model.state_dict(), path / "weights.pt")
    trainer.folder.close()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def losses(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_are_one(tmp_path):
    mp.spawn(train_as, (free_port(), 2, tmp_path), nprocs=2)
    train_in(tmp_path / "alone", ALONE)
    first, second, alone = (
        torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("rank0", "rank1", "alone")
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses(tmp_path / "rank0"), losses(tmp_path / "alone"), rtol=1e-4, atol=1e-5)
    saved = load_checkpoint(tmp_path / "rank0" / "checkpoints" / "step-000005")
    assert saved.environment["processes"] == 2
    assert not (tmp_path / "rank1" / "checkpoints").exists()
