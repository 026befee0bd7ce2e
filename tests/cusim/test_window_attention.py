# SPDX-License-Identifier: Apache-2.0
"""window_attention on the emulated GPU: values, gradients, the bytes it moves and the tensor cores it uses."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from common import DTYPES, EPS, value_and_grads
from emulated_ops import ops_on_emulated_cuda
from emulator import SCHEDULES, Emulation, Library, build
from torch import Tensor
from window_common import NAMES, Case, by_look_up, check_against_look_up, make, ours, output_gradient

from fvm_fast.ops import backend, window_attention, window_attention_reference

HALVES = (torch.bfloat16, torch.float16)
SWIN = Case(B=1, H=7, W=14, heads=2, d=32, window=(7, 7), shift=(3, 3))
CASES = {
    "one token": Case(B=1, H=1, W=1, heads=1, d=1, window=(1, 1), shift=(0, 0)),
    "swin": SWIN,
    "roll_pad, d 5": Case(H=5, W=7, heads=2),
    "pad_roll, h3d": Case(
        B=1, H=5, W=9, heads=2, d=16, window=(3, 4), shift=(1, 2), pad_order="pad_roll", qkv_layout="h3d"
    ),
    "no parameters, padded": Case(B=1, H=4, W=5, heads=1, d=24, shift=(0, 0), bias=False, pad=False, scale=0.83),
    "larger than the map": Case(B=1, H=3, W=4, heads=1, window=(7, 5), shift=(2, 1), pad_order="pad_roll"),
    "cosine": Case(B=1, H=4, W=6, heads=2, d=16, window=(4, 3), shift=(2, 0), cosine=True),
    "cosine in slices, padded": Case(B=1, H=4, W=5, heads=1, d=40, cosine=True, mask_value=-1.3),
    "several blocks, cosine, regions shut off": Case(
        B=1, H=9, W=7, heads=1, d=40, window=(9, 8), shift=(4, 3), cosine=True, mask_value=-torch.inf
    ),
    "several blocks, dropout": Case(B=1, H=5, W=13, heads=1, d=8, window=(5, 13), shift=(0, 6), dropout_p=0.4),
    "dropout, cosine, h3d": Case(H=3, W=4, heads=2, d=7, cosine=True, qkv_layout="h3d", dropout_p=0.1),
    "d 128, negative scale": Case(B=1, H=2, W=3, heads=1, d=128, window=(2, 3), shift=(0, 1), scale=-0.1),
}
LARGE = {
    "13 x 17, heads 3": Case(H=13, W=17, window=(7, 7), shift=(3, 3), d=32),
    "window 12, d 20": Case(B=1, H=12, W=24, heads=2, d=20, window=(12, 12), shift=(6, 6)),
    "window 24": Case(B=1, H=24, W=20, heads=1, d=32, window=(24, 24), shift=(12, 12)),
    "window 7 x 13, d 96, cosine": Case(B=1, H=9, W=14, heads=1, d=96, window=(7, 13), shift=(3, 0), cosine=True),
    "logits of 300": Case(size_of_q=300.0, scale=1.0, d=1),
    "groups of windows": Case(B=1, H=2, W=5, heads=64, d=3, window=(2, 1), shift=(1, 0)),
}


@pytest.fixture(scope="module")
def library() -> Library:
    return build("window_attention", "window_attention_backward")


def assert_clean(e: Emulation) -> None:
    assert not e.findings, "\n".join(map(str, e.findings))


# ---- launchers, as the op calls them


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def scalars(c: Case) -> tuple:
    """The arguments from ``scale`` to ``sw``."""
    scale = c.scale if c.scale is not None else 1.0 if c.cosine else c.d**-0.5
    seed = torch.tensor(c.seed) if c.dropout_p else None
    numbers = (scale, c.mask_value, c.dropout_p, seed, c.pad_order == "pad_roll", c.qkv_layout == "h3d")
    return *numbers, c.B, c.H, c.W, c.heads, c.d, *c.window, *c.shift


def attend(e: Emulation, c: Case, args: list[Tensor | None]) -> Tensor:
    qkv, dtype = args[0], args[0].dtype
    parameters = [None if a is None else a.to(wide(dtype)) for a in args[1:]]
    out = qkv.new_empty(c.B, c.H, c.W, c.heads * c.d)
    space = torch.empty(e.call("window_attention_fwd_workspace", *scalars(c)[6:13], dtype), dtype=torch.uint8)
    e.call("window_attention_fwd", qkv, *parameters, out, space, *scalars(c), dtype)
    return out


def differentiate(
    e: Emulation, c: Case, args: list[Tensor | None], dout: Tensor, want: tuple[bool, ...] = (True,) * 4
) -> list[Tensor | None]:
    qkv, dtype = args[0], args[0].dtype
    parameters = [None if a is None else a.to(wide(dtype)) for a in args[1:]]
    grads = [
        torch.empty_like(a) if wanted and a is not None else None
        for a, wanted in zip((qkv, *parameters), want, strict=True)
    ]
    size = e.call("window_attention_bwd_workspace", *scalars(c)[6:13], grads[1] is not None, dtype)
    space = torch.empty(size, dtype=torch.uint8)
    e.call("window_attention_bwd", dout, qkv, *parameters, *grads, space, *scalars(c), dtype)
    return grads


def emulated(c: Case, e: Emulation) -> Callable[..., Tensor]:
    """The launchers in the place of ``window_attention``."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            ctx.save_for_backward(*args)
            return attend(e, c, [None if a is None else a.detach() for a in args])

        @staticmethod
        def backward(ctx, dout):
            grads = differentiate(e, c, list(ctx.saved_tensors), dout.contiguous())
            return tuple(None if g is None else g.to(dout.dtype) for g in grads)

    def op(qkv, attn_bias, *, logit_scale, pad_qkv, **_):
        return Function.apply(qkv, attn_bias, logit_scale, pad_qkv)

    return op


