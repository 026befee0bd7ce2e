# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST: 70,000 grey pictures of ten kinds of clothes, 28 x 28 pixels (https://arxiv.org/abs/1708.07747).

The files are those of Debian's package ``dataset-fashion-mnist`` and of the data set's own site, in the IDX format of
MNIST. Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_PREFIX = {"train": "train", "test": "t10k"}
_UINT8 = 0x08  # the only type of element in these files


def fashion_mnist(split: str, folder: str | os.PathLike = FOLDER) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 1, 28, 28] and labels int64 [n] of a split.

    Args:
        split: ``train`` (60,000) or ``test`` (10,000).
        folder: with ``train-images-idx3-ubyte.gz`` and the other three files.

    Raises:
        ValueError: the split is unknown, or a file is not what its name says.
        FileNotFoundError: a file is not there; the message says how to get it.
    """
    if split not in _PREFIX:
        raise ValueError(f"fashion_mnist: split should be one of {', '.join(_PREFIX)}, got {split!r}")
    images = read_idx(Path(folder) / f"{_PREFIX[split]}-images-idx3-ubyte.gz", 3)
    labels = read_idx(Path(folder) / f"{_PREFIX[split]}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels):
        raise ValueError(f"fashion_mnist: expected as many labels as images in {folder}, got {len(images)} images and "
                         f"{len(labels)} labels")  # fmt: skip
    return images[:, None], labels.long()


def read_idx(path: Path, dimensions: int) -> Tensor:
    """A gzipped IDX file of bytes with so many dimensions, as a uint8 tensor."""
    if not path.exists():
        raise FileNotFoundError(
            f"fashion_mnist: expected {path}, which is not there; apt-get install dataset-fashion-mnist, or pass the "
            "folder that has the files"
        )
    data = bytearray(gzip.decompress(path.read_bytes()))
    header = 4 + 4 * dimensions
    if len(data) < header or tuple(data[:4]) != (0, 0, _UINT8, dimensions):
        raise ValueError(f"fashion_mnist: {path} should be an IDX file of bytes with {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    values = torch.frombuffer(data, dtype=torch.uint8)[header:]
    if values.numel() != torch.Size(shape).numel():
        raise ValueError(f"fashion_mnist: {path} should hold {shape} bytes, got {values.numel()}")
    return values.reshape(shape)
