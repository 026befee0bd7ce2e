# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: read without running code that is in them, written so that a crash never leaves half a file."""

import json
import os
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fvm_fast.files import flush
from fvm_fast.weights.spelling import StateDict, listed

NUMERICS_KEY = "fvm_fast.numerics"
_CONTAINERS = ("state_dict", "model", "model_state_dict")
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile


def read_checkpoint(path: str | os.PathLike) -> tuple[StateDict, dict[str, Any]]:
    """Reads ``.safetensors``, or ``.pth``, ``.pt``, ``.bin`` with ``weights_only=True``; a folder of transformers'.

    Returns:
        The flat state dict on the CPU, and the numerics that travelled with it (empty when none did).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind, contains code, or holds no state dict.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"load_weights: there should be a checkpoint at {path}, got no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        return unwrap(_read_pickle(path), str(path)), _config_numerics(path)
    raise ValueError(f"load_weights: a checkpoint should end in .safetensors, .pth, .pt or .bin, got {path.name}")


def write_safetensors(
    state: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes beside ``path``, flushes to the disk and renames, so that ``path`` is always a whole file, old or new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(_unshared(state), beside, metadata={"format": "pt", **(metadata or {})})
        flush(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def unwrap(checkpoint: Any, where: str = "the dict given") -> StateDict:
    """The state dict inside a training checkpoint: containers and the prefixes of wrappers are taken off.

    Raises:
        ValueError: there are no tensors in it.
    """
    for key in _CONTAINERS:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"load_weights: {where} should map names to tensors, got a {type(checkpoint).__name__}")
    tensors = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    if not tensors:
        got = listed(map(repr, checkpoint)) or "nothing"
        raise ValueError(f"load_weights: {where} should map names to tensors, got {got}; pass the part that does")
    while prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in tensors)), ""):
        tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    return tensors


def _read_safetensors(path: Path) -> tuple[StateDict, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(_damage(path, error)) from error
    own = json.loads(metadata[NUMERICS_KEY]) if NUMERICS_KEY in metadata else None
    return unwrap(state, str(path)), own if own is not None else _config_numerics(path)


def _damage(path: Path, error: Exception) -> str:
    """Says how many bytes are missing, where the header of a safetensors file still tells."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends)
        return f"load_weights: {path} is truncated or damaged: expected {expected} bytes, got {size}; save it again"
    except (struct.error, ValueError, KeyError, MemoryError, OverflowError):
        return f"load_weights: {path} should be a safetensors file, got {size} bytes that are not one ({error})"


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code is None:
            raise ValueError(
                f"load_weights: {path} should be a file that torch.save wrote, got another kind"
            ) from error
        raise ValueError(
            f"load_weights: {path} should hold tensors only, got {code[1]}, which would run code when loaded; refused. "
            "If you trust its author, load it yourself with torch.load and pass the state dict"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        size = path.stat().st_size
        raise ValueError(f"load_weights: {path} ({size} bytes) is truncated or damaged; save it again") from error


def _config_numerics(path: Path) -> dict[str, Any]:
    """Numerics from the ``config.json`` that transformers puts beside its weights."""
    config_path = path.with_name("config.json")
    if not config_path.is_file():
        return {}
    config = json.loads(config_path.read_text())
    config = config.get("vision_config", config)  # CLIP has one for each tower
    act = {"gelu_pytorch_tanh": "gelu_tanh"}.get(config.get("hidden_act"), config.get("hidden_act"))
    found = {"norm_eps": config.get("layer_norm_eps"), "act": act}
    return {name: value for name, value in found.items() if value is not None}


def _unshared(state: Mapping[str, Tensor]) -> StateDict:
    """Contiguous tensors that share no memory, as the format asks for."""
    seen: set[int] = set()
    result = {}
    for name, tensor in state.items():
        tensor = tensor.detach().contiguous()
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return result
