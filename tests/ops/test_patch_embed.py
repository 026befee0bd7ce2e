# SPDX-License-Identifier: Apache-2.0
"""patch_embed against convolution, cat, add and gather, in the orders of timm and of MAE."""

import ctypes
import itertools
import mmap
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from common import DTYPES, assert_no_worse_than_torch, assert_same_on_any_threads, check_against_torch, clone_with_grad
from torch import Tensor

from fvm_fast.ops import backend, patch_embed, patch_embed_reference

FLOATING = ("images", "weight", "bias", "pos_embed", "prefix_tokens", "mask_token")


@dataclass(frozen=True)
class Case:
    """Sizes of a call; H and W count patches."""

    B: int = 2
    H: int = 3
    W: int = 2
    p: int = 4
    C: int = 3
    D: int = 33
    P: int = 1
    K: int | None = None
    uint8: bool = False
    normalise: bool = False
    masked: bool = False
    channels_last: bool = False
    prefix_has_position: bool = True


CASES = {
    "plain": Case(),
    "one of everything": Case(B=1, H=1, W=1, p=1, C=1, D=1, P=0),
    "p=1": Case(p=1, H=5, W=7, C=3, D=96),
    "p=3, more rows than columns, C=4": Case(p=3, H=7, W=1, C=4, D=5, P=2),
    "p=7, prime sizes": Case(B=3, p=7, H=5, W=3, D=13),
    "p=14, rows that no vector divides": Case(p=14, D=129),
    "p=16, several chunks of features": Case(p=16, D=96),
    "p=32": Case(p=32, H=1, W=2, D=5),
    "several blocks of tokens": Case(B=4, H=9, W=8, p=8, D=128, uint8=True, normalise=True),
    "uint8": Case(uint8=True, p=8),
    "uint8 normalised, channels_last": Case(uint8=True, normalise=True, channels_last=True, P=0),
    "float normalised, grey": Case(normalise=True, C=1, p=7),
    "channels_last": Case(channels_last=True, p=7, D=5),
    "kept": Case(K=4, H=5, W=3),
    "more ids than patches": Case(K=11),
    "kept, uint8 normalised, no position for the prefix": Case(
        K=3, uint8=True, normalise=True, prefix_has_position=False
    ),
    "masked": Case(masked=True, H=5, W=3),
    "masked and kept, channels_last, normalised": Case(masked=True, K=5, channels_last=True, normalise=True, P=2),
}


def make(case: Case) -> tuple[list[Tensor | None], dict]:
    """The six floating arguments in float64, and the rest."""
    c, L = case, case.H * case.W
    shape = (c.B, c.C, c.H * c.p, c.W * c.p)
    images = torch.randint(0, 256, shape, dtype=torch.uint8) if c.uint8 else torch.randn(shape, dtype=torch.float64)
    if c.channels_last:
        images = images.to(memory_format=torch.channels_last)
    weight = torch.randn(c.D, c.C, c.p, c.p, dtype=torch.float64) / c.p
    pos_embed = torch.randn((c.P if c.prefix_has_position else 0) + L, c.D, dtype=torch.float64)
    prefix = torch.randn(c.P, c.D, dtype=torch.float64) if c.P else None
    mask_token = torch.randn(c.D, dtype=torch.float64) if c.masked else None
    rest = {
        "ids_keep": None if c.K is None else torch.randint(0, L, (c.B, c.K)),
        "mask": torch.rand(c.B, L) < 0.5 if c.masked else None,
        "mean": [0.48, 0.46, 0.41, 0.5][: c.C] if c.normalise else None,
        "std": [0.27, 0.26, 0.28, 0.3][: c.C] if c.normalise else None,
    }
    return [images, weight, torch.randn(c.D, dtype=torch.float64), pos_embed, prefix, mask_token], rest


def ours(rest: dict, op=patch_embed):
    """``op`` as a function of the floating arguments."""

    def call(images, weight, bias, pos_embed, prefix, mask_token):
        kwargs = {k: v for k, v in rest.items() if k != "ids_keep"}
        return op(images, weight, bias, pos_embed, prefix, rest["ids_keep"], mask_token=mask_token, **kwargs)

    return call


