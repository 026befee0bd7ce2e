# SPDX-License-Identifier: Apache-2.0
"""emoji3: 1,852 concepts drawn in three styles, with CLDR captions; bundled with the package.

The same concept in three hands gives a test that pixels cannot pass by memory: train on two styles, name the third.
Sources and licences: ``emoji3/ATTRIBUTION.md``; how it was made: ``scripts/make_emoji.py``.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fvm_fast.data.pairs import Sample, check_image_size
from fvm_fast.data.transforms.separable import resize

STYLES = ("google", "twitter", "fluent")
CONCRETE = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
GROUPS = ("smileys-emotion", "people-body", *CONCRETE, "symbols", "flags")
TEMPLATES = ("an icon of {}", "a drawing of {}", "a picture of {}", "{} emoji", "a small {}")
SHARD_FOLDER = Path(__file__).parent / "emoji3"


class Drawing(NamedTuple):
    """One emoji in one style."""

    key: str  # code points: "1f34e"
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    picture: bytes  # WebP


class EmojiPairs:
    """Emoji pictures with captions, decoded once into memory (64 px: 16 KB an image).

    Args:
        styles: which drawings, of ``google``, ``twitter``, ``fluent``. Leave one out of training to test on it.
        subset: ``"concrete"`` (849 concepts: animals, food, travel, activities, objects), ``"all"`` (1,852),
            ``"no_flags"`` (1,599), or a tuple of group names from ``GROUPS``.
        concepts: ``"all"``, or one side of a fixed split of the concepts: ``"train"`` and ``"held_out"`` (about 10 %,
            chosen by a hash of the code points, so it does not depend on subset or styles).
        image_size: pixels a side; the shards hold 64.
        captions: parts joined with "+": ``"label"`` always comes first; ``"tags"`` adds each keyword as a caption;
            ``"templates"`` adds sentences around the label ("an icon of {}").
        folder: where the shards are; None is the bundled copy.

    Attributes:
        images: uint8 [N, 4, S, S], RGBA with straight alpha; style by style, concepts in CLDR order.
        captions: N tuples of texts.
        concepts: int64 [N]; ids count the subset's concepts, the same for every style and on both sides of the split.
        styles: names of the styles, one for each block of ``len(concept_ids)`` images.
        labels, groups, subgroups, keys: one entry a concept id of the subset.
        concept_ids: int64, the ids that occur (all of the subset, or one side of the split).
    """

    def __init__(
        self,
        styles: str | Iterable[str] = STYLES,
        subset: str | Iterable[str] = "concrete",
        concepts: str = "all",
        image_size: int = 64,
        captions: str = "label",
        *,
        folder: str | Path | None = None,
    ) -> None:
        self.styles = _check_names("styles", (styles,) if isinstance(styles, str) else tuple(styles), STYLES)
        wanted = _subset_groups(subset)
        size = check_image_size("EmojiPairs", image_size)
        parts = _check_names("captions", tuple(captions.split("+")), ("label", "tags", "templates"))
        folder = SHARD_FOLDER if folder is None else Path(folder)

        shards = [_read_shard(folder / f"{style}.tar.gz", style, wanted) for style in self.styles]
        rows = shards[0]
        if any([row[:-1] for row in shard] != [row[:-1] for row in rows] for shard in shards):
            raise ValueError(f"{folder}: the shards of {self.styles} should hold the same concepts; {_REMEDY}")
        self.labels = [row.label for row in rows]
        self.groups = [row.group for row in rows]
        self.subgroups = [row.subgroup for row in rows]
        self.keys = [row.key for row in rows]
        ids = [i for i, row in enumerate(rows) if _in_split(row.key, concepts)]
        self.concept_ids = torch.tensor(ids, dtype=torch.int64)
        self.concepts = self.concept_ids.repeat(len(self.styles))
        self.captions = [_captions(rows[i], parts) for i in ids] * len(self.styles)
        pictures = [_decode(shard[i].picture, f"{folder}: {rows[i].key}.webp") for shard in shards for i in ids]
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        self.images: Tensor = images if images.shape[-1] == size else resize(images, (size, size))

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.images[index], self.captions[index], int(self.concepts[index]))

    def __repr__(self) -> str:
        size = self.images.shape[-1]
        return f"EmojiPairs({len(self)} pairs: {len(self.concept_ids)} concepts x {', '.join(self.styles)}; {size} px)"


_REMEDY = "install fvm_fast again, or in a checkout run `python scripts/make_emoji.py`"


def is_held_out(key: str) -> bool:
    """Whether a concept (code points, "1f34e") belongs to the fixed tenth that ``concepts="held_out"`` keeps aside."""
    return hashlib.sha256(key.encode()).digest()[0] < 26  # 26 / 256 = 10.2 %


def _in_split(key: str, split: str) -> bool:
    if split not in ("all", "train", "held_out"):
        raise ValueError(f"EmojiPairs: concepts should be 'all', 'train' or 'held_out', got {split!r}")
    return split == "all" or is_held_out(key) == (split == "held_out")


def _check_names(argument: str, names: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) != len(names):
        raise ValueError(f"EmojiPairs: {argument} should be distinct names out of {', '.join(known)}, got {names!r}")
    return names


def _subset_groups(subset: str | Iterable[str]) -> tuple[str, ...]:
    """The group names behind ``subset``."""
    named = {"all": GROUPS, "concrete": CONCRETE, "no_flags": GROUPS[:-1]}
    if isinstance(subset, str):
        if subset not in named:
            raise ValueError(
                f"EmojiPairs: subset should be {', '.join(map(repr, named))} or a tuple of groups, got {subset!r}"
            )
        return named[subset]
    return _check_names("subset", tuple(subset), GROUPS)


def _read_shard(path: Path, style: str, groups: tuple[str, ...]) -> list[Drawing]:
    """The drawings of the wanted groups, undecoded, in shard order."""
    try:
        # gzip's checksum covers every byte, so a flipped or missing one cannot pass for data
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(path.read_bytes())), mode="r:") as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        drawings = [_drawing(name, files) for name in files if name.endswith(".json")]
        return [drawing for drawing in drawings if drawing.group in groups]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: the emoji shard of style {style!r} is missing; {_REMEDY}") from error
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected a whole gzipped tar of {style} emoji, got a corrupt or truncated one "
            f"({type(error).__name__}: {error}); {_REMEDY}"
        ) from error


def _drawing(name: str, files: dict[str, bytes]) -> Drawing:
    """The drawing whose metadata is ``files[name]``."""
    stem = name.removesuffix(".json")
    meta = json.loads(files[name])
    key = stem.rpartition("/")[2]
    return Drawing(key, meta["caption"], tuple(meta["tags"]), meta["group"], meta["subgroup"], files[stem + ".webp"])


def _captions(drawing: Drawing, parts: tuple[str, ...]) -> tuple[str, ...]:
    texts = [drawing.label]
    if "tags" in parts:
        texts += [tag for tag in drawing.tags if tag != drawing.label]
    if "templates" in parts:
        texts += [template.format(drawing.label) for template in TEMPLATES]
    return tuple(texts)


def _decode(payload: bytes, name: str) -> np.ndarray:
    """One WebP as uint8 [64, 64, 4]."""
    try:
        return np.asarray(Image.open(io.BytesIO(payload)).convert("RGBA"))
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ValueError(
            f"{name}: expected an RGBA WebP, got bytes that Pillow cannot decode ({error}); {_REMEDY}"
        ) from error
