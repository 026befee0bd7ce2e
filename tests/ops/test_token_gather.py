# SPDX-License-Identifier: Apache-2.0
"""random_masking, gather_tokens and restore_tokens against the operations of MAE's code."""

import itertools

import pytest
import torch
from common import DTYPES, assert_same_on_any_threads, check_against_torch, clone_with_grad
from torch import Tensor

from fvm_fast.ops import (
    backend,
    gather_tokens,
    gather_tokens_reference,
    random_masking,
    random_masking_reference,
    restore_tokens,
    restore_tokens_reference,
)

# ---- random_masking


def mae_random_masking(noise: Tensor, mask_ratio: float):
    """The operations of the paper's code, in its order."""
    B, L = noise.shape
    keep = int(L * (1 - mask_ratio))
    shuffled = torch.argsort(noise, dim=1)
    restore = torch.argsort(shuffled, dim=1)
    mask = torch.ones(B, L)
    mask[:, :keep] = 0
    return shuffled[:, :keep], restore, torch.gather(mask, 1, restore)


@pytest.mark.parametrize("ratio", (0.0, 0.25, 0.6, 0.75, 1.0))
@pytest.mark.parametrize(("B", "L"), [(1, 1), (3, 37), (2, 196), (0, 9), (2, 0)])
@pytest.mark.parametrize("op", (random_masking, random_masking_reference))
def test_masks_as_mae(op, B, L, ratio):
    noise = torch.rand(B, L)
    for got, wanted in zip(op(B, L, ratio, noise=noise), mae_random_masking(noise, ratio), strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def test_masks_as_mae_where_noise_is_tied():
    noise = (torch.rand(4, 50) * 5).floor()
    for got, wanted in zip(random_masking(4, 50, 0.5, noise=noise), mae_random_masking(noise, 0.5), strict=True):
        assert torch.equal(got, wanted)


def test_generator_decides_the_masks():
    draws = [random_masking(2, 16, 0.5, generator=torch.Generator().manual_seed(s))[1] for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    torch.manual_seed(3)
    drawn = random_masking(2, 16, 0.5)[1]
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2, 16).argsort(1).argsort(1))


def test_masking_compiles_without_a_break():
    noise = torch.rand(2, 12)
    torch._dynamo.reset()
    compiled = torch.compile(lambda n: random_masking(2, 12, 0.75, noise=n), fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(noise), mae_random_masking(noise, 0.75), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("args", "noise", "sentence"),
    [
        ((-1, 4, 0.5), None, "of 0 or more, got -1 and 4"),
        ((2, 4, 1.5), None, r"mask_ratio in \[0, 1\], got 1.5"),
        ((2, 4, float("nan")), None, "got nan"),
        ((2, 4, 0.5), torch.zeros(2, 5), r"noise \[2, 4\], got torch.float32 \(2, 5\)"),
        ((2, 4, 0.5), torch.zeros(2, 4, dtype=torch.int64), "floating noise .*got torch.int64"),
    ],
)
def test_bad_masking_is_a_sentence(args, noise, sentence):
    with pytest.raises(ValueError, match="^random_masking: expected .*" + sentence):
        random_masking(*args, noise=noise)


# ---- gather_tokens and restore_tokens: sizes


def take(x: Tensor, ids: Tensor) -> Tensor:
    """Row by row, as the definition says."""
    return torch.stack([row[i] for row, i in zip(x, ids, strict=True)]) if len(x) else x[:, :0]


