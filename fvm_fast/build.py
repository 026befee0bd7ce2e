# SPDX-License-Identifier: Apache-2.0
"""From the words of a configuration, or of a checkpoint's metadata, to data, tokenizer, model and loader."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from torch import Tensor, nn

import fvm_fast
from fvm_fast.checkpoint import load_model_file
from fvm_fast.configs.schema import DataConfig, TrainConfig
from fvm_fast.data import EmojiPairs, open_pairs
from fvm_fast.data import transforms as T
from fvm_fast.data.loader import PairLoader
from fvm_fast.data.sampler import ConceptSampler, shuffled_sampler, stream_seed
from fvm_fast.data.tokenizer import BPETokenizer, CLIPTokenizer, EmojiTokenizer
from fvm_fast.distributed import World

SIGLIP_START = {"init_logit_scale": math.log(10.0), "init_logit_bias": -10.0}  # section 3.1 of the SigLIP paper


class Trained(NamedTuple):
    """A model read from a checkpoint, in evaluation mode, with what is needed to use it."""

    model: nn.Module
    tokenizer: BPETokenizer
    spec: dict[str, Any]


def build_tokenizer(name: str, context_length: int) -> BPETokenizer:
    """``emoji``, ``clip`` or the path of a tokenizer.json."""
    if name == "emoji":
        return EmojiTokenizer(context_length)
    if name == "clip":
        return CLIPTokenizer(context_length)
    if not Path(name).is_file():
        raise FileNotFoundError(f"data.tokenizer: expected emoji, clip or the path of a tokenizer.json, got {name!r}")
    return BPETokenizer.from_file(name, context_length)


def build_pairs(data: DataConfig) -> Any:
    """The pair data set that ``data`` describes."""
    if data.pairs == "emoji3":
        return EmojiPairs(tuple(data.styles), data.subset, data.concepts, data.source_size, data.captions)
    return open_pairs(data.pairs, data.source_size)


def build_transform(data: DataConfig) -> Callable[[Tensor, torch.Generator | None], Tensor]:
    """The training augmentation: uint8 batches in, uint8 ``[n, 3, image_size, image_size]`` out."""
    size, strength = data.image_size, data.color_jitter
    after: list[T.Transform] = []
    if strength:
        after.append(T.ColorJitter(strength, strength, strength, strength / 4))
    if data.blur_share:
        after.append(T.GaussianBlur((0.1, 1.0), p=data.blur_share))
    if data.augment == "anywhere":
        return T.Anywhere(size, after, data.white_share)
    if data.augment == "photo":
        crop = T.RandomResizedCrop(size, (0.5, 1.0))
        return T.Compose([crop, T.Composite("white"), T.RandomHorizontalFlip(0.5), *after])
    if data.augment == "aligned":
        return T.Compose([T.Aligned(size), *after])
    raise ValueError(f"data.augment should be anywhere, photo or aligned, got {data.augment!r}")


def build_loader(config: TrainConfig, pairs: Any, tokenizer: BPETokenizer, world: World) -> PairLoader:
    """Endless batches of the run's data."""
    data, size, seed = config.data, config.optimizer.batch_size, config.run.seed
    if data.unique_concepts:
        sampler = ConceptSampler(pairs.concepts, size, seed)
    else:
        sampler = shuffled_sampler(len(pairs), size, seed)
    return PairLoader(
        pairs,
        sampler,
        build_transform(data),
        tokenizer,
        label_share=data.label_share,
        seed=seed,
        rank=world.rank,
        world_size=world.size,
        workers=data.workers,
    )


def model_spec(config: TrainConfig, tokenizer: BPETokenizer) -> dict[str, Any]:
    """What a checkpoint says of its model: JSON values from which :func:`build_model` makes it again."""
    data = config.data
    kwargs = {
        "image_size": data.image_size,
        "context_length": data.context_length,
        "vocab_size": tokenizer.vocab_size,
        **(SIGLIP_START if config.objective.loss == "siglip" else {}),
        **config.model.kwargs,
    }
    own = {} if data.tokenizer in ("emoji", "clip") else {"tokenizer_json": Path(data.tokenizer).read_text("utf-8")}
    return {
        "version": fvm_fast.__version__,
        "model": config.model.name,
        "kwargs": kwargs,
        "tokenizer": data.tokenizer,
        "context_length": data.context_length,
        "image_size": data.image_size,
        "source_size": data.source_size,
        "seed": config.run.seed,
        "pairs": data.pairs,
        "styles": data.styles,
        "subset": data.subset,
        **own,
    }


def build_model(spec: dict[str, Any]) -> nn.Module:
    """The network of ``spec``, with the weights that its seed draws: the very ones that training started from."""
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(spec["seed"]))
        return fvm_fast.create_model(spec["model"], **spec["kwargs"])


def load_trained(path: Path) -> Trained:
    """Model and tokenizer of a run folder, a checkpoint folder or a ``model.safetensors``.

    Raises:
        FileNotFoundError: nothing of that name, or a folder without a checkpoint.
        ValueError: a damaged file, or one without our metadata.
    """
    weights, spec = load_model_file(find_model_file(path))
    if not spec:
        raise ValueError(
            f"checkpoint {path}: it holds weights but not how to build their model; load it with load_weights"
        )
    model = build_model(spec)
    model.load_state_dict(weights)
    if "tokenizer_json" in spec:
        tokenizer = BPETokenizer(tokenizers.Tokenizer.from_str(spec["tokenizer_json"]), spec["context_length"])
    else:
        tokenizer = build_tokenizer(spec["tokenizer"], spec["context_length"])
    return Trained(model.eval(), tokenizer, spec)


def find_model_file(path: Path) -> Path:
    """The newest ``model.safetensors`` of a run folder, or of a checkpoint folder, or the file itself."""
    for candidate in (path, path / "model.safetensors", path / "checkpoints" / "last" / "model.safetensors"):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise FileNotFoundError(f"checkpoint: the folder {path} holds no model.safetensors and no checkpoints/last")
    raise FileNotFoundError(f"checkpoint: there is no file or run folder {path}; train one with fvm-fast train")
