# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run, without pickle: ``checkpoints/step-000150/{model,state}.safetensors`` and ``state.json``.

A checkpoint is written into a hidden folder, flushed, and renamed, so a folder named ``step-*`` was complete when it
got its name; ``state.json`` carries each file's size and checksum, so later damage is seen too. ``last`` points to the
newest. ``model.safetensors`` stands alone: its metadata says how to build the model, the tokenizer and the images.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fvm_fast.files import crc32, flush

METADATA_KEY = "fvm_fast"


@dataclass
class Checkpoint:
    """The state of training after ``step`` optimizer steps.

    Attributes:
        step: optimizer steps done.
        model: the model's state dict.
        optimizer: state of the optimizer, ``<parameter>/<state>`` to tensor.
        ema: averaged weights; empty when none are kept. They are also what ``model.safetensors`` holds then.
        spec: how to build the model (JSON values), written into ``model.safetensors``.
        environment: what bit-exact continuation depends on, such as threads and instruction set.
        seconds: spent in training so far.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor]
    spec: dict[str, Any]
    environment: dict[str, Any]
    seconds: float = 0.0


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write ``folder/step-<step>``, point ``folder/last`` to it, and delete all but the ``keep`` newest."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{checkpoint.step:06d}"
    beside = folder / f".{final.name}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    save_model(beside / "model.safetensors", checkpoint.ema or checkpoint.model, checkpoint.spec)
    parts = {"optimizer": checkpoint.optimizer, "model": checkpoint.model if checkpoint.ema else {}}
    state = {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    _save_tensors(beside / "state.safetensors", state, {})
    _write_manifest(beside, checkpoint)
    flush(beside)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    _point(folder / "last", final.name)
    flush(folder)
    for old in _steps(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        ValueError: a part is missing, cut short or damaged.
    """
    manifest = check_checkpoint(path)
    weights, spec = load_model_file(path / "model.safetensors")
    parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "model": {}}
    for name, tensor in load_file(path / "state.safetensors").items():
        part, inner = name.split("/", 1)
        parts[part][inner] = tensor
    model, ema = (parts["model"], weights) if parts["model"] else (weights, {})
    return Checkpoint(
        manifest["step"], model, parts["optimizer"], ema, spec, manifest["environment"], manifest["seconds"]
    )


def check_checkpoint(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder whose files are all there with the size and checksum it names.

    Raises:
        ValueError: a part is missing, cut short or damaged; says which.
    """
    try:
        manifest = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {path}: state.json cannot be read ({error})") from None
    for name, expected in manifest["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else 0
        if size != expected["bytes"]:
            raise ValueError(f"checkpoint {path}: {name} should have {expected['bytes']} bytes, got {size}")
        if crc32(file) != expected["crc32"]:
            raise ValueError(f"checkpoint {path}: the bytes of {name} are not those that were written")
    return manifest


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint below ``folder``, and a sentence for each newer one that is damaged."""
    complaints = []
    for path in _steps(folder):
        try:
            check_checkpoint(path)
        except ValueError as error:
            complaints.append(f"{error}; it is skipped")
        else:
            return path, complaints
    return None, complaints


def save_model(path: Path, weights: dict[str, Tensor], spec: dict[str, Any]) -> None:
    """Write weights with the ``spec`` that :func:`load_model_file` gives back."""
    _save_tensors(path, weights, {METADATA_KEY: json.dumps(spec), "format": "pt"})


def load_model_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and spec of a ``model.safetensors``; an empty spec when another program wrote it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short or is not safetensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            spec = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        return load_file(path), spec
    except SafetensorError as error:
        raise ValueError(
            f"checkpoint {path}: expected a whole safetensors file, got {path.stat().st_size} bytes that do not read "
            f"as one ({error}); use another checkpoint of the run, or fetch the file again"
        ) from None


def _save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, path, metadata=metadata)
    path.chmod(0o644)  # safetensors lets only the owner read
    flush(path)


def _write_manifest(folder: Path, checkpoint: Checkpoint) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "crc32": crc32(path)} for path in sorted(folder.iterdir())}
    manifest = {
        "step": checkpoint.step,
        "seconds": checkpoint.seconds,
        "environment": checkpoint.environment,
        "files": files,
    }
    path = folder / "state.json"
    path.write_text(json.dumps(manifest, indent=2) + "\n")
    flush(path)


def _steps(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _point(link: Path, target: str) -> None:
    beside = link.with_name(f".{link.name}.tmp")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    os.replace(beside, link)
