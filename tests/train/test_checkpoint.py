# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or absent, checked when read, the older one used when the newer is damaged."""

import json

import pytest
import torch

from fvm_fast.checkpoint import (
    Checkpoint,
    check_checkpoint,
    load_checkpoint,
    load_model_file,
    newest_checkpoint,
    save_checkpoint,
    save_model,
)


def checkpoint_of(step: int, ema: bool = False) -> Checkpoint:
    torch.manual_seed(step)
    model = {"weight": torch.randn(3, 5), "count": torch.tensor(step), "half": torch.randn(2).bfloat16()}
    optimizer = {"weight/exp_avg": torch.randn(3, 5), "weight/step": torch.tensor(float(step))}
    average = {name: tensor + 1 for name, tensor in model.items()} if ema else {}
    return Checkpoint(step, model, optimizer, average, {"model": "toy", "sizes": [1, 2]}, {"threads": 2}, 1.5 * step)


@pytest.mark.parametrize("ema", [False, True])
def test_round_trip(tmp_path, ema):
    saved = checkpoint_of(7, ema)
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved, keep=2))
    for part in ("model", "optimizer", "ema"):
        torch.testing.assert_close(getattr(loaded, part), getattr(saved, part), rtol=0, atol=0)
    assert (loaded.step, loaded.spec, loaded.environment) == (7, saved.spec, saved.environment)
    assert loaded.seconds == 10.5


def test_model_file_holds_the_average_when_there_is_one(tmp_path):
    saved = checkpoint_of(1, ema=True)
    weights, spec = load_model_file(save_checkpoint(tmp_path, saved, keep=1) / "model.safetensors")
    torch.testing.assert_close(weights, saved.ema)
    assert spec == saved.spec


def test_keeps_the_newest_and_points_to_the_last(tmp_path):
    for step in (3, 100, 20):
        save_checkpoint(tmp_path, checkpoint_of(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-000020", "step-000100"]
    assert (tmp_path / "last").resolve().name == "step-000020"


def damage_by_truncation(path):
    with (path / "state.safetensors").open("r+b") as file:
        file.truncate(100)
    return "state.safetensors should have"


def damage_by_a_flipped_bit(path):
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    return "model.safetensors are not those that were written"


def damage_by_a_missing_file(path):
    (path / "model.safetensors").unlink()
    return "got 0"


def damage_of_the_manifest(path):
    (path / "state.json").write_text('{"step": 2, ')
    return "state.json cannot be read"


DAMAGE = [damage_by_truncation, damage_by_a_flipped_bit, damage_by_a_missing_file, damage_of_the_manifest]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_skipped_with_a_sentence(tmp_path, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint_of(step), keep=3)
    message = damage(tmp_path / "step-000002")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "step-000002")
    path, complaints = newest_checkpoint(tmp_path)
    assert path == tmp_path / "step-000001"
    assert len(complaints) == 1
    assert message in complaints[0] and "skipped" in complaints[0]


def test_half_written_checkpoint_is_never_seen(tmp_path):
    save_checkpoint(tmp_path, checkpoint_of(1), keep=3)
    (tmp_path / ".step-000002.tmp").mkdir()
    (tmp_path / ".step-000002.tmp" / "model.safetensors").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-000001", [])
    save_checkpoint(tmp_path, checkpoint_of(2), keep=3)
    assert check_checkpoint(tmp_path / "step-000002")["step"] == 2


def test_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path / "absent") == (None, [])


def test_model_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_model_file(tmp_path / "absent.safetensors")
    save_model(tmp_path / "m.safetensors", {"w": torch.ones(50)}, {"model": "toy"})
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=f"expected a whole safetensors file, got {len(whole) - 10} bytes"):
        load_model_file(tmp_path / "m.safetensors")


def test_no_pickle_in_any_file(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint_of(1, ema=True), keep=1)
    assert sorted(file.name for file in path.iterdir()) == ["model.safetensors", "state.json", "state.safetensors"]
    assert json.loads((path / "state.json").read_text())["files"].keys() == {"model.safetensors", "state.safetensors"}
