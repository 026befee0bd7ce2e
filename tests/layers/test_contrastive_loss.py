# SPDX-License-Identifier: Apache-2.0
"""ClipLoss and SigLipLoss against open_clip's modules of the same names."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss as OracleClipLoss
from open_clip.loss import SigLipLoss as OracleSigLipLoss
from torch.testing import assert_close

from fvm_fast.layers import contrastive_loss
from fvm_fast.layers.contrastive_loss import ClipLoss, SigLipLoss

SIZES = [(1, 8), (2, 5), (7, 33), (67, 16)]


def make_leaves(n, dim, dtype=torch.float64):
    """Unit features, scale and bias, all leaves that want gradients."""
    generator = torch.Generator().manual_seed(n)
    features = [F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2)]
    values = [*features, torch.tensor(14.3, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)]
    return [value.to(dtype).requires_grad_() for value in values]


def value_and_gradients(loss_module, leaves):
    loss = loss_module(*leaves)
    return loss.detach(), torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize(("ours", "oracle"), [(ClipLoss, OracleClipLoss), (SigLipLoss, OracleSigLipLoss)])
@pytest.mark.parametrize(("n", "dim"), SIZES)
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-9, 1e-12), (torch.float32, 1e-5, 1e-6)])
def test_value_and_every_gradient(ours, oracle, n, dim, dtype, rtol, atol):
    leaves = make_leaves(n, dim, dtype)
    assert_close(value_and_gradients(ours(), leaves), value_and_gradients(oracle(), leaves), rtol=rtol, atol=atol)


def test_without_a_bias():
    image, text, scale, _ = make_leaves(6, 9)
    assert_close(ClipLoss()(image, text, scale), OracleClipLoss()(image, text, scale), rtol=1e-9, atol=0)
    expected = OracleSigLipLoss()(image, text, scale, None)
    assert_close(SigLipLoss()(image, text, scale, None), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("ours", "oracle"), [(ClipLoss, OracleClipLoss), (SigLipLoss, OracleSigLipLoss)])
def test_output_dict(ours, oracle):
    leaves = make_leaves(4, 8)
    assert_close(ours()(*leaves, output_dict=True), oracle()(*leaves, output_dict=True), rtol=1e-9, atol=0)


def test_constructors_take_open_clips_arguments():
    common = dict(cache_labels=True, rank=0, world_size=1)
    leaves = make_leaves(4, 8)
    clip = dict(local_loss=True, gather_with_grad=True, use_horovod=False, **common)
    assert_close(ClipLoss(**clip)(*leaves), OracleClipLoss(**clip)(*leaves), rtol=1e-9, atol=0)
    siglip = dict(dist_impl="gather", **common)
    assert_close(SigLipLoss(**siglip)(*leaves), OracleSigLipLoss(**siglip)(*leaves), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("gather_with_grad", "reduction"), [(True, "mean"), (False, "sum")])
def test_several_ranks_hand_the_world_to_the_op(monkeypatch, gather_with_grad, reduction):
    calls = []
    monkeypatch.setattr(contrastive_loss, "clip_loss", lambda *args, **kwargs: calls.append(kwargs))
    monkeypatch.setattr(contrastive_loss, "_group", lambda world_size: f"group of {world_size}")
    ClipLoss(gather_with_grad=gather_with_grad, rank=1, world_size=4)(*make_leaves(2, 4)[:3])
    assert calls == [{"group": "group of 4", "grad_reduction": reduction}]


@pytest.mark.parametrize("loss", [ClipLoss, SigLipLoss])
def test_several_ranks_need_a_process_group(loss):
    with pytest.raises(RuntimeError, match="world_size 2 needs a process group, got none; call .*init_process_group"):
        loss(world_size=2)(*make_leaves(2, 4))


def test_bad_arguments_are_a_sentence():
    with pytest.raises(ValueError, match="use_horovod should be False, got True; launch with torchrun"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="bidir, shift, reduce or gather, got 'ring'"):
        SigLipLoss(dist_impl="ring")
