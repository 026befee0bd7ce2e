# SPDX-License-Identifier: Apache-2.0
"""The bundled emoji: what is in them, their splits, and what happens when a shard is damaged."""

import gzip
import io
import pickle
import tarfile
from collections import Counter

import pytest
import torch
import webdataset
from PIL import Image

from fvm_fast.data import EmojiPairs, PairDataset, Sample, open_pairs
from fvm_fast.data.emoji import CONCRETE, GROUPS, SHARD_FOLDER, STYLES, is_held_out

GROUP_COUNTS = {"animals-nature": 157, "food-drink": 128, "travel-places": 218, "activities": 85, "objects": 261}


@pytest.fixture(scope="module")
def concrete() -> EmojiPairs:
    return EmojiPairs(captions="label+tags+templates")


def test_concrete_counts(concrete):
    assert isinstance(concrete, PairDataset)
    assert len(concrete) == 3 * 849 and concrete.styles == STYLES
    assert concrete.images.shape == (3 * 849, 4, 64, 64) and concrete.images.dtype == torch.uint8
    assert Counter(concrete.groups) == GROUP_COUNTS
    assert len(set(concrete.labels)) == len(set(concrete.keys)) == len(concrete.labels) == 849
    assert torch.equal(concrete.concepts, torch.arange(849).repeat(3))


def test_all_counts():
    everything = EmojiPairs("google", subset="all")
    assert len(everything) == 1852 and everything.images.shape == (1852, 4, 64, 64)
    assert len(EmojiPairs("google", subset="no_flags")) == 1852 - 253
    assert set(everything.groups) == set(GROUPS)
    for group in GROUPS:
        assert any(is_held_out(k) for k, g in zip(everything.keys, everything.groups, strict=True) if g == group)


def test_samples(concrete):
    apple = concrete.labels.index("red apple")
    sample = concrete[849 + apple]  # in the second style
    assert isinstance(sample, Sample) and sample.concept == apple
    assert (
        sample.captions[0] == "red apple" and "fruit" in sample.captions and "an icon of red apple" in sample.captions
    )
    assert concrete.keys[apple] == "1f34e" and concrete.subgroups[apple] == "food-fruit"
    red, green, blue = sample.image[:3, 20:44, 20:44].float().mean(dim=(1, 2))
    assert red > 1.5 * green and red > 1.5 * blue


def test_alpha_is_kept(concrete):
    alpha = concrete.images[:, 3]
    assert (alpha.amin(dim=(1, 2)) == 0).float().mean() > 0.95
    assert (alpha.amax(dim=(1, 2)) == 255).all()


