# SPDX-License-Identifier: Apache-2.0
"""Pairs that users bring: folders of images and webdataset tars, whole and damaged."""

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from fvm_fast.data import FolderPairs, PairDataset, TarPairs, open_pairs
from fvm_fast.data.pairs import decode_image


def picture(width: int = 30, height: int = 20, colour=(200, 30, 60), mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (width, height), colour).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for key, parts in samples.items():
            writer.write({"__key__": key, **parts})
    return path


def three_samples() -> dict[str, dict[str, bytes]]:
    return {
        "a/000": {"jpg": encoded(picture(), "JPEG"), "txt": b"a red box\na crimson box\n"},
        "a/001.v2": {"png": encoded(picture(colour=(0, 250, 0))), "json": b'{"caption": "a green box", "id": 1}'},
        "002": {"webp": encoded(picture(colour=(0, 0, 250)), "WEBP"), "txt": "ein blaues Kästchen".encode()},
    }


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((20, 30), 200 * 257, dtype=np.uint16))
    else:
        image = picture(colour=(200, 200, 200), mode="RGB" if mode == "LA" else mode).convert(mode)
    got = decode_image(encoded(image, "TIFF" if mode == "CMYK" else "PNG"), 8, "it")
    assert got.shape == (3, 8, 8) and got.dtype == torch.uint8
    assert mode == "1" or (got.float() - 200).abs().max() < 8  # a palette dithers; the rest is off by one at most


def test_transparency_is_laid_on_white():
    assert (decode_image(encoded(Image.new("RGBA", (9, 9), (255, 0, 0, 0))), 4, "it") == 255).all()


def test_shorter_side_is_resized_and_the_centre_kept():
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = (10, 100, 200)
    got = decode_image(encoded(Image.fromarray(wide)), 10, "it")
    torch.testing.assert_close(got[:, 5, 5], torch.tensor([10, 100, 200], dtype=torch.uint8))
    assert got.float().std(dim=(1, 2)).max() < 15  # only the middle square is seen
    tall = decode_image(encoded(Image.fromarray(wide).transpose(Image.Transpose.ROTATE_90)), 10, "it")
    torch.testing.assert_close(tall.transpose(1, 2).flip(1).float(), got.float(), atol=1, rtol=0)


def test_exif_orientation_is_followed():
    image = Image.fromarray(np.repeat(np.arange(0, 240, 12, dtype=np.uint8)[:, None], 20, 1))  # dark above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    upright = decode_image(encoded(image, "JPEG"), 10, "it").float()
    turned = decode_image(encoded(image, "JPEG", exif=exif), 10, "it").float()
    assert upright[0, 0].mean() < 40 < 180 < upright[0, 9].mean()
    torch.testing.assert_close(turned.flip(1), upright, atol=3, rtol=0)


@pytest.mark.parametrize(
    "payload", [b"", b"words", encoded(picture(300, 300))[:-200], encoded(picture(), "JPEG")[:300]]
)
def test_corrupt_image(payload):
    with pytest.raises(ValueError, match=r"dogs/1\.png: expected an image file, got \d+ bytes that Pillow cannot"):
        decode_image(payload, 8, "dogs/1.png")


# --- folders ----------------------------------------------------------------------------------------------------------


