# SPDX-License-Identifier: Apache-2.0
"""The same training steps twice, side by side: ours, and a plain open_clip loop on the same batches and weights.

The rival is what a user of open_clip writes: ``open_clip.CLIP``, ``open_clip.ClipLoss``, images turned to floats and
normalised with torch, the same optimizer. Steps alternate between the two, so that both meet the same load.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fvm_fast.build import build_loader, build_model, build_pairs, build_tokenizer, model_spec
from fvm_fast.configs.schema import TrainConfig
from fvm_fast.distributed import World
from fvm_fast.objectives import ContrastivePretraining
from fvm_fast.objectives.contrastive import MAX_LOGIT_SCALE
from fvm_fast.optim import build_optimizers, schedule_share, set_learning_rate

WARM_UP = 3  # first steps, not timed
CLOCKED = 3  # steps over which the time inside our ops is averaged


@dataclass
class Comparison:
    """What :func:`compare_open_clip` measured.

    Attributes:
        steps: steps compared.
        loss_difference: largest relative difference of the two losses of a step.
        ours_ms, theirs_ms: median time of a step, data not counted.
        ours_mb, theirs_mb: peak memory of a step beyond what rests between steps; None where the system cannot say.
        ops_share: part of our step spent inside fvm_fast's native ops, 0 to 1.
    """

    steps: int
    loss_difference: float
    ours_ms: float
    theirs_ms: float
    ours_mb: float | None
    theirs_mb: float | None
    ops_share: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)

    def sentence(self) -> str:
        """The result in words."""
        memory = ""
        if self.ours_mb and self.theirs_mb:
            memory = f"; extra memory a step {self.ours_mb:.0f} MB against {self.theirs_mb:.0f} MB"
        return (
            f"first {self.steps} steps against a plain open_clip loop: largest relative difference of the loss "
            f"{self.loss_difference:.1e}; {self.ours_ms:.0f} ms a step against {self.theirs_ms:.0f} ms "
            f"({self.theirs_ms / self.ours_ms:.2f}x){memory}; {100 * self.ops_share:.0f} % of our step is in our ops"
        )


def compare_open_clip(config: TrainConfig, steps: int) -> Comparison:
    """Run the first ``steps`` steps of ``config`` both ways, on the CPU in float32.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: the configuration trains something open_clip's ClipLoss does not compute.
    """
    if config.objective.loss != "clip" or config.objective.label_smoothing or config.objective.multi_positive:
        raise ValueError("comparison: open_clip's ClipLoss has no counterpart of this objective; use loss=clip alone")
    tokenizer = build_tokenizer(config.data.tokenizer, config.data.context_length)
    loader = build_loader(config, build_pairs(config.data), tokenizer, World(0, 1, torch.device("cpu"), None))
    ours = _our_step(config, build_model(model_spec(config, tokenizer)))
    theirs = _their_step(config, build_model(model_spec(config, tokenizer)))
    differences, times = [], ([], [])
    for step, batch in zip(range(steps), loader.batches(), strict=False):
        losses = []
        for run, spent in zip((ours, theirs), times, strict=True):
            started = time.perf_counter()
            losses.append(run(batch, step))
            spent.append(1e3 * (time.perf_counter() - started))
        differences.append(abs(losses[0] - losses[1]) / abs(losses[1]))
    ours_ms, theirs_ms = (statistics.median(spent[WARM_UP:] or spent) for spent in times)
    ours_mb, theirs_mb = (_extra_megabytes(lambda run=run: run(batch, steps)) for run in (ours, theirs))
    with _OpsClock() as clock:
        for _ in range(CLOCKED):
            ours(batch, steps)
    share = clock.milliseconds / CLOCKED / ours_ms
    return Comparison(steps, max(differences), ours_ms, theirs_ms, ours_mb, theirs_mb, share)


Step = Callable[[dict[str, Tensor], int], float]


def _our_step(config: TrainConfig, model: nn.Module) -> Step:
    objective = ContrastivePretraining(model.train(), config.objective.loss)

    def run(batch: dict[str, Tensor], step: int) -> float:
        loss = objective(batch)["loss"]
        update(loss, step)
        objective.after_step()
        return float(loss.detach())

    update = _updater(config, model, model)
    return run


def _their_step(config: TrainConfig, model: nn.Module) -> Step:
    try:
        import open_clip
    except ImportError:
        raise ImportError(
            "comparison left out, since open_clip is not installed: pip install open_clip_torch, or run.compare_steps=0"
        ) from None
    rival = open_clip_twin(model).train()
    criterion = open_clip.ClipLoss()
    mean, std = (getattr(model.visual, name).flatten()[:, None, None].clone() for name in ("image_mean", "image_std"))

    def run(batch: dict[str, Tensor], step: int) -> float:
        images = (batch["images"].float() / 255.0 - mean) / std
        loss = criterion(*rival(images, batch["tokens"]))
        update(loss, step)
        with torch.no_grad():
            rival.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)
        return float(loss.detach())

    update = _updater(config, rival, model)
    return run


def open_clip_twin(model: nn.Module) -> nn.Module:
    """An ``open_clip.CLIP`` of the sizes and the weights of our CLIP."""
    import open_clip

    visual, text = model.visual, model.transformer
    width = visual.transformer.width
    vision_block, text_block = visual.transformer.resblocks[0], text.resblocks[0]
    twin = open_clip.CLIP(
        embed_dim=visual.output_dim,
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=visual.transformer.layers,
            width=width,
            head_width=width // vision_block.attn.num_heads,
            mlp_ratio=vision_block.mlp.c_fc.out_features / width,
            patch_size=visual.patch_size,
            image_size=visual.image_size,
        ),
        text_cfg=open_clip.CLIPTextCfg(
            context_length=model.context_length,
            vocab_size=model.vocab_size,
            width=text.width,
            heads=text_block.attn.num_heads,
            layers=text.layers,
            mlp_ratio=text_block.mlp.c_fc.out_features / text.width,
        ),
        quick_gelu=type(vision_block.mlp.gelu).__name__ == "QuickGELU",
    )
    twin.load_state_dict(model.state_dict())
    return twin


def _updater(config: TrainConfig, trained: nn.Module, model: nn.Module) -> Callable[[Tensor, int], None]:
    """Backward pass and optimizer step on ``trained``; ``model``, of the same names, decides what decays."""
    options, schedule = config.optimizer, config.schedule
    if trained is not model:
        trained.no_weight_decay = model.no_weight_decay
    optimizers = build_optimizers(trained, options)

    def update(loss: Tensor, step: int) -> None:
        set_learning_rate(
            optimizers, schedule_share(step, schedule.steps, schedule.warmup_steps, schedule.final_lr_share)
        )
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        if options.clip_grad_norm:
            nn.utils.clip_grad_norm_(trained.parameters(), options.clip_grad_norm)
        for optimizer in optimizers:
            optimizer.step()

    return update


def _extra_megabytes(run: Callable[[], Any]) -> float | None:
    """Peak of the resident memory during ``run`` above what was resident before; Linux only."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status_kb("VmRSS")
        run()
        return (_status_kb("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return None


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


class _OpsClock(TorchDispatchMode):
    """While active, adds up the time spent inside fvm_fast's ops, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.milliseconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        started = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if func.namespace == "fvm_fast":
            self.milliseconds += 1e3 * (time.perf_counter() - started)
        return result