def test_styles_draw_the_same_concepts_differently(concrete):
    google, twitter, fluent = concrete.images.view(3, 849, 4, 64, 64).float()
    alpha = [style[:, 3] / 255 for style in (google, twitter, fluent)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        own = (alpha[a] - alpha[b]).abs().mean()
        others = (alpha[a] - alpha[b].roll(400, 0)).abs().mean()
        assert 0.02 < own < 0.8 * others


def test_order_of_styles_does_not_change_ids(concrete):
    some = EmojiPairs(("fluent", "google"))
    assert some.labels == concrete.labels
    assert torch.equal(some.images[:849], concrete.images[1698:]) and torch.equal(
        some.images[849:], concrete.images[:849]
    )


def test_held_out_concepts_are_a_fixed_tenth(concrete):
    train, held_out = (EmojiPairs(("twitter",), concepts=side) for side in ("train", "held_out"))
    assert train.labels == held_out.labels == concrete.labels  # ids mean the same on both sides
    assert sorted(train.concept_ids.tolist() + held_out.concept_ids.tolist()) == list(range(849))
    assert len(held_out) == 88 and [held_out.captions[i][0] for i in range(2)] == ["monkey face", "poodle"]
    assert torch.equal(held_out.images, concrete.images[849:1698][held_out.concept_ids])
    food = EmojiPairs("twitter", subset=("food-drink",), concepts="held_out")
    assert {food.labels[i] for i in food.concept_ids} < {held_out.labels[i] for i in held_out.concept_ids}


def test_image_size_resamples_without_fringes():
    small = EmojiPairs("fluent", subset=("food-drink",), image_size=48)
    large = EmojiPairs("fluent", subset=("food-drink",))
    assert small.images.shape[-2:] == (48, 48)
    whole = Image.fromarray(large.images[3].permute(1, 2, 0).numpy())
    expected = torch.frombuffer(
        bytearray(whole.resize((48, 48), Image.Resampling.BILINEAR).tobytes()), dtype=torch.uint8
    )
    expected = expected.view(48, 48, 4).permute(2, 0, 1).float()
    got = small.images[3].float()
    seen = expected[3] / 255
    torch.testing.assert_close(got[3], expected[3], atol=1.01, rtol=0)
    torch.testing.assert_close(got[:3] * seen, expected[:3] * seen, atol=2.5, rtol=0)  # Pillow rounds in between


def test_it_pickles():
    pairs = EmojiPairs("google", subset=("activities",), image_size=8)
    again = pickle.loads(pickle.dumps(pairs))
    assert torch.equal(again.images, pairs.images) and again.captions == pairs.captions


def test_open_pairs():
    pairs = open_pairs("emoji3", 8)
    assert isinstance(pairs, EmojiPairs) and len(pairs) == 2547 and pairs[0].image.shape == (4, 8, 8)


def test_webdataset_reads_the_shards():
    reader = webdataset.WebDataset(str(SHARD_FOLDER / "fluent.tar.gz"), shardshuffle=False)
    sample = next(iter(reader.decode("pil").to_tuple("webp", "json")))
    assert sample[0].size == (64, 64)
    assert sample[1]["caption"] == "grinning face" and sample[1]["style"] == "fluent"


def test_shards_are_small_reproducible_and_credited():
    shards = [SHARD_FOLDER / f"{style}.tar.gz" for style in STYLES]
    assert sum(shard.stat().st_size for shard in shards) < 8e6
    for shard in shards:
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
        assert len(members) == 2 * 1852
        assert {(m.mtime, m.uid, m.gid, m.mode) for m in members} == {(0, 0, 0, 0o644)}
    credit = (SHARD_FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    licences = sorted((SHARD_FOLDER / "LICENSES").iterdir())
    assert len(licences) == 6 and all(f"LICENSES/{path.name}" in credit for path in licences)


def damage(kind: str, payload: bytes) -> bytes:
    if kind == "flipped bit":
        middle = len(payload) // 2
        return payload[:middle] + bytes([payload[middle] ^ 1]) + payload[middle + 1 :]
    if kind == "flipped checksum":
        return payload[:-8] + bytes([payload[-8] ^ 1]) + payload[-7:]
    if kind == "not a tar":
        return gzip.compress(b"words")
    return {"truncated": payload[:-1000], "truncated tail": payload[:-3], "empty": b"", "not gzip": b"words"}[kind]


@pytest.mark.parametrize(
    "kind", ["flipped bit", "flipped checksum", "truncated", "truncated tail", "empty", "not gzip", "not a tar"]
)
def test_damaged_shard(tmp_path, kind):
    shard = tmp_path / "twitter.tar.gz"
    shard.write_bytes(damage(kind, (SHARD_FOLDER / "twitter.tar.gz").read_bytes()))
    with pytest.raises(ValueError, match=r"twitter\.tar\.gz: expected a whole .* install fvm_fast again"):
        EmojiPairs("twitter", folder=tmp_path)


def test_missing_shard(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"twitter\.tar\.gz: the emoji shard of style 'twitter' is missing"):
        EmojiPairs("twitter", folder=tmp_path)


def test_damaged_picture(tmp_path):
    """A shard whose frame is whole but one of whose pictures is not."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, payload in (
            ("google/1f34e.json", b'{"caption":"red apple","tags":[],"group":"food-drink","subgroup":"food-fruit"}'),
            ("google/1f34e.webp", b"RIFF....WEBP"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    (tmp_path / "google.tar.gz").write_bytes(gzip.compress(buffer.getvalue()))
    with pytest.raises(ValueError, match=r"1f34e\.webp: expected an RGBA WebP"):
        EmojiPairs("google", folder=tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"styles": ("apple",)}, "styles should be distinct names out of google, twitter, fluent, got .'apple'"),
        ({"styles": ()}, "styles should be"),
        ({"styles": ("google", "google")}, "distinct"),
        ({"subset": "animals"}, "subset should be 'all', 'concrete', 'no_flags' or a tuple"),
        ({"subset": ("animals",)}, "subset should be distinct names out of"),
        ({"concepts": "test"}, "'all', 'train' or 'held_out', got 'test'"),
        ({"image_size": 0}, "positive int"),
        ({"image_size": 4.5}, "positive int"),
        ({"captions": "label+emoji"}, "captions should be"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EmojiPairs(**{"styles": "google", "subset": CONCRETE[:1], **arguments})
