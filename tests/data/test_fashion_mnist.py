# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST's files: a small pair of them, written here, and what damaged ones say."""

import gzip
import struct
from pathlib import Path

import pytest
import torch

from fvm_fast.data.fashion_mnist import fashion_mnist


def write(path: Path, values: torch.Tensor, kind: int = 8) -> None:
    header = bytes([0, 0, kind, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.numpy().tobytes()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    write(tmp_path / "t10k-images-idx3-ubyte.gz", torch.randint(0, 256, (5, 28, 28), generator=generator).byte())
    write(tmp_path / "t10k-labels-idx1-ubyte.gz", torch.tensor([3, 0, 9, 9, 1]).byte())
    return tmp_path


def test_images_and_labels_come_back(folder: Path):
    images, labels = fashion_mnist("test", folder)
    expected = torch.randint(0, 256, (5, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
    assert torch.equal(images[:, 0], expected) and images.dtype == torch.uint8
    assert labels.tolist() == [3, 0, 9, 9, 1] and labels.dtype == torch.int64


def test_errors_say_what_to_do(folder: Path):
    with pytest.raises(ValueError, match="should be one of train, test, got 'validation'"):
        fashion_mnist("validation", folder)
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist("train", folder)
    write(folder / "t10k-labels-idx1-ubyte.gz", torch.zeros(4).byte())
    with pytest.raises(ValueError, match="got 5 images and 4 labels"):
        fashion_mnist("test", folder)
    write(folder / "t10k-labels-idx1-ubyte.gz", torch.zeros(5).byte(), kind=13)
    with pytest.raises(ValueError, match="IDX file of bytes with 1 dimensions"):
        fashion_mnist("test", folder)
    whole = (folder / "t10k-images-idx3-ubyte.gz").read_bytes()
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(ValueError, match="should hold \\(5, 28, 28\\) bytes, got 3919"):
        fashion_mnist("test", folder)
