# SPDX-License-Identifier: Apache-2.0
"""What moves the weights: AdamW or Muon, warm-up and cosine, a moving average of the weights."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from fvm_fast.configs.schema import OptimizerConfig

HIDDEN_MATRIX = re.compile(r"blocks\.\d+\..*")  # parameters of a transformer block, in timm's and in open_clip's names


def build_optimizers(model: nn.Module, options: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a model: AdamW for all of it, or Muon for the matrices of its blocks and AdamW for the rest.

    AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101) decays matrices only: gains, biases, the logit scale, and what
    ``model.no_weight_decay()`` names, are left alone. Muon (Jordan et al., 2024; scaled as Liu et al., 2025,
    arXiv:2502.16982) orthogonalises the momentum of a hidden matrix. Each group carries its ``peak_lr``.
    """
    if options.name not in ("adamw", "muon"):
        raise ValueError(f"optimizer.name should be adamw or muon, got {options.name!r}")
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    hidden, decayed, left_alone = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if options.name == "muon" and parameter.ndim == 2 and HIDDEN_MATRIX.search(name):
            hidden.append(parameter)
        else:
            (decayed if parameter.ndim >= 2 and name not in spared else left_alone).append(parameter)
    decay = options.weight_decay
    groups = [{"params": decayed, "weight_decay": decay}, {"params": left_alone, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)]
    if hidden:
        rate = options.muon_lr
        optimizers.append(torch.optim.Muon(hidden, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Set every group to ``share`` of its peak rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]


def schedule_share(step: int, steps: int, warmup_steps: int, final_share: float = 0.0) -> float:
    """Share of the peak rate at step 0, 1, ...: a line up to 1, then a cosine down to ``final_share``."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return final_share + (1.0 - final_share) * cosine


class Ema:
    """Exponential moving average of a model's floating state: ``average <- d * average + (1 - d) * weights``.

    The decay starts low, ``d = min(decay, (1 + t) / (10 + t))`` after ``t`` updates, so that the first weights are soon
    forgotten (as in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"run.ema_decay should be above 0 and below 1, or 0 for none, got {decay}")
        self.decay = decay
        self.average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step number ``step`` = 0, 1, ..."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = [], []
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                averages.append(self.average[name])
                weights.append(tensor)
            else:
                self.average[name].copy_(tensor)
        torch._foreach_lerp_(averages, weights, 1.0 - decay)


def optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state as flat tensors, named ``<parameter>/<state>`` after the model's parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]
) -> None:
    """Put back what :func:`optimizer_tensors` gave."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for path, tensor in tensors.items():
            name, key = path.rsplit("/", 1)
            if name in order:
                state.setdefault(order.index(name), {})[key] = tensor.clone()
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
