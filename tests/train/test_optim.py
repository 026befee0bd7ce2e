# SPDX-License-Identifier: Apache-2.0
"""AdamW's groups, the learning rate, the moving average, and the optimizer's state by name."""

import math
from collections import OrderedDict

import pytest
import torch
from torch import nn

from fvm_fast.configs.schema import OptimizerConfig
from fvm_fast.models import create_model
from fvm_fast.optim import Ema, build_optimizers, load_optimizer_tensors, optimizer_tensors, schedule_share


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def small_blocks() -> nn.Module:
    return nn.Sequential(OrderedDict(blocks=small_model()))


def step_of(model: nn.Module, optimizers: list[torch.optim.Optimizer], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(5, 3, generator=generator)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_only_matrices_decay():
    model = create_model("clip_vit_test")
    (optimizer,) = build_optimizers(model, OptimizerConfig(weight_decay=0.2))
    decayed, spared = (set(map(id, group["params"])) for group in optimizer.param_groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed | spared == names.keys() and not decayed & spared
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    kinds = ("bias", "ln_", "logit_scale", "positional_embedding", "class_embedding")
    for key, name in names.items():
        assert (key in spared) == any(kind in name for kind in kinds), name


def test_frozen_parameters_are_left_out():
    model = small_model()
    model[0].requires_grad_(False)
    (optimizer,) = build_optimizers(model, OptimizerConfig())
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(trained) == 4


def test_learning_rate_rises_then_falls():
    rates = [2.0 * schedule_share(step, 100, 10, 0.1) for step in range(101)]
    torch.testing.assert_close(rates[:10], [0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(0.2 + 1.8 * 0.5)
    assert rates[100] == pytest.approx(0.2)
    assert all(left > right for left, right in zip(rates[10:], rates[11:], strict=False))
    assert schedule_share(0, 1, 0) == 1.0
    assert schedule_share(500, 100, 10) == 0.0


def test_ema_follows_its_formula():
    model = nn.BatchNorm1d(2)
    ema = Ema(model, 0.5)
    expected = {name: tensor.clone().double() for name, tensor in model.state_dict().items()}
    for step in range(8):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, generator=torch.Generator().manual_seed(step)))
            model.num_batches_tracked += 1
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected["weight"] = decay * expected["weight"] + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(ema.average["weight"].double(), expected["weight"], rtol=1e-6, atol=1e-6)
    assert int(ema.average["num_batches_tracked"]) == 8
    with pytest.raises(ValueError, match=r"run.ema_decay.*got 1.5"):
        Ema(model, 1.5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_state_by_name_continues_bit_for_bit(name):
    models = [small_blocks() for _ in range(2)]
    optimizers = [build_optimizers(model, OptimizerConfig(name, lr=1e-2)) for model in models]
    for seed in range(3):
        step_of(models[0], optimizers[0], seed)
    models[1].load_state_dict(models[0].state_dict())
    load_optimizer_tensors(models[1], optimizers[1], optimizer_tensors(models[0], optimizers[0]))
    for seed in range(3, 6):
        for model, optimizer in zip(models, optimizers, strict=True):
            step_of(model, optimizer, seed)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)
    state = optimizer_tensors(models[0], optimizers[0])
    assert math.isfinite(float(state["blocks.1.weight/step"]))
    assert ("blocks.0.weight/momentum_buffer" in state) == (name == "muon")


def test_muon_takes_the_matrices_of_the_blocks():
    model = create_model("clip_vit_test")
    _, muon = build_optimizers(model, OptimizerConfig("muon", muon_lr=0.5))
    names = {parameter: name for name, parameter in model.named_parameters()}
    taken = {names[p] for group in muon.param_groups for p in group["params"]}
    assert taken == {name for name, p in model.named_parameters() if "resblocks" in name and p.ndim == 2}
    assert muon.param_groups[0]["peak_lr"] == 0.5
    with pytest.raises(ValueError, match="adamw or muon, got 'sgd'"):
        build_optimizers(model, OptimizerConfig("sgd"))
