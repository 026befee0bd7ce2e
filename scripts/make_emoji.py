# SPDX-License-Identifier: Apache-2.0
"""Make the bundled data set emoji3: 1,852 concepts, each drawn by Google, Twitter and Microsoft, with CLDR captions.

Four npm packages are fetched (158 MB) into a temporary directory, joined on their code points, resized to 64 px and
written as one gzipped webdataset shard a style::

    google.tar.gz:  google/1f34e.json  google/1f34e.webp  ...  in CLDR order

The bytes are reproducible: re-making with the same Pillow gives the same archives. Run from a checkout::

    python scripts/make_emoji.py            # writes fvm_fast/data/emoji3/*.tar.gz
    python scripts/make_emoji.py --check    # makes them anew and compares, writes nothing
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

from PIL import Image

PACKAGES = {
    "google": "emoji-datasource-google@16.0.0",
    "twitter": "emoji-datasource-twitter@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
    "captions": "emojibase-data@17.0.0",
}
STYLES = ("google", "twitter", "fluent")
CONCEPTS = 1852
CONCRETE = {"animals-nature": 157, "food-drink": 128, "travel-places": 218, "activities": 85, "objects": 261}
IMAGE_SIZE = 64
WEBP = {"quality": 83, "alpha_quality": 90, "method": 6, "use_sharp_yuv": True}
OUT = Path(__file__).resolve().parents[1] / "fvm_fast" / "data" / "emoji3"


def concept_key(code_points: str) -> str:
    """The name all four packages agree on: lower case, no emoji-presentation selector, no leading zeros."""
    parts = code_points.lower().replace("-fe0f", "").split("-")
    return "-".join(part.lstrip("0") for part in parts)


def fetch(package: str, folder: Path) -> Path:
    """Download and unpack one npm package; returns its ``package`` folder."""
    folder.mkdir(parents=True)
    try:
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"make_emoji: `npm pack {package}` failed ({error}); npm and access to the npm registry are needed")
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package"


def image_files(package: Path, style: str) -> dict[str, Path]:
    """Concept key -> picture file of one style (skin-tone variants are not top-level entries, so they stay out)."""
    if style == "fluent":
        return {concept_key(path.stem): path for path in (package / "assets").glob("*.webp")}
    entries = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
    drawn = [entry for entry in entries if entry[f"has_img_{style}"]]
    return {concept_key(entry["unified"]): package / "img" / style / "64" / entry["image"] for entry in drawn}


def read_captions(package: Path) -> dict[str, dict]:
    """Concept key -> metadata of one emoji, in CLDR order."""
    names = json.loads((package / "meta" / "groups.json").read_text(encoding="utf-8"))
    rows = json.loads((package / "en" / "data.json").read_text(encoding="utf-8"))
    rows = sorted((row for row in rows if "group" in row), key=lambda row: row["order"])
    return {
        concept_key(row["hexcode"]): {
            "caption": row["label"],
            "tags": row.get("tags", []),
            "group": names["groups"][str(row["group"])],
            "subgroup": names["subgroups"][str(row["subgroup"])],
            "emoji": row["emoji"],
        }
        for row in rows
    }


def join(files: dict[str, dict[str, Path]], captions: dict[str, dict]) -> dict[str, dict]:
    """The concepts that all styles draw and CLDR names, in CLDR order; refuses counts other than the published ones."""
    concepts = {key: row for key, row in captions.items() if all(key in files[style] for style in STYLES)}
    groups = Counter(row["group"] for row in concepts.values())
    concrete = {group: groups[group] for group in CONCRETE}
    if len(concepts) != CONCEPTS or concrete != CONCRETE:
        sys.exit(
            f"make_emoji: expected {CONCEPTS} concepts with {CONCRETE}, got {len(concepts)} with {concrete}; "
            f"are the package versions {', '.join(PACKAGES.values())}?"
        )
    return concepts


def encode_image(path: Path) -> bytes:
    """One picture as RGBA WebP. Pillow resizes RGBA on premultiplied alpha, so no dark fringe appears."""
    image = Image.open(path).convert("RGBA")
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", **WEBP)
    return buffer.getvalue()


def add_member(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    """Append a file with a fixed date, owner and mode (TarInfo's defaults), so that the bytes are reproducible."""
    member = tarfile.TarInfo(name)
    member.size = len(payload)
    tar.addfile(member, io.BytesIO(payload))


def make_shard(style: str, files: dict[str, Path], concepts: dict[str, dict]) -> bytes:
    """The uncompressed tar of one style."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, row in concepts.items():
            text = json.dumps({**row, "style": style}, ensure_ascii=False, sort_keys=True)
            add_member(tar, f"{style}/{key}.json", text.encode())
            add_member(tar, f"{style}/{key}.webp", encode_image(files[key]))
    return buffer.getvalue()


def write_beside_and_rename(path: Path, payload: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(payload)
    os.replace(partial, path)


def check_shard(path: Path, tar: bytes) -> bool:
    """Whether the committed archive holds the same tar (the gzip frame may differ between zlib releases)."""
    same = path.exists() and gzip.decompress(path.read_bytes()) == tar
    print(f"{path.name}: {'identical' if same else 'DIFFERS (another Pillow or libwebp, or an edited shard)'}")
    return same


def main() -> int:
    """Make or check the three shards; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed shards, write nothing")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the shards (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="emoji3-") as scratch:
        packages = {name: fetch(package, Path(scratch) / name) for name, package in PACKAGES.items()}
        files = {style: image_files(packages[style], style) for style in STYLES}
        concepts = join(files, read_captions(packages["captions"]))
        shards = {style: make_shard(style, files[style], concepts) for style in STYLES}
        licences = {name: (packages[name] / "LICENSE").read_bytes() for name in ("google", "captions")}
    if args.check:
        return 0 if all([check_shard(args.out / f"{style}.tar.gz", tar) for style, tar in shards.items()]) else 1
    (args.out / "LICENSES").mkdir(parents=True, exist_ok=True)
    write_beside_and_rename(args.out / "LICENSES" / "emoji-data-MIT.txt", licences["google"])
    write_beside_and_rename(args.out / "LICENSES" / "emojibase-MIT.txt", licences["captions"])
    for style, tar in shards.items():
        path = args.out / f"{style}.tar.gz"
        write_beside_and_rename(path, gzip.compress(tar, compresslevel=9, mtime=0))
        print(f"{path}: {len(concepts)} concepts, {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
