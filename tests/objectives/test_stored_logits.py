# SPDX-License-Identifier: Apache-2.0
"""A teacher's stored answers: written once, replayed exactly, damage found and kept to its own record."""

import struct

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fvm_fast.data import EmojiPairs
from fvm_fast.data.sampler import stream_seed
from fvm_fast.data.transforms import ColorJitter, Compose, Composite, Mixup, RandomHorizontalFlip, RandomResizedCrop
from fvm_fast.objectives import Classification, CorruptRecord, StoredDistillation, StoredLogits, StoredLogitsWriter
from fvm_fast.objectives.distillation import dense_targets
from fvm_fast.objectives.stored_logits import replay

HEADER = 32


def logits_of(n: int, classes: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def write(path, n: int = 10, classes: int = 9, k: int = 4, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """A file of ``n`` samples written in a shuffled order; the seeds and logits behind it."""
    seeds, logits = torch.tensor([stream_seed(7, i) for i in range(n)]), logits_of(n, classes)
    with StoredLogitsWriter(path, n, classes, k) as writer:
        for samples in torch.randperm(n, generator=torch.Generator().manual_seed(1)).split(batch):
            writer.write(samples, seeds[samples], logits[samples])
    return seeds, logits


@pytest.mark.parametrize("classes, k", [(9, 4), (9, 9), (9, 1), (1, 1), (32_768, 5), (32_769, 5), (100_003, 3)])
def test_what_is_written_is_read(tmp_path, classes, k):
    seeds, logits = write(tmp_path / "epoch", 10, classes, k)
    stored = StoredLogits(tmp_path / "epoch")
    assert (len(stored), stored.num_classes, stored.topk) == (10, classes, k)
    samples = [9, 0, 4, 4]
    records = stored.read(samples)
    values, indices = logits[samples].softmax(1).topk(k)
    assert torch.equal(records.seeds, seeds[samples])
    assert torch.equal(records.indices, indices) and torch.equal(records.values, values.half())
    width = 2 if classes <= 32_768 else 4
    assert (tmp_path / "epoch").stat().st_size == HEADER + 10 * (8 + k * width + 2 * k + 4)


@pytest.mark.parametrize("classes", [32_768, 32_769, 65_537])
def test_large_class_numbers_do_not_wrap(tmp_path, classes):
    logits = torch.zeros(1, classes)
    logits[0, [classes - 1, 32_767, 0]] = torch.tensor([9.0, 8.0, 7.0]) if classes > 32_768 else torch.tensor([9.0] * 3)
    with StoredLogitsWriter(tmp_path / "epoch", 1, classes, 3) as writer:
        writer.write([0], [5], logits)
    indices = StoredLogits(tmp_path / "epoch").read([0]).indices[0]
    assert set(indices.tolist()) == {classes - 1, 32_767, 0} | ({1, 2} & set(indices.tolist()))


def test_the_layout_is_as_documented(tmp_path):
    with StoredLogitsWriter(tmp_path / "epoch", 1, 3, 2) as writer:
        writer.write([0], [-2], torch.tensor([[0.0, 2.0, 1.0]]))
    data = (tmp_path / "epoch").read_bytes()
    assert struct.unpack("<8sHHIIQ", data[:28]) == (b"FVMLOGIT", 1, 2, 2, 3, 1)
    seed, first, second, p, q = struct.unpack("<qhhee", data[HEADER:-4])
    assert (seed, first, second) == (-2, 1, 2)
    probabilities = torch.tensor([0.0, 2.0, 1.0]).softmax(0).half()
    assert (p, q) == (float(probabilities[1]), float(probabilities[2]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_logits_of_any_float_are_softened_in_float32_at_least(tmp_path, dtype):
    logits = logits_of(2, 9).to(dtype)
    with StoredLogitsWriter(tmp_path / "epoch", 2, 9, 4) as writer:
        writer.write([0, 1], [1, 2], logits)
    expected = logits.double().softmax(1).topk(4).values
    assert_close(StoredLogits(tmp_path / "epoch").read([0, 1]).values.double(), expected, atol=0.0, rtol=6e-4)


class Teacher(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, classes)

    def forward(self, images):
        return self.head(images.flatten(1).float() / 255)


def test_replay_makes_the_images_that_the_teacher_saw(tmp_path):
    torch.manual_seed(0)
    images, teacher = EmojiPairs("google", image_size=16).images[:12], Teacher(50)
    transform = Compose(
        [Composite("random"), RandomResizedCrop(8), RandomHorizontalFlip(), ColorJitter(0.4, 0.4, 0.4, 0.1)]
    )
    epochs = [[stream_seed(3, epoch, sample) for sample in range(12)] for epoch in range(2)]
    for epoch, seeds in enumerate(epochs):
        with StoredLogitsWriter(tmp_path / f"epoch-{epoch}", 12, 50, 5) as writer:
            for samples in torch.arange(12).split(5):
                batch_seeds = torch.tensor(seeds)[samples]
                writer.write(samples, batch_seeds, teacher(replay(images[samples], transform, batch_seeds)))
    seen = []
    for epoch in range(2):
        records = StoredLogits(tmp_path / f"epoch-{epoch}").read([7, 2, 11])
        again = replay(images[[7, 2, 11]], transform, records.seeds)
        values, indices = teacher(again).softmax(1).topk(5)
        assert torch.equal(records.indices, indices)
        assert_close(records.values.float(), values, atol=0.0, rtol=1e-3)
        seen.append(again)
    assert not torch.equal(*seen), "each epoch has its own augmentation"


def test_a_file_trains_a_student(tmp_path):
    _, logits = write(tmp_path / "epoch", 8, 9, 4)
    stored, images = StoredLogits(tmp_path / "epoch"), torch.rand(8, 3, 8, 8)
    student = Teacher(9)
    records = stored.read(range(8))
    batch = {"images": images, "teacher_indices": records.indices, "teacher_values": records.values}
    outputs = StoredDistillation(student)(batch)
    targets = dense_targets(records.indices, records.values, stored.num_classes)
    expected = Classification(student)({"images": images, "labels": targets})["loss"]
    assert_close(outputs["loss"], expected)
    assert torch.equal(outputs["teacher"], logits.argmax(1))
    mixed, soft = Mixup(9, mode="elem")(images, targets, torch.Generator().manual_seed(0))
    assert_close(soft.sum(1), torch.ones(8))
    assert mixed.shape == images.shape


# ---- damage


def flip(path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def assert_only_this_is_damaged(path, sample: int, message: str) -> None:
    stored = StoredLogits(path)
    others = [i for i in range(10) if i != sample]
    assert len(stored.read(others).seeds) == 9
    for samples in ([sample], [0, 1, sample, 2]):
        with pytest.raises(CorruptRecord, match=f"epoch: the record of sample {sample} {message}") as info:
            stored.read(samples)
        assert (info.value.sample, info.value.path) == (sample, path)
    assert stored.damaged() == [sample]


SIZE = 8 + 4 * 2 + 4 * 2 + 4


@pytest.mark.parametrize("byte", range(SIZE))
def test_any_changed_byte_is_found_and_other_records_are_read(tmp_path, byte):
    write(tmp_path / "epoch")
    flip(tmp_path / "epoch", HEADER + 6 * SIZE + byte)
    assert_only_this_is_damaged(tmp_path / "epoch", 6, "is damaged: its bytes are not those that were written")


@pytest.mark.parametrize("kept", [0, 1, SIZE - 1])
def test_a_truncated_record_is_found_and_other_records_are_read(tmp_path, kept):
    path = tmp_path / "epoch"
    write(path)
    path.write_bytes(path.read_bytes()[: HEADER + 9 * SIZE + kept])
    assert_only_this_is_damaged(path, 9, f"is cut off: expected {SIZE} bytes, got {kept}; leave the sample out")


def test_a_record_in_another_ones_place_is_found(tmp_path):
    path = tmp_path / "epoch"
    write(path)
    data = bytearray(path.read_bytes())
    data[HEADER + SIZE : HEADER + 2 * SIZE] = data[HEADER : HEADER + SIZE]
    path.write_bytes(data)
    assert_only_this_is_damaged(path, 1, "is damaged")


def test_a_hole_of_zeros_is_found(tmp_path):
    path = tmp_path / "epoch"
    write(path)
    path.write_bytes(path.read_bytes()[: HEADER + 4 * SIZE] + bytes(3 * SIZE) + path.read_bytes()[HEADER + 7 * SIZE :])
    assert StoredLogits(path).damaged() == [4, 5, 6]


@pytest.mark.parametrize("offset", range(HEADER))
def test_a_damaged_header_is_found(tmp_path, offset):
    write(tmp_path / "epoch")
    flip(tmp_path / "epoch", offset)
    with pytest.raises(ValueError, match="epoch: (the header is damaged|expected a file of stored logits)"):
        StoredLogits(tmp_path / "epoch")


def test_foreign_and_missing_files_are_refused(tmp_path):
    (tmp_path / "short").write_bytes(b"FVMLOGIT")
    with pytest.raises(ValueError, match="short: expected a file of stored logits, got 8 bytes of another kind"):
        StoredLogits(tmp_path / "short")
    with pytest.raises(FileNotFoundError, match="there should be a file at .*none, got none"):
        StoredLogits(tmp_path / "none")
    write(tmp_path / "epoch")
    for sample in (10, -1):
        with pytest.raises(IndexError, match=f"samples should be 0 to 9, got {sample}"):
            StoredLogits(tmp_path / "epoch").read([sample])


# ---- writing


def test_nothing_is_left_when_writing_fails_or_stops_early(tmp_path):
    with pytest.raises(KeyboardInterrupt), StoredLogitsWriter(tmp_path / "epoch", 2, 9, 4) as writer:
        writer.write([0], [1], logits_of(1, 9))
        raise KeyboardInterrupt
    with (
        pytest.raises(ValueError, match="all 3 samples should be written, 2 are missing, the first is 0; nothing is"),
        StoredLogitsWriter(tmp_path / "epoch", 3, 9, 4) as writer,
    ):
        writer.write([1], [1], logits_of(1, 9))
    assert not list(tmp_path.iterdir())


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    seeds, _ = write(tmp_path / "epoch")
    with pytest.raises(ValueError, match="missing"), StoredLogitsWriter(tmp_path / "epoch", 10, 9, 4) as writer:
        writer.write([0], [1], logits_of(1, 9))
        assert torch.equal(StoredLogits(tmp_path / "epoch").read([0]).seeds, seeds[:1])
    assert torch.equal(StoredLogits(tmp_path / "epoch").read(range(10)).seeds, seeds)
    write(tmp_path / "epoch", n=4)
    assert len(StoredLogits(tmp_path / "epoch")) == 4 and len(list(tmp_path.iterdir())) == 1


def test_the_later_record_of_a_sample_counts(tmp_path):
    with StoredLogitsWriter(tmp_path / "epoch", 2, 9, 4) as writer:
        writer.write([0, 1], [1, 2], logits_of(2, 9))
        writer.write([1], [3], logits_of(1, 9, seed=1))
    assert StoredLogits(tmp_path / "epoch").read([0, 1]).seeds.tolist() == [1, 3]


def test_an_empty_batch_changes_nothing(tmp_path):
    with StoredLogitsWriter(tmp_path / "epoch", 1, 9, 4) as writer:
        writer.write([], [], torch.zeros(0, 9))
        writer.write([0], [1], logits_of(1, 9))
    assert StoredLogits(tmp_path / "epoch").read([]).indices.shape == (0, 4)


BAD = {
    "topk": (
        lambda path: StoredLogitsWriter(path, 1, 9, 10),
        "between 1 and num_classes, got 1 samples, topk 10 and 9",
    ),
    "samples": (lambda path: StoredLogitsWriter(path, 0, 9, 1), "should be 1 or more"),
    "width": (lambda path: write_one(path, [0], [1], logits_of(1, 8)), "logits \\[n, 9\\], got 1, 1 and \\(1, 8\\)"),
    "seeds": (lambda path: write_one(path, [0], [], logits_of(1, 9)), "got 1, 0 and"),
    "number": (lambda path: write_one(path, [2], [1], logits_of(1, 9)), "samples should be 0 to 1, got \\[2\\]"),
}


def write_one(path, *arguments) -> None:
    with StoredLogitsWriter(path, 2, 9, 4) as writer:
        writer.write(*arguments)


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD.keys())
def test_errors_say_what_was_expected(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "epoch")
