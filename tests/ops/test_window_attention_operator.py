# SPDX-License-Identifier: Apache-2.0
"""window_attention as torch sees it: layouts, subsets of gradients, tracing, transforms, autocast, bad input."""

import itertools
from dataclasses import replace

import pytest
import torch
from common import assert_no_worse_than_torch, clone_with_grad
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from window_common import (
    NAMES,
    Case,
    by_look_up,
    check_against_look_up,
    make,
    options,
    ours,
    output_gradient,
)

from fvm_fast.ops import backend, window_attention, window_attention_reference

PADDED = Case(H=5, W=7, cosine=True, pad_order="pad_roll", mask_value=-2.0)


def backward(f, leaves: list[Tensor | None], dout: Tensor) -> list[Tensor | None]:
    """Output and gradients of ``f`` at fresh leaves."""
    leaves = clone_with_grad(*leaves)
    out = f(*leaves)
    out.backward(dout)
    return [out.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def test_checkpointing_changes_nothing():
    args, dout = make(PADDED), output_gradient(PADDED)
    plain = backward(ours(PADDED), args, dout)
    again = backward(lambda *leaves: checkpoint(ours(PADDED), *leaves, use_reentrant=False), args, dout)
    for a, b in zip(plain, again, strict=True):
        assert a is b is None or torch.equal(a, b)


# ---- which arguments, which gradients


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_optional_arguments_one_by_one(isa, dtype):
    for bias, cosine, pad in itertools.product((False, True), repeat=3):
        case = replace(PADDED, bias=bias, cosine=cosine, pad=pad)
        check_against_look_up(case, make(case), dtype)


@pytest.mark.parametrize(
    "case", [PADDED, Case(H=16, W=16, window=(16, 16), shift=(8, 8), d=8, cosine=True, dropout_p=0.1)]
)
def test_every_subset_of_gradients(isa, case):
    args, dout = make(case), output_gradient(case)
    _, *everything = backward(ours(case), args, dout)
    for wanted in itertools.product((False, True), repeat=4):
        leaves = [a.clone().requires_grad_(w) for a, w in zip(args, wanted, strict=True)]
        out = ours(case)(*leaves)
        assert out.requires_grad == any(wanted)
        if any(wanted):
            out.backward(dout)
        for leaf, full, w in zip(leaves, everything, wanted, strict=True):
            assert torch.equal(leaf.grad, full) if w else leaf.grad is None


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_strided_inputs_and_gradients(dtype):
    case = PADDED
    args = [a.to(dtype) for a in make(case)]
    qkv, *parameters = args
    expected = ours(case)(*args)
    wide = torch.randn(2 * case.B, case.H, case.W, qkv.shape[3] + 3).to(dtype)
    wide[::2, ..., 2:-1] = qkv
    views = (
        wide[::2, ..., 2:-1],
        qkv.to(memory_format=torch.channels_last),
        qkv.transpose(1, 2).contiguous().transpose(1, 2),
    )
    for view in views:
        assert not view.is_contiguous() and torch.equal(ours(case)(view, *parameters), expected)
    one = qkv[:1].expand(3, -1, -1, -1)
    assert torch.equal(ours(case)(one, *parameters), expected[:1].expand(3, -1, -1, -1))
    bias, logit_scale, pad_qkv = (p.flip(0).flip(0).repeat_interleave(2, -1)[..., ::2] for p in parameters)
    assert torch.equal(ours(case)(qkv, bias, logit_scale, pad_qkv), expected)

    channels = case.heads * case.d
    for dout in (
        torch.randn(1, 1, 1, channels).to(dtype).expand_as(expected),
        torch.randn(channels, case.W, case.H, case.B).to(dtype).permute(3, 2, 1, 0),
    ):
        for a, b in zip(backward(ours(case), args, dout), backward(ours(case), args, dout.contiguous()), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("sizes", [{"B": 0}, {"H": 0}, {"W": 0}, {"B": 0, "H": 0, "W": 0}], ids=str)
@pytest.mark.parametrize("name", ["native", "torch"])
def test_empty(name, sizes):
    case = replace(Case(cosine=True, dropout_p=0.5), **sizes)
    with backend(name):
        out, *grads = backward(ours(case), make(case), output_gradient(case))
    assert out.shape == (case.B, case.H, case.W, case.heads * case.d)
    for grad, arg in zip(grads, make(case), strict=True):
        assert grad.shape == arg.shape and not grad.any()


@pytest.mark.parametrize("window", [(3, 3), (16, 16)])
def test_nothing_but_inputs_is_kept_for_the_backward(window):
    case = Case(H=16, W=16, window=window, cosine=True, dropout_p=0.1)
    leaves = clone_with_grad(*make(case))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), backend("native"):
        out = ours(case)(*leaves)
    owned = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    assert {t.untyped_storage().data_ptr() for t in kept if t.is_floating_point()} == owned
    assert sum(t.numel() for t in kept if not t.is_floating_point()) == 1  # the seed
    out.sum().backward()


def test_results_are_fresh():
    qkv = torch.randn(1, 2, 2, 3)
    before = qkv.clone()
    out = window_attention(qkv, num_heads=1, window_size=1)  # v itself
    assert torch.equal(out, qkv[..., 2:])
    out.zero_()
    assert torch.equal(qkv, before)


# ---- derivatives


@pytest.mark.parametrize(
    "case",
    [
        Case(B=1, H=3, W=4, heads=2, d=2, window=(2, 3), shift=(1, 1), scale=0.7, mask_value=-0.5),
        Case(B=1, H=3, W=4, heads=2, d=2, window=(2, 3), shift=(1, 2), cosine=True, pad_order="pad_roll"),
        Case(B=1, H=3, W=2, heads=2, d=3, window=(2, 2), shift=(0, 1), dropout_p=0.4, qkv_layout="h3d"),
    ],
    ids=["products", "cosines", "dropout"],
)
def test_gradcheck(isa, case):
    leaves = clone_with_grad(*make(case))

    def f(*given):
        given = iter(given)
        return ours(case)(*(None if leaf is None else next(given) for leaf in leaves))

    with backend("native"):
        assert torch.autograd.gradcheck(f, [leaf for leaf in leaves if leaf is not None])


def test_transforms_take_the_reference():
    case = replace(PADDED, dropout_p=0.2)
    args = make(case)
    expected = ours(case)(*args)

    def loss(qkv, attn_bias):
        return ours(case)(qkv, attn_bias, *args[2:]).square().sum()

    leaves = [a.clone().requires_grad_() for a in args[:2]]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1))(*args[:2]), wanted)
    tangents = tuple(torch.randn_like(a) for a in args[:2])
    _, forward = torch.func.jvp(loss, tuple(args[:2]), tangents)
    torch.testing.assert_close(forward, sum((w * t).sum() for w, t in zip(wanted, tangents, strict=True)))
    with backend("native"), pytest.raises(RuntimeError, match="torch.func transform"):
        torch.func.grad(loss)(*args[:2])

    dry = replace(case, dropout_p=0.0)
    per_image = torch.func.vmap(lambda qkv: ours(dry)(qkv[None], *args[1:])[0])
    torch.testing.assert_close(per_image(args[0]), ours(dry)(*args))
    assert not torch.allclose(expected, ours(dry)(*args))


