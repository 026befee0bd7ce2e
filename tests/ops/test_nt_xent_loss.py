# SPDX-License-Identifier: Apache-2.0
"""nt_xent_loss: the reference against loops, the kernels against the reference."""

import pytest
import torch
import torch.nn.functional as F
from common import DTYPES, EPS
from contrastive_common import features
from temperature_common import check_accuracy
from torch import Tensor

from fvm_fast.ops import backend, nt_xent_loss, nt_xent_loss_reference

# images, width: tiles that are whole and partial, one and several blocks, diagonals that cross the tiles anywhere
SIZES = [(1, 1), (1, 40), (2, 3), (7, 16), (8, 64), (15, 33), (16, 129), (61, 5), (112, 64), (149, 32), (283, 17)]


def test_reference_equals_loops() -> None:
    z1, z2 = features(5, 4), features(5, 4)
    rows, T, losses = [*z1, *z2], 0.3, []
    for i, row in enumerate(rows):
        others = torch.stack([row @ other / T for j, other in enumerate(rows) if j != i])
        losses.append(others.exp().sum().log() - row @ rows[(i + 5) % 10] / T)
    torch.testing.assert_close(nt_xent_loss_reference(z1, z2, T), sum(losses) / 10)


def eager(z1: Tensor, z2: Tensor, temperature: Tensor) -> Tensor:
    """What one writes in torch, in the dtype of the features."""
    z = torch.cat([z1, z2])
    logits = (z @ z.T / temperature).to(z.dtype)
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    loss = F.cross_entropy(logits, torch.arange(len(z)).roll(len(z1)))
    return loss if z.dtype == torch.float64 else loss.float()


def sizes_of_terms(z1: Tensor, z2: Tensor, temperature: Tensor) -> list[float]:
    """Of the value, the two gradients of features and that of the temperature, before they cancel."""
    z, T = torch.cat([z1, z2]), abs(float(temperature))
    similarities = z @ z.T
    logits = (similarities / temperature).fill_diagonal_(-torch.inf)
    shares = logits.softmax(1) + torch.eye(len(z), dtype=z.dtype).roll(len(z1), 1)
    shares = (shares + shares.T) / len(z)
    largest = float(similarities.abs().max()) / T
    conditioning = 1 + largest / 8  # a probability is off by the rounding of its logit: one of eight, at logits of 8
    dz = float(shares.sum(1).max()) * max(1.0, float(z.abs().max())) / T * conditioning
    of_temperature = float((shares * similarities.abs()).sum()) / T**2 * conditioning
    return [largest + float(logits.logsumexp(1).abs().max()), dz, dz, of_temperature]


def check(z1: Tensor, z2: Tensor, temperature: float, dtype: torch.dtype, what: str) -> None:
    args = [z1, z2, torch.tensor(temperature).double()]
    check_accuracy(nt_xent_loss, eager, args, dtype, sizes_of_terms(*args), f"{what}, temperature {temperature}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_exact_as_torch(isa: str, dtype: torch.dtype) -> None:
    for n, D in SIZES:
        check(features(n, D), features(n, D), 0.1, dtype, f"{n}x{D}")


def test_several_stripes_chunks_and_blocks(isa: str) -> None:
    """Rows for two chunks of the backward, more features than one of its tasks takes."""
    for dtype in (torch.float32, torch.bfloat16):
        check(features(601, 5), features(601, 5), 0.2, dtype, "601x5")
        check(features(120, 150), features(120, 150), 0.2, dtype, "120x150")


@pytest.mark.parametrize("temperature", [0.001, 0.01, 0.5, 1e4, -0.05])
@pytest.mark.parametrize("kind", ["unrelated", "identical", "opposite", "zero", "long"])
def test_no_overflow_and_no_underflow(isa: str, kind: str, temperature: float) -> None:
    """A row's similarity to itself is far above all others, and must count nowhere."""
    z1, z2 = features(40, 512), features(40, 512)
    if kind == "identical":
        z1 = z2 = z1[:1].repeat(40, 1)
    elif kind == "opposite":
        z2 = -z1
    elif kind == "zero":
        z1, z2 = torch.zeros_like(z1), torch.zeros_like(z2)
    elif kind == "long":
        z1, z2 = 5 * z1, z2 * torch.linspace(0, 3, 40)[:, None]
    for dtype in (torch.float64, torch.float32):
        check(z1, z2, temperature, dtype, kind)


def test_views_that_are_told_apart_well(isa: str) -> None:
    """A loss of 1e-5 is a small difference of large numbers, and has to be right for all that."""
    z1 = features(100, 64)
    z2 = F.normalize(z1 + 0.01 * torch.randn_like(z1), dim=1)
    got, same = (f(z1.float(), z2.float(), 0.04) for f in (nt_xent_loss, nt_xent_loss_reference))
    exact = nt_xent_loss_reference(z1.float().double(), z2.float().double(), 0.04)
    assert 1e-7 < exact < 1e-3
    assert abs(got - exact) <= 2 * abs(same - exact) + 2 * EPS[torch.float32]


def test_one_image_has_nothing_to_tell_apart(isa: str) -> None:
    for name in ("native", "torch"):
        z1, z2, T = features(1, 8).requires_grad_(), features(1, 8).requires_grad_(), torch.tensor(0.1).double()
        with backend(name):
            loss = nt_xent_loss(z1, z2, T.requires_grad_())
        grads = torch.autograd.grad(loss, (z1, z2, T))
        assert loss.abs() < 1e-14 and all(g.abs().max() < 1e-12 for g in grads)
