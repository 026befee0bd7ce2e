# SPDX-License-Identifier: Apache-2.0
"""A teacher's answers on disk: written once, replayed in every later training (TinyViT's pretraining distillation).

A large teacher costs more than its student. TinyViT (https://arxiv.org/abs/2207.10666) asks it once: for each
sample of an epoch the file keeps the seed of the augmentation, the ``k`` likeliest classes and their probabilities. The
seed makes the very same image again, and ``objectives.StoredDistillation`` trains on the stored answers.

One file an epoch: a header, then one record of fixed size for each sample, so that any is one seek away:

    header   magic, version, bytes an index, k, number of classes, number of samples, CRC-32 of these
    record   seed int64, indices [k] int16 or int32, probabilities [k] float16, CRC-32 of the sample's number and these

All little endian. The checksum holds the number of the sample, so a record in the wrong place is found too. Damage is
an error of that record only.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fvm_fast.files import flush

MAGIC, VERSION = b"FVMLOGIT", 1
_HEADER = struct.Struct("<8sHHIIQI")
_INT16_CLASSES = 1 << 15  # indices above 32,767 would wrap


class CorruptRecord(ValueError):
    """The record of one sample is damaged or missing; the others are unaffected.

    Attributes:
        path: the file.
        sample: number of the sample.
    """

    def __init__(self, path: Path, sample: int, what: str) -> None:
        super().__init__(
            f"{path}: the record of sample {sample} {what}; leave the sample out or write the file again, the other "
            "records can be read"
        )
        self.path, self.sample = path, sample


class TeacherRecords(NamedTuple):
    """What the teacher said of ``n`` samples.

    seeds: int64 [n], of the augmentation.
    indices: int64 [n, k], the likeliest classes in falling order.
    values: float16 [n, k], their probabilities.
    """

    seeds: Tensor
    indices: Tensor
    values: Tensor


class StoredLogitsWriter:
    """Writes one epoch's file: a context manager, and ``write`` for each batch, the samples in any order.

    The file is written beside ``path`` and renamed when the block ends, if every sample was written; after an exception
    nothing is left. One process writes a file: gather what the others computed to it.

    Args:
        path: of the file.
        num_samples: how many there are; they are numbered from 0.
        num_classes: width C of the teacher's logits. Above 32,768 the indices take four bytes instead of two.
        topk: how many classes a record keeps (TinyViT: 100 of 21,841, 10 of 1,000).
    """

    def __init__(self, path: str | os.PathLike, num_samples: int, num_classes: int, topk: int) -> None:
        if num_samples < 1 or not 1 <= topk <= num_classes:
            raise ValueError(
                "StoredLogitsWriter: num_samples should be 1 or more and topk between 1 and num_classes, got "
                f"{num_samples} samples, topk {topk} and {num_classes} classes"
            )
        self.path = Path(path)
        self.num_samples, self.num_classes, self.topk = num_samples, num_classes, topk
        self._record = _record_type(num_classes, topk)
        self._written = np.zeros(num_samples, dtype=bool)
        self._beside = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> StoredLogitsWriter:
        self._file = self._beside.open("wb")
        self._file.write(_pack_header(self.num_samples, self.num_classes, self.topk))
        return self

    @torch.no_grad()
    def write(self, samples: Tensor | Sequence[int], seeds: Tensor | Sequence[int], logits: Tensor) -> None:
        """Stores the softmax of a teacher's logits.

        Args:
            samples: [n] numbers in 0..num_samples - 1; one that is written twice keeps the later record.
            seeds: [n] int64, of the augmentation that the teacher saw.
            logits: [n, C] floating.
        """
        samples = torch.as_tensor(samples).tolist()
        self._check(samples, len(seeds), logits)
        values, indices = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1).topk(self.topk)
        records = np.zeros(len(samples), self._record)
        records["seed"] = torch.as_tensor(seeds).cpu().numpy()
        records["indices"] = indices.cpu().numpy()
        records["values"] = values.cpu().numpy()
        for sample, record in zip(samples, records, strict=True):
            record["crc"] = _checksum(sample, record.tobytes())
            self._file.seek(_HEADER.size + sample * self._record.itemsize)
            self._file.write(record.tobytes())
        self._written[samples] = True

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        try:
            if kind is None:
                self._finish()
        finally:
            self._beside.unlink(missing_ok=True)

    def _finish(self) -> None:
        missing = np.flatnonzero(~self._written)
        if len(missing):
            raise ValueError(
                f"{self.path}: all {self.num_samples} samples should be written, {len(missing)} are missing, the first "
                f"is {missing[0]}; nothing is stored"
            )
        flush(self._beside)
        os.replace(self._beside, self.path)
        flush(self.path.parent)

    def _check(self, samples: list[int], seeds: int, logits: Tensor) -> None:
        if logits.shape != (len(samples), self.num_classes) or seeds != len(samples):
            raise ValueError(
                f"StoredLogitsWriter: expected n samples, n seeds and logits [n, {self.num_classes}], got "
                f"{len(samples)}, {seeds} and {tuple(logits.shape)}"
            )
        wrong = [sample for sample in samples if not 0 <= sample < self.num_samples]
        if wrong:
            raise ValueError(f"StoredLogitsWriter: samples should be 0 to {self.num_samples - 1}, got {wrong[:5]}")


class StoredLogits:
    """Reads a file that :class:`StoredLogitsWriter` wrote.

    The file is opened for each read: no handle is shared between loader processes.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind or its header is damaged.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.num_samples, self.num_classes, self.topk = _read_header(self.path)
        self._record = _record_type(self.num_classes, self.topk)

    def __len__(self) -> int:
        """Samples in the file."""
        return self.num_samples

    def read(self, samples: Tensor | Sequence[int]) -> TeacherRecords:
        """The records of ``n`` samples.

        Raises:
            IndexError: there is no such sample.
            CorruptRecord: the record of one of them is damaged or cut off; its ``sample`` says which.
        """
        samples = torch.as_tensor(samples).tolist()
        with self.path.open("rb") as file:
            payloads = [self._read_one(file, sample) for sample in samples]
        records = np.frombuffer(b"".join(payloads), self._record)
        indices = torch.from_numpy(records["indices"].astype(np.int64))
        values = torch.from_numpy(records["values"].astype(np.float16))
        return TeacherRecords(torch.from_numpy(records["seed"].astype(np.int64)), indices, values)

    def damaged(self) -> list[int]:
        """Numbers of all samples whose record cannot be read."""
        found = []
        with self.path.open("rb") as file:
            for sample in range(self.num_samples):
                try:
                    self._read_one(file, sample)
                except CorruptRecord:
                    found.append(sample)
        return found

    def _read_one(self, file: BinaryIO, sample: int) -> bytes:
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"{self.path}: samples should be 0 to {self.num_samples - 1}, got {sample}")
        size = self._record.itemsize
        file.seek(_HEADER.size + sample * size)
        payload = file.read(size)
        if len(payload) < size:
            raise CorruptRecord(self.path, sample, f"is cut off: expected {size} bytes, got {len(payload)}")
        if _checksum(sample, payload) != int.from_bytes(payload[-4:], "little"):
            raise CorruptRecord(self.path, sample, "is damaged: its bytes are not those that were written")
        return payload

    def __repr__(self) -> str:
        return f"StoredLogits({self.path}: {self.num_samples} samples, {self.topk} of {self.num_classes} classes)"


