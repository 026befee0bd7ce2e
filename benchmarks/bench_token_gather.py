# SPDX-License-Identifier: Apache-2.0
"""Take the kept tokens, and put them back among mask tokens: ours against MAE's order of operations.

python benchmarks/bench_token_gather.py
"""

from argparse import Namespace
from collections.abc import Iterator

import torch
from harness import main
from problem import Floor, Problem, rivals_on
from torch import Tensor

from fvm_fast import backend, ops


def ours_gather(x: Tensor, ids: Tensor) -> Tensor:
    with backend("native"):
        return ops.gather_tokens(x, ids)


def mae_gather(x: Tensor, ids: Tensor) -> Tensor:
    """The encoder's side in the order of the paper's code: through an index as large as the data."""
    return torch.gather(x, 1, ids.unsqueeze(-1).repeat(1, 1, x.shape[-1]))


def ours_restore(x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
    with backend("native"):
        return ops.restore_tokens(x, ids_restore, mask_token, pos_embed, num_prefix_tokens=1)


def mae_restore(x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
    """The decoder's side in the order of the paper's code: repeat, cat, gather, cat, add."""
    B, L, D = *ids_restore.shape, x.shape[-1]
    masked = mask_token.repeat(B, L + 1 - x.shape[1], 1)
    patches = torch.gather(torch.cat([x[:, 1:], masked], 1), 1, ids_restore.unsqueeze(-1).repeat(1, 1, D))
    return torch.cat([x[:, :1], patches], 1) + pos_embed


def gather_problem(B: int, L: int, D: int, dtype: torch.dtype) -> Problem:
    """Keep a quarter of the patches."""
    ids, _, _ = ops.random_masking(B, L, 0.75)
    K, e = ids.shape[1], dtype.itemsize
    x = torch.randn(B, L, D).to(dtype).requires_grad_()
    functions = {"fvm_fast": ours_gather, "MAE's order": mae_gather}
    return Problem(
        f"gather_tokens, {B} x {L} tokens of {D}, keep {K}",
        rivals_on([x, ids], functions, {"MAE's, torch.compile": mae_gather}),
        dtype,
        forward=Floor(bytes=2 * e * B * K * D + ids.nbytes),
        backward=Floor(bytes=e * B * (K + L) * D + ids.nbytes),
    )


def restore_problem(B: int, L: int, D: int, dtype: torch.dtype) -> Problem:
    """Three quarters of the patches are mask tokens; the position table is fixed, as MAE's is."""
    ids_keep, ids_restore, _ = ops.random_masking(B, L, 0.75)
    K, e = ids_keep.shape[1], dtype.itemsize
    x = torch.randn(B, 1 + K, D).to(dtype).requires_grad_()
    mask_token = torch.randn(1, 1, D).to(dtype).requires_grad_()
    pos_embed = torch.randn(1, 1 + L, D).to(dtype)
    functions = {"fvm_fast": ours_restore, "MAE's order": mae_restore}
    return Problem(
        f"restore_tokens, {B} x {1 + K} tokens of {D} to {1 + L}",
        rivals_on([x, ids_restore, mask_token, pos_embed], functions, {"MAE's, torch.compile": mae_restore}),
        dtype,
        forward=Floor(bytes=e * (B * (1 + K) + B * (1 + L) + (1 + L) + 1) * D + ids_restore.nbytes),
        backward=Floor(bytes=e * (B * (1 + L) + B * (1 + K) + 1) * D + ids_restore.nbytes),
    )


def problems(args: Namespace) -> Iterator[Problem]:
    """MAE's decoder at ImageNet's 196 patches."""
    B, L, D = (4, 49, 64) if args.quick else (32, 196, 512)
    for problem in (gather_problem, restore_problem):
        for dtype in args.dtypes:
            yield problem(B, L, D, dtype)


if __name__ == "__main__":
    main(__file__, __doc__, problems)