def by_convolution(rest: dict):
    """Embed everything, mask, add positions, gather, put the prefix in front: what timm, BEiT and MAE do."""

    def call(images, weight, bias, pos_embed, prefix, mask_token):
        dtype = weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        if images.dtype == torch.uint8:
            images = images.to(wide).div(255)
        if rest["mean"] is not None:
            mean, std = (torch.tensor(rest[k], dtype=wide)[:, None, None] for k in ("mean", "std"))
            images = (images.to(wide) - mean) / std
        x = F.conv2d(images.to(dtype), weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
        L, D = x.shape[1:]
        if mask_token is not None:
            w = rest["mask"][..., None].to(dtype)
            x = x * (1 - w) + mask_token * w
        P = 0 if prefix is None else len(prefix)
        if pos_embed is not None:
            if len(pos_embed) == L:
                pos_embed = torch.cat([pos_embed.new_zeros(P, D), pos_embed])
            x = x + pos_embed[P:]
        if rest["ids_keep"] is not None:
            x = torch.gather(x, 1, rest["ids_keep"][..., None].repeat(1, 1, D))
        if prefix is None:
            return x
        return torch.cat([(prefix if pos_embed is None else prefix + pos_embed[:P]).expand(len(x), -1, -1), x], dim=1)

    return call


# ---- values and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_value_and_gradients_are_no_worse_than_torch(isa, case, dtype):
    args, rest = make(case)
    oracle = by_convolution(rest)
    dout = torch.randn_like(oracle(*args))
    check_against_torch(ours(rest), oracle, args, dtype, dout)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_reference_is_the_formula(case):
    args, rest = make(case)
    leaves = [clone_with_grad(*args), clone_with_grad(*args)]
    outs = [f(*own) for f, own in zip((ours(rest, patch_embed_reference), by_convolution(rest)), leaves, strict=True)]
    torch.testing.assert_close(*outs)
    dout = torch.randn_like(outs[0])
    for out in outs:
        out.backward(dout)
    for a, b in zip(*leaves, strict=True):
        if a is not None and a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_more_tokens_than_are_packed_at_once(dtype):
    case = Case(B=3, H=30, W=30, p=32, D=5, C=3, P=0) if dtype == torch.bfloat16 else Case(B=37, H=6, W=6, p=32, D=5)
    args, rest = make(case)
    oracle = by_convolution(rest)
    check_against_torch(ours(rest), oracle, args, dtype, torch.randn_like(oracle(*args)))


def test_optional_arguments_one_by_one():
    args, rest = make(Case(P=2, prefix_has_position=False))
    for chosen in itertools.product((False, True), repeat=3):  # bias, pos_embed, prefix_tokens
        some = [*args[:2], *(a if c else None for a, c in zip(args[2:5], chosen, strict=True)), None]
        check_against_torch(ours(rest), by_convolution(rest), some, torch.float32)


def test_leading_ones_are_accepted():
    args, rest = make(Case(masked=True))
    images, weight, bias, pos_embed, prefix, mask_token = args
    kwargs = {"mask": rest["mask"]}
    out = patch_embed(images, weight, bias, pos_embed, prefix, mask_token=mask_token, **kwargs)
    token = mask_token[None, None]
    again = patch_embed(images, weight, bias, pos_embed[None], prefix[None], mask_token=token, **kwargs)
    assert torch.equal(out, again)


def test_statistics_as_tensors():
    args, rest = make(Case(uint8=True, normalise=True))
    tensors = {**rest, "mean": torch.tensor(rest["mean"]), "std": torch.tensor(rest["std"])}
    torch.testing.assert_close(ours(tensors)(*args), ours(rest)(*args), rtol=0, atol=1e-6)


def test_gradients_of_repeated_ids_add_up():
    args, rest = make(Case(B=1, P=0))
    dout = torch.randn(1, 3, 33, dtype=torch.float64)
    leaves = clone_with_grad(*args)
    ours({**rest, "ids_keep": torch.tensor([[4, 1, 4]])})(*leaves).backward(dout)
    torch.testing.assert_close(leaves[3].grad[4], dout[0, 0] + dout[0, 2])
    assert not leaves[3].grad[[0, 2, 3, 5]].any()


def test_nothing_flows_to_the_weight_through_the_mask():
    args, rest = make(Case(masked=True))
    leaves = clone_with_grad(*args)
    ours({**rest, "mask": torch.ones_like(rest["mask"])})(*leaves).sum().backward()
    images, weight, bias, _, _, mask_token = leaves
    assert not weight.grad.any() and not bias.grad.any() and not images.grad.any()
    torch.testing.assert_close(mask_token.grad, torch.full_like(mask_token, 12))


def test_a_patch_sees_no_other_patch(isa):
    args, rest = make(Case(p=3, H=4, W=5))
    clean = ours(rest)(*args)
    args[0][:, :, 3:6, 6:9] = float("nan")
    out = ours(rest)(*args)
    dirty = 1 + 5 * 1 + 2
    assert out[:, dirty].isnan().all()
    keep = [i for i in range(out.shape[1]) if i != dirty]
    assert torch.equal(out[:, keep], clean[:, keep])


@pytest.mark.parametrize("p", (1, 3, 4, 16))
def test_images_are_not_read_past_their_end(isa, p):
    page, size = mmap.PAGESIZE, 3 * (2 * p) * (2 * p)
    memory = mmap.mmap(-1, 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), 0) == 0  # reading it is a fault
    images = torch.frombuffer(memory, dtype=torch.uint8, count=page)[page - size :].view(1, 3, 2 * p, 2 * p)
    images.copy_(torch.randint(0, 256, images.shape, dtype=torch.uint8))
    weight = torch.randn(5, 3, p, p)
    out = patch_embed(images, weight)
    torch.testing.assert_close(out, patch_embed_reference(images, weight))
    assert libc.mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), 3) == 0


