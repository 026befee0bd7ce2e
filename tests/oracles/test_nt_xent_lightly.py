# SPDX-License-Identifier: Apache-2.0
"""nt_xent_loss and info_nce_loss, kernels and references, against lightly's NTXentLoss."""

import pytest
import torch
import torch.nn.functional as F
from common import value_and_grads
from contrastive_common import features
from lightly.loss import NTXentLoss
from torch import Tensor

from fvm_fast.ops import backend, info_nce_loss, nt_xent_loss


@pytest.mark.parametrize("implementation", ["native", "torch"])
@pytest.mark.parametrize("n", [1, 2, 17, 130])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_nt_xent_loss_equals_lightly(implementation: str, n: int, temperature: float) -> None:
    """Value and gradients; lightly normalises the features itself."""
    args = [3 * features(n, 12), features(n, 12)]

    def ours(z1: Tensor, z2: Tensor) -> Tensor:
        return nt_xent_loss(F.normalize(z1, dim=1), F.normalize(z2, dim=1), temperature)

    with backend(implementation):
        value, grads = value_and_grads(ours, args, torch.float64)
    expected, expected_grads = value_and_grads(NTXentLoss(temperature), args, torch.float64)
    torch.testing.assert_close([value, *grads], [expected, *expected_grads])


@pytest.mark.parametrize("implementation", ["native", "torch"])
def test_info_nce_loss_equals_lightly_with_a_memory_bank(implementation: str) -> None:
    """MoCo: lightly's bank takes in the keys of a batch after the loss was computed with it."""
    q, k, T = features(6, 8, torch.float32), features(6, 8, torch.float32), 0.07
    loss = NTXentLoss(T, memory_bank_size=(32, 8))
    loss(q, k)  # makes the bank
    queue = loss.memory_bank.bank.clone()
    assert queue.shape == (32, 8)
    expected, (expected_dq,) = value_and_grads(lambda x: loss(x, k), [q], torch.float32)
    with backend(implementation):
        value, (dq,) = value_and_grads(lambda x: info_nce_loss(F.normalize(x, dim=1), k, queue, T), [q], torch.float32)
    torch.testing.assert_close([value, dq], [expected, expected_dq])
