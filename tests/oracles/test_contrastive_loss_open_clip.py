# SPDX-License-Identifier: Apache-2.0
"""The references of clip_loss and siglip_loss against open_clip; apart from tests/ops, which need only torch."""

import pytest
import torch
from common import value_and_grads
from contrastive_common import features
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss

from fvm_fast.ops import Teacher, clip_loss_reference, siglip_loss_reference


@pytest.mark.parametrize("n", [1, 2, 17])
def test_references_equal_open_clip(n: int) -> None:
    args = [features(n, 12), features(n, 12), torch.tensor(14.0).double()]
    for ours, theirs, more in (
        (clip_loss_reference, ClipLoss(), []),
        (siglip_loss_reference, SigLipLoss(), [torch.tensor(-3.0).double()]),
    ):
        value, grads = value_and_grads(ours, args + more, torch.float64)
        expected, expected_grads = value_and_grads(theirs, args + more, torch.float64)
        torch.testing.assert_close([value, *grads], [expected, *expected_grads])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_reference_of_a_teacher_equals_open_clip(alpha: float) -> None:
    x, y, t, u = (features(11, 6) for _ in range(4))
    contrastive, distilled = DistillClipLoss()(x, y, 20.0, t, u, 15.0)
    ours = clip_loss_reference(x, y, 20.0, targets=Teacher(t, u, 15.0, alpha))
    torch.testing.assert_close(ours, alpha * distilled + (1 - alpha) * contrastive)