# ---- layouts, threads, subsets, empties


def test_strided_images_and_gradients():
    args, rest = make(Case(B=3))
    images, parameters = args[0], args[1:]
    expected = ours(rest)(*args)
    wide = torch.randn(3, 3, 12, 20, dtype=torch.float64)
    wide[..., ::2][..., :8] = images
    for view in (wide[..., ::2][..., :8], images.transpose(2, 3).contiguous().transpose(2, 3)):
        assert not view.is_contiguous()
        assert torch.equal(ours(rest)(view, *parameters), expected)
    one = images[:1].expand(3, -1, -1, -1)
    assert torch.equal(ours(rest)(one, *parameters), expected[:1].expand(3, -1, -1))

    douts = [
        torch.randn(1, 1, 33, dtype=torch.float64).expand_as(expected),
        torch.randn(33, 7, 3).double().permute(2, 1, 0),
    ]
    for dout in douts:
        got, wanted = clone_with_grad(*args), clone_with_grad(*args)
        ours(rest)(*got).backward(dout)
        by_convolution(rest)(*wanted).backward(dout)
        for a, b in zip(got[:5], wanted[:5], strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_the_image_gradient_lies_as_the_images():
    args, rest = make(Case(channels_last=True))
    leaves = clone_with_grad(*args)
    ours(rest)(*leaves).sum().backward()
    assert leaves[0].grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "case", [replace(CASES["several blocks of tokens"], uint8=False, K=70, masked=True)], ids=["all"]
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_same_bits_on_any_number_of_threads(case, dtype):
    args, rest = make(case)
    args = [a if a is None else a.to(dtype) for a in args]

    def run():
        leaves = clone_with_grad(*args)
        out = ours(rest)(*leaves)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(1) % 3 - 1)

    assert_same_on_any_threads(run)


def test_every_subset_of_gradients():
    args, rest = make(Case(masked=True, K=4))
    everything = clone_with_grad(*args)
    ours(rest)(*everything).sum().backward()
    for wanted in itertools.product((False, True), repeat=6):
        leaves = [a.clone().requires_grad_(w) for a, w in zip(args, wanted, strict=True)]
        out = ours(rest)(*leaves)
        assert out.requires_grad == any(wanted)
        if any(wanted):
            out.sum().backward()
        for leaf, full, w in zip(leaves, everything, wanted, strict=True):
            assert torch.equal(leaf.grad, full.grad) if w else leaf.grad is None


