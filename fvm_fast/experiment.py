# SPDX-License-Identifier: Apache-2.0
"""One run from its configuration to its figures: train, evaluate, compare, draw."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvm_fast.build import Trained, build_loader, build_model, build_pairs, build_tokenizer, load_trained, model_spec
from fvm_fast.checkpoint import load_checkpoint
from fvm_fast.compare import compare_open_clip
from fvm_fast.configs import TrainConfig, to_yaml
from fvm_fast.data import EmojiPairs, open_pairs
from fvm_fast.data import transforms as T
from fvm_fast.distributed import World, join_world, leave_world
from fvm_fast.evaluate import encode_images, encode_texts, evaluate_emoji, placed
from fvm_fast.figures import loss_curve, search_strip, similarity_matrix
from fvm_fast.files import write_text
from fvm_fast.objectives import ContrastivePretraining
from fvm_fast.retrieval import evaluate_retrieval, search
from fvm_fast.run_folder import RunFolder, choose_folder, find_resume_point
from fvm_fast.tables import retrieval_table, zero_shot_table
from fvm_fast.train import Trainer, check_config

log = logging.getLogger("fvm_fast")

MATRIX_LABELS = (
    "red apple", "banana", "carrot", "cat face", "octopus", "cactus", "rocket", "automobile",
    "guitar", "soccer ball", "umbrella", "house",
)  # fmt: skip


def run_experiment(config: TrainConfig, resume: str | None = None) -> Path:
    """Train as ``config`` says, then evaluate and draw; returns the run folder."""
    check_config(config)
    world = join_world(config.run.device)
    if not world.is_main:
        log.setLevel(logging.ERROR)
    try:
        folder = RunFolder(choose_folder(config.run.name, config.run.out, resume == "auto"))
        train(config, folder, world, resume)
        if world.is_main:
            after_training(config, folder)
        world.wait()
    finally:
        leave_world()
    return folder.path


def train(config: TrainConfig, folder: RunFolder, world: World, resume: str | None = None) -> Trainer:
    """Train into ``folder``, from its newest checkpoint when ``resume`` is ``auto``."""
    start = find_resume_point(folder, resume)
    checkpoint = None if start is None else load_checkpoint(start)
    trainer = build_trainer(config, folder, world)
    changes = folder.changes(to_yaml(config)) if checkpoint else []
    if world.is_main:
        folder.open(to_yaml(config), checkpoint.step if checkpoint else 0)
    try:
        if checkpoint is not None:
            log.info("continuing from %s", start)
            for change in changes:
                log.warning("resume: %s, so the run is not the one that was begun", change)
            trainer.restore(checkpoint)
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        pairs = len(trainer.loader.pairs)
        log.info("%s: %.2f M parameters, %d pairs, into %s", config.model.name, parameters / 1e6, pairs, folder.path)
        trainer.fit()
    finally:
        folder.close()
    return trainer


def build_trainer(config: TrainConfig, folder: RunFolder, world: World) -> Trainer:
    """The trainer of ``config`` with the weights its seed draws."""
    data, options = config.data, config.objective
    tokenizer = build_tokenizer(data.tokenizer, data.context_length)
    loader = build_loader(config, build_pairs(data), tokenizer, world)
    spec = model_spec(config, tokenizer)
    objective = ContrastivePretraining(
        build_model(spec),
        options.loss,
        label_smoothing=options.label_smoothing,
        multi_positive=options.multi_positive,
        group=world.group,
    )
    return Trainer(objective, loader, config, folder, world, spec)


def after_training(config: TrainConfig, folder: RunFolder) -> dict[str, Any]:
    """Evaluate the newest checkpoint, compare with open_clip, draw: ``results.json`` and ``figures/`` in the folder."""
    trained = load_trained(folder.path)
    results = evaluate(trained, config.eval.styles, config.eval.pairs, config.eval.templates, config.eval.seed)
    if config.run.compare_steps:
        try:
            comparison = compare_open_clip(config, config.run.compare_steps)
        except ImportError as error:
            log.info("%s", error)
        else:
            results["open_clip"] = comparison.as_dict()
            log.info("%s", comparison.sentence())
    write_text(folder.path / "results.json", json.dumps(results, indent=2) + "\n")
    if config.eval.figures:
        try:
            loss_curve(folder.metrics, folder.path / "figures" / "loss.png", math.log(config.optimizer.batch_size))
            draw(trained, folder.path / "figures", config.eval.styles, config.eval.queries, config.eval.seed)
        except ImportError as error:
            log.info("%s", error)
    return results


def evaluate(trained: Trained, styles: list[str], pairs: str | None, templates: list[str], seed: int) -> dict[str, Any]:
    """Zero-shot on emoji ``styles`` and retrieval on the user's own ``pairs``; prints a table for each."""
    results: dict[str, Any] = {}
    if styles:
        results["zero_shot"] = evaluate_emoji(trained, styles, templates, seed)
        for style, settings in results["zero_shot"].items():
            zero_shot_table(style, settings)
    if pairs:
        data = open_pairs(pairs, trained.spec["source_size"])
        transform = T.Aligned(trained.spec["image_size"])
        results["retrieval"] = evaluate_retrieval(trained.model, trained.tokenizer, data, transform)
        retrieval_table(pairs, results["retrieval"])
    return results


def search_emoji(trained: Trained, styles: list[str], queries: list[str], k: int = 8) -> list[tuple[str, list[str]]]:
    """Labels of the ``k`` emoji of the first style that each query finds."""
    if not queries:
        return []
    pairs, _, features = _index(trained, styles[0] if styles else "twitter", seed=0)
    found = []
    for query in queries:
        best = search(trained.model, trained.tokenizer, features, query, k)[1]
        found.append((query, [pairs.labels[int(pairs.concepts[index])] for index in best]))
    return found


def draw(trained: Trained, folder: Path, styles: list[str], queries: list[str], seed: int) -> list[Path]:
    """Similarity matrix and search strip over the emoji of the first of ``styles``; returns the PNG files."""
    if not styles:
        return []
    pairs, images, features = _index(trained, styles[0], seed)
    drawn = []
    captions = [label for label in MATRIX_LABELS if label in pairs.labels]
    if captions:
        rows = torch.tensor([pairs.labels.index(label) for label in captions])
        similarities = encode_texts(trained.model, trained.tokenizer, captions) @ features[rows].T
        drawn.append(similarity_matrix(similarities, images[rows], captions, folder / "similarity.png"))
    if queries:
        found = [(q, images[search(trained.model, trained.tokenizer, features, q, 10)[1]]) for q in queries]
        drawn.append(search_strip(found, folder / "search.png"))
    return drawn


def _index(trained: Trained, style: str, seed: int) -> tuple[EmojiPairs, Tensor, Tensor]:
    """The emoji of a style, aligned on white, and their features."""
    spec = trained.spec
    pairs = EmojiPairs((style,), spec["subset"], image_size=spec["source_size"])
    images = placed(pairs, "aligned", spec["image_size"], seed)
    return pairs, images, encode_images(trained.model, images)
