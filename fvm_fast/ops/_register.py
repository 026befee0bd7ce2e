# SPDX-License-Identifier: Apache-2.0
"""Registers an op with torch.library: schema, CPU and CUDA kernel, shapes for tracing, one reverse-mode derivative."""

from collections.abc import Callable

import torch

from fvm_fast.ops._direct import direct

_LIBRARY = torch.library.Library("fvm_fast", "DEF")


def register_op(
    schema: str,
    *,
    kernel: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Define ``torch.ops.fvm_fast.<name>``.

    Args:
        schema: torch schema without the namespace, ``"gather_tokens(Tensor x, Tensor ids) -> Tensor"``.
        kernel: runs on CPU and on CUDA tensors; returns fresh tensors, never an input or a view.
        fake: the same signature on fake tensors: shapes and dtypes only.
        setup_context, backward: as in :func:`torch.library.register_autograd`. An op without them is a derivative
            itself: to differentiate it again raises a sentence.

    Returns:
        The op by a shorter way for eager mode, see :func:`direct`.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"fvm_fast::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(
        f"fvm_fast::{name}", backward or _refuse_double_backward(name), setup_context=setup_context, lib=_LIBRARY
    )
    return direct(getattr(torch.ops.fvm_fast, name), kernel, setup_context=setup_context, backward=backward)


def _refuse_double_backward(name: str) -> Callable:
    op = name.removesuffix("_bwd")

    def backward(ctx, *grads):
        raise RuntimeError(
            f"{op}: expected to be differentiated once, got a second derivative; its native kernels are once "
            "differentiable: compute it under `with fvm_fast.backend('torch'):`"
        )

    return backward
