# SPDX-License-Identifier: Apache-2.0
"""Defects that other kernel libraries shipped, and that no test of a single op would notice here."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import check_against_torch, threads
from torch import Tensor

from fvm_fast import ops
from fvm_fast.ops._backend import backend

BEYOND_32_BITS = 2**31


# ---- tests that pass whatever the kernel does


class _ScaleForgotten(torch.autograd.Function):
    """``0.125 * a @ b`` whose gradients lack the scale, as those of a published window attention did."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return 0.125 * (a @ b)

    @staticmethod
    def backward(ctx, dout: Tensor):
        a, b = ctx.saved_tensors
        return dout @ b.mT, a.mT @ dout


class _FewWrongElements(torch.autograd.Function):
    """``exp(x)`` whose gradient is wrong in one element of many: a mean error hides it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = x.exp()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        dx = dout * ctx.saved_tensors[0]
        dx.view(-1)[-1] *= 1.05
        return dx


def test_a_gradient_without_its_scale_fails_although_the_output_is_right():
    args = [torch.randn(5, 7), torch.randn(7, 3)]
    with pytest.raises(AssertionError, match="gradient of argument 0"):
        check_against_torch(_ScaleForgotten.apply, lambda a, b: 0.125 * (a @ b), args, torch.float32, torch.randn(5, 3))


def test_one_wrong_element_of_many_fails():
    with pytest.raises(AssertionError, match="largest error"):
        check_against_torch(_FewWrongElements.apply, torch.exp, [torch.randn(100, 100)], torch.float32)


# ---- offsets of 32 bits. Memory that is never touched costs nothing, so that these tensors are small.


def test_rows_beyond_32_bits_of_elements_are_gathered():
    D = 2**15
    x = torch.empty(1, BEYOND_32_BITS // D + 2, D, dtype=torch.bfloat16)
    ids = torch.tensor([[x.shape[1] - 1, 0, x.shape[1] - 2]])
    for i, row in enumerate(ids[0]):
        x[0, row] = i + 1
    with backend("native"):
        out = ops.gather_tokens(x, ids)
    assert torch.equal(out, torch.tensor([1, 2, 3], dtype=x.dtype).reshape(1, 3, 1).expand_as(out))


@pytest.mark.parametrize("channels_last", [False, True])
def test_patches_beyond_32_bits_of_pixels_are_embedded(channels_last):
    H, W, p = 2**15 + 16, 2**15, 16
    images = torch.empty(1, 2, H, W, dtype=torch.uint8)
    if channels_last:
        images = torch.empty(1, H, W, 2, dtype=torch.uint8).permute(0, 3, 1, 2)
    images[0, :, -p:, -p:] = torch.randint(256, (2, p, p), dtype=torch.uint8)
    last = torch.tensor([[H // p * (W // p) - 1]])
    weight = torch.randn(3, 2, p, p)
    with backend("native"):
        out = ops.patch_embed(images, weight, ids_keep=last)
    expected = ops.patch_embed_reference(images[:, :, -p:, -p:], weight)
    torch.testing.assert_close(out, expected)


# ---- a gradient that enters the loss and is not one


def _features(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1).requires_grad_()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "clip_loss": lambda x, y: ops.clip_loss(x, y, 10.0),
    "siglip_loss": lambda x, y: ops.siglip_loss(x, y, 10.0, -5.0),
    "nt_xent_loss": lambda x, y: ops.nt_xent_loss(x, y, 0.1),
    "info_nce_loss": lambda x, y: ops.info_nce_loss(x, y, y.detach().flip(0), 0.1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_that_enters_a_loss_counts(name):
    """Losses that make gradients in the forward pass may forget it; a second use of the loss must not change them."""
    x, y = _features(37, 19), _features(37, 19)
    with backend("native"):
        loss = LOSSES[name](x, y)
        before = loss.detach().clone()
        once = torch.autograd.grad(loss, [x, y], retain_graph=True)
        many = torch.autograd.grad(loss, [x, y], torch.tensor(-3.0), retain_graph=True)
        again = torch.autograd.grad(loss, [x, y])
    torch.testing.assert_close(many, tuple(-3 * g for g in once))
    torch.testing.assert_close(again, once, rtol=0, atol=0)
    assert torch.equal(loss.detach(), before)


# ---- a ring that keeps every block that passed by

RING = """
import gc, sys
import torch, torch.distributed as dist
from fvm_fast import ops

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=3)
x, y = (torch.randn(40, 32, requires_grad=True) for _ in range(2))
losses = {
    "clip": lambda: ops.clip_loss(x, y, 1.0, group=dist.group.WORLD),
    "siglip": lambda: ops.siglip_loss(x, y, 1.0, 0.0, group=dist.group.WORLD),
    "nt_xent": lambda: ops.nt_xent_loss(x, y, 1.0, group=dist.group.WORLD),
}

