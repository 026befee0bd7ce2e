# SPDX-License-Identifier: Apache-2.0
"""What the tests of nt_xent_loss and info_nce_loss share: the accuracy rule."""

from collections.abc import Callable, Sequence

import torch
from common import EPS
from torch import Tensor

from fvm_fast.ops import backend

Loss = Callable[..., Tensor]


def value_and_gradients(loss: Loss, args: Sequence[Tensor], dtype: torch.dtype, scalar_dtype: torch.dtype) -> list:
    """The loss and its gradients: features in ``dtype``, the temperature (0-d) in ``scalar_dtype``, as in training."""
    leaves = [a.to(dtype if a.dim() else scalar_dtype).clone().requires_grad_() for a in args]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, torch.full_like(value, 0.75))]


def check_accuracy(
    ours: Loss, eager: Loss, args: Sequence[Tensor], dtype: torch.dtype, terms: Sequence[float], what: str
) -> None:
    """Value and every gradient of native ``ours``: at most twice torch's error in the same dtype, and eight roundings.

    Args:
        ours: the op.
        eager: plain torch, run in ``dtype`` and in float64.
        args: features, then the temperature, in float64; features are rounded to ``dtype`` before all.
        dtype: of the features.
        terms: how large the terms of the value and of each gradient are before they cancel.
        what: for the message.
    """
    rounded = [a.to(dtype).double() if a.dim() else a for a in args]
    scalar_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    with backend("native"):
        got = value_and_gradients(ours, rounded, dtype, scalar_dtype)
    assert [t.dtype for t in got] == [scalar_dtype, *[dtype] * (len(args) - 1), scalar_dtype]
    same = value_and_gradients(eager, rounded, dtype, scalar_dtype)
    exact = value_and_gradients(eager, rounded, torch.float64, torch.float64)
    for i, (a, b, c, size) in enumerate(zip(got, same, exact, terms, strict=True)):
        assert a.shape == c.shape
        if not c.numel():
            continue
        error, torchs = (float((t.double() - c).abs().max()) for t in (a, b))
        # in float64 torch is the measure, and no better than the kernels
        limit = 1e-12 * size if dtype == torch.float64 else 2 * torchs + 8 * EPS[a.dtype] * size
        name = f"gradient of argument {i - 1}" if i else "value"
        assert error <= limit, (
            f"{what}: {name}: error {error:.2e}, expected at most {limit:.2e} (torch makes {torchs:.2e})"
        )
