# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: whole or refused with a sentence; no code is run; a failed write leaves the old file."""

import os
from pathlib import Path

import pytest
import torch

import fvm_fast.weights.files as files
from fvm_fast import create_model, load_weights
from fvm_fast.weights import read_checkpoint, write_safetensors

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def assert_same(state: dict) -> None:
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())


def test_safetensors_there_and_back(tmp_path):
    path = tmp_path / "new" / "weights.safetensors"
    write_safetensors(STATE, path, {files.NUMERICS_KEY: '{"norm_eps": 1e-05}'})
    state, numerics = read_checkpoint(path)
    assert_same(state)
    assert numerics == {"norm_eps": 1e-5}
    assert os.listdir(path.parent) == ["weights.safetensors"]


def test_views_and_shared_tensors_are_written(tmp_path):
    base = torch.randn(4, 6)
    state = {"tied": base, "same": base, "transposed": base.T, "slice": base[1:3], "stride": base[:, ::2]}
    write_safetensors(state, tmp_path / "views.safetensors")
    again, _ = read_checkpoint(tmp_path / "views.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    write_safetensors(STATE, path)

    def full_disk(state, beside, metadata):
        Path(beside).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors({"b": torch.zeros(3)}, path)
    assert_same(read_checkpoint(path)[0])
    assert os.listdir(tmp_path) == ["weights.safetensors"]


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_pickles_of_tensors_are_read_and_unwrapped(suffix, tmp_path):
    path = tmp_path / f"checkpoint{suffix}"
    torch.save({"model": {f"module.{name}": tensor for name, tensor in STATE.items()}, "epoch": 7}, path)
    assert_same(read_checkpoint(path)[0])


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    torch.save({"model": STATE, "extra": Bomb()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth should hold tensors only, got posix.mkdir, which would run"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("keep", [0, 4, 20, 100, -1])
def test_a_truncated_safetensors_file_is_refused(keep, tmp_path):
    path = tmp_path / "cut.safetensors"
    write_safetensors(STATE, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(ValueError, match="cut.safetensors") as refusal:
        load_weights(create_model("vit_test_patch16_64"), path)
    if keep == -1:
        assert f"expected {len(whole)} bytes, got {len(whole) - 1}" in str(refusal.value)


@pytest.mark.parametrize("keep", [0, 10, 300, -1])
def test_a_truncated_pickle_is_refused(keep, tmp_path):
    path = tmp_path / "cut.pth"
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="cut.pth.* is truncated or damaged|cut.pth should be a file"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["text.safetensors", "text.pth"])
def test_a_file_of_another_kind_is_refused(name, tmp_path):
    (tmp_path / name).write_text("Not a checkpoint at all, but a letter to a friend.\n" * 9)
    with pytest.raises(ValueError, match=f"{name}.*(should be|is truncated or damaged)"):
        read_checkpoint(tmp_path / name)


def test_other_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="should be a checkpoint at .*none.safetensors, got no such file"):
        read_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        read_checkpoint(tmp_path)
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="should end in .safetensors, .pth, .pt or .bin, got weights.npz"):
        read_checkpoint(tmp_path / "weights.npz")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="should map names to tensors, got a list"):
        read_checkpoint(tmp_path / "list.pth")