@pytest.mark.parametrize("P", (0, 2))
@pytest.mark.parametrize(
    "case", [Case(B=0), Case(K=0), Case(H=0), Case(B=0, K=3)], ids=["B=0", "K=0", "L=0", "B=0, K=3"]
)
def test_empty(case, P):
    args, rest = make(replace(case, P=P))
    leaves = clone_with_grad(*args)
    out = ours(rest)(*leaves)
    L = case.H * case.W
    assert out.shape == (case.B, P + (L if case.K is None else case.K), case.D)
    out.sum().backward()
    for leaf in leaves[:3]:
        assert leaf.grad.shape == leaf.shape and not leaf.grad.any()
    if P and case.B:
        torch.testing.assert_close(out[0], args[4] + args[3][:P])
        torch.testing.assert_close(leaves[4].grad, torch.full_like(args[4], case.B))
        torch.testing.assert_close(leaves[3].grad[:P], torch.full_like(args[4], case.B))


# ---- what torch does with an op


def test_gradcheck():
    args, rest = make(Case(B=2, H=2, W=1, p=2, C=2, D=3, masked=True, K=3, normalise=True))
    rest["mask"] = torch.tensor([[False, True], [False, False]])
    rest["ids_keep"] = torch.tensor([[0, 1, 0], [1, 0, 1]])
    with backend("native"):
        assert torch.autograd.gradcheck(ours(rest), clone_with_grad(*args))


@pytest.mark.parametrize("name", ["plain", "masked and kept, channels_last, normalised", "uint8"])
def test_opcheck(name):
    args, rest = make(CASES[name])
    images, weight, bias, pos_embed, prefix, mask_token = clone_with_grad(*args, dtype=torch.float32)
    mean, std = (None if rest[k] is None else torch.tensor(rest[k], dtype=torch.float64) for k in ("mean", "std"))
    op_args = (images, weight, bias, pos_embed, prefix, rest["ids_keep"], mean, std, rest["mask"], mask_token)
    torch.library.opcheck(torch.ops.fvm_fast.patch_embed.default, op_args)


@pytest.mark.parametrize(
    "name", ["kept", "uint8 normalised, channels_last", "masked and kept, channels_last, normalised"]
)
def test_compiles_without_a_break(name):
    args, rest = make(CASES[name])
    torch._dynamo.reset()
    compiled = torch.compile(ours(rest), fullgraph=True, backend="aot_eager")
    eager_leaves, leaves = clone_with_grad(*args, dtype=torch.float32), clone_with_grad(*args, dtype=torch.float32)
    expected, out = ours(rest)(*eager_leaves), compiled(*leaves)
    assert torch.equal(out, expected)
    expected.sum().backward()
    out.sum().backward()
    for a, b in zip(leaves, eager_leaves, strict=True):
        if a is not None and a.requires_grad:
            assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("compiled", (False, True))
def test_autocast(compiled):
    args, rest = make(Case(normalise=False))
    torch._dynamo.reset()

    def f(*leaves):
        with torch.autocast("cpu", torch.bfloat16):
            return ours(rest)(*leaves)

    def oracle(images, weight, bias, pos_embed, prefix, _):
        with torch.autocast("cpu", torch.bfloat16):
            x = F.conv2d(images, weight, None, stride=4).flatten(2).transpose(1, 2)
        x = x.to(pos_embed.dtype) + bias + pos_embed[1:]
        return torch.cat([(prefix + pos_embed[:1]).expand(len(x), -1, -1), x], dim=1)

    f = torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f
    leaves, leaves_torch = clone_with_grad(*args, dtype=torch.float32), clone_with_grad(*args, dtype=torch.float32)
    out, out_torch = f(*leaves), oracle(*leaves_torch)
    assert out.dtype == torch.float32
    exact = clone_with_grad(*(None if a is None else a.detach().float() for a in args), dtype=torch.float64)
    exact[1] = args[1].float().double().requires_grad_()
    out_exact = by_convolution(rest)(*exact)
    assert_no_worse_than_torch(out, out_torch, out_exact)
    for o in (out, out_torch, out_exact):
        o.backward(torch.ones_like(o))
    for name, a, b, e in zip(FLOATING[:5], leaves, leaves_torch, exact, strict=False):
        assert a.grad.dtype == torch.float32
        assert_no_worse_than_torch(a.grad, b.grad, e.grad, name)