def replay(images: Tensor, transform: Callable[[Tensor, torch.Generator], Tensor], seeds: Tensor) -> Tensor:
    """Augments every image [n, C, H, W] by a generator of its own seed [n]: the same for teacher and student."""
    generators = (torch.Generator().manual_seed(seed) for seed in seeds.tolist())
    return torch.cat([transform(image[None], generator) for image, generator in zip(images, generators, strict=True)])


def _record_type(num_classes: int, topk: int) -> np.dtype:
    index = "<i2" if num_classes <= _INT16_CLASSES else "<i4"
    return np.dtype([("seed", "<i8"), ("indices", index, (topk,)), ("values", "<f2", (topk,)), ("crc", "<u4")])


def _checksum(sample: int, record: bytes) -> int:
    """CRC-32 of a sample's number and its record, without the checksum at its end."""
    return zlib.crc32(record[:-4], zlib.crc32(struct.pack("<q", sample)))


def _pack_header(num_samples: int, num_classes: int, topk: int) -> bytes:
    width = 2 if num_classes <= _INT16_CLASSES else 4
    fields = (MAGIC, VERSION, width, topk, num_classes, num_samples)
    return _HEADER.pack(*fields, zlib.crc32(_HEADER.pack(*fields, 0)[:-4]))


def _read_header(path: Path) -> tuple[int, int, int]:
    """(samples, classes, k) of a file."""
    if not path.is_file():
        raise FileNotFoundError(f"StoredLogits: there should be a file at {path}, got none")
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise ValueError(f"{path}: expected a file of stored logits, got {path.stat().st_size} bytes of another kind")
    _, version, _, topk, num_classes, num_samples, crc = _HEADER.unpack(header)
    if crc != zlib.crc32(header[:-4]):
        raise ValueError(f"{path}: the header is damaged: its bytes are not those that were written; copy it again")
    if version != VERSION:
        raise ValueError(f"{path}: expected version {VERSION} of the format, got {version}; update fvm_fast")
    return num_samples, num_classes, topk
