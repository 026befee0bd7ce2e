# SPDX-License-Identifier: Apache-2.0
"""Image-text pairs: the one interface of every data set, and how an image file becomes a tensor.

A pair data set is map style, so that shuffling and exact resume need nothing but an index order: ``len(ds)`` and
``ds[i] -> Sample``. ``ds.captions`` and ``ds.concepts`` answer for all samples without decoding an image.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Sample(NamedTuple):
    """One image with its captions.

    image: uint8 [3, S, S] (RGB) or [4, S, S] (RGBA, straight alpha).
    captions: one or more texts; the first is the main one.
    concept: samples with the same non-negative id show the same thing; -1 when unknown.
    """

    image: Tensor
    captions: tuple[str, ...]
    concept: int


@runtime_checkable
class PairDataset(Protocol):
    """What the training loop asks of a data set."""

    captions: list[tuple[str, ...]]  # one entry a sample
    concepts: Tensor  # int64 [N]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as RGB: upright as its EXIF says, 16-bit grey scaled to 8, transparency laid on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def centre_square(width: int, height: int) -> tuple[float, float, float, float]:
    """The largest centred square of an image, as a Pillow box (left, upper, right, lower)."""
    side = min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def decode_image(payload: bytes, image_size: int, name: str) -> Tensor:
    """Decode an image file to uint8 [3, S, S]: shorter side to ``image_size``, centre crop, bicubic.

    ``name`` says where the bytes came from. Raises ValueError when they are not a whole image.
    """
    try:
        image = Image.open(io.BytesIO(payload))
        image.draft("RGB", (image_size, image_size))  # JPEG: decode at 1/2, 1/4 or 1/8 when that is large enough
        image = to_rgb(image)
    except Exception as error:  # Pillow's decoders raise many kinds: OSError, SyntaxError, struct.error, ...
        raise ValueError(
            f"{name}: expected an image file, got {len(payload)} bytes that Pillow cannot decode ({error}); "
            "repair or remove the file"
        ) from error
    box = centre_square(*image.size)
    image = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()


def as_captions(text: str | list[str]) -> tuple[str, ...]:
    """The captions in a text (one a line) or a list of texts; blank ones ignored."""
    lines = text.splitlines() if isinstance(text, str) else text
    return tuple(line.strip() for line in lines if line.strip())


def check_image_size(owner: str, image_size: int) -> int:
    """``image_size`` if it is a positive whole number; ValueError otherwise."""
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"{owner}: image_size should be a positive int (pixels a side), got {image_size!r}")
    return image_size


def open_pairs(spec: str, image_size: int) -> PairDataset:
    """Open a pair data set by what it is: ``"emoji3"``, a folder of images, or a webdataset tar or glob of tars.

    Options of the data sets (styles, splits) are theirs: construct ``EmojiPairs`` and the others for those.
    """
    from fvm_fast.data.emoji import EmojiPairs
    from fvm_fast.data.folder import FolderPairs
    from fvm_fast.data.tar import TarPairs

    spec = str(spec)
    if spec == "emoji3":
        return EmojiPairs(image_size=image_size)
    if Path(spec).is_dir():
        return FolderPairs(spec, image_size)
    if spec.endswith((".tar", ".tar.gz", ".tgz")) or any(mark in spec for mark in "*?["):
        return TarPairs(spec, image_size)
    raise ValueError(
        f"open_pairs: expected 'emoji3', an existing folder, or a .tar file or glob, got {spec!r}; "
        f"{'that file is no tar' if Path(spec).exists() else 'nothing of that name exists'}"
    )
