# SPDX-License-Identifier: Apache-2.0
"""webdataset tars as a map-style data set: an index of offsets is built once, then any sample is one seek away.

Streaming readers shuffle through a buffer and cannot say where they were; an index makes the order a list of numbers,
so shuffling is global and resuming exact.
"""

from __future__ import annotations

import glob
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from fvm_fast.data.pairs import IMAGE_SUFFIXES, Sample, as_captions, check_image_size, decode_image


class Member(NamedTuple):
    """Where the bytes of a file lie in a tar."""

    path: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes. Opens the tar each time: no handle is shared between processes, and the cost is microseconds."""
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            payload = stream.read(self.size)
        if len(payload) != self.size:
            raise ValueError(
                f"{self.path}::{self.name}: expected {self.size} bytes, got {len(payload)}; the tar has been truncated "
                "since it was opened"
            )
        return payload


class TarPairs:
    """Image-text pairs of webdataset tars: files whose names agree up to the first dot make a sample.

    A sample has an image (``.jpg``, ``.png``, ``.webp``, ...) and a caption: ``.txt`` (one caption a line) or ``.json``
    with ``"caption"``. Indexing reads the headers and captions; images are decoded on access.

    Args:
        paths: a tar, a glob such as ``"shards/*.tar"``, or a list of either.
        image_size: pixels a side; the shorter side is resized to it and the centre kept.

    Raises:
        FileNotFoundError: no such tar, or the glob matches nothing.
        ValueError: a truncated, compressed or foreign archive, a sample without image or caption; on access, an image
            that cannot be decoded.
    """

    def __init__(self, paths: str | Path | Iterable[str | Path], image_size: int) -> None:
        self.image_size = check_image_size("TarPairs", image_size)
        self.paths = expand_paths(paths)
        samples = [sample for path in self.paths for sample in index_tar(path)]
        self.members = [member for member, _ in samples]
        self.captions = [captions for _, captions in samples]
        self.concepts = torch.full((len(samples),), -1)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Sample:
        member = self.members[index]
        image = decode_image(member.read(), self.image_size, f"{member.path}::{member.name}")
        return Sample(image, self.captions[index], -1)

    def __repr__(self) -> str:
        return f"TarPairs({len(self)} pairs in {len(self.paths)} tars; {self.image_size} px)"


def expand_paths(paths: str | Path | Iterable[str | Path]) -> list[str]:
    """Tar paths with globs expanded, sorted within a glob; FileNotFoundError for one that names nothing."""
    found: list[str] = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        matches = [str(path)] if Path(path).is_file() else sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise FileNotFoundError(
                f"TarPairs: expected a tar file or a glob of them, got {str(path)!r}: nothing matches"
            )
        found += matches
    if not found:
        raise ValueError("TarPairs: expected at least one tar, got an empty list")
    return found


def index_tar(path: str) -> list[tuple[Member, tuple[str, ...]]]:
    """The samples of one tar in its order: the image's place and its captions."""
    files = _members(path)
    groups: dict[str, list[Member]] = {}
    for member in files:
        groups.setdefault(_key(member.name), []).append(member)
    if not groups:
        raise ValueError(f"{path}: expected a tar of samples (key.jpg, key.txt), got an empty one")
    return [_sample(path, key, members) for key, members in groups.items()]


def _members(path: str) -> list[Member]:
    """The files of a tar, which must be whole and uncompressed."""
    with open(path, "rb") as stream:
        if stream.read(2) == b"\x1f\x8b":
            raise ValueError(
                f"{path}: expected an uncompressed tar, got a gzipped one; unpack it once with gunzip, so that samples "
                "can be found by offset"
            )
    try:
        with tarfile.open(path, mode="r:") as tar:
            found = [Member(path, info.name, info.offset_data, info.size) for info in tar if info.isfile()]
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: expected a tar, got a truncated or foreign file ({error}); copy it again") from error
    if end != bytes(tarfile.BLOCKSIZE):  # tarfile itself stops silently at a damaged header and at a missing end
        raise ValueError(
            f"{path}: expected an end-of-archive block after {len(found)} files, got none; the tar is truncated or "
            "damaged: copy it again"
        )
    return [member for member in found if not member.name.rpartition("/")[2].startswith(".")]


def _key(name: str) -> str:
    """webdataset's sample key: the path up to the first dot of the file name."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _sample(path: str, key: str, members: list[Member]) -> tuple[Member, tuple[str, ...]]:
    by_suffix = {"." + member.name.rpartition(".")[2].lower(): member for member in members}
    images = [by_suffix[suffix] for suffix in IMAGE_SUFFIXES if suffix in by_suffix]
    if not images:
        raise ValueError(f"{path}::{key}: expected an image ({', '.join(IMAGE_SUFFIXES)}), got {', '.join(by_suffix)}")
    captions: tuple[str, ...] = ()
    try:
        if ".txt" in by_suffix:
            captions = as_captions(by_suffix[".txt"].read().decode())
        elif ".json" in by_suffix:
            captions = as_captions(json.loads(by_suffix[".json"].read()).get("caption", ""))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}::{key}: expected a caption as UTF-8 text or JSON, got neither ({error})") from error
    if not captions:
        raise ValueError(f'{path}::{key}: expected a caption in {key}.txt or under "caption" in {key}.json, got none')
    return images[0], captions
