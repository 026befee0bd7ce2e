# SPDX-License-Identifier: Apache-2.0
"""The training loop: one for every objective, and able to stop and go on at any step without a difference in any bit.

All that is random about step ``t`` (order, captions, augmentation, dropout) is drawn from generators seeded by
``(seed, t)``, so a checkpoint needs the weights, the optimizer's moments and ``t``, and no generator state.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fvm_fast.checkpoint import Checkpoint, save_checkpoint
from fvm_fast.configs.schema import TrainConfig
from fvm_fast.data.loader import PairLoader
from fvm_fast.data.sampler import stream_seed
from fvm_fast.distributed import World
from fvm_fast.ops import _backend
from fvm_fast.optim import (
    Ema,
    build_optimizers,
    load_optimizer_tensors,
    optimizer_tensors,
    schedule_share,
    set_learning_rate,
)
from fvm_fast.progress import Progress
from fvm_fast.run_folder import RunFolder

log = logging.getLogger("fvm_fast")

DROPOUT_STREAM = 3


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no number any more."""

    exit_code = 1


class Interrupted(RuntimeError):
    """A signal asked the run to stop; its state was saved."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class Trainer:
    """Trains an objective on batches from a loader, into a run folder.

    Args:
        objective: ``objective(batch) -> {"loss": ...}``, with the ``model`` to save, and optionally ``after_step()``
            and ``metrics(outputs)``.
        loader: gives batch number ``step`` as a pure function of it.
        config: optimizer, schedule and run sections are read.
        folder: where metrics and checkpoints go.
        world: the processes of the run.
        spec: how to build the model, stored with its weights.
    """

    def __init__(
        self,
        objective: nn.Module,
        loader: PairLoader,
        config: TrainConfig,
        folder: RunFolder,
        world: World,
        spec: dict[str, Any],
    ) -> None:
        check_config(config)
        self.objective = objective.to(world.device).train()
        self.model: nn.Module = objective.model
        self.loader, self.config, self.folder, self.world, self.spec = loader, config, folder, world, spec
        self.optimizers = build_optimizers(self.model, config.optimizer)
        self.ema = Ema(self.model, config.run.ema_decay) if config.run.ema_decay else None
        self.runner = self._wrap(objective)
        self.step = 0
        self._seconds_before = 0.0
        self._started = time.perf_counter()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, saying what differs between its environment and this one."""
        try:
            self.model.load_state_dict(checkpoint.model)
        except RuntimeError as error:
            raise ValueError(
                f"resume: the checkpoint of step {checkpoint.step} holds another model than the configuration makes: "
                f"{' '.join(str(error).split())[:300]}"
            ) from None
        load_optimizer_tensors(self.model, self.optimizers, checkpoint.optimizer)
        if self.ema is not None:
            self.ema.average = {
                name: t.to(self.world.device) for name, t in (checkpoint.ema or checkpoint.model).items()
            }
        self.step = checkpoint.step
        self._seconds_before = checkpoint.seconds
        for key, now in self.environment().items():
            before = checkpoint.environment.get(key)
            if before != now:
                log.warning(
                    "resume: %s was %s and is %s now, so the last bits of the results may differ", key, before, now
                )

    def fit(self) -> None:
        """Train to the last step, or to the time limit.

        Raises:
            TrainingDiverged: a loss or gradient is NaN or infinite; the weights are those before that step.
            Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
        """
        run, steps = self.config.run, self.config.schedule.steps
        self._started = time.perf_counter()
        progress = Progress(steps, self.step, run.print_every, enabled=self.world.is_main)
        with progress, Signals() as signals:
            batches = self.loader.batches(self.step * self.config.optimizer.accumulate)
            while self.step < steps:
                record = self._train_step(batches)
                self._report(record, progress)
                signum = self.world.largest(signals.received)
                out_of_time = run.max_minutes and self.world.largest(self.seconds() >= 60 * run.max_minutes)
                stop = signum or out_of_time or self.step == steps
                if stop or self.step % run.checkpoint_every == 0:
                    self.save()
                if signum:
                    raise Interrupted(f"stopped at step {self.step} of {steps}, which is saved", signum)
                if out_of_time:
                    log.info("run.max_minutes: %g minutes are over at step %d of %d", run.max_minutes, self.step, steps)
                    break

    def save(self) -> None:
        """Write a checkpoint of this step."""
        if self.world.is_main:
            self.folder.sync()
            checkpoint = Checkpoint(
                self.step,
                self.model.state_dict(),
                optimizer_tensors(self.model, self.optimizers),
                {} if self.ema is None else self.ema.average,
                self.spec | {"step": self.step},
                self.environment(),
                self.seconds(),
            )
            save_checkpoint(self.folder.checkpoints, checkpoint, self.config.run.keep)
        self.world.wait()

    def seconds(self) -> float:
        """Time spent in training, that before a resumption included."""
        return self._seconds_before + time.perf_counter() - self._started

    def environment(self) -> dict[str, Any]:
        """What the last bits of a result depend on, besides the configuration."""
        return {
            "threads": torch.get_num_threads(),
            "instruction set": _backend.isa(),
            "backend": _backend._mode,
            "torch": torch.__version__,
            "torch instruction set": torch.backends.cpu.get_cpu_capability(),
            "device": self.world.device.type,
            "processes": self.world.size,
        }

    def _wrap(self, objective: nn.Module) -> nn.Module:
        runner = objective
        if self.world.group is not None:
            device_ids = [self.world.device.index] if self.world.device.type == "cuda" else None
            runner = DistributedDataParallel(runner, device_ids=device_ids, process_group=self.world.group)
        return torch.compile(runner) if self.config.run.compile else runner

    def _train_step(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, Any]:
        """One optimizer step; returns its line of metrics."""
        started = time.perf_counter()
        options, schedule = self.config.optimizer, self.config.schedule
        share = schedule_share(self.step, schedule.steps, schedule.warmup_steps, schedule.final_lr_share)
        set_learning_rate(self.optimizers, share)
        lr = share * options.lr
        torch.manual_seed(stream_seed(self.config.run.seed, self.step, DROPOUT_STREAM, self.world.rank))
        loss, waited, outputs = self._accumulate(batches)
        limit = options.clip_grad_norm or math.inf
        grad_norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        self._stop_unless_finite(loss, grad_norm, lr)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if hasattr(self.objective, "after_step"):
            self.objective.after_step()
        if self.ema is not None:
            self.ema.update(self.model, self.step)
        self.step += 1
        spent = time.perf_counter() - started
        pairs = options.batch_size * options.accumulate
        speed = {
            "pairs_per_second": pairs / spent,
            "data_wait_percent": 100 * waited / spent,
            "seconds": self.seconds(),
        }
        return {"step": self.step, "loss": loss, "lr": lr, "grad_norm": grad_norm, "outputs": outputs, **speed}

    def _accumulate(self, batches: Iterator[dict[str, Tensor]]) -> tuple[float, float, dict[str, Tensor]]:
        """Gradients of the micro-batches of one step: mean loss, seconds waited for data, last outputs."""
        count = self.config.optimizer.accumulate
        loss = waited = 0.0
        for micro in range(count):
            asked = time.perf_counter()
            batch = {key: tensor.to(self.world.device, non_blocking=True) for key, tensor in next(batches).items()}
            waited += time.perf_counter() - asked
            last = micro == count - 1
            with contextlib.nullcontext() if last or self.world.group is None else self.runner.no_sync():
                with self._autocast():
                    outputs = self.runner(batch)
                (outputs["loss"] / count).backward()
            loss += float(outputs["loss"].detach()) / count
        return loss, waited, outputs

    def _autocast(self) -> contextlib.AbstractContextManager:
        enabled = self.config.run.precision == "bf16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=enabled)

    def _stop_unless_finite(self, loss: float, grad_norm: float, lr: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        last = self.folder.checkpoints / "last"
        kept = f"the last good checkpoint is {last.resolve()}" if last.exists() else "there is no checkpoint yet"
        raise TrainingDiverged(
            f"training stopped at step {self.step + 1}: the loss is {loss:g} and the norm of the gradient "
            f"{grad_norm:g} at rate {lr:.2g}; {kept}; lower optimizer.lr, lengthen schedule.warmup_steps or clip with "
            "optimizer.clip_grad_norm=1"
        )

    def _report(self, record: dict[str, Any], progress: Progress) -> None:
        outputs = record.pop("outputs")
        if not self.world.is_main:
            return
        speed, seconds = record["pairs_per_second"], record["seconds"] - self._seconds_before
        progress.show(record["step"], record["loss"], record["lr"], speed, seconds)
        if self.step % self.config.run.log_every == 0 or self.step == self.config.schedule.steps:
            if hasattr(self.objective, "metrics"):
                record |= self.objective.metrics(outputs)
            self.folder.record(record)


class Signals:
    """While open, the first SIGINT or SIGTERM is only noted, in ``received``; the second acts as usual."""

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for signum in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        signal.signal(signum, self._previous[signum])
        log.info("%s: finishing this step and saving; once more stops at once", signal.Signals(signum).name)


def check_config(config: TrainConfig) -> None:
    """Refuse values that no run can work with.

    Raises:
        ValueError: names the value, what it should be and what it is.
    """
    at_least_one = {
        "schedule.steps": config.schedule.steps,
        "optimizer.batch_size": config.optimizer.batch_size,
        "optimizer.accumulate": config.optimizer.accumulate,
        "run.checkpoint_every": config.run.checkpoint_every,
        "run.keep": config.run.keep,
        "run.log_every": config.run.log_every,
        "run.print_every": config.run.print_every,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{name} should be 1 or more, got {value}")
    if config.run.precision not in ("fp32", "bf16"):
        raise ValueError(f"run.precision should be fp32 or bf16, got {config.run.precision!r}")
