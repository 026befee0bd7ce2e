# SPDX-License-Identifier: Apache-2.0
"""Masked tokens: choose the patches to keep, take their rows, and put them back among mask tokens.

The three steps of masked autoencoders (He et al. 2022, https://arxiv.org/abs/2111.06377)::

    gather_tokens:   out[b, k] = x[b, ids[b, k]]
    restore_tokens:  out[b, P + l] = (x[b, P + r] if r < K else mask_token) + pos_embed[P + l],   r = ids_restore[b, l]

Each is one pass over memory: no index of the shape of the data, no concatenation, no zero fill; the backwards go
through the inverse of the index.
"""

import torch
from torch import Tensor

from fvm_fast.ops._backend import autocast_dtype, call, check_ids, check_same_device, check_same_dtype, use_native
from fvm_fast.ops._register import register_op
from fvm_fast.ops._token_checks import as_rows, as_vector, check_index, check_tokens

# ---- random_masking


def random_masking_reference(
    batch: int, num_patches: int, mask_ratio: float, *, generator=None, device=None, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`random_masking` with the two sorts of the paper's code."""
    keep = _checked_keep(batch, num_patches, mask_ratio, noise)
    noise = torch.rand(batch, num_patches, generator=generator, device=device) if noise is None else noise
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    return ids_shuffle[:, :keep].clone(), ids_restore, (ids_restore >= keep).float()


def random_masking(
    batch: int,
    num_patches: int,
    mask_ratio: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose for each image which patches an encoder sees: those with the smallest noise.

    Args:
        batch: B, number of images.
        num_patches: L, patches of an image.
        mask_ratio: r in [0, 1]; K = int(L * (1 - r)) patches are kept.
        generator: source of the noise. For eager use only: torch.compile(fullgraph=True) cannot trace it.
        device: where the ids are made; that of ``noise`` if given.
        noise: [B, L] floating, instead of drawing it here.

    Returns:
        ids_keep [B, K] int64, ids_restore [B, L] int64 (where each patch went in the shuffled order) and mask [B, L]
        float32 (0 kept, 1 removed), in MAE's order and values, with one sort instead of two.
    """
    keep = _checked_keep(batch, num_patches, mask_ratio, noise)
    noise = torch.rand(batch, num_patches, generator=generator, device=device) if noise is None else noise
    ids_shuffle = torch.argsort(noise, dim=1)
    places = torch.arange(num_patches, device=noise.device).expand(batch, num_patches)
    ids_restore = torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, places)
    return ids_shuffle[:, :keep].clone(), ids_restore, (ids_restore >= keep).float()


def _checked_keep(batch: int, num_patches: int, mask_ratio: float, noise: Tensor | None) -> int:
    if batch < 0 or num_patches < 0:
        raise ValueError(f"random_masking: expected batch and num_patches of 0 or more, got {batch} and {num_patches}")
    if not 0 <= mask_ratio <= 1:
        raise ValueError(f"random_masking: expected a mask_ratio in [0, 1], got {mask_ratio}")
    if noise is not None and (tuple(noise.shape) != (batch, num_patches) or not noise.is_floating_point()):
        got = f"{noise.dtype} {tuple(noise.shape)}"
        raise ValueError(f"random_masking: expected floating noise [{batch}, {num_patches}], got {got}")
    return int(num_patches * (1 - mask_ratio))


# ---- gather_tokens


def gather_tokens_reference(x: Tensor, ids: Tensor) -> Tensor:
    """:func:`gather_tokens` by torch.gather."""
    return torch.gather(x, 1, ids[..., None].expand(-1, -1, x.shape[-1]))


def _gather_kernel(x: Tensor, ids: Tensor) -> Tensor:
    (B, L, D), K = x.shape, ids.shape[1]
    x, ids = x.contiguous(), ids.contiguous()
    out = x.new_empty(B, K, D)
    if L == 0 and ids.numel():
        check_ids("gather_tokens", "ids", ids, L, 0)
    elif out.numel():
        check_ids("gather_tokens", "ids", ids, L, call("gather_tokens_fwd", x, ids, out, B, L, K, D, x.dtype))
    return out


def _gather_bwd_kernel(dout: Tensor, ids: Tensor, L: int) -> Tensor:
    B, K, D = dout.shape
    dout, ids = dout.contiguous(), ids.contiguous()
    if not dout.numel():
        return dout.new_zeros(B, L, D)
    dx = dout.new_empty(B, L, D)
    workspace = ids.new_empty(B * (L + 1 + K))
    call("gather_tokens_bwd", dout, ids, dx, workspace, B, L, K, D, dout.dtype)
    return dx


def _gather_setup(ctx, inputs, output) -> None:
    x, ids = inputs
    ctx.save_for_backward(ids)
    ctx.L = x.shape[1]


def _gather_backward(ctx, dout: Tensor):
    (ids,) = ctx.saved_tensors
    return torch.ops.fvm_fast.gather_tokens_bwd(dout, ids, ctx.L), None


register_op(
    "gather_tokens_bwd(Tensor dout, Tensor ids, SymInt L) -> Tensor",
    kernel=_gather_bwd_kernel,
    fake=lambda dout, ids, L: dout.new_empty(dout.shape[0], L, dout.shape[2]),
)
register_op(
    "gather_tokens(Tensor x, Tensor ids) -> Tensor",
    kernel=_gather_kernel,
    fake=lambda x, ids: x.new_empty(x.shape[0], ids.shape[1], x.shape[2]),
    setup_context=_gather_setup,
    backward=_gather_backward,
)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Take the rows ``ids`` of each sequence: ``out[b, k] = x[b, ids[b, k]]``.

    Args:
        x: [B, L, D] floating (strip prefix tokens first).
        ids: [B, K] int64 in [0, L). An id may occur twice: its gradients add up.

    Returns:
        [B, K, D] in the dtype of ``x``.

    Raises:
        ValueError: wrong rank, batch or device. IndexError: an id out of range (the first one is named).
    """
    check_tokens("gather_tokens", "x", x)
    check_index("gather_tokens", "ids", ids, x.shape[0])
    check_same_device("gather_tokens", x=x, ids=ids)
    check_same_dtype("gather_tokens", x=x)
    if use_native("gather_tokens", x, ids):
        return torch.ops.fvm_fast.gather_tokens(x, ids)
    return gather_tokens_reference(x, ids)


# ---- restore_tokens


def restore_tokens_reference(
    x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor | None = None, *, num_prefix_tokens: int = 0
) -> Tensor:
    """:func:`restore_tokens` by cat, gather and add."""
    P, D, (B, L) = num_prefix_tokens, x.shape[-1], ids_restore.shape
    kept = x.shape[1] - P
    tokens = torch.cat([x[:, P:], mask_token.reshape(1, 1, D).expand(B, L - kept, D)], dim=1)
    out = torch.cat([x[:, :P], gather_tokens_reference(tokens, ids_restore)], dim=1)
    if pos_embed is None:
        return out
    pos_embed = pos_embed.reshape(-1, D)
    if pos_embed.shape[0] == L:
        pos_embed = torch.cat([pos_embed.new_zeros(P, D), pos_embed])
    return out + pos_embed


def _restore_kernel(x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor | None, P: int) -> Tensor:
    (B, N, D), L = x.shape, ids_restore.shape[1]
    x, ids_restore, mask_token = x.contiguous(), ids_restore.contiguous(), mask_token.contiguous()
    out = x.new_empty(B, P + L, D)
    if out.numel():
        pos = None if pos_embed is None else pos_embed.contiguous()
        pos_rows = 0 if pos is None else pos.shape[0]
        bad = call("restore_tokens_fwd", x, ids_restore, mask_token, pos, out, B, P, N - P, L, D, pos_rows, x.dtype)
        check_ids("restore_tokens", "ids_restore", ids_restore, L, bad)
    return out


def _restore_bwd_kernel(
    dout, ids_restore, P, K, pos_rows, want_x, want_mask_token, want_pos_embed
) -> tuple[Tensor, Tensor, Tensor]:
    B, L, D = dout.shape[0], ids_restore.shape[1], dout.shape[2]
    dout, ids_restore = dout.contiguous(), ids_restore.contiguous()
    make = dout.new_empty if dout.numel() else dout.new_zeros
    dx = make((B, P + K, D) if want_x else (0,))
    dmask_token = make((D,) if want_mask_token else (0,))
    dpos_embed = make((pos_rows, D) if want_pos_embed else (0,))
    if dout.numel():
        workspace = ids_restore.new_empty(B * (K + 1 + L))
        wide = torch.float64 if dout.dtype == torch.float64 else torch.float32
        partial_sums = dout.new_empty((P + L) * D, dtype=wide)
        call(
            "restore_tokens_bwd", dout, ids_restore, dx if want_x else None, dmask_token if want_mask_token else None,
            dpos_embed if want_pos_embed else None, workspace, partial_sums, B, P, K, L, D, pos_rows, dout.dtype,
        )  # fmt: skip
    return dx, dmask_token, dpos_embed


def _restore_bwd_fake(dout, ids_restore, P, K, pos_rows, want_x, want_mask_token, want_pos_embed):
    B, D = dout.shape[0], dout.shape[2]
    return (
        dout.new_empty((B, P + K, D) if want_x else (0,)),
        dout.new_empty((D,) if want_mask_token else (0,)),
        dout.new_empty((pos_rows, D) if want_pos_embed else (0,)),
    )


def _restore_setup(ctx, inputs, output) -> None:
    x, ids_restore, _, pos_embed, P = inputs
    ctx.save_for_backward(ids_restore)
    ctx.sizes = (P, x.shape[1] - P, 0 if pos_embed is None else pos_embed.shape[0])


def _restore_backward(ctx, dout: Tensor):
    (ids_restore,) = ctx.saved_tensors
    want = (ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3])
    grads = torch.ops.fvm_fast.restore_tokens_bwd(dout, ids_restore, *ctx.sizes, *want)
    dx, dmask_token, dpos_embed = (g if wanted else None for g, wanted in zip(grads, want, strict=True))
    return dx, None, dmask_token, dpos_embed, None


register_op(
    "restore_tokens_bwd(Tensor dout, Tensor ids_restore, SymInt P, SymInt K, SymInt pos_rows, bool want_x, "
    "bool want_mask_token, bool want_pos_embed) -> (Tensor, Tensor, Tensor)",
    kernel=_restore_bwd_kernel,
    fake=_restore_bwd_fake,
)
register_op(
    "restore_tokens(Tensor x, Tensor ids_restore, Tensor mask_token, Tensor? pos_embed, SymInt P) -> Tensor",
    kernel=_restore_kernel,
    fake=lambda x, ids_restore, mask_token, pos_embed, P: x.new_empty(x.shape[0], P + ids_restore.shape[1], x.shape[2]),
    setup_context=_restore_setup,
    backward=_restore_backward,
)


def restore_tokens(
    x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor | None = None, *, num_prefix_tokens: int = 0
) -> Tensor:
    """MAE's decoder input in one pass: kept tokens at their places, mask tokens elsewhere, positions added.

    Args:
        x: [B, P + K, D] floating: P prefix tokens, then the K kept ones in shuffled order.
        ids_restore: [B, L] int64 in [0, L), from :func:`random_masking`; values of K and more stand for the mask token.
        mask_token: [D] or [1, 1, D].
        pos_embed: [P + L, D] (added to all), [L, D] (patches only), each with or without a leading 1; or None.
        num_prefix_tokens: P.

    Returns:
        [B, P + L, D]. Dtypes must agree; under autocast they are promoted to the widest, never demoted.

    Raises:
        ValueError: wrong rank, size or device. TypeError: mixed dtypes. IndexError: an id out of range.
    """
    check_tokens("restore_tokens", "x", x)
    check_index("restore_tokens", "ids_restore", ids_restore, x.shape[0])
    P, D, L = num_prefix_tokens, x.shape[2], ids_restore.shape[1]
    if not 0 <= P <= x.shape[1] or x.shape[1] - P > L:
        got = f"{tuple(x.shape)} with P = {P}"
        raise ValueError(f"restore_tokens: expected x [B, P + K, D] with K of at most {L} patches, got {got}")
    mask_token = as_vector("restore_tokens", "mask_token", mask_token, D)
    if pos_embed is not None:
        pos_embed = as_rows("restore_tokens", "pos_embed", pos_embed, D, (P + L, L))
    check_same_device("restore_tokens", x=x, ids_restore=ids_restore, mask_token=mask_token, pos_embed=pos_embed)
    if autocast_dtype(x) is not None:
        dtype = torch.promote_types(x.dtype, mask_token.dtype)
        dtype = dtype if pos_embed is None else torch.promote_types(dtype, pos_embed.dtype)
        x, mask_token, pos_embed = x.to(dtype), mask_token.to(dtype), None if pos_embed is None else pos_embed.to(dtype)
    check_same_dtype("restore_tokens", x=x, mask_token=mask_token, pos_embed=pos_embed)
    if use_native("restore_tokens", x, ids_restore, mask_token, pos_embed):
        return torch.ops.fvm_fast.restore_tokens(x, ids_restore, mask_token, pos_embed, P)
    return restore_tokens_reference(x, ids_restore, mask_token, pos_embed, num_prefix_tokens=P)
