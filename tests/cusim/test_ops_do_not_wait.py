# SPDX-License-Identifier: Apache-2.0
"""No op on CUDA reads on the host what the device computes: it would wait, and could not be captured into a graph.

The tensors of the emulated device are the CPU's, so that what would wait on a GPU can be forbidden by name.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from contrastive_common import class_ids, clip_options, features
from emulated_ops import ops_on_emulated_cuda
from torch import Tensor

from fvm_fast.ops import (
    backend,
    clip_loss,
    gather_tokens,
    info_nce_loss,
    nt_xent_loss,
    patch_embed,
    random_masking,
    restore_tokens,
    siglip_loss,
    window_attention,
)

# What gives a number to the host, or a result whose size the host has to learn, or copies to it or from it
METHODS = ("item", "tolist", "numpy", "cpu", "nonzero", "unique", "bincount", "masked_select", "equal", "__array__")
CONVERSIONS = ("__bool__", "__int__", "__float__", "__index__", "__complex__")
FUNCTIONS = ("tensor", "as_tensor", "nonzero", "unique", "unique_consecutive", "bincount", "masked_select", "equal")


@pytest.fixture
def refuse_to_wait(monkeypatch) -> Callable[[], None]:
    """Once it is called, all of these raise."""

    def refusal(name: str) -> Callable:
        def refuse(*args, **kwargs):
            raise AssertionError(f"{name} waits for the device")

        return refuse

    def get_by_numbers(self: Tensor, key) -> Tensor:
        for k in key if isinstance(key, tuple) else (key,):
            assert not isinstance(k, Tensor) or k.dtype != torch.bool, "an index of booleans waits for the device"
        return get(self, key)

    def start() -> None:
        for name in (*METHODS, *CONVERSIONS):
            monkeypatch.setattr(Tensor, name, refusal(f"Tensor.{name}"))
        for name in FUNCTIONS:
            monkeypatch.setattr(torch, name, refusal(f"torch.{name}"))
        monkeypatch.setattr(Tensor, "__getitem__", get_by_numbers)

    get = Tensor.__getitem__
    return start


def x(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def number(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def unit(n: int, D: int = 8) -> Tensor:
    return features(n, D).float().requires_grad_()


def make_calls() -> dict[str, Callable[[], Tensor]]:
    """Calls of all ops, in all the ways that take other paths to the kernels."""
    ids, classes = torch.tensor([[0, 3, 1], [2, 2, 4]]), {"targets": class_ids(6, 7, 3)}
    uint8, restore = torch.zeros(2, 3, 8, 12, dtype=torch.uint8), torch.rand(2, 5).argsort(1)
    constants = {"mean": (0.4, 0.5, 0.6), "std": [0.2, 0.3, 0.4]}
    statistics = {"mean": torch.rand(3), "std": torch.rand(3, dtype=torch.float64)}
    mask = {"mask": torch.rand(2, 6) < 0.5, "mask_token": x(5)}
    swin = {"num_heads": 2, "window_size": 3, "shift_size": 1}
    dropout = {"dropout_p": 0.5, "seed": torch.tensor(1 << 40)}
    return {
        "gather_tokens": partial(gather_tokens, x(2, 5, 4), ids),
        "restore_tokens": partial(restore_tokens, x(2, 3, 4), restore, x(4), x(6, 4), num_prefix_tokens=1),
        "random_masking": lambda: random_masking(2, 9, 0.5)[2],
        "patch_embed": partial(patch_embed, x(2, 3, 8, 12), x(5, 3, 4, 4), x(5), x(7, 5), x(1, 5), ids),
        "patch_embed of uint8": partial(patch_embed, uint8, x(5, 3, 4, 4), **constants),
        "patch_embed with a mask": partial(patch_embed, x(2, 3, 8, 12), x(5, 3, 4, 4), **statistics, **mask),
        "window_attention": partial(window_attention, x(1, 5, 7, 24), x(2, 9, 9), pad_qkv=x(24), **swin),
        "window_attention of cosines": partial(window_attention, x(1, 5, 7, 24), logit_scale=x(2), **dropout, **swin),
        "clip_loss": partial(clip_loss, unit(6), unit(6), number(5.0), label_smoothing=0.1),
        "clip_loss of a number": partial(clip_loss, unit(6), unit(6), 5.0),
        "clip_loss of classes": partial(clip_loss, unit(6), unit(7), number(5.0), **classes),
        "clip_loss of a teacher": partial(
            clip_loss, unit(6), unit(6), number(5.0), **clip_options("smooth mixed teacher", 6, 6, torch.float32)
        ),
        "siglip_loss": partial(siglip_loss, unit(6), unit(6), number(5.0), number(-2.0)),
        "siglip_loss of classes": partial(siglip_loss, unit(6), unit(7), number(5.0), number(-2.0), **classes),
        "nt_xent_loss": partial(nt_xent_loss, unit(6), unit(6), number(0.2)),
        "info_nce_loss": partial(info_nce_loss, unit(6), unit(6), unit(9), number(0.2)),
        "info_nce_loss of classes": partial(info_nce_loss, unit(6), unit(6), unit(7), number(0.2), **classes),
    }


@pytest.mark.parametrize("name", make_calls())
def test_no_op_waits(name, refuse_to_wait):
    call = make_calls()[name]
    with ops_on_emulated_cuda(), backend("native"):
        call()  # the first use of constants copies them to the device
        refuse_to_wait()
        out = call()
        if out.requires_grad:
            out.sum().backward()


def test_waiting_would_be_seen(refuse_to_wait):
    numbers, mask = torch.ones(3), torch.ones(3, dtype=torch.bool)
    refuse_to_wait()
    for wait in (
        lambda: float(numbers[0]),
        lambda: numbers.sum().item(),
        lambda: numbers[mask],
        lambda: torch.unique(numbers),
    ):
        with pytest.raises(AssertionError, match="waits for the device"):
            wait()
