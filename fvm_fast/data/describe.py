# SPDX-License-Identifier: Apache-2.0
"""What a pair data set holds, in a few lines, before an hour is spent on it."""

from __future__ import annotations

from collections import Counter

from fvm_fast.data.pairs import PairDataset


def describe_pairs(pairs: PairDataset) -> str:
    """Counts of images, captions and concepts, and the first few captions."""
    if len(pairs) == 0:
        return f"{type(pairs).__name__}: no pairs"
    texts = [text for captions in pairs.captions for text in captions]
    words = sum(len(text.split()) for text in texts) / len(texts)
    concepts = Counter(concept for concept in pairs.concepts.tolist() if concept >= 0)
    most = f", at most {max(concepts.values())} pairs of one" if concepts else ""
    channels, height, width = pairs[0].image.shape
    lines = [
        f"{type(pairs).__name__}: {len(pairs)} images [{channels}, {height}, {width}]",
        f"captions: {len(texts)}, {len(set(texts))} different, {words:.1f} words on average",
        f"concepts: {len(concepts) or 'unknown'}{most}",
        "for example: " + " | ".join(captions[0] for captions in pairs.captions[:5]),
    ]
    return "\n".join(lines)
