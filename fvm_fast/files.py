# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent: written beside, flushed to the disk, then renamed into place."""

from __future__ import annotations

import os
import zlib
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace the text of ``path`` at once: a reader, or a power cut, sees the old text or the new."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    flush(beside)
    os.replace(beside, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def crc32(path: Path, chunk: int = 1 << 22) -> int:
    """Checksum of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(chunk):
            value = zlib.crc32(block, value)
    return value