def folder(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def test_captions_beside_images(tmp_path):
    png = encoded(picture())
    folder(
        tmp_path, {"x/b.png": png, "x/b.txt": "second", "a.jpg": encoded(picture(), "JPEG"), "a.txt": "one\n\n two \n"}
    )
    folder(tmp_path, {".hidden/c.png": png, "notes.md": "no image"})
    pairs = open_pairs(str(tmp_path), 12)
    assert isinstance(pairs, FolderPairs) and isinstance(pairs, PairDataset)
    assert pairs.captions == [("one", "two"), ("second",)] and pairs.concepts.tolist() == [-1, -1]
    image, captions, concept = pairs[0]
    assert image.shape == (3, 12, 12) and captions == ("one", "two") and concept == -1


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_captions_file(tmp_path, kind):
    rows = [("y/2.png", "a dog, running"), ("1.png", "eine Katze: größer"), ("y/2.png", "a hound")]
    png = encoded(picture())
    if kind == "csv":
        text = "\ufefffile,caption\n" + "".join(f'{file},"{caption}"\n' for file, caption in rows)
    else:
        text = "\n".join(json.dumps({"file": file, "caption": caption}) for file, caption in rows) + "\n\n"
    folder(tmp_path, {"1.png": png, "y/2.png": png, "unlisted.png": png, f"captions.{kind}": text})
    pairs = FolderPairs(tmp_path, 8)
    assert [file.name for file in pairs.files] == ["2.png", "1.png"]
    assert pairs.captions == [("a dog, running", "a hound"), ("eine Katze: größer",)]


def test_folder_names_are_captions_and_concepts(tmp_path):
    png = encoded(picture())
    folder(tmp_path, {"red_apple/1.png": png, "red_apple/2.PNG": png, "dog/1.png": png})
    pairs = FolderPairs(tmp_path, 8)
    assert pairs.captions == [("dog",), ("red apple",), ("red apple",)]
    assert pairs.concepts.tolist() == [0, 1, 1] and pairs[2].concept == 1


PNG = encoded(picture())


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "expected images"),
        ({"a.txt": "words"}, "expected images"),
        ({"a.png": PNG}, r"a\.png: expected a caption: a\.txt beside it"),
        ({"a.png": PNG, "a.txt": "x", "b.png": PNG}, r"b\.png: expected a caption in b\.txt, got no such file"),
        ({"a.png": PNG, "a.txt": " \n"}, r"a\.png: expected a caption in a\.txt, got an empty file"),
        ({"a.png": PNG, "a.txt": b"\xff\xfe\x00"}, r"a\.txt: expected UTF-8"),
        ({"a.png": PNG, "captions.csv": "name,text\na.png,x\n"}, r"captions\.csv:2: expected rows with the columns"),
        ({"a.png": PNG, "captions.csv": "file,caption\na.png\n"}, r"captions\.csv:2: expected rows"),
        ({"a.png": PNG, "captions.csv": "file,caption\na.png,\n"}, "the caption is empty"),
        ({"a.png": PNG, "captions.csv": ""}, "at least one row"),
        ({"a.png": PNG, "captions.jsonl": '{"file": "a.png", "caption": "x"}\n{"file": '}, r"captions\.jsonl:2: exp"),
        ({"a.png": PNG, "captions.jsonl": "[1]"}, r"captions\.jsonl:1: expected"),
        ({"captions.csv": "", "captions.jsonl": ""}, "one captions file"),
    ],
)
def test_folder_errors_name_the_file(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        FolderPairs(folder(tmp_path, files), 8)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere, which is no folder"):
        FolderPairs(tmp_path / "nowhere", 8)
    folder(tmp_path, {"captions.csv": "file,caption\na.png,x\n"})
    with pytest.raises(FileNotFoundError, match=r"captions\.csv:2: the image .*a\.png is missing"):
        FolderPairs(tmp_path, 8)


def test_corrupt_image_in_a_folder(tmp_path):
    pairs = FolderPairs(folder(tmp_path, {"dog/1.png": PNG[:40], "dog/2.png": PNG}), 8)
    assert pairs[1].image.shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"dog/1\.png: expected an image file"):
        pairs[0]


# --- tars -------------------------------------------------------------------------------------------------------------


def test_tar_is_read_as_webdataset_does(tmp_path):
    path = write_tar(tmp_path / "pairs-000.tar", three_samples())
    pairs = TarPairs(path, 16)
    assert isinstance(pairs, PairDataset) and pairs.concepts.tolist() == [-1, -1, -1]
    assert pairs.captions == [("a red box", "a crimson box"), ("a green box",), ("ein blaues Kästchen",)]
    colours = torch.stack([pairs[i].image.float().mean(dim=(1, 2)) for i in range(3)])
    torch.testing.assert_close(colours.argmax(1), torch.tensor([0, 1, 2]))
    keys = [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert len(pairs) == len(keys)


def test_a_key_ends_at_the_first_dot(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"d.1/k": {"left.png": PNG, "txt": b"x"}, "d.2/k": {"png": PNG, "txt": b"y"}})
    assert TarPairs(path, 8).captions == [("x",), ("y",)]


