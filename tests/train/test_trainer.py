# SPDX-License-Identifier: Apache-2.0
"""The loop: bit-exact resumption, stopping well, and steps that are what they say."""

import json
import os
import signal

import pytest
import torch
from toy import toy_config, toy_trainer

from fvm_fast.checkpoint import load_checkpoint, newest_checkpoint
from fvm_fast.optim import optimizer_tensors
from fvm_fast.run_folder import RunFolder, find_resume_point
from fvm_fast.train import Interrupted, TrainingDiverged

TIMINGS = ("seconds", "pairs_per_second", "data_wait_percent")


def run(path, config, resume=None, loss="clip"):
    """Train to the end of `config`, from the newest checkpoint if `resume`."""
    start = find_resume_point(RunFolder(path), resume)
    checkpoint = load_checkpoint(start) if start else None
    trainer = toy_trainer(path, config, checkpoint.step if checkpoint else 0, loss)
    if checkpoint:
        trainer.restore(checkpoint)
    try:
        trainer.fit()
    finally:
        trainer.folder.close()
    return trainer


def metrics(path):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def assert_same_state(left, right):
    torch.testing.assert_close(left.model.state_dict(), right.model.state_dict(), rtol=0, atol=0)
    states = (optimizer_tensors(trainer.model, trainer.optimizers) for trainer in (left, right))
    torch.testing.assert_close(*states, rtol=0, atol=0)
    if left.ema is not None:
        torch.testing.assert_close(left.ema.average, right.ema.average, rtol=0, atol=0)


