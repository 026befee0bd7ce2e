# SPDX-License-Identifier: Apache-2.0
"""The twins of mma, ldmatrix and cp.async against the layouts that NVIDIA publishes, built here from numbers alone.

A kernel and its twin that were wrong in the same way would agree; so the fragments are not taken from our kernels but
from the thread and value layouts, as (shape, stride), of CuTe's traits for SM80_16x8x16_F32BF16BF16F32_TN and
SM75_U32x4_LDSM_N / _T, whose strides run through column-major matrices.

Under FVM_TEST_DEVICE=cuda it is the GPU itself that is put beside them.
"""

import itertools

import numpy as np
import pytest
import torch


def layout(thread: tuple, value: tuple) -> np.ndarray:
    """[threads, values]: the offset of each value of each thread, coordinates counted with the first one fastest."""

    def offsets(shape: tuple, stride: tuple) -> np.ndarray:
        coordinates = itertools.product(*(range(s) for s in reversed(shape)))
        return np.array([sum(c * s for c, s in zip(reversed(cs), stride, strict=True)) for cs in coordinates])

    return offsets(*thread)[:, None] + offsets(*value)[None, :]


A = layout(((4, 8), (32, 1)), ((2, 2, 2), (16, 8, 128)))  # of a [16 m, 16 k], m fastest
B = layout(((4, 8), (16, 1)), ((2, 2), (8, 64)))  # of b [8 n, 16 k], n fastest
C = layout(((4, 8), (32, 1)), ((2, 2), (16, 8)))  # of c [16 m, 8 n], m fastest


def held(matrix: torch.Tensor, where: np.ndarray) -> torch.Tensor:
    """What each lane holds of a matrix whose rows run fastest."""
    return matrix.t().flatten()[torch.from_numpy(where)].contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_multiplies_what_the_published_layout_says(dtype: torch.dtype, run_fragments, schedule: str) -> None:
    torch.manual_seed(0)
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.randn(16, 8)
    out = torch.empty(32, 4)
    with run_fragments(schedule=schedule) as e:
        e.call("run_mma", held(a, A), held(b, B), held(c, C), out, dtype == torch.bfloat16)
    assert not e.findings and (e.launches is None or e.launches[0].mma == 1)
    want = c.double() + a.double() @ b.double().t()
    torch.testing.assert_close(out.double(), held(want, C), rtol=0, atol=2e-6)


def test_mma_passes_infinity_and_nan_on(run_fragments) -> None:
    a, b, c = torch.zeros(16, 16).half(), torch.ones(8, 16).half(), torch.zeros(16, 8)
    a[3, 5], a[4, 6], c[7, 2] = torch.inf, torch.nan, -torch.inf
    out = torch.empty(32, 4)
    with run_fragments() as e:
        e.call("run_mma", held(a, A), held(b, B), held(c, C), out, False)
    want = held(c + a.float() @ b.float().t(), C)
    torch.testing.assert_close(out, want, equal_nan=True, rtol=0, atol=0)
    assert want.isnan().sum() == 8 and want.isinf().sum() == 9


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_ldmatrix_hands_out_what_the_published_layout_says(
    matrices: int, transposed: bool, run_fragments, schedule
) -> None:
    tiles = torch.arange(64 * matrices, dtype=torch.int16)
    out = torch.empty(32, 2 * matrices, dtype=torch.int16)
    with run_fragments(schedule=schedule) as e:
        e.call("run_ldmatrix", tiles, out, matrices, transposed)
    assert not e.findings and (e.launches is None or e.launches[0].ldmatrix == 1)
    if transposed:
        where = layout(((4, 8), (16, 1)), ((2, matrices), (8, 64)))
    else:
        where = layout(((4, 8), (2, 8)), ((2, matrices), (1, 64)))
    torch.testing.assert_close(out, torch.from_numpy(where).to(torch.int16))


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_copies_and_fills_with_zeros(size: int, run_fragments, schedule: str) -> None:
    x = torch.arange(1, 31 * size + 1).to(torch.uint8)
    out = torch.empty(32 * size, dtype=torch.uint8)
    with run_fragments(schedule=schedule) as e:
        e.call("run_copy_async", x, out, size)
    assert not e.findings and (e.launches is None or e.launches[0].cp_async == 32)
    torch.testing.assert_close(out, torch.cat([x, torch.zeros(size, dtype=torch.uint8)]))
    if e.traffic is not None:
        reads = e.traffic.select(space="global", access="read", buffer="x")
        assert reads.bytes == reads.unique == 31 * size


def test_pack_halves_rounds_and_keeps_the_order(run_fragments) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 2)
    out = torch.empty(2, 32, 2, dtype=torch.int16)
    with run_fragments() as e:
        e.call("run_pack", x, out)
    torch.testing.assert_close(out[0].view(torch.bfloat16), x.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(out[1].view(torch.float16), x.half(), rtol=0, atol=0)