def mae_decoder_input(P: int):
    """Mask tokens appended, unshuffled with a repeated index, prefix put back in front, positions added."""

    def call(x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor | None) -> Tensor:
        B, L = ids_restore.shape
        missing = mask_token.reshape(1, 1, -1).repeat(B, L + P - x.shape[1], 1)
        tokens = torch.cat([x[:, P:], missing], dim=1)
        tokens = torch.gather(tokens, 1, ids_restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        if pos_embed is not None and len(pos_embed) == L:
            return torch.cat([x[:, :P], tokens + pos_embed], dim=1)
        out = torch.cat([x[:, :P], tokens], dim=1)
        return out if pos_embed is None else out + pos_embed

    return call


GATHER = {  # B, L, K, D
    "one": (1, 1, 1, 1),
    "a few": (2, 5, 3, 7),
    "more ids than rows": (3, 4, 9, 33),
    "several blocks": (2, 50, 37, 129),
    "several slices of a row": (2, 3, 40, 600),
}
RESTORE = {  # B, P, K, L, D, positions: of all, of the patches, none
    "one": (1, 0, 1, 1, 1, "all"),
    "nothing masked": (2, 1, 6, 6, 5, "patches"),
    "everything masked": (2, 0, 0, 6, 5, "all"),
    "everything masked behind a prefix": (2, 2, 0, 6, 5, "all"),
    "no position": (3, 1, 2, 7, 33, "none"),
    "position of patches": (3, 2, 2, 7, 96, "patches"),
    "several blocks": (2, 1, 20, 77, 129, "all"),
    "several slices of a row": (5, 1, 4, 9, 600, "all"),
}


def make_gather(B, L, K, D):
    return [torch.randn(B, L, D, dtype=torch.float64), torch.randint(0, max(L, 1), (B, K))]


def make_restore(B, P, K, L, D, positions, repeated=False):
    ids = torch.randint(0, L, (B, L)) if repeated else torch.rand(B, L).argsort(1)
    rows = {"all": P + L, "patches": L, "none": None}[positions]
    pos_embed = None if rows is None else torch.randn(rows, D, dtype=torch.float64)
    return [torch.randn(B, P + K, D, dtype=torch.float64), ids, torch.randn(D, dtype=torch.float64), pos_embed]


def ours(P: int, op=restore_tokens):
    """``op`` with P prefix tokens."""
    return lambda x, ids_restore, mask_token, pos_embed: op(x, ids_restore, mask_token, pos_embed, num_prefix_tokens=P)


# ---- values and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", GATHER.values(), ids=GATHER.keys())
def test_gather_is_exact_and_its_gradient_no_worse_than_torch(isa, sizes, dtype):
    x, ids = make_gather(*sizes)
    with backend("native"):
        assert torch.equal(gather_tokens(x.to(dtype), ids), take(x.to(dtype), ids))
    check_against_torch(gather_tokens, take, [x, ids], dtype, torch.randn_like(take(x, ids)))


@pytest.mark.parametrize("repeated", (False, True), ids=["permutation", "repeated ids"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", RESTORE.values(), ids=RESTORE.keys())
def test_restore_is_no_worse_than_torch(isa, sizes, dtype, repeated):
    args, oracle = make_restore(*sizes, repeated=repeated), mae_decoder_input(sizes[1])
    check_against_torch(ours(sizes[1]), oracle, args, dtype, torch.randn_like(oracle(*args)))


@pytest.mark.parametrize("sizes", RESTORE.values(), ids=RESTORE.keys())
def test_references_are_the_formulas(sizes):
    args = make_restore(*sizes)
    torch.testing.assert_close(ours(sizes[1], restore_tokens_reference)(*args), mae_decoder_input(sizes[1])(*args))
    x = torch.randn(3, 5, 4)
    ids = torch.randint(0, 5, (3, 7))
    assert torch.equal(gather_tokens_reference(x, ids), take(x, ids))


def test_masking_gathering_and_restoring_go_round():
    x = torch.randn(3, 20, 8)
    keep, restore, mask = random_masking(3, 20, 0.6)
    out = restore_tokens(gather_tokens(x, keep), restore, torch.zeros(8))
    assert torch.equal(out, x * (1 - mask)[..., None])


def test_rows_nobody_took_have_no_gradient_and_repeated_ones_add_up():
    x = torch.randn(1, 4, 3, requires_grad=True)
    dout = torch.randn(1, 3, 3)
    gather_tokens(x, torch.tensor([[2, 0, 2]])).backward(dout)
    assert torch.equal(x.grad[0], torch.stack([dout[0, 1], torch.zeros(3), dout[0, 0] + dout[0, 2], torch.zeros(3)]))


def test_half_precision_sums_are_rounded_once(isa):
    x = torch.zeros(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    dout = torch.tensor([256.0] + [1.0] * 255, dtype=torch.bfloat16).view(1, 256, 1)
    gather_tokens(x, torch.zeros(1, 256, dtype=torch.int64)).backward(dout)
    assert x.grad.item() == 512  # 511 to the nearest; one by one the sum would stay at 256


# ---- layouts, threads, subsets, empties


def test_strided_inputs_and_gradients():
    x, ids, mask_token, pos_embed = make_restore(2, 1, 3, 6, 4, "all")
    expected = ours(1)(x, ids, mask_token, pos_embed)
    strided_x = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    strided_ids = torch.stack([ids, ids], dim=-1)[..., 0]
    strided_pos = pos_embed.T.contiguous().T
    assert not strided_x.is_contiguous() and not strided_ids.is_contiguous()
    assert torch.equal(
        ours(1)(strided_x, strided_ids, mask_token[:1].expand(4) * 0 + mask_token, strided_pos), expected
    )
    index = torch.tensor([[1, 1, 0]]).expand(2, -1)
    assert torch.equal(gather_tokens(strided_x, index), take(x, index))

    for dout in (torch.randn(1, 1, 4).double().expand(2, 7, 4), torch.randn(4, 7, 2).double().permute(2, 1, 0)):
        got, wanted = clone_with_grad(x, ids, mask_token, pos_embed), clone_with_grad(x, ids, mask_token, pos_embed)
        ours(1)(*got).backward(dout)
        mae_decoder_input(1)(*wanted).backward(dout)
        for i in (0, 2, 3):
            torch.testing.assert_close(got[i].grad, wanted[i].grad)
        leaf = x.clone().requires_grad_()
        gather_tokens(leaf, ids[:, :3] % 4).backward(dout[:, :3])
        other = x.clone().requires_grad_()
        take(other, ids[:, :3] % 4).backward(dout[:, :3])
        torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_same_bits_on_any_number_of_threads(dtype):
    x, ids, mask_token, pos_embed = (
        t if t.dtype == torch.int64 else t.to(dtype) for t in make_restore(*(5, 1, 30, 77, 129), "all")
    )

    def run():
        leaves = clone_with_grad(x, mask_token, pos_embed)
        out = restore_tokens(leaves[0], ids, *leaves[1:], num_prefix_tokens=1)
        taken = gather_tokens(out, ids[:, :50] // 3)
        return out, taken, *torch.autograd.grad(taken, leaves, taken.detach())

    assert_same_on_any_threads(run)


def test_every_subset_of_gradients():
    args = make_restore(2, 1, 3, 6, 5, "all")
    everything = clone_with_grad(*args)
    ours(1)(*everything).square().sum().backward()
    for wanted in itertools.product((False, True), repeat=3):
        leaves = [args[i].clone().requires_grad_(w) for i, w in zip((0, 2, 3), wanted, strict=True)]
        out = restore_tokens(leaves[0], args[1], *leaves[1:], num_prefix_tokens=1)
        assert out.requires_grad == any(wanted)
        if any(wanted):
            out.square().sum().backward()
        for i, leaf, w in zip((0, 2, 3), leaves, wanted, strict=True):
            assert torch.equal(leaf.grad, everything[i].grad) if w else leaf.grad is None


@pytest.mark.parametrize(
    "sizes", [(0, 5, 3, 4), (2, 5, 0, 4), (2, 0, 0, 4), (2, 5, 3, 0)], ids=["B=0", "K=0", "L=0", "D=0"]
)
def test_empty_gather(sizes):
    B, L, K, D = sizes
    x = torch.randn(B, L, D, requires_grad=True)
    out = gather_tokens(x, torch.zeros(B, K, dtype=torch.int64))
    assert out.shape == (B, K, D)
    out.sum().backward()
    assert x.grad.shape == x.shape and not x.grad.any()


@pytest.mark.parametrize(
    "sizes", [(0, 1, 2, 6, 4), (2, 0, 0, 0, 4), (2, 1, 0, 0, 4)], ids=["B=0", "L=0", "L=0 behind a prefix"]
)
def test_empty_restore(sizes):
    args = (
        make_restore(*sizes, "all") if sizes[3] else [torch.randn(2, sizes[1], 4), torch.zeros(2, 0, dtype=torch.int64)]
    )
    if not sizes[3]:
        args += [torch.randn(4), torch.randn(sizes[1], 4)]
    leaves = clone_with_grad(*args)
    out = ours(sizes[1])(*leaves)
    assert torch.equal(out, mae_decoder_input(sizes[1])(*args))
    out.sum().backward()
    assert not leaves[2].grad.any()
    assert torch.equal(leaves[3].grad, torch.full_like(args[3], sizes[0]))


# ---- what torch does with an op


def test_gradcheck():
    x, ids, mask_token, pos_embed = make_restore(2, 1, 2, 5, 3, "all", repeated=True)
    with backend("native"):
        assert torch.autograd.gradcheck(gather_tokens, (x.requires_grad_(), torch.tensor([[0, 2, 0], [1, 1, 2]])))
        assert torch.autograd.gradcheck(ours(1), clone_with_grad(x, ids, mask_token, pos_embed))


def test_opcheck():
    x, ids, mask_token, pos_embed = clone_with_grad(*make_restore(2, 1, 3, 6, 5, "patches"), dtype=torch.float32)
    torch.library.opcheck(torch.ops.fvm_fast.restore_tokens.default, (x, ids, mask_token, pos_embed, 1))
    torch.library.opcheck(torch.ops.fvm_fast.restore_tokens.default, (x, ids, mask_token, None, 1))
    torch.library.opcheck(torch.ops.fvm_fast.gather_tokens.default, (x, ids[:, :2] % 4))


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_without_a_break(dynamic):
    def f(x, ids, mask_token, pos_embed):
        return restore_tokens(gather_tokens(x, ids[:, :4] % 5), ids, mask_token, pos_embed, num_prefix_tokens=1)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for B in (2, 3):
        args = make_restore(B, 1, 4, 7, 5, "all")
        leaves, eager = clone_with_grad(*args), clone_with_grad(*args)
        out, expected = compiled(*leaves), f(*eager)
        assert torch.equal(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        for i in (0, 2, 3):
            assert torch.equal(leaves[i].grad, eager[i].grad)


def test_autocast_promotes_and_never_demotes():
    x, ids, mask_token, pos_embed = make_restore(2, 1, 3, 6, 5, "all")
    narrow, wide = (x.bfloat16(), ids, mask_token.bfloat16(), pos_embed.bfloat16()), pos_embed.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert gather_tokens(x.float(), ids[:, :2] % 4).dtype == torch.float32
        assert gather_tokens(x.bfloat16(), ids[:, :2] % 4).dtype == torch.bfloat16
        assert ours(1)(*narrow).dtype == torch.bfloat16
        out = ours(1)(*narrow[:3], wide)
    assert out.dtype == torch.float32
    assert torch.equal(out, ours(1)(narrow[0].float(), ids, narrow[2].float(), wide))


def test_transforms_take_the_reference():
    args = make_restore(2, 1, 3, 6, 5, "all")
    x, ids, mask_token, pos_embed = args

    def loss(x):
        return (ours(1)(x, ids, mask_token, pos_embed).square().sum(), gather_tokens(x, ids % 4).cos().sum())[0]

    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), wanted)
    rows = torch.func.vmap(lambda x, i: gather_tokens(x[None], i[None])[0])(x, ids % 4)
    assert torch.equal(rows, take(x, ids % 4))
    tangent = torch.randn_like(x)
    _, forward = torch.func.jvp(loss, (x,), (tangent,))
    torch.testing.assert_close(forward, (wanted * tangent).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = gather_tokens(torch.autograd.forward_ad.make_dual(x, tangent), ids % 4)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, take(tangent, ids % 4))
    with backend("native"), pytest.raises(RuntimeError, match="restore_tokens: .*torch.func transform"):
        torch.func.grad(loss)(x)


@pytest.mark.parametrize("name", ("gather_tokens", "restore_tokens"))
def test_second_derivatives_name_the_torch_backend(name):
    x, ids, mask_token, pos_embed = clone_with_grad(*make_restore(2, 1, 3, 6, 5, "all"))

    def op(x):
        return gather_tokens(x, ids % 4) if name == "gather_tokens" else ours(1)(x, ids, mask_token, pos_embed)

    (grad,) = torch.autograd.grad(op(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"{name}: .*backend\('torch'\)"):
        grad.sum().backward()
    with backend("torch"):
        (grad,) = torch.autograd.grad(op(x).pow(3).sum(), x, create_graph=True)
        grad.sum().backward()
    assert x.grad.any()


def test_tensors_are_made_where_the_inputs_are():
    args = clone_with_grad(*make_restore(2, 1, 3, 6, 5, "all"))
    with torch.device("meta"):
        out = gather_tokens(ours(1)(*args), args[1])
        out.backward(torch.ones_like(out))
    assert out.device.type == "cpu" and args[0].grad.device.type == "cpu"


# ---- bad input


def gather(x=(2, 5, 3), ids=((0, 1), (2, 3)), dtype=torch.int64, **kwargs):
    return gather_tokens(torch.zeros(x, **kwargs), torch.tensor(ids, dtype=dtype))


def restore(x=(2, 3, 4), ids=None, mask_token=(4,), pos_embed=(7, 4), P=1, dtype=torch.float32):
    ids = torch.arange(6).expand(2, 6) if ids is None else ids
    return restore_tokens(
        torch.zeros(x), ids, torch.zeros(mask_token, dtype=dtype), torch.zeros(pos_embed), num_prefix_tokens=P
    )


OUT_OF_RANGE = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 6]])
BAD = [
    (gather, {"x": (5, 3)}, ValueError, r"gather_tokens: expected x \[B, L, D\], got 2 dimensions \(5, 3\)"),
    (gather, {"ids": ((0, 1),)}, ValueError, r"gather_tokens: expected ids \[2, K\] int64, got torch.int64 \(1, 2\)"),
    (gather, {"ids": (0, 1)}, ValueError, r"got torch.int64 \(2,\)"),
    (gather, {"dtype": torch.int32}, ValueError, r"int64, got torch.int32"),
    (gather, {"ids": ((0, 1), (2, 5))}, IndexError, r"gather_tokens: expected ids in \[0, 5\), got 5 at \[1, 1\]"),
    (gather, {"ids": ((0, -1), (2, 5))}, IndexError, r"got -1 at \[0, 1\]"),
    (gather, {"x": (2, 0, 3)}, IndexError, r"expected ids in \[0, 0\), got 0 at \[0, 0\]"),
    (gather, {"device": "meta"}, ValueError, "one device, got x on meta, ids on cpu"),
    (restore, {"x": (3, 4)}, ValueError, r"restore_tokens: expected x \[B, L, D\]"),
    (restore, {"x": (2, 8, 4)}, ValueError, r"K of at most 6 patches, got \(2, 8, 4\) with P = 1"),
    (restore, {"P": 4}, ValueError, "with P = 4"),
    (restore, {"P": -1}, ValueError, "with P = -1"),
    (restore, {"mask_token": (5,)}, ValueError, r"mask_token \[4\] or \[1, 1, 4\], got \(5,\)"),
    (restore, {"pos_embed": (8, 4)}, ValueError, r"pos_embed \[7, 4\] or \[6, 4\].*got \(8, 4\)"),
    (restore, {"pos_embed": (2, 3, 4)}, ValueError, r"pos_embed .*got \(2, 3, 4\)"),
    (restore, {"dtype": torch.bfloat16}, TypeError, "one floating dtype .*mask_token bfloat16"),
    (
        restore,
        {"ids": OUT_OF_RANGE},
        IndexError,
        r"restore_tokens: expected ids_restore in \[0, 6\), got 6 at \[1, 5\]",
    ),
]


@pytest.mark.parametrize(("call", "changes", "error", "sentence"), BAD, ids=[b[3] for b in BAD])
def test_bad_input_is_a_sentence(call, changes, error, sentence):
    call()
    with pytest.raises(error, match=sentence):
        call(**changes)
