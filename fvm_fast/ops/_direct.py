# SPDX-License-Identifier: Apache-2.0
"""A short way to a kernel in plain eager mode, past torch's dispatcher, for ops that small batches call often.

The dispatcher and the autograd of torch.library take about 0.1 ms of a training step, more than the kernels of a loss
need for a batch of 8. Where something traces, fakes or records, the registered op is called as ever.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN_TYPES = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def direct(
    op: Callable, kernel: Callable, *, setup_context: Callable | None = None, backward: Callable | None = None
) -> Callable[..., Any]:
    """What to call instead of ``op``: the same values and gradients, sooner.

    Args:
        op: a packet of ``torch.ops.fvm_fast`` that :func:`register_op` makes.
        kernel, setup_context, backward: as given to it. Without ``backward`` it is a derivative, which takes the short
            way while gradients are not recorded; else ``op`` says that it is differentiated once.
    """
    if backward is None:
        return lambda *args: kernel(*args) if not torch.is_grad_enabled() and is_plain(args) else op(*args)

    def forward(ctx: Any, *args: Any) -> Any:
        output = kernel(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(f"{op.__name__}_function", (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        if not is_plain(args):
            return op(*args)
        return function.apply(*args) if torch.is_grad_enabled() else kernel(*args)

    return call


def is_plain(args: tuple) -> bool:
    """Whether torch only computes: no compiler, no tracer, no dispatch mode, no tensor that is more than a tensor."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return False
    return all(type(a) in _PLAIN_TYPES for a in args if isinstance(a, Tensor))
