# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification: name a picture by the class whose text is nearest, beside what needs no learning.

On emoji the honest yardstick is not chance: vendors draw a concept alike, so matching raw pixels to the training
drawings does well when the pictures are aligned, and fails when they stand anywhere. Both settings, and all rows of a
setting, see the very same pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvm_fast.build import Trained, build_model
from fvm_fast.data import EmojiPairs
from fvm_fast.data import transforms as T
from fvm_fast.data.sampler import generator_for

TOP = (1, 5, 10)
PIXELS = 32  # side at which raw pictures are compared
GALLERY_VIEWS = 8  # random views of each training picture in the `anywhere` gallery

Scores = dict[str, dict[str, float]]  # row -> {"top1": percent, ...}


@torch.inference_mode()
def encode_images(model: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Unit-length features ``[n, D]`` float32 of uint8 images ``[n, 3, S, S]``."""
    device = next(model.parameters()).device
    parts = [model.encode_image(part.to(device), normalize=True).float() for part in images.split(batch_size)]
    return torch.cat(parts)


@torch.inference_mode()
def encode_texts(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    texts: Sequence[str],
    templates: Sequence[str] = ("{}",),
    batch_size: int = 512,
) -> Tensor:
    """Unit-length features ``[n, D]`` float32 of texts, averaged over ``templates`` with ``{}`` for the text."""
    device = next(model.parameters()).device
    total = 0.0
    for template in templates:
        tokens = tokenizer([template.replace("{}", text) for text in texts]).to(device)
        total = total + torch.cat([model.encode_text(p, normalize=True).float() for p in tokens.split(batch_size)])
    return F.normalize(total, dim=-1)


def top_k_percent(scores: Tensor, targets: Tensor, top: Sequence[int] = TOP) -> dict[str, float]:
    """How often, in percent, the target is among the k best of a row.

    Args:
        scores: ``[n, classes]``, larger is better; NaN counts as a miss.
        targets: class of each row, int64 ``[n]``.
        top: the values of k.
    """
    own = scores.gather(1, targets[:, None])
    # ties count against the model: a network that answers the same to everything earns no credit
    not_worse = ~(scores < own)
    rank = not_worse.sum(dim=1)  # 1 is best
    return {f"top{k}": 100.0 * (rank <= k).float().mean().item() for k in top}


def pixel_scores(images: Tensor, gallery: Tensor, concepts: Tensor, num_concepts: int, chunk: int = 4096) -> Tensor:
    """Negative distance of each image to the nearest gallery picture of each concept, mean squared over pixels.

    Args:
        images: uint8 ``[n, 3, S, S]``.
        gallery: uint8 ``[m, 3, S, S]``.
        concepts: concept of each gallery picture, ``[m]``.
        num_concepts: columns of the result.

    Returns:
        float32 ``[n, num_concepts]``, -inf for a concept without a picture.
    """
    queries = _thumbnails(images)
    scores = torch.full((len(images), num_concepts), -torch.inf)
    for part, ids in zip(gallery.split(chunk), concepts.split(chunk), strict=True):
        distance = torch.cdist(queries, _thumbnails(part)).square() / queries.shape[1]
        scores.scatter_reduce_(1, ids.expand(len(images), -1), -distance, "amax")
    return scores


def evaluate_emoji(trained: Trained, styles: Sequence[str], templates: Sequence[str] = ("{}",), seed: int = 0) -> dict:
    """Zero-shot accuracy over the concepts of the training subset on drawing styles, with three yardsticks.

    Returns:
        ``{style: {"aligned" | "anywhere": {row: {"top1", "top5", "top10"}}}}`` in percent; the rows are the trained
        network, raw-pixel nearest neighbour over the training styles, the untrained network, and chance.
    """
    spec = trained.spec
    subset = spec.get("subset", "concrete")
    gallery = EmojiPairs(tuple(spec["styles"]), subset, image_size=spec["source_size"])
    untrained = build_model(spec).eval()
    return {
        style: {
            setting: _rows(trained, untrained, gallery, style, setting, templates, seed)
            for setting in ("aligned", "anywhere")
        }
        for style in styles
    }


def placed(pairs: EmojiPairs, setting: str, size: int, seed: int, view: int = 0) -> Tensor:
    """The pictures of ``pairs`` in a setting: ``aligned`` on white, or ``anywhere`` as (seed, view) draw it."""
    if setting == "aligned":
        return T.Aligned(size)(pairs.images)
    return T.Anywhere(size)(pairs.images, generator_for(seed, view))


def _rows(
    trained: Trained,
    untrained: nn.Module,
    gallery: EmojiPairs,
    style: str,
    setting: str,
    templates: Sequence[str],
    seed: int,
) -> Scores:
    size = trained.spec["image_size"]
    pairs = EmojiPairs((style,), trained.spec.get("subset", "concrete"), image_size=trained.spec["source_size"])
    images, targets = placed(pairs, setting, size, seed), pairs.concepts
    views = range(1, 1 + (GALLERY_VIEWS if setting == "anywhere" else 1))
    pictures = torch.cat([placed(gallery, setting, size, seed, view) for view in views])
    pixels = pixel_scores(images, pictures, gallery.concepts.repeat(len(views)), len(pairs.labels))
    rows = {
        "trained": top_k_percent(_similarity(trained.model, trained, images, pairs.labels, templates), targets),
        "raw pixels": top_k_percent(pixels, targets),
        "untrained": top_k_percent(_similarity(untrained, trained, images, pairs.labels, templates), targets),
        "chance": {f"top{k}": 100.0 * k / len(pairs.labels) for k in TOP},
    }
    return rows


def _similarity(
    model: nn.Module, trained: Trained, images: Tensor, texts: Sequence[str], templates: Sequence[str]
) -> Tensor:
    text_features = encode_texts(model, trained.tokenizer, texts, templates)
    return (encode_images(model, images) @ text_features.T).cpu()


def _thumbnails(images: Tensor) -> Tensor:
    """Float ``[n, 3 * 32 * 32]`` in 0..1, averaged down."""
    small = F.interpolate(images.float() / 255.0, size=(PIXELS, PIXELS), mode="bilinear", antialias=True)
    return small.flatten(1)
