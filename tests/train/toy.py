# SPDX-License-Identifier: Apache-2.0
"""A task small enough to train in a second: eight coloured squares with their names, in memory or on demand."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fvm_fast.configs import ModelConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from fvm_fast.data.loader import PairLoader
from fvm_fast.data.sampler import ConceptSampler
from fvm_fast.distributed import World
from fvm_fast.models import create_model
from fvm_fast.objectives import ContrastivePretraining
from fvm_fast.run_folder import RunFolder
from fvm_fast.train import Trainer

ALONE = World(0, 1, torch.device("cpu"), None)
NAMES = ("red", "green", "blue", "black", "white", "pink", "grey", "lime")


class Sample(NamedTuple):
    image: Tensor
    captions: tuple[str, ...]
    concept: int


class OnDemandPairs:
    """Map style, one sample at a time; two pictures of each concept."""

    def __init__(self, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pictures = torch.randint(0, 256, (2 * len(NAMES), 3, size, size), generator=generator, dtype=torch.uint8)
        self.captions = [(name, f"{name} square", f"a {name} thing") for name in NAMES] * 2
        self.concepts = torch.arange(len(NAMES)).repeat(2)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.pictures[index], self.captions[index], int(self.concepts[index]))


class InMemoryPairs(OnDemandPairs):
    """The same, with all images at hand."""

    @property
    def images(self) -> Tensor:
        return self.pictures


def tokenize(texts: list[str], context_length: int = 12) -> Tensor:
    """Letters as ids, 126 in front and 127 behind."""
    rows = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        ids = [126, *(ord(letter) % 120 for letter in text[: context_length - 2]), 127]
        row[: len(ids)] = torch.tensor(ids)
    return rows


def add_noise(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """An augmentation that uses its generator."""
    noise = torch.randint(0, 32, images.shape, generator=generator, dtype=torch.uint8)
    return torch.minimum(images, 255 - noise) + noise


def toy_config(**run: object) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig("clip_vit_test"),
        optimizer=OptimizerConfig(lr=1e-3, batch_size=4),
        schedule=ScheduleConfig(steps=12, warmup_steps=3),
        run=RunConfig(**{"checkpoint_every": 3, "log_every": 1, "keep": 10} | run),
    )


def toy_loader(pairs: OnDemandPairs | None = None, batch_size: int = 4, **options: object) -> PairLoader:
    pairs = InMemoryPairs() if pairs is None else pairs
    sampler = ConceptSampler(pairs.concepts, batch_size, seed=1)
    return PairLoader(pairs, sampler, add_noise, tokenize, **{"label_share": 0.5, "seed": 1} | options)


def toy_trainer(path: Path, config: TrainConfig, step: int = 0, loss: str = "clip", world: World = ALONE) -> Trainer:
    """A trainer whose folder is open; patch dropout makes the model draw random numbers too."""
    torch.manual_seed(0)
    bias = {"init_logit_bias": -2.0} if loss == "siglip" else {}
    model = create_model("clip_vit_test", patch_dropout=0.5, **bias)
    objective = ContrastivePretraining(model, loss, group=world.group)
    folder = RunFolder(path)
    folder.open("", step)
    loader = toy_loader(batch_size=config.optimizer.batch_size, rank=world.rank, world_size=world.size)
    return Trainer(objective, loader, config, folder, world, {"model": "clip_vit_test"})