# ---- values and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_finding_and_the_same_bits_in_every_order(library, case, dtype):
    """Of threads and blocks; and no worse than torch."""
    args, dout = [a if a is None else a.to(dtype) for a in make(case)], output_gradient(case).to(dtype)
    found = []
    for schedule in SCHEDULES[1:]:
        with Emulation(library, schedule=schedule) as e:
            found.append([attend(e, case, args), *differentiate(e, case, args, dout)])
        assert_clean(e)
    with Emulation(library, schedule=SCHEDULES[0]) as e:
        found.append([attend(e, case, args), *differentiate(e, case, args, dout)])
        check_against_look_up(case, args, dtype, emulated(case, e))
    assert_clean(e)
    for name, first, *others in zip(("out", *NAMES), *found, strict=True):
        assert first is None or all(torch.equal(first, other) for other in others), f"{name} depends on the schedule"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_larger_cases_are_no_worse_than_torch(library, case, dtype):
    with Emulation(library, check=False) as e:
        check_against_look_up(case, make(case), dtype, emulated(case, e))


def test_sums_over_the_windows_of_a_group_are_clean(library):
    """128 blocks of threads share 320 windows and heads."""
    case = LARGE["groups of windows"]
    with Emulation(library) as e:
        differentiate(e, case, make(case), output_gradient(case))
    assert_clean(e)
    assert e.launches[0].grid[0] == 128 < case.heads * 5


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_any_subset_of_gradients(library, dtype):
    c = Case(B=1, H=4, W=3, heads=1, cosine=True)
    args, dout = [a.to(dtype) for a in make(c)], output_gradient(c).to(dtype)
    with Emulation(library) as e:
        everything = differentiate(e, c, args, dout)
        for want in itertools.product((False, True), repeat=4):
            for got, full, wanted in zip(differentiate(e, c, args, dout, want), everything, want, strict=True):
                assert torch.equal(got, full) if wanted else got is None
    assert_clean(e)


def test_no_maps(library):
    c = Case(B=0, cosine=True)
    args = [a.float() for a in make(c)]
    with Emulation(library) as e:
        assert attend(e, c, args).shape == (0, c.H, c.W, c.heads * c.d)
        dqkv, *others = differentiate(e, c, args, output_gradient(c).float())
    assert_clean(e)
    assert dqkv.shape == args[0].shape and not any(g.any() for g in others)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_dropping_everything_leaves_zeros(library, dtype):
    c = Case(B=1, H=3, W=4, heads=1, dropout_p=1.0)
    args = [a if a is None else a.to(dtype) for a in make(c)]
    with Emulation(library) as e:
        out, grads = attend(e, c, args), differentiate(e, c, args, output_gradient(c).to(dtype))
    assert_clean(e)
    assert not out.any() and not any(g.any() for g in grads if g is not None)