def test_forward_mode_takes_the_reference():
    args = make(PADDED)
    tangent = torch.randn_like(args[0])
    with torch.autograd.forward_ad.dual_level():
        qkv = torch.autograd.forward_ad.make_dual(args[0], tangent)
        got = torch.autograd.forward_ad.unpack_dual(ours(PADDED)(qkv, *args[1:])).tangent
        with backend("native"), pytest.raises(RuntimeError, match="forward-mode"):
            ours(PADDED)(qkv, *args[1:])
    _, wanted = torch.func.jvp(lambda qkv: by_look_up(PADDED)(qkv, *args[1:]), (args[0],), (tangent,))
    torch.testing.assert_close(got, wanted)


def test_second_derivatives_name_the_torch_backend():
    leaves = clone_with_grad(*make(PADDED))
    (grad,) = torch.autograd.grad(ours(PADDED)(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"window_attention: .*backend\('torch'\)"):
        grad.sum().backward()
    case = Case(B=1, H=3, W=2, heads=1, d=2, window=(2, 2), shift=(1, 1), cosine=True)
    with backend("torch"):
        assert torch.autograd.gradgradcheck(ours(case), clone_with_grad(*make(case)))


# ---- tracing


@pytest.mark.parametrize("case", [Case(), PADDED, Case(dropout_p=0.5)], ids=["products", "cosines", "dropout"])
def test_opcheck(case):
    leaves, more = clone_with_grad(*make(case), dtype=torch.float32), options(case)
    torch.library.opcheck(
        torch.ops.fvm_fast.window_attention.default,
        (*leaves, more["seed"], case.heads, case.window, case.shift, case.scale or 0.5, case.mask_value,
         case.pad_order == "pad_roll", case.qkv_layout == "h3d", case.dropout_p),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize(
    "case", [Case(mask_value=-torch.inf), replace(PADDED, dropout_p=0.3)], ids=["products", "cosines and dropout"]
)
def test_compiles_without_a_break(case, name):
    args = make(case)
    dout = output_gradient(case).float()
    args = [a if a is None else a.float() for a in args]
    torch._dynamo.reset()
    compiled = torch.compile(ours(case), fullgraph=True, backend="aot_eager")
    with backend(name):
        for a, b in zip(backward(compiled, args, dout), backward(ours(case), args, dout), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_compiles_once_for_all_sizes():
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda qkv: window_attention(qkv, num_heads=2, window_size=3, shift_size=1),
        fullgraph=True,
        dynamic=True,
        backend=count,
    )
    for B, H, W in ((2, 4, 5), (3, 7, 6), (5, 9, 11)):
        qkv = torch.randn(B, H, W, 12)
        assert torch.equal(compiled(qkv), window_attention(qkv, num_heads=2, window_size=3, shift_size=1))
    assert len(graphs) == 1


def test_exports_on_the_torch_backend():
    class Attention(torch.nn.Module):
        def forward(self, qkv: Tensor, attn_bias: Tensor) -> Tensor:
            return window_attention(qkv, attn_bias, num_heads=2, window_size=3, shift_size=1)

    qkv, attn_bias = torch.randn(2, 5, 7, 12), torch.randn(2, 9, 9)
    sizes = {"qkv": {0: torch.export.Dim("batch")}, "attn_bias": None}
    with backend("torch"):
        program = torch.export.export(Attention(), (qkv, attn_bias), dynamic_shapes=sizes)
    assert "fvm_fast" not in str(program.graph)
    qkv = torch.randn(5, 5, 7, 12)
    torch.testing.assert_close(program.module()(qkv, attn_bias), Attention()(qkv, attn_bias))


def test_meta_tensors_have_shapes():
    qkv = torch.zeros(2, 5, 7, 12, device="meta")
    out = window_attention(qkv, num_heads=2, window_size=3, shift_size=1)
    assert out.shape == (2, 5, 7, 4) and out.device.type == "meta"


# ---- dtypes


@pytest.mark.parametrize("compiled", (False, True))
def test_autocast(compiled):
    args = [a.float() for a in make(PADDED)]
    dout = output_gradient(PADDED).bfloat16()
    torch._dynamo.reset()

    def autocast(f):
        def call(*leaves):
            with torch.autocast("cpu", torch.bfloat16):
                return f(*leaves)

        return call

    f = autocast(ours(PADDED))
    got = backward(torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f, args, dout)
    same = backward(lambda qkv, *rest: by_look_up(PADDED)(qkv.bfloat16(), *rest), args, dout)
    exact = backward(by_look_up(PADDED), [a.double() for a in (args[0].bfloat16(), *args[1:])], dout.double())
    assert got[0].dtype == torch.bfloat16
    for name, a, b, e in zip(("out", *NAMES), got, same, exact, strict=True):
        assert name == "out" or a.dtype == torch.float32
        assert_no_worse_than_torch(a.bfloat16(), b.bfloat16(), e, name)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(PADDED)(*make(PADDED)).dtype == torch.float64
    with backend("torch"):
        assert f(*args).dtype == torch.bfloat16


@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("wide", NAMES[1:])
def test_parameters_may_be_float32_beside_a_16_bit_qkv(isa, half, wide):
    args = [a.float() if name == wide else a.to(half) for name, a in zip(NAMES, make(PADDED), strict=True)]
    dout = output_gradient(PADDED).to(half)
    with backend("native"):
        got = backward(ours(PADDED), args, dout)
    exact = backward(by_look_up(PADDED), [a.double() for a in args], dout.double())
    assert got[0].dtype == half
    for arg, a, e in zip((got[0], *args), got, exact, strict=True):
        assert a.dtype == arg.dtype
        torch.testing.assert_close(a.double(), e, rtol=0, atol=8 * torch.finfo(half).eps * float(e.abs().max()))
    with backend("torch"):
        assert [g.dtype for g in backward(ours(PADDED), args, dout)] == [g.dtype for g in got]


def test_a_wide_bias_is_not_rounded():
    bias = torch.zeros(1, 2, 2)
    bias[0, :, 1] = 256.5  # bfloat16 has 256 and 258
    bias[0, :, 0] = 256.0
    qkv = torch.zeros(1, 1, 2, 3).bfloat16()
    qkv[0, 0, 1, 2] = 1.0
    for name in ("native", "torch"):
        with backend(name):
            out = window_attention(qkv, bias, num_heads=1, window_size=(1, 2))
        torch.testing.assert_close(out.float(), torch.full((1, 1, 2, 1), 0.5).sigmoid(), rtol=4e-3, atol=0)


# ---- bad input


def call(**changes):
    """A small correct call with some arguments replaced."""
    args = {
        "qkv": torch.zeros(2, 5, 7, 24),
        "attn_bias": torch.zeros(2, 12, 12),
        "num_heads": 2,
        "window_size": (3, 4),
        "shift_size": (1, 2),
        "pad_qkv": torch.zeros(24),
    }
    return window_attention(**{**args, **changes})


BAD = [
    ({"qkv": torch.zeros(5, 7, 24)}, ValueError, r"qkv \[B, H, W, 3C\], got 3 dimensions \(5, 7, 24\); .*qkv\[None\]"),
    ({"qkv": torch.zeros(2, 35, 2, 2, 6)}, ValueError, r"qkv \[B, H, W, 3C\], got 5 dimensions"),
    ({"qkv": torch.zeros(2, 5, 7, 26)}, ValueError, "3 \\* num_heads \\* head_dim channels, got 26 .*num_heads 2"),
    ({"qkv": torch.zeros(2, 5, 7, 0)}, ValueError, "got 0 channels"),
    ({"num_heads": 0}, ValueError, "num_heads 0"),
    ({"qkv": torch.zeros(2, 5, 7, 24, dtype=torch.int64)}, TypeError, "floating qkv .*got torch.int64"),
    ({"window_size": 0}, ValueError, r"1 or more on each axis, got \(0, 0\)"),
    ({"window_size": (3, 4, 5)}, ValueError, r"window_size to be an integer or \(height, width\), got \(3, 4, 5\)"),
    ({"window_size": 3.0}, ValueError, "window_size .*got 3.0"),
    ({"shift_size": "3"}, ValueError, "shift_size .*got '3'"),
    ({"shift_size": (3, 0)}, ValueError, r"0 <= shift_size < window_size .*got shift \(3, 0\) and window \(3, 4\)"),
    ({"shift_size": (0, -1)}, ValueError, r"got shift \(0, -1\).*pass shift 0"),
    ({"attn_bias": torch.zeros(2, 9, 9)}, ValueError, r"attn_bias \[2, 12, 12\], got \(2, 9, 9\)"),
    ({"attn_bias": torch.zeros(1, 2, 12, 12)}, ValueError, r"got \(1, 2, 12, 12\); reshape it"),
    ({"attn_bias": torch.zeros(2, 12, 12).double()}, TypeError, "attn_bias of qkv's torch.float32, got torch.float64"),
    ({"attn_bias": torch.zeros(2, 12, 12).half()}, TypeError, "attn_bias of qkv's torch.float32, got torch.float16"),
    ({"logit_scale": torch.zeros(2, 1, 1)}, ValueError, r"logit_scale \[2\], got \(2, 1, 1\); reshape it"),
    ({"logit_scale": torch.zeros(3)}, ValueError, r"logit_scale \[2\], got \(3,\)"),
    ({"logit_scale": torch.zeros(2), "scale": 1.0}, ValueError, "scale or logit_scale, got both"),
    ({"scale": torch.tensor(1.0)}, TypeError, "scale to be a number, got a tensor"),
    ({"pad_qkv": torch.zeros(8)}, ValueError, r"pad_qkv \[24\], got \(8,\)"),
    ({"pad_qkv": torch.zeros(24, dtype=torch.bfloat16)}, TypeError, "pad_qkv of .*got torch.bfloat16"),
    ({"pad_order": "pad"}, ValueError, "pad_order to be 'roll_pad' or 'pad_roll', got 'pad'"),
    ({"qkv_layout": "hd3"}, ValueError, "qkv_layout to be '3hd' or 'h3d', got 'hd3'"),
    ({"mask_value": torch.nan}, ValueError, "mask_value below infinity, got nan"),
    ({"mask_value": torch.inf}, ValueError, "mask_value below infinity, got inf"),
    ({"dropout_p": 1.1}, ValueError, r"dropout_p in \[0, 1\], got 1.1"),
    ({"dropout_p": -0.1}, ValueError, r"dropout_p in \[0, 1\], got -0.1"),
    ({"dropout_p": torch.nan}, ValueError, r"dropout_p in \[0, 1\], got nan"),
    ({"dropout_p": 0.1}, ValueError, "a seed beside dropout_p 0.1, got None; .*torch.randint"),
    (
        {"dropout_p": 0.1, "seed": torch.zeros(2, dtype=torch.int64)},
        ValueError,
        r"seed \[\] or \[1\] int64, got .*\(2,\)",
    ),
    ({"dropout_p": 0.1, "seed": torch.tensor(1.0)}, ValueError, "int64, got torch.float32"),
    ({"attn_bias": torch.zeros(2, 12, 12, device="meta")}, ValueError, "one device, got qkv on cpu, attn_bias on meta"),
]


@pytest.mark.parametrize(("changes", "error", "sentence"), BAD, ids=[b[2] for b in BAD])
def test_bad_input_is_a_sentence(changes, error, sentence):
    call()
    with pytest.raises(error, match=r"^window_attention: expected .*" + sentence):
        call(**changes)


def test_dropout_has_a_number_for_each_window_and_head_or_refuses():
    qkv = torch.zeros(1, 1, 1, 12).expand(2**31, 1, 1, 12)
    seed = torch.tensor(0)
    with pytest.raises(ValueError, match=r"fewer than 2\*\*32 windows times heads with dropout, got 2147483648 \* 2"):
        window_attention(qkv, num_heads=2, window_size=1, dropout_p=0.5, seed=seed)


def test_the_seed_of_no_dropout_is_not_looked_at():
    assert torch.equal(call(seed=torch.tensor(3)), call())
    assert torch.equal(
        window_attention_reference(torch.ones(1, 2, 2, 3), num_heads=1, window_size=2), torch.ones(1, 2, 2, 1)
    )
