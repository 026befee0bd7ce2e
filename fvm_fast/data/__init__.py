# SPDX-License-Identifier: Apache-2.0
"""Image-text pairs in: the bundled emoji, folders of images, webdataset tars; Fashion-MNIST; transforms of batches."""

from fvm_fast.data.emoji import EmojiPairs
from fvm_fast.data.fashion_mnist import fashion_mnist
from fvm_fast.data.folder import FolderPairs
from fvm_fast.data.pairs import PairDataset, Sample, open_pairs
from fvm_fast.data.tar import TarPairs
from fvm_fast.data.tokenizer import BPETokenizer, CLIPTokenizer, EmojiTokenizer

__all__ = [
    "BPETokenizer",
    "CLIPTokenizer",
    "EmojiPairs",
    "EmojiTokenizer",
    "FolderPairs",
    "PairDataset",
    "Sample",
    "TarPairs",
    "fashion_mnist",
    "open_pairs",
]
