# SPDX-License-Identifier: Apache-2.0
"""patch_embed on the emulated GPU: values, gradients, bad indices, the bytes it moves and the tensor cores it uses."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from common import DTYPES, assert_no_worse_than_torch, check_against_torch, clone_with_grad
from emulated_ops import ops_on_emulated_cuda
from emulator import SCHEDULES, Emulation, Library, build
from torch import Tensor

from fvm_fast.ops import backend, patch_embed, patch_embed_reference

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """Sizes of a call; H and W count patches. Mixed: float32 images and parameters beside a 16-bit weight."""

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
    mixed: bool = False

    @property
    def L(self) -> int:
        """Patches of an image."""
        return self.H * self.W

    @property
    def sizes(self) -> tuple[int, ...]:
        """B, C, H, W, p, D, P, K in pixels, as the launchers take them."""
        K = self.L if self.K is None else self.K
        return self.B, self.C, self.H * self.p, self.W * self.p, self.p, self.D, self.P, K


CASES = {
    "one of everything": Case(B=1, H=1, W=1, p=1, C=1, D=1, P=0),
    "chunks of 16 bytes": Case(p=8, D=40),
    "p=1": Case(p=1, H=5, W=7, D=40),
    "p=3, more rows than columns, C=4": Case(p=3, H=7, W=1, C=4, D=5, P=2),
    "p=7, prime sizes, mixed": Case(B=3, p=7, H=5, W=3, D=13, C=1, mixed=True),
    "several tiles of tokens and columns": Case(B=3, H=7, W=7, D=136),
    "several tiles of features": Case(p=12, C=1, D=8),
    "uint8 normalised, channels_last, mixed": Case(
        p=8, D=8, uint8=True, normalise=True, channels_last=True, P=0, mixed=True
    ),
    "normalised in chunks, mixed": Case(p=8, D=24, normalise=True, mixed=True),
    "kept": Case(K=4, H=5, W=3, D=16),
    "more ids than patches and than lanes": Case(K=37, D=8, p=8, C=1),
    "kept, no position for the prefix, mixed": Case(K=3, D=20, prefix_has_position=False, mixed=True),
    "masked and kept, channels_last, normalised": Case(
        p=3, masked=True, K=5, channels_last=True, normalise=True, P=2, D=9
    ),
    "masked": Case(masked=True, H=5, W=3, D=8),
}


@dataclass
class Arguments:
    """What the launchers get: parameters in the accumulation type."""

    case: Case
    images: Tensor
    weight: Tensor
    bias: Tensor | None
    pos: Tensor | None
    prefix: Tensor | None
    ids: Tensor | None
    mean: Tensor | None
    std: Tensor | None
    mask: Tensor | None
    mask_token: Tensor | None
    dout: Tensor

    @property
    def in_order(self) -> Tensor:
        """The images as they lie in memory."""
        return self.images.permute(0, 2, 3, 1).contiguous() if self.case.channels_last else self.images


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def make(case: Case, dtype: torch.dtype) -> Arguments:
    c, S = case, accumulation(dtype)
    B, C, H, W, p, D, P, K = c.sizes
    mixed = c.mixed and dtype in HALVES

    def parameter(*shape: int) -> Tensor:
        return torch.randn(shape).to(S if mixed else dtype).to(S)

    images = torch.randint(0, 256, (B, C, H, W), dtype=torch.uint8) if c.uint8 else torch.randn(B, C, H, W)
    constants = torch.tensor([[0.48, 0.46, 0.41, 0.5], [0.27, 0.26, 0.28, 0.3]], dtype=torch.float64)[:, :C]
    return Arguments(
        case=c,
        images=images if c.uint8 else images.to(S if mixed else dtype),
        weight=(torch.randn(D, C, p, p) / p).to(dtype),
        bias=parameter(D),
        pos=parameter((P if c.prefix_has_position else 0) + c.L, D),
        prefix=parameter(P, D) if P else None,
        ids=None if c.K is None else torch.randint(0, c.L, (B, K)),
        mean=constants[0].clone() if c.normalise else None,
        std=constants[1].clone() if c.normalise else None,
        mask=torch.rand(B, c.L) < 0.5 if c.masked else None,
        mask_token=parameter(D) if c.masked else None,
        dout=torch.randn(B, P + K, D).to(S if mixed else dtype),
    )


@pytest.fixture(scope="module")
def library() -> Library:
    return build("patch_embed", "patch_embed_backward")


def assert_clean(e: Emulation) -> None:
    assert not e.findings, "\n".join(map(str, e.findings))


# ---- launchers, as the op calls them


def embed(e: Emulation, a: Arguments, **kwargs) -> Tensor:
    out, dtype, (_, C, *_, p, D, _, _) = torch.empty_like(a.dout), a.weight.dtype, a.case.sizes
    space = torch.empty(e.call("patch_embed_fwd_workspace", dtype, C, p, D), dtype=torch.uint8)
    e.call(
        "patch_embed_fwd", a.in_order, a.images.dtype, a.case.channels_last, a.weight, dtype, a.bias, a.pos, a.prefix,
        a.ids, a.mean, a.std, a.mask, a.mask_token, out, out.dtype, space, *a.case.sizes,
        0 if a.pos is None else len(a.pos), **kwargs,
    )  # fmt: skip
    return out


def embed_bwd(e: Emulation, a: Arguments, want=(True,) * 6) -> list[Tensor | None]:
    """Gradients of images, weight, bias, pos, prefix and mask_token, as these lie."""
    (B, C, H, W, p, D, P, K), dtype, S = a.case.sizes, a.weight.dtype, accumulation(a.weight.dtype)
    wanted = (a.images if a.images.is_floating_point() else None, a.weight, a.bias, a.pos, a.prefix, a.mask_token)
    in_order = (a.in_order, a.weight.permute(0, 2, 3, 1) if a.case.channels_last else a.weight, *wanted[2:])
    grads = [
        torch.empty(t.shape, dtype=t.dtype if i == 0 else S) if w and given is not None else None
        for i, (t, given, w) in enumerate(zip(in_order, wanted, want, strict=True))
    ]
    space = e.call("patch_embed_bwd_workspace", dtype, B, C, H, W, p, D, P, K)
    e.call(
        "patch_embed_bwd", a.dout, a.dout.dtype, a.in_order, a.images.dtype, a.case.channels_last, a.weight, dtype,
        a.ids, a.mean, a.std, a.mask, *grads, torch.empty(space, dtype=torch.uint8), *a.case.sizes,
        0 if a.pos is None else len(a.pos),
    )  # fmt: skip
    if a.case.channels_last:
        grads[:2] = (None if g is None else g.permute(0, 3, 1, 2) for g in grads[:2])
    return grads


def by_torch(a: Arguments, dtype: torch.dtype) -> list[Tensor | None]:
    """The result and those gradients by the reference, floating tensors in ``dtype`` or as they are if that is wide."""
    parameters = (a.bias, a.pos, a.prefix, a.mask_token)
    to = (lambda t: t.double()) if dtype == torch.float64 else (lambda t: t if a.case.mixed else t.to(dtype))
    leaves = [
        None if t is None or not t.is_floating_point() else to(t).detach().requires_grad_()
        for t in (a.images, a.weight, *parameters)
    ]
    images = a.images if leaves[0] is None else leaves[0]
    kwargs = {"mean": a.mean, "std": a.std, "mask": a.mask, "mask_token": leaves[5]}
    out = patch_embed_reference(images, *leaves[1:5], a.ids, **kwargs)
    out.backward(a.dout.to(out.dtype))
    return [out.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


# ---- no finding, and the same bits, in every order of threads and blocks


NAMES = ("out", "dimages", "dweight", "dbias", "dpos", "dprefix", "dmask_token")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradients_are_no_worse_than_torch(library, case, dtype):
    a = make(case, dtype)
    found = []
    for schedule in SCHEDULES:
        with Emulation(library, schedule=schedule) as e:
            found.append([embed(e, a), *embed_bwd(e, a)])
        assert_clean(e)
    for name, ours, theirs, exact, *others in zip(
        NAMES, found[0], by_torch(a, dtype), by_torch(a, torch.float64), *found[1:], strict=True
    ):
        assert (ours is None) == (exact is None), name
        if ours is not None:
            assert_no_worse_than_torch(ours, theirs, exact, name)
            assert all(torch.equal(ours, other) for other in others), f"{name} depends on the schedule"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_optional_arguments_one_by_one(library, dtype):
    for chosen in itertools.product((False, True), repeat=3):
        a = make(Case(P=2 if chosen[2] else 0, D=8), dtype)
        a.bias, a.pos = (t if c else None for t, c in zip((a.bias, a.pos), chosen, strict=False))
        with Emulation(library) as e:
            ours = [embed(e, a), *embed_bwd(e, a)]
        assert_clean(e)
        for name, value, theirs, exact in zip(NAMES, ours, by_torch(a, dtype), by_torch(a, torch.float64), strict=True):
            if value is not None:
                assert_no_worse_than_torch(value, theirs, exact, name)


def test_any_subset_of_gradients(library):
    a = make(Case(masked=True, K=4, p=2, D=8), torch.bfloat16)
    with Emulation(library) as e:
        everything = embed_bwd(e, a)
        for want in itertools.product((False, True), repeat=6):
            for ours, full, wanted in zip(embed_bwd(e, a, want), everything, want, strict=True):
                assert torch.equal(ours, full) if wanted else ours is None
    assert_clean(e)


def test_no_rows(library):
    for case in (Case(B=0), Case(K=0, D=8), Case(B=0, K=3)):
        a = make(case, torch.float32)
        with Emulation(library) as e:
            out, (dimages, dweight, dbias, *_) = embed(e, a), embed_bwd(e, a)
        assert_clean(e)
        assert out.shape == a.dout.shape and not dimages.any() and not dweight.any() and not dbias.any()


# ---- indices


def test_bad_ids_give_nan_rows_and_no_gradient(library):
    ids = torch.tensor([[0, 6, 1, 4], [-1, 2, 1 << 40, 2]])
    good = torch.tensor([[True, False, True, True], [False, True, False, True]])
    for masked in (False, True):
        a = make(Case(K=4, D=8, masked=masked), torch.float32)
        a.ids, bad_id = ids, torch.tensor([-1])
        with Emulation(library) as e:
            out, grads = embed(e, a, bad_id=bad_id), embed_bwd(e, a)
        assert_clean(e)
        assert bad_id.item() == 1  # the first, in flat order
        assert torch.equal(out[:, 1:].isnan().all(2), ~good) and torch.equal(out[:, 1:].isnan().any(2), ~good)
        a.ids, a.dout[:, 1:] = ids.where(good, 0), a.dout[:, 1:] * good[..., None]
        exact = by_torch(a, torch.float64)
        for ours, wanted in zip((out[:, 1:][good], *grads), (exact[0][:, 1:][good], *exact[1:]), strict=True):
            if ours is not None:
                torch.testing.assert_close(ours, wanted.float(), rtol=1e-5, atol=1e-5)


def test_without_the_word_bad_ids_are_left_alone(library):
    a = make(Case(K=1, D=8, P=0), torch.float32)
    a.ids = torch.tensor([[6], [0]])
    with Emulation(library) as e:
        assert embed(e, a).isnan().all(2).tolist() == [[True], [False]]
    assert_clean(e)


def test_a_patch_sees_no_other_patch(library):
    a = make(Case(p=8, H=3, W=4, D=8), torch.bfloat16)
    with Emulation(library) as e:
        clean = embed(e, a)
        a.images[:, :, 8:16, 16:24] = float("nan")
        out = embed(e, a)
    dirty = 1 + 4 * 1 + 2
    assert out[:, dirty].isnan().all()
    out[:, dirty] = clean[:, dirty]
    assert torch.equal(out, clean)


def test_offsets_beyond_32_bits(library):
    """The last patch of an image with 2^32 pixels, of which only the pages with that patch come into being."""
    p, side = 4, 1 << 16
    a = make(Case(B=1, C=1, p=p, H=1, W=1, D=8, P=0, K=1, uint8=True), torch.float32)
    patch, case = a.images, replace(a.case, H=side // p, W=side // p)
    a.case, a.pos, a.ids = case, None, torch.tensor([[case.L - 1]])
    a.images = torch.from_numpy(np.zeros((1, 1, side, side), dtype=np.uint8))
    a.images[..., -p:, -p:] = patch
    with Emulation(library, check=False) as e:
        out = embed(e, a)
    torch.testing.assert_close(out, patch_embed_reference(patch, a.weight, a.bias))


# ---- traffic and tensor cores: patches of 16, of which three quarters are kept


KINDS = {
    "bfloat16": (torch.bfloat16, {}),
    "float32": (torch.float32, {}),
    "mixed": (torch.bfloat16, {"mixed": True}),
    "uint8": (torch.bfloat16, {"uint8": True, "normalise": True}),
    "uint8, mixed": (torch.float16, {"uint8": True, "mixed": True}),
}
VIT = Case(B=4, H=7, W=7, p=16, C=1, D=128, P=1, K=36)


@pytest.fixture(params=KINDS)
def vit(request) -> Arguments:
    dtype, changes = KINDS[request.param]
    a = make(replace(VIT, **changes), dtype)
    a.ids = torch.rand(VIT.B, VIT.L).argsort(1)[:, : VIT.K].contiguous()
    return a


def moved(e: Emulation, buffer: str, access: str, bytes_: int, *, times: int = 1, waste: float = 1.1, **where) -> None:
    """Each of these bytes is moved, ``times`` over, in whole sectors but for ``waste``."""
    group = e.traffic.select(space="global", buffer=buffer, access=access, **where)
    assert group.unique == bytes_, f"{buffer}: {group.unique} different bytes, expected {bytes_}"
    assert group.bytes == times * bytes_, f"{buffer}: {group.bytes} bytes, expected {times} times {bytes_}"
    assert 32 * group.sectors <= waste * group.bytes, f"{buffer} is moved in parts of sectors"


def waste_of(images: Tensor) -> float:
    """16 bytes of a row of a uint8 patch are half a sector; the other half belongs to the patch beside it."""
    return 2 if images.dtype == torch.uint8 else 1.1


def no_conflicts(e: Emulation) -> None:
    for (kernel, line), group in e.traffic.select(space="shared").by("kernel", "line").items():
        assert group.wavefronts == group.ideal_wavefronts, f"{kernel} has bank conflicts in line {line}"


def mma_of(tiles: int, steps: int) -> int:
    """Eight warps multiply 32 x 64 x 32 in parts of 16 x 8 x 16."""
    return tiles * 8 * -(-steps // 32) * (2 * 8 * 2)


@pytest.mark.parametrize("columns", (1, 2))
def test_the_forward_moves_each_byte_once(library, vit, columns):
    """Of 128 columns by 128 rows: beyond, pixels and weight are read again, out of the L2 cache."""
    D, F, (B, P, K) = 128 * columns, 256, (VIT.B, VIT.P, VIT.K)
    a = make(replace(vit.case, D=D), vit.weight.dtype)
    a.ids = vit.ids
    with Emulation(library) as e:
        embed(e, a)
    assert_clean(e)
    no_conflicts(e)
    rows = -(-B * (P + K) // 128)
    assert rows == 2
    moved(e, "images", "read", B * K * F * a.images.element_size(), times=columns, waste=waste_of(a.images))
    moved(e, "weight", "read", D * F * a.weight.element_size(), times=rows)
    moved(e, "out", "write", B * (P + K) * D * a.dout.element_size())
    assert e.traffic.select(buffer="pos").unique == 4 * D * (P + len(a.ids.unique()))
    assert e.traffic.select(buffer="bias").unique == e.traffic.select(buffer="prefix").unique == 4 * D
    assert sum(k.mma for k in e.launches) == (0 if a.weight.dtype == torch.float32 else mma_of(rows * columns, F))


def test_the_backward_moves_each_byte_once(library, vit):
    D, F, (B, P, K) = VIT.D, 256, (VIT.B, VIT.P, VIT.K)
    with Emulation(library) as e:
        embed_bwd(e, vit)
    assert_clean(e)
    no_conflicts(e)
    tokens, e_dout = B * K, vit.dout.element_size()
    parts, columns = -(-tokens // 128), F // 128
    weight, images, sums = ({"kernel": f"{k}"} for k in ("weight_gradient", "image_gradient", "sum_images"))
    moved(e, "dout", "read", tokens * D * e_dout, times=columns, **weight)
    moved(e, "images", "read", tokens * F * vit.images.element_size(), waste=waste_of(vit.images), **weight)
    moved(e, "workspace", "write", parts * D * F * 4, **weight)
    moved(e, "dweight", "write", D * F * 4)
    moved(e, "dout", "read", B * (P + K) * D * e_dout, **sums)
    moved(e, "dpos", "write", (P + VIT.L) * D * 4)
    assert e.traffic.select(buffer="dbias").unique == e.traffic.select(buffer="dprefix").unique == 4 * D
    mma = mma_of(parts * columns, 128)  # the last part has 16 tokens
    if not vit.case.uint8:
        moved(e, "dout", "read", tokens * D * e_dout, times=columns, **images)
        moved(e, "weight", "read", D * F * vit.weight.element_size(), times=parts, **images)
        moved(e, "dimages", "write", vit.images.nbytes)
    used = {k.kernel: k.mma for k in e.launches}
    half = vit.weight.dtype != torch.float32
    assert used["weight_gradient"] == half * mma_of(columns, 128 + 16)
    assert used.get("image_gradient", 0) == (half and not vit.case.uint8) * mma


@pytest.mark.parametrize(("dtype", "waste"), [(torch.bfloat16, 2.5), (torch.float32, 1.6)], ids=str)
def test_patches_of_14_move_each_byte_once(library, dtype, waste):
    """28 or 56 bytes of a row of a patch begin anywhere in a sector; neighbours and later steps need what is left."""
    a = make(Case(B=2, H=4, W=4, p=14, C=3, D=128, P=0), dtype)
    with Emulation(library) as e:
        embed(e, a)
        dimages, *_ = embed_bwd(e, a)
    assert_clean(e)
    no_conflicts(e)
    for kernel in ("embed", "weight_gradient"):
        moved(e, "images", "read", a.images.nbytes, waste=waste, kernel=kernel)
    assert e.traffic.select(buffer="dimages", access="write").bytes == dimages.nbytes


# ---- the op, from Python down


def ours(a: Arguments, op=patch_embed):
    """The op as a function of its floating arguments."""

    def call(images, weight, bias, pos, prefix, mask_token):
        kwargs = {"mean": a.mean, "std": a.std, "mask": a.mask, "mask_token": mask_token}
        return op(images, weight, bias, pos, prefix, a.ids, **kwargs)

    return call


def arguments_of(a: Arguments) -> list[Tensor | None]:
    layout = torch.channels_last if a.case.channels_last else torch.contiguous_format
    return [a.images.contiguous(memory_format=layout), a.weight, a.bias, a.pos, a.prefix, a.mask_token]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op(dtype):
    with ops_on_emulated_cuda():
        for case in CASES.values():
            a = make(replace(case, mixed=False), torch.float64)
            check_against_torch(ours(a), ours(a, patch_embed_reference), arguments_of(a), dtype, a.dout)


def test_op_of_nothing():
    for case in (Case(B=0), Case(K=0), Case(H=0)):
        a = make(replace(case, P=2), torch.float32)
        with ops_on_emulated_cuda(), backend("native"):
            leaves = clone_with_grad(*arguments_of(a))
            ours(a)(*leaves).sum().backward()
        assert not leaves[1].grad.any()
        torch.testing.assert_close(leaves[4].grad, torch.full_like(a.prefix, case.B))


def test_gradients_of_float64_by_differences():
    a = make(Case(H=2, W=1, p=2, C=2, D=3, masked=True, normalise=True, K=3), torch.float64)
    a.mask, a.ids = torch.tensor([[False, True], [False, False]]), torch.tensor([[0, 1, 0], [1, 0, 1]])
    with ops_on_emulated_cuda(), backend("native"):
        assert torch.autograd.gradcheck(ours(a), clone_with_grad(*arguments_of(a)))


def test_bad_ids_raise_only_where_they_are_asked_for():
    a = make(Case(K=2, D=8), torch.float32)
    a.ids = torch.tensor([[0, 1], [2, 6]])
    with ops_on_emulated_cuda():
        assert ours(a)(*arguments_of(a)).isnan().any(2).tolist() == [[False] * 3, [False, False, True]]
    sentence = r"patch_embed: expected ids_keep in \[0, 6\), got 6 at \[1, 1\]"
    with ops_on_emulated_cuda(check=True), pytest.raises(IndexError, match=sentence):
        ours(a)(*arguments_of(a))
