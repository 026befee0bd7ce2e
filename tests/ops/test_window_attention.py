# SPDX-License-Identifier: Apache-2.0
"""Values and gradients of window_attention against an oracle that looks up every token."""

import ctypes
import mmap
from dataclasses import replace

import pytest
import torch
from common import DTYPES, FLOATS, assert_same_on_any_threads, clone_with_grad, value_and_grads
from torch import Tensor
from window_common import (
    NAMES,
    Case,
    by_look_up,
    check_against_look_up,
    floor,
    look_up,
    make,
    options,
    ours,
    output_gradient,
    results_three_times,
)

from fvm_fast.ops import backend, window_attention, window_attention_reference
from fvm_fast.ops.window_attention._dropout import keep_mask

SWIN = Case(H=14, W=21, d=32, window=(7, 7), shift=(3, 3))
CASES = {
    "swin, more windows across than down": SWIN,
    "one token": Case(B=1, H=1, W=1, heads=1, d=1, window=(1, 1), shift=(0, 0)),
    "tokens by themselves": Case(H=3, W=2, window=(1, 1), shift=(0, 0)),
    "13 x 17, roll_pad": Case(H=13, W=17, window=(7, 7), shift=(3, 3)),
    "13 x 17, pad_roll": Case(H=13, W=17, window=(7, 7), shift=(3, 3), pad_order="pad_roll"),
    "13 x 17, no shift, no parameters": Case(H=13, W=17, window=(7, 7), shift=(0, 0), bias=False, pad=False),
    "13 x 17, zero pads, h3d": Case(H=13, W=17, window=(7, 7), shift=(3, 3), pad=False, qkv_layout="h3d"),
    "window 2, weak mask": Case(H=5, W=6, window=(2, 2), shift=(1, 1), pad_order="pad_roll", mask_value=-1.3),
    "window 3, cosine": Case(H=7, W=9, window=(3, 3), shift=(1, 1), cosine=True),
    "window 5, shifted across only": Case(H=11, W=10, d=16, window=(5, 5), shift=(0, 2)),
    "window 8, cosine": Case(H=16, W=8, d=32, window=(8, 8), shift=(4, 4), cosine=True),
    "window 8, d 64": Case(B=1, H=8, W=16, heads=2, d=64, window=(8, 8), shift=(0, 4)),
    "window 11, shifted down only": Case(B=1, H=12, W=11, heads=2, d=48, window=(11, 11), shift=(5, 0)),
    "window 12, d 20": Case(B=1, H=12, W=24, heads=2, d=20, window=(12, 12), shift=(6, 6)),
    "window 13": Case(B=1, H=13, W=14, heads=2, d=7, window=(13, 13), shift=(6, 6)),
    "window 14, h3d": Case(B=1, H=10, W=15, heads=2, d=32, window=(14, 14), shift=(0, 0), qkv_layout="h3d"),
    "window 16, cosine": Case(B=1, H=16, W=32, heads=2, d=32, window=(16, 16), shift=(8, 8), cosine=True),
    "window 24": Case(B=1, H=24, W=20, heads=1, d=32, window=(24, 24), shift=(12, 12)),
    "window 2 x 7, d 128": Case(B=1, H=4, W=15, d=128, window=(2, 7), shift=(1, 3)),
    "window 7 x 4, d 96, cosine": Case(H=9, W=8, heads=2, d=96, window=(7, 4), shift=(3, 0), cosine=True),
    "window larger than the map": Case(H=3, W=4, window=(7, 5), shift=(2, 1)),
    "window larger than the map, pad_roll": Case(H=3, W=4, window=(7, 5), shift=(2, 1), pad_order="pad_roll"),
    "window larger than the map on one axis": Case(H=3, W=11, window=(7, 5), shift=(6, 4), cosine=True),
    "scale neither 1 nor the default": Case(scale=0.83),
    "negative scale": Case(scale=-1.7, bias=False),
    "regions shut off": replace(SWIN, mask_value=-torch.inf),
    "regions not masked": replace(SWIN, mask_value=0.0),
    "regions shut off, cosine, padded": Case(H=5, W=7, cosine=True, mask_value=-torch.inf, pad_order="pad_roll"),
    "logits of 300": Case(size_of_q=300.0, scale=1.0, d=1),
    "dropout": Case(H=7, W=7, dropout_p=0.3),
    "dropout, cosine, h3d": Case(H=7, W=7, dropout_p=0.1, cosine=True, qkv_layout="h3d"),
    "dropout, window 16": Case(B=1, H=16, W=16, heads=2, d=16, window=(16, 16), shift=(4, 4), dropout_p=0.5),
}
SMALL = {name: case for name, case in CASES.items() if case.N <= 64}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_value_and_gradients_are_no_worse_than_torch(isa, case, dtype):
    check_against_look_up(case, make(case), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.cosine])