def test_several_tars(tmp_path):
    for i in (2, 0, 1):
        write_tar(tmp_path / f"pairs-{i}.tar", {f"{i}": {"png": PNG, "txt": f"number {i}".encode()}})
    pairs = open_pairs(f"{tmp_path}/pairs-*.tar", 8)
    assert isinstance(pairs, TarPairs) and pairs.captions == [("number 0",), ("number 1",), ("number 2",)]
    listed = TarPairs([tmp_path / "pairs-2.tar", f"{tmp_path}/pairs-[01].tar"], 8)
    assert [captions[0][-1] for captions in listed.captions] == ["2", "0", "1"]


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_workers_read_the_same(tmp_path, kind):
    if kind == "tar":
        pairs = TarPairs(write_tar(tmp_path / "a.tar", three_samples()), 8)
    else:
        pairs = FolderPairs(folder(tmp_path, {f"{c}/1.png": encoded(picture(colour=c)) for c in ("red", "lime")}), 8)
    pairs[0]  # opened here first
    again = pickle.loads(pickle.dumps(pairs))
    images = [
        sample.image for batch in DataLoader(pairs, batch_size=2, num_workers=2, collate_fn=list) for sample in batch
    ]
    for i, image in enumerate(images):
        assert torch.equal(image, pairs[i].image) and torch.equal(again[i].image, image)


@pytest.mark.parametrize("cut", [10_240 - 1024, 3000, 1536, 1100, 700, 512, 100, 0])
def test_truncated_tar(tmp_path, cut):
    path = tmp_path / "a.tar"
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    write_tar(path, {"0": {"png": encoded(Image.fromarray(noise)), "txt": b"x"}})
    whole = path.read_bytes()
    assert len(TarPairs(path, 8)) == 1
    with tarfile.open(path) as tar:
        end = max(member.offset_data + 512 * -(-member.size // 512) for member in tar)
    path.write_bytes(whole[: min(cut, end)])
    with pytest.raises(ValueError, match=r"a\.tar: expected .*(truncated|copy it again)"):
        TarPairs(path, 8)


def test_tar_truncated_after_opening(tmp_path):
    path = write_tar(tmp_path / "a.tar", three_samples())
    pairs = TarPairs(path, 8)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"a\.tar::.* got \d+; the tar has been truncated since"):
        pairs[2]


def test_damaged_header_is_not_an_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", three_samples())
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    payload = bytearray(path.read_bytes())
    payload[third + 3] ^= 1
    path.write_bytes(payload)
    with pytest.raises(ValueError, match=r"a\.tar: expected an end-of-archive block after 2 files"):
        TarPairs(path, 8)


@pytest.mark.parametrize(
    "samples, message",
    [
        ({}, "got an empty one"),
        ({"k": {"png": PNG}}, r"a\.tar::k: expected a caption in k\.txt"),
        ({"k": {"png": PNG, "txt": b" "}}, r"a\.tar::k: expected a caption in k\.txt"),
        ({"k": {"png": PNG, "json": b'{"text": "x"}'}}, r"a\.tar::k: expected a caption"),
        ({"k": {"png": PNG, "json": b"{"}}, r"a\.tar::k: expected a caption as UTF-8 text or JSON"),
        ({"k": {"png": PNG, "json": b'{"caption": 3}'}}, r"a\.tar::k: expected a caption as"),
        ({"k": {"png": PNG, "txt": b"\xff"}}, r"a\.tar::k: expected a caption as UTF-8"),
        ({"k": {"txt": b"x"}}, r"a\.tar::k: expected an image .* got \.txt"),
    ],
)
def test_tar_errors_name_the_sample(tmp_path, samples, message):
    path = write_tar(tmp_path / "a.tar", samples)
    with pytest.raises(ValueError, match=message):
        TarPairs(path, 8)


def test_corrupt_image_in_a_tar(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"k": {"png": PNG[:40], "txt": b"x"}})
    with pytest.raises(ValueError, match=r"a\.tar::k\.png: expected an image file"):
        TarPairs(path, 8)[0]


def test_what_is_no_tar(tmp_path):
    folder(tmp_path, {"a.tar": b"words " * 500, "b.tar": gzip.compress(b"words")})
    with pytest.raises(ValueError, match=r"a\.tar: expected a tar, got a truncated or foreign file"):
        TarPairs(tmp_path / "a.tar", 8)
    with pytest.raises(ValueError, match=r"b\.tar: expected an uncompressed tar, got a gzipped one; unpack"):
        TarPairs(tmp_path / "b.tar", 8)
    with pytest.raises(FileNotFoundError, match="nothing matches"):
        TarPairs(tmp_path / "c*.tar", 8)
    with pytest.raises(ValueError, match="at least one tar"):
        TarPairs([], 8)


@pytest.mark.parametrize("spec", ["emoji4", "nowhere/", "a.zip"])
def test_open_pairs_says_what_it_takes(spec):
    with pytest.raises(ValueError, match="expected 'emoji3', an existing folder, or a .tar file or glob, got"):
        open_pairs(spec, 8)