def test_a_window_sees_no_other_window(library):
    c = replace(SWIN, shift=(0, 0), heads=1)
    args, dout = [a if a is None else a.bfloat16() for a in make(c)], output_gradient(c).bfloat16()
    with Emulation(library, check=False) as e:
        out, dqkv = attend(e, c, args), differentiate(e, c, args, dout)[0]
        args[0][:, 3, 9] = torch.nan
        dirty_out, dirty_dqkv = attend(e, c, args), differentiate(e, c, args, dout)[0]
    for clean, dirty in ((out, dirty_out), (dqkv, dirty_dqkv)):
        assert torch.equal(clean[:, :, :7], dirty[:, :, :7]) and dirty[:, :, 7:].isnan().any(-1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cosines_of_zero_rows_are_zero(library, dtype):
    """As pads are without pad_qkv: 1 / |k| is 1e12 for them, beyond half precision, and must not spoil other rows."""
    c = Case(B=1, H=5, W=4, heads=1, d=16, pad=False, cosine=True)
    args, dout = [a if a is None else a.to(dtype) for a in make(c)], output_gradient(c).to(dtype)
    with Emulation(library) as e:
        found = [attend(e, c, args), *differentiate(e, c, args, dout)]
    assert_clean(e)
    value, grads = value_and_grads(by_look_up(c), args, torch.float64, dout.double())
    for got, exact in zip(found, (value, *grads), strict=True):
        if exact is not None:
            error = (got.double() - exact).abs().max() / exact.abs().max()
            assert error <= 64 * EPS[dtype]


def test_what_the_kernels_are_not_made_for_is_an_error(library):
    c = Case(B=1, H=1, W=1, heads=1, d=129, window=(1, 1), shift=(0, 0))
    with Emulation(library) as e:
        attend(e, c, [a if a is None else a.float() for a in make(c)])
    assert [f.kind for f in e.findings] == ["launch"]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_op_reaches_the_kernels(dtype):
    c = Case(H=5, W=7, heads=2, d=8, cosine=True, dropout_p=0.2)
    args, dout = make(c), output_gradient(c).to(dtype)
    args = [a.to(dtype) for a in args]
    with ops_on_emulated_cuda(), backend("native"):
        value, grads = value_and_grads(ours(c, window_attention), args, dtype, dout)
    exact, exact_grads = value_and_grads(ours(c, window_attention_reference), args, torch.float64, dout.double())
    tolerance = {"rtol": 0.05, "atol": 0.1} if dtype in HALVES else {"rtol": 1e-4, "atol": 1e-5}
    for got, wanted in zip((value, *grads), (exact, *exact_grads), strict=True):
        torch.testing.assert_close(got.double(), wanted, **tolerance)


# ---- traffic and tensor cores


# Of reads and of writes, for rows of 64 bytes that are 80 apart (128 and 144 with float32). Operands of products are
# read without any; what has some is two rows of a copy, and pairs of float32 results.
FORWARD_CONFLICTS = {torch.float32: (1.0, 1.37), torch.bfloat16: (1.05, 1.68)}
BACKWARD_CONFLICTS = {torch.float32: (1.0, 1.41), torch.bfloat16: (1.06, 1.34)}


def moved(e: Emulation, buffer: str, access: str, bytes_: int, times: float = 1.0) -> None:
    """Each of these bytes is moved, ``times`` over, in whole sectors."""
    group = e.traffic.select(space="global", buffer=buffer, access=access)
    assert group.unique == bytes_, f"{buffer}: {group.unique} different bytes, expected {bytes_}"
    assert group.bytes == round(times * bytes_), f"{buffer}: {group.bytes} bytes, expected {times} times {bytes_}"
    assert 32 * group.sectors <= 1.1 * group.bytes, f"{buffer} is moved in parts of sectors"


def conflicts(e: Emulation, access: str) -> float:
    """Wavefronts of shared memory beside what they would be without conflicts."""
    group = e.traffic.select(space="shared", access=access)
    return round(group.wavefronts / group.ideal_wavefronts, 2)


def products(c: Case, tokens: int, channels: int) -> int:
    """Instructions of 16 x 8 x 16 for a product of 64 x 64 tokens with channels, or of channels with tokens."""
    return c.B * c.grid[0] * c.grid[1] * c.heads * (tokens // 16) * (tokens // 8) * (channels // 16)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_forward_moves_each_byte_once(library, dtype):
    """Where a window is one block of keys (16 bits); else keys and values are read again, out of the L2 cache.

    The bias has rows of 49 values, which no vector fits: single values are read, half a sector by half, and all windows
    read the same ones, which stay in the caches.
    """
    c, size = SWIN, dtype.itemsize
    blocks = 1 if dtype in HALVES else 2
    with Emulation(library) as e:
        attend(e, c, [a if a is None else a.to(dtype) for a in make(c)])
    assert_clean(e)
    tokens, C = c.B * c.H * c.W, c.heads * c.d
    moved(e, "qkv", "read", 3 * C * tokens * size, times=(1 + 2 * blocks) / 3)
    moved(e, "out", "write", C * tokens * size)
    assert e.traffic.select(buffer="bias").unique == 4 * c.heads * c.N**2
    assert sum(k.mma for k in e.launches) == (2 * products(c, 64, c.d) if dtype in HALVES else 0)
    assert (conflicts(e, "read"), conflicts(e, "write")) == FORWARD_CONFLICTS[dtype]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_backward_moves_each_byte_once(library, dtype):
    c, size = SWIN, dtype.itemsize
    with Emulation(library) as e:
        differentiate(e, c, [a if a is None else a.to(dtype) for a in make(c)], output_gradient(c).to(dtype))
    assert_clean(e)
    tokens, C = c.B * c.H * c.W, c.heads * c.d
    moved(e, "qkv", "read", 3 * C * tokens * size, times=1 if dtype in HALVES else (1 + 2 * 4) / 3)
    moved(e, "dout", "read", C * tokens * size)
    moved(e, "dqkv", "write", 3 * C * tokens * size)
    assert e.traffic.select(buffer="dbias", access="write").bytes == 4 * c.heads * c.N**2
    assert sum(k.mma for k in e.launches) == (5 * products(c, 64, c.d) if dtype in HALVES else 0)
    assert (conflicts(e, "read"), conflicts(e, "write")) == BACKWARD_CONFLICTS[dtype]
