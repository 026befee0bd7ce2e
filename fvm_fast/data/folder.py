# SPDX-License-Identifier: Apache-2.0
"""A folder of images with captions: from a captions file, from a text beside each image, or from the folders' names."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from fvm_fast.data.pairs import IMAGE_SUFFIXES, Sample, as_captions, check_image_size, decode_image


class FolderPairs:
    """Image-text pairs of a folder, decoded on access.

    Captions come from the first of these that is there:

    1. ``captions.csv`` (a header with ``file`` and ``caption``) or ``captions.jsonl`` (objects with the same keys);
       only the files listed are used, and several rows for a file are several captions;
    2. a text file beside each image (``dog.jpg``, ``dog.txt``), one caption a line;
    3. the name of the folder an image lies in, underscores read as spaces; then images of one folder share a concept.

    Args:
        root: the folder; images are sought in its subfolders too, hidden ones left out.
        image_size: pixels a side; the shorter side is resized to it and the centre kept.

    Raises:
        FileNotFoundError: no such folder, or a listed file is missing.
        ValueError: no images, an image without a caption, a bad captions file; on access, an image that cannot be
            decoded.
    """

    def __init__(self, root: str | Path, image_size: int) -> None:
        self.root = Path(root)
        self.image_size = check_image_size("FolderPairs", image_size)
        if not self.root.is_dir():
            raise FileNotFoundError(f"FolderPairs: expected a folder of images, got {self.root}, which is no folder")
        listing = _listing(self.root)
        files = [] if listing else _image_files(self.root)
        by_folder = not listing and not any(file.with_suffix(".txt").exists() for file in files)
        if listing:
            captions = _read_listing(self.root, listing)
        else:
            captions = {file: _folder_name(file, self.root) if by_folder else _text_beside(file) for file in files}
        self.files = list(captions)
        self.captions = list(captions.values())
        ids = {text: i for i, text in enumerate(sorted({texts[0] for texts in self.captions}))} if by_folder else {}
        self.concepts = torch.tensor([ids.get(texts[0], -1) for texts in self.captions], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        file = self.files[index]
        image = decode_image(file.read_bytes(), self.image_size, str(file))
        return Sample(image, self.captions[index], int(self.concepts[index]))

    def __repr__(self) -> str:
        return f"FolderPairs({len(self)} pairs in {self.root}; {self.image_size} px)"


def _listing(root: Path) -> Path | None:
    """The captions file of a folder, if it has one; ValueError if it has two."""
    found = [root / name for name in ("captions.csv", "captions.jsonl") if (root / name).exists()]
    if len(found) == 2:
        raise ValueError(f"{root}: expected one captions file, got captions.csv and captions.jsonl; remove one")
    return found[0] if found else None


def _rows(listing: Path) -> Iterator[tuple[int, dict | str]]:
    """Line numbers and rows of a captions file; those of a jsonl still as text."""
    with listing.open(encoding="utf-8-sig", newline="") as stream:
        if listing.suffix == ".csv":
            reader = csv.DictReader(stream)
            yield from ((reader.line_num, row) for row in reader)
            return
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, line


def _read_listing(root: Path, listing: Path) -> dict[Path, tuple[str, ...]]:
    """Image file -> captions, in the order of the captions file."""
    captions: dict[Path, tuple[str, ...]] = {}
    number = 0
    try:
        for number, row in _rows(listing):
            fields = json.loads(row) if isinstance(row, str) else row
            file, texts = root / fields["file"], as_captions(fields["caption"])
            if not texts:
                raise ValueError("the caption is empty")
            if file not in captions and not file.is_file():
                raise FileNotFoundError(
                    f"{listing}:{number}: the image {file} is missing; remove the row or add the file"
                )
            captions[file] = captions.get(file, ()) + texts
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(
            f"{listing}:{max(number, 1)}: expected rows with the columns 'file' and 'caption', got a row that does not "
            f"read so ({type(error).__name__}: {error})"
        ) from error
    if not captions:
        raise ValueError(f"{listing}: expected at least one row under the header 'file,caption', got none")
    return captions


def _image_files(root: Path) -> list[Path]:
    """All images under ``root``, hidden files and folders left out, sorted by path."""
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    if not files:
        raise ValueError(f"{root}: expected images ({', '.join(IMAGE_SUFFIXES)}), got a folder without any")
    return files


def _text_beside(file: Path) -> tuple[str, ...]:
    text = file.with_suffix(".txt")
    try:
        texts = as_captions(text.read_text(encoding="utf-8")) if text.exists() else ()
    except UnicodeDecodeError as error:
        raise ValueError(f"{text}: expected UTF-8 text, got other bytes ({error}); save it as UTF-8") from error
    if not texts:
        raise ValueError(
            f"{file}: expected a caption in {text.name}, got {'an empty file' if text.exists() else 'no such file'}; "
            "write one or remove the image"
        )
    return texts


def _folder_name(file: Path, root: Path) -> tuple[str, ...]:
    if file.parent == root:
        raise ValueError(
            f"{file}: expected a caption: {file.with_suffix('.txt').name} beside it, a captions.csv or captions.jsonl "
            f"in {root}, or a subfolder that names what it shows; got none"
        )
    return (file.parent.name.replace("_", " "),)
