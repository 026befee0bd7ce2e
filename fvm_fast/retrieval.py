# SPDX-License-Identifier: Apache-2.0
"""Find images by words: search with free text, and recall at k on a set of pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fvm_fast.evaluate import encode_images, encode_texts


def search(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    images: Tensor,
    query: str,
    k: int = 8,
) -> tuple[Tensor, Tensor]:
    """The ``k`` images whose features are nearest to those of ``query``.

    Args:
        model: two-tower model in evaluation mode.
        tokenizer: the one it was trained with.
        images: uint8 ``[n, 3, S, S]``, or their features ``[n, D]`` from :func:`~fvm_fast.evaluate.encode_images`
            when the same images are searched again and again.
        query: free words.
        k: number of results; fewer when there are fewer images.

    Returns:
        Cosine similarities ``[k]`` and indices ``[k]``, best first.
    """
    if k < 1:
        raise ValueError(f"search: k should be 1 or more, got {k}")
    features = images if images.ndim == 2 else encode_images(model, images)
    scores = features @ encode_texts(model, tokenizer, [query])[0]
    best = scores.topk(min(k, len(scores)))
    return best.values.cpu(), best.indices.cpu()


def recall_at_k(
    queries: Tensor,
    items: Tensor,
    query_ids: Tensor,
    item_ids: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
) -> dict[str, float]:
    """Share of the queries, in percent, with an item of their own id among the ``k`` nearest.

    Args:
        queries: features ``[n, D]``.
        items: features ``[m, D]``.
        query_ids: ids ``[n]``.
        item_ids: ids ``[m]``; several items may share one.
        ks: the values of k.
        chunk: queries compared at a time, so that no n x m matrix is held.
    """
    hits = torch.zeros(len(ks))
    depth = min(max(ks), len(items))
    for part, ids in zip(queries.split(chunk), query_ids.split(chunk), strict=True):
        found = item_ids[(part @ items.T).topk(depth, dim=1).indices] == ids[:, None]
        hits += torch.stack([found[:, :k].any(dim=1).sum() for k in ks])
    return {f"R@{k}": 100.0 * float(hit) / max(len(queries), 1) for k, hit in zip(ks, hits, strict=True)}


def evaluate_retrieval(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    pairs: Any,
    transform: Callable[[Tensor], Tensor],
    chunk: int = 256,
) -> dict[str, dict[str, float]]:
    """Recall at 1, 5 and 10 in both directions on a pair data set, by main captions; equal captions are one text."""
    texts = sorted({captions[0] for captions in pairs.captions})
    number = {text: i for i, text in enumerate(texts)}
    ids = torch.tensor([number[captions[0]] for captions in pairs.captions])
    image_features = torch.cat(
        [encode_images(model, transform(_images(pairs, part))) for part in torch.arange(len(pairs)).split(chunk)]
    ).cpu()
    text_features = encode_texts(model, tokenizer, texts).cpu()
    text_ids = torch.arange(len(texts))
    return {
        "image to text": recall_at_k(image_features, text_features, ids, text_ids),
        "text to image": recall_at_k(text_features, image_features, text_ids, ids),
    }


def _images(pairs: Any, indices: Tensor) -> Tensor:
    if hasattr(pairs, "images"):
        return pairs.images[indices]
    return torch.stack([pairs[int(index)].image for index in indices])