def test_gradient_of_logit_scale_is_no_worse_than_torch(isa, name, dtype):
    case, errors = CASES[name], []
    for _ in range(6 if case.N > 64 else 8):  # of these sums of terms that cancel, any one may be right by luck
        ours, same, exact = results_three_times(case, make(case), dtype)
        errors.append([(r[3].double() - exact[3]).abs() / exact[3].abs().max() for r in (ours, same)])
    errors, allowed = (torch.cat(e).mean() for e in zip(*errors, strict=True))
    assert errors <= 2 * allowed + floor(dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_reference_is_the_formula(case):
    args, dout = make(case), output_gradient(case)
    value, grads = value_and_grads(ours(case, window_attention_reference), args, torch.float64, dout)
    expected, expected_grads = value_and_grads(by_look_up(case), args, torch.float64, dout)
    torch.testing.assert_close([value, *grads], [expected, *expected_grads])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_reference_is_no_worse_than_torch(case, dtype):
    check_against_look_up(case, make(case), dtype, window_attention_reference)


def test_sizes_as_integers():
    case = Case(window=(3, 3), shift=(2, 2))
    qkv, *_ = make(case)
    expected = window_attention(qkv, **options(case))
    assert torch.equal(window_attention(qkv, **options(case) | {"window_size": 3, "shift_size": 2}), expected)
    assert torch.equal(window_attention(qkv, **options(case) | {"window_size": [3, 3], "shift_size": [2, 2]}), expected)


# ---- the mask


def jacobian_support(case: Case) -> Tensor:
    """[H * W, H * W] bool: whether the output of a token depends on the values (v) of another."""
    qkv, attn_bias, logit_scale, pad_qkv = make(case)

    def out(qkv):
        return ours(case)(qkv, attn_bias, logit_scale, pad_qkv).flatten(1, 2)[0].sum(-1)

    rows = torch.autograd.functional.jacobian(out, qkv)  # [H * W, 1, H, W, 3C]
    return rows[:, 0, ..., 2 * case.heads * case.d :].flatten(1, 2).ne(0).any(-1)


@pytest.mark.parametrize("pad_order", ["roll_pad", "pad_roll"])
@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_what_the_roll_brought_together_stays_apart(isa, size, pad_order):
    case = Case(
        B=1, H=size[0], W=size[1], heads=1, d=2, window=(3, 4), shift=(1, 2), pad_order=pad_order, mask_value=-torch.inf
    )
    index, carried = look_up(case)
    expected, unmasked = (torch.zeros(2, index.max() + 2, index.max() + 2, dtype=torch.bool)).unbind(0)
    for tokens, regions in zip(index, carried, strict=True):
        expected[tokens[:, None], tokens] = regions[:, None] == regions
        unmasked[tokens[:, None], tokens] = True
    H, W = size
    assert not torch.equal(expected, unmasked)
    assert torch.equal(jacobian_support(case), expected[: H * W, : H * W])
    assert torch.equal(jacobian_support(replace(case, mask_value=0.0)), unmasked[: H * W, : H * W])


def test_a_finite_mask_yields_to_large_logits(isa):
    case = Case(size_of_q=100.0, scale=1.0)
    args = make(case)
    soft, hard = (ours(replace(case, mask_value=m))(*args) for m in (-100.0, -torch.inf))
    torch.testing.assert_close(soft, by_look_up(case)(*args))
    assert (soft - hard).abs().max() > 0.1


# ---- numbers


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_biases_do_not_overflow(isa, dtype):
    case = Case(H=7, d=16)
    args = make(case)
    args[1] = torch.randn_like(args[1]).sign() * 1e4
    check_against_look_up(case, args, dtype)
    out = ours(case)(*(a if a is None else a.to(dtype) for a in args))
    assert out.isfinite().all()


@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", [SWIN, CASES["window 16, cosine"]], ids=["swin", "window 16, cosine"])
def test_half_types_accumulate_in_float(isa, half, case):
    args = [a if a is None else a.to(half) for a in make(case)]
    got, _, exact = results_three_times(case, args, half)
    for name, a, b in zip(("out", *NAMES), got, exact, strict=True):
        if b is not None:
            error, size = (a.double() - b).norm(), b.norm()
            limit = 4 if name == "logit_scale" else 1  # its terms cancel
            assert error <= limit * torch.finfo(half).eps * size, f"{name}: error {error:.1e} of {size:.1e}"


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_cosine_of_zero_vectors(isa, dtype):
    case = Case(H=5, cosine=True, mask_value=-1.0)
    args = [a.to(dtype) for a in make(case)]
    args[0][:, 1, 2] = 0
    args[3].zero_()
    value, grads = value_and_grads(ours(case), args, dtype)
    expected, expected_grads = value_and_grads(by_look_up(case), args, dtype)
    torch.testing.assert_close(value, expected)
    for got, wanted in zip(grads, expected_grads, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


# ---- dropout


def keeps(seed: int, p: float, window_and_head: int, query: int, key: int) -> bool:
    """The rule in plain integers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    row = mix(seed % 2**32)
    for number in (seed >> 32, window_and_head, query):
        row = mix((row + number) % 2**32)
    return mix((row + key * 0x9E3779B9) % 2**32) >= int(p * 2**32)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**63 - 1])
def test_the_dropout_mask_is_the_rule(seed):
    windows, heads, N = 3, 2, 5
    expected = [keeps(seed, 0.4, n, i, j) for n in range(windows * heads) for i in range(N) for j in range(N)]
    got = keep_mask(torch.tensor(seed), 0.4, windows, heads, N)
    assert got.flatten().tolist() == expected
    assert torch.equal(keep_mask(torch.tensor([seed]), 0.4, windows, heads, N), got)
    assert torch.equal(keep_mask(torch.tensor(seed - 2**63), 0.4, windows, heads, N), got)  # the sign is not used


def native_keep_mask(seed: int, p: float, windows: int, heads: int, N: int) -> Tensor:
    """[windows, heads, N, N]: what the kernel kept, by uniform weights on values that are the rows of an identity."""
    v = torch.eye(N)[:, None].expand(N, heads, N)
    qkv = torch.stack([torch.zeros_like(v), torch.zeros_like(v), v], dim=1).reshape(1, 1, N, -1)
    qkv = qkv.expand(1, windows, N, -1)
    with backend("native"):
        out = window_attention(
            qkv, num_heads=heads, window_size=(1, N), dropout_p=p, seed=torch.tensor(seed)
        )  # each row of the map is a window
    return out.view(windows, N, heads, N).transpose(1, 2) * (N * (1 - p))


@pytest.mark.parametrize("p", (0.0, 2**-32, 0.1, 0.5, 0.97))
def test_kernel_and_reference_drop_the_same_weights(isa, p):
    for seed in (0, 2**32 + 5, 2**63 - 1, -3):
        kept = native_keep_mask(seed, p, windows=7, heads=3, N=19)
        expected = keep_mask(torch.tensor(seed), p, 7, 3, 19)
        torch.testing.assert_close(kept, expected.float())


def test_share_and_independence_of_dropped_weights():
    for p in (0.1, 0.5, 0.9):
        keep = [keep_mask(torch.tensor(seed), p, 16, 4, 64).double() - (1 - p) for seed in (1, 2)]
        n, variance = keep[0].numel(), p * (1 - p)
        limit = 5 * variance / n**0.5  # five standard deviations of a mean of products
        assert abs(keep[0].mean()) < 5 * (variance / n) ** 0.5
        assert abs((keep[0] * keep[1]).mean()) < limit
        for axis in range(4):  # neighbours in window, head, query and key
            assert abs((keep[0] * keep[0].roll(1, axis)).mean()) < limit


def test_seeds_of_dropout():
    case = Case(dropout_p=0.5)
    args = make(case)
    first, again, other = (ours(replace(case, seed=seed))(*args) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(
        ours(replace(case, dropout_p=0.0))(*args),
        window_attention(
            args[0], args[1], pad_qkv=args[3], **options(replace(case, dropout_p=0.0)) | {"seed": torch.tensor(1)}
        ),
    )


@pytest.mark.parametrize("name", ("native", "torch"))
def test_everything_dropped(name):
    case = Case(dropout_p=1.0)
    leaves = clone_with_grad(*make(case))
    with backend(name):
        out = ours(case)(*leaves)
        out.sum().backward()
    assert not out.any()
    for leaf in leaves:
        assert leaf is None or not leaf.grad.any()


# ---- memory and threads


def at_the_end_of_a_page(t: Tensor) -> Tensor:
    """A copy of ``t`` behind which the processor refuses to read."""
    size = t.numel() * t.element_size()
    length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, length + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + length), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=length)[length - size :].view(t.dtype).view(t.shape)
    return copy.copy_(t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [Case(), Case(H=5, W=5, d=1, cosine=True)], ids=["whole", "padded"])
def test_inputs_are_not_read_past_their_end(isa, case, dtype):
    args = [a if a is None else a.to(dtype) for a in make(case)]
    dout = output_gradient(case).to(dtype)
    at_end = [a if a is None else at_the_end_of_a_page(a) for a in (*args, dout)]
    results = []
    for *leaves, gradient in ((*args, dout), at_end):
        leaves = [a if a is None else a.requires_grad_() for a in leaves]
        out = ours(case)(*leaves)
        results.append([out, *torch.autograd.grad(out, [a for a in leaves if a is not None], gradient)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [SWIN, Case(H=5, W=10, cosine=True)], ids=["swin", "padded, cosine"])
def test_a_window_sees_no_other_window(isa, case, dtype):
    args = [a if a is None else a.to(dtype) for a in make(case)]
    index, _ = look_up(case)
    tokens = index[2][index[2] < case.H * case.W]
    args[0].flatten(1, 2)[1, tokens[0]] = torch.nan
    out = ours(case)(*args)
    flat = out.flatten(1, 2)
    assert flat[1, tokens].isnan().any(-1).all()
    others = torch.ones(case.B, case.H * case.W, dtype=torch.bool)
    others[1, tokens] = False
    assert flat[others].isfinite().all()

    leaves = clone_with_grad(*make(case), dtype=dtype)
    dout = torch.ones_like(out)
    dout.flatten(1, 2)[1, tokens[0]] = torch.nan
    ours(case)(*leaves).backward(dout)
    assert leaves[0].grad.flatten(1, 2)[others].isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "case",
    [
        replace(SWIN, B=3, dropout_p=0.2),
        Case(B=3, H=13, W=17, d=16, window=(7, 7), shift=(3, 3), cosine=True),
        Case(B=1, H=20, W=35, heads=2, d=32, window=(16, 16), shift=(8, 8), cosine=True),
    ],
    ids=["swin", "padded, cosine", "window 16"],
)
def test_same_bits_on_any_number_of_threads(isa, case, dtype):
    args = [a if a is None else a.to(dtype) for a in make(case)]
    dout = output_gradient(case).to(dtype)

    def run():
        leaves = clone_with_grad(*args)
        out = ours(case)(*leaves)
        return out, *torch.autograd.grad(out, [a for a in leaves if a is not None], dout)

    assert_same_on_any_threads(run)