def stop_at(trainer, step, signum=signal.SIGINT):
    """Send a signal to this process while the trainer computes step number `step` = 1, 2, ..."""
    forward, count = trainer.objective.forward, iter(range(1, 1000))

    def noisy(batch):
        if next(count) == step:
            os.kill(os.getpid(), signum)
        return forward(batch)

    trainer.objective.forward = noisy


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_six_and_six_steps_are_twelve(tmp_path, ema):
    config = toy_config(ema_decay=ema)
    whole = run(tmp_path / "whole", config)

    first = toy_trainer(tmp_path / "parts", config)
    stop_at(first, 6)
    with pytest.raises(Interrupted):
        first.fit()
    first.folder.close()
    torch.randn(7)  # the state of torch's own generator should not matter
    second = run(tmp_path / "parts", config, "auto")

    assert_same_state(whole, second)
    assert [row["step"] for row in metrics(tmp_path / "parts")] == list(range(1, 13))
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_steps_after_the_checkpoint_are_done_again_and_not_doubled(tmp_path):
    config = toy_config(checkpoint_every=5)
    whole = run(tmp_path / "whole", config)
    run(tmp_path / "cut", config)
    for step in (10, 12):  # as if killed after step 8
        for file in (tmp_path / "cut" / "checkpoints" / f"step-{step:06d}").iterdir():
            file.unlink()
        (tmp_path / "cut" / "checkpoints" / f"step-{step:06d}").rmdir()
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "metrics.jsonl").write_text("".join(lines[:8]) + lines[8][:20])
    again = run(tmp_path / "cut", config, "auto")
    assert_same_state(whole, again)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, caplog):
    config = toy_config()
    whole = run(tmp_path / "whole", config)
    run(tmp_path / "cut", config)
    with (tmp_path / "cut" / "checkpoints" / "step-000012" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    again = run(tmp_path / "cut", config, "auto")
    assert "model.safetensors should have" in caplog.text and "it is skipped" in caplog.text
    assert_same_state(whole, again)


def test_all_checkpoints_damaged(tmp_path):
    run(tmp_path, toy_config(checkpoint_every=20))
    (tmp_path / "checkpoints" / "step-000012" / "state.json").write_text("")
    with pytest.raises(ValueError, match=r"no checkpoint below .* is whole"):
        find_resume_point(RunFolder(tmp_path), "auto")


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(tmp_path, toy_config())
    with pytest.raises(ValueError, match=r"already holds a run.*--resume auto"):
        find_resume_point(RunFolder(tmp_path), None)
    with pytest.raises(FileNotFoundError, match=r"expected 'auto' or a checkpoint folder .*, got '/nowhere'"):
        find_resume_point(RunFolder(tmp_path), "/nowhere")


def test_another_model_is_refused(tmp_path):
    trainer = run(tmp_path, toy_config())
    checkpoint = load_checkpoint(newest_checkpoint(tmp_path / "checkpoints")[0])
    checkpoint.model["logit_scale"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"step 12 holds another model than .* size mismatch for logit_scale"):
        trainer.restore(checkpoint)


def test_another_environment_is_named(tmp_path, caplog):
    trainer = run(tmp_path, toy_config())
    checkpoint = load_checkpoint(newest_checkpoint(tmp_path / "checkpoints")[0])
    caplog.clear()
    trainer.restore(checkpoint)
    assert caplog.messages == []
    checkpoint.environment["threads"] = 99
    trainer.restore(checkpoint)
    assert len(caplog.messages) == 1
    assert f"resume: threads was 99 and is {torch.get_num_threads()} now" in caplog.messages[0]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(tmp_path, signum, code):
    before = signal.getsignal(signum)
    trainer = toy_trainer(tmp_path, toy_config(checkpoint_every=100))
    stop_at(trainer, 4, signum)
    with pytest.raises(Interrupted, match="stopped at step 4 of 12, which is saved") as caught:
        trainer.fit()
    trainer.folder.close()
    assert caught.value.exit_code == code
    assert newest_checkpoint(tmp_path / "checkpoints")[0].name == "step-000004"
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_training_stops_when_numbers_end(tmp_path, broken):
    trainer = toy_trainer(tmp_path, toy_config())
    forward, step = trainer.objective.forward, iter(range(1, 100))

    def diverging(batch):
        outputs = forward(batch)
        if next(step) == 5:
            loss = outputs["loss"]
            infinite = loss * torch.inf if broken == "loss" else loss + (0 * loss).sqrt()  # sqrt'(0) is infinite
            outputs["loss"] = infinite
        return outputs

    trainer.objective.forward = diverging
    with pytest.raises(TrainingDiverged, match=r"stopped at step 5: .*last good checkpoint is .*step-000003; lower"):
        trainer.fit()
    trainer.folder.close()
    assert all(weight.isfinite().all() for weight in trainer.model.state_dict().values())
    assert load_checkpoint(newest_checkpoint(tmp_path / "checkpoints")[0]).step == 3


def test_time_limit_saves_and_stops(tmp_path):
    trainer = run(tmp_path, toy_config(max_minutes=1e-9, checkpoint_every=100))
    assert trainer.step == 1
    assert newest_checkpoint(tmp_path / "checkpoints")[0].name == "step-000001"


def test_the_temperature_is_bounded_after_each_step(tmp_path):
    trainer = toy_trainer(tmp_path, toy_config())
    torch.nn.init.constant_(trainer.model.logit_scale, 9.0)
    trainer.fit()
    trainer.folder.close()
    scales = [row["logit_scale"] for row in metrics(tmp_path)]
    assert scales[0] > 100 and max(scales[1:]) <= 100.001


def test_accumulated_gradient_is_the_mean_of_the_micro_batches(tmp_path):
    config = toy_config()
    config.optimizer.accumulate = 3
    trainer = toy_trainer(tmp_path, config)
    trainer.model.visual.patch_dropout = 0.0
    batches = [batch for _, batch in zip(range(3), trainer.loader.batches(), strict=False)]
    losses = torch.stack([trainer.objective(batch)["loss"] for batch in batches])
    parameters = list(trainer.model.parameters())
    expected = torch.autograd.grad(losses.mean(), parameters)
    loss, _, _ = trainer._accumulate(iter(batches))
    assert loss == pytest.approx(losses.mean().item())
    torch.testing.assert_close([parameter.grad for parameter in parameters], list(expected))
    trainer.folder.close()


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_bf16_and_clipped_gradients_train(tmp_path, loss):
    config = toy_config(precision="bf16")
    config.optimizer.clip_grad_norm = 0.5
    config.schedule.steps = 40
    run(tmp_path, config, loss=loss)
    rows = metrics(tmp_path)
    assert sum(row["loss"] for row in rows[-8:]) < 0.9 * sum(row["loss"] for row in rows[:8])
    assert rows[0]["lr"] == pytest.approx(1e-3 / 3)


def test_training_learns(tmp_path):
    config = toy_config(checkpoint_every=200)
    config.schedule.steps = 100
    trainer = run(tmp_path, config)
    rows = metrics(tmp_path)
    assert sum(row["accuracy"] for row in rows[-20:]) / 20 > 0.9  # chance: 0.25
    assert trainer.model.logit_scale.exp().item() <= 100.0


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("schedule", "steps", 0), ("run", "checkpoint_every", 0), ("optimizer", "accumulate", -1), ("run", "keep", 0)],
)
def test_impossible_numbers(tmp_path, section, name, value):
    config = toy_config()
    setattr(getattr(config, section), name, value)
    with pytest.raises(ValueError, match=rf"{section}\.{name} should be 1 or more, got {value}"):
        toy_trainer(tmp_path, config)
    config = toy_config(precision="fp8")
    with pytest.raises(ValueError, match="fp32 or bf16, got 'fp8'"):
        toy_trainer(tmp_path, config)