def alive():
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

for name, loss in losses.items():
    saved = []
    before = alive()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        value = loss()
    print(name, sum(saved), alive() - before)
    value.backward()
dist.destroy_process_group()
"""


def test_a_ring_keeps_nothing_of_what_passed_by(tmp_path: Path):
    """Between forward and backward a process of three holds what belongs to its own rows: not a joined batch."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    team = [
        subprocess.Popen(
            [sys.executable, "-c", RING, str(rank), str(tmp_path / "store")],
            env=environment, text=True, stdout=subprocess.PIPE,
        )
        for rank in range(3)
    ]  # fmt: skip
    try:
        printed = [member.communicate(timeout=120)[0] for member in team]
    finally:
        for member in team:
            member.kill()
    assert [member.returncode for member in team] == [0] * 3
    own = 2 * 40 * 32 * 4  # bytes of the features
    for line in "".join(printed).splitlines():
        name, saved, alive = line.split()
        assert int(saved) < 2 * own and int(alive) < 2 * own, line
    assert "".join(printed).count("\n") == 9


# ---- sums in 16 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_over_many_tokens_do_not_stop_growing(dtype):
    """Ones added up in bfloat16 stay at 256, in float16 at 2048."""
    images = torch.ones(5, 1, 64, 64, dtype=dtype)
    weight, bias = torch.zeros(1, 1, 2, 2, dtype=dtype), torch.zeros(1, dtype=dtype)
    pos_embed = torch.zeros(1024, 1, dtype=dtype)
    leaves = [t.requires_grad_() for t in (weight, bias, pos_embed)]
    with backend("native"):
        out = ops.patch_embed(images, *leaves)
    dweight, dbias, dpos_embed = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert (dweight == 5 * 1024).all() and dbias.item() == 5 * 1024 and (dpos_embed == 5).all()


# ---- parallel regions at the same time, and memory that was never written


def test_calls_from_several_threads_do_not_disturb_each_other():
    """The kernels release the GIL: what they share would be written by two calls at once."""
    images, weight = torch.randn(4, 3, 32, 32), torch.randn(24, 3, 8, 8)
    x, y = torch.randn(64, 32), torch.randn(64, 32)

    def everything() -> list[Tensor]:
        with threads(2):
            tokens = ops.patch_embed(images, weight)
            ids, _, _ = ops.random_masking(4, 16, 0.5, noise=torch.arange(64.0).sin().reshape(4, 16))
            return [tokens, ops.gather_tokens(tokens, ids), ops.clip_loss(x, y, 1.0), ops.nt_xent_loss(x, y, 1.0)]

    expected, found = everything(), []

    def work() -> None:
        for _ in range(20):
            found.append(all(map(torch.equal, everything(), expected)))

    team = [threading.Thread(target=work) for _ in range(3)]
    for member in team:
        member.start()
    for member in team:
        member.join()
    assert len(found) == 60 and all(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_odd_number_of_features_meets_no_stale_memory(dtype):
    """Pairs of 16-bit values are padded; padding that is not cleared is NaN sooner or later."""
    images, weight = torch.randn(3, 1, 9, 15).to(dtype), torch.randn(5, 1, 3, 3).to(dtype).requires_grad_()
    for _ in range(5):
        stale = [torch.full((1 << n,), torch.nan) for n in range(4, 18)]  # what the allocator hands out next
        del stale
        with backend("native"):
            out = ops.patch_embed(images, weight)
            (dweight,) = torch.autograd.grad(out.sum(), weight)
        assert not out.isnan().any() and not dweight.isnan().any()