def test_autocast_without_float32_parameters_stays_narrow():
    args, rest = make(Case(P=0))
    images, weight = args[0].float(), args[1].float()
    with torch.autocast("cpu", torch.bfloat16):
        assert patch_embed(images, weight).dtype == torch.bfloat16
        assert patch_embed(images, weight, args[2].bfloat16()).dtype == torch.bfloat16
        assert patch_embed(images, weight, args[2].float()).dtype == torch.float32


@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("wide", FLOATING[2:])
def test_parameters_may_be_float32_beside_a_16_bit_weight(isa, half, wide):
    args, rest = make(Case(masked=True, H=5))
    args = [a.float() if name == wide else a.to(half) for name, a in zip(FLOATING, args, strict=True)]
    leaves, exact = clone_with_grad(*args), clone_with_grad(*args, dtype=torch.float64)
    with backend("native"):
        out = ours(rest)(*leaves)
    out_exact = by_convolution(rest)(*exact)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, out_exact.float(), rtol=1e-5, atol=1e-4)
    out.sum().backward()
    out_exact.sum().backward()
    for a, e in zip(leaves, exact, strict=True):
        assert a.grad.dtype == a.dtype
        torch.testing.assert_close(a.grad, e.grad.to(a.dtype), rtol=1e-2, atol=1e-3)
    with backend("torch"):
        assert ours(rest)(*leaves).dtype == torch.float32


def test_transforms_take_the_reference():
    args, rest = make(Case())
    expected = ours(rest)(*args)

    def loss(weight):
        return ours(rest)(args[0], weight, *args[2:]).square().sum()

    leaf = args[1].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(args[1]), wanted)
    per_image = torch.func.vmap(lambda image: ours(rest)(image[None], *args[1:])[0])
    torch.testing.assert_close(per_image(args[0]), expected)
    tangent = torch.randn_like(args[1])
    _, forward = torch.func.jvp(loss, (args[1],), (tangent,))
    torch.testing.assert_close(forward, (wanted * tangent).sum())
    with backend("native"), pytest.raises(RuntimeError, match="torch.func transform"):
        torch.func.grad(loss)(args[1])


def test_forward_mode_takes_the_reference():
    args, rest = make(Case())
    tangent = torch.randn_like(args[1])
    with torch.autograd.forward_ad.dual_level():
        weight = torch.autograd.forward_ad.make_dual(args[1], tangent)
        out = torch.autograd.forward_ad.unpack_dual(ours(rest)(args[0], weight, *args[2:])).tangent
        with backend("native"), pytest.raises(RuntimeError, match="forward-mode"):
            ours(rest)(args[0], weight, *args[2:])
    wanted = by_convolution(rest)(args[0], tangent, *(None for _ in args[2:]))
    torch.testing.assert_close(out[:, 1:], wanted)


def test_second_derivatives_name_the_torch_backend():
    args, rest = make(Case())
    leaves = clone_with_grad(*args)
    (grad,) = torch.autograd.grad(ours(rest)(*leaves).square().sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"patch_embed: .*backend\('torch'\)"):
        grad.sum().backward()
    with backend("torch"):
        (grad,) = torch.autograd.grad(ours(rest)(*leaves).square().sum(), leaves[1], create_graph=True)
        grad.square().sum().backward()
    assert leaves[1].grad.any()


def test_results_are_fresh():
    images, weight = torch.randn(1, 3, 1, 1), torch.eye(3).view(3, 3, 1, 1)
    out = patch_embed(images, weight)
    out.zero_()
    assert images.any()


# ---- bad input


def call(**changes):
    """A small correct call with some arguments replaced."""
    args = {
        "images": torch.zeros(2, 3, 8, 12),
        "weight": torch.zeros(5, 3, 4, 4),
        "bias": torch.zeros(5),
        "pos_embed": torch.zeros(7, 5),
        "prefix_tokens": torch.zeros(1, 5),
    }
    return patch_embed(**{**args, **changes})


BAD = [
    (
        {"images": torch.zeros(3, 8, 12)},
        ValueError,
        r"images \[B, C, H, W\], got 3 dimensions \(3, 8, 12\).*images\[None\]",
    ),
    ({"images": torch.zeros(2, 3, 9, 12)}, ValueError, "multiples of 4, got 9 x 12"),
    ({"images": torch.zeros(2, 4, 8, 12)}, ValueError, "3 channels.*got 4"),
    ({"images": torch.zeros(2, 3, 8, 12, dtype=torch.float64)}, TypeError, "weight's torch.float32, got torch.float64"),
    ({"images": torch.zeros(2, 3, 8, 12, dtype=torch.int64)}, TypeError, "uint8 .*got torch.int64"),
    ({"weight": torch.zeros(5, 48)}, ValueError, r"\[D, C, p, p\].*got \(5, 48\)"),
    ({"weight": torch.zeros(5, 3, 4, 2)}, ValueError, r"square patches, got \(5, 3, 4, 2\)"),
    ({"weight": torch.zeros(0, 3, 4, 4)}, ValueError, r"got \(0, 3, 4, 4\)"),
    ({"weight": torch.zeros(5, 3, 4, 4, dtype=torch.int32)}, TypeError, "floating weight.*got torch.int32"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias \[5\], got \(4,\)"),
    ({"bias": torch.zeros(5, dtype=torch.float64)}, TypeError, "bias of the weight's torch.float32, got torch.float64"),
    ({"pos_embed": torch.zeros(8, 5)}, ValueError, r"pos_embed \[7, 5\] or \[6, 5\].*got \(8, 5\)"),
    ({"pos_embed": torch.zeros(2, 7, 5)}, ValueError, r"pos_embed .*got \(2, 7, 5\)"),
    ({"prefix_tokens": torch.zeros(5)}, ValueError, r"prefix_tokens \[P, 5\].*got \(5,\)"),
    ({"prefix_tokens": torch.zeros(1, 5, dtype=torch.float16)}, TypeError, "prefix_tokens of .*got torch.float16"),
    (
        {"ids_keep": torch.zeros(1, 3, dtype=torch.int64)},
        ValueError,
        r"ids_keep \[2, K\] int64, got torch.int64 \(1, 3\)",
    ),
    ({"ids_keep": torch.zeros(2, 3, dtype=torch.int32)}, ValueError, "int64, got torch.int32"),
    ({"ids_keep": torch.tensor([[0, 1], [2, 6]])}, IndexError, r"ids_keep in \[0, 6\), got 6 at \[1, 1\]"),
    ({"ids_keep": torch.tensor([[0, -1], [2, 6]])}, IndexError, r"got -1 at \[0, 1\]"),
    ({"mean": [0.5] * 3}, ValueError, "mean and std together"),
    ({"mean": [0.5] * 2, "std": [1.0] * 2}, ValueError, "mean with 3 numbers.*got 2"),
    ({"mean": torch.zeros(3, requires_grad=True), "std": [1.0] * 3}, ValueError, "constant mean.*detach"),
    ({"mask": torch.zeros(2, 6, dtype=torch.bool)}, ValueError, "mask and mask_token together"),
    ({"mask_token": torch.zeros(5)}, ValueError, "mask and mask_token together"),
    (
        {"mask": torch.zeros(2, 7, dtype=torch.bool), "mask_token": torch.zeros(5)},
        ValueError,
        r"mask \[2, 6\] bool, got torch.bool \(2, 7\)",
    ),
    ({"mask": torch.zeros(2, 6), "mask_token": torch.zeros(5)}, ValueError, "bool, got torch.float32"),
    (
        {"mask": torch.zeros(2, 6, dtype=torch.bool), "mask_token": torch.zeros(1, 5, 5)},
        ValueError,
        r"mask_token \[5\] or \[1, 1, 5\], got \(1, 5, 5\)",
    ),
    ({"weight": torch.zeros(5, 3, 4, 4, device="meta")}, ValueError, "one device, got images on cpu, weight on meta"),
]


@pytest.mark.parametrize(("changes", "error", "sentence"), BAD, ids=[b[2] for b in BAD])
def test_bad_input_is_a_sentence(changes, error, sentence):
    call()
    with pytest.raises(error, match=r"^patch_embed: expected .*" + sentence):
        call(**changes)


def test_meta_tensors_have_shapes():
    out = patch_embed(torch.zeros(2, 3, 8, 12, device="meta"), torch.zeros(5, 3, 4, 4, device="meta"))
    assert out.shape == (2, 6, 5) and out.device.type == "meta"
