# SPDX-License-Identifier: Apache-2.0
"""The counters give what can be counted by hand, in every order of threads and blocks."""

import emulator
import pytest
import torch


def traffic(library: emulator.Library, schedule: str, name: str, x: torch.Tensor, out: torch.Tensor, *args):
    """The traffic of one call, which has to be without findings."""
    with emulator.Emulation(library, schedule=schedule) as e:
        e.call(name, x, out, *args)
    assert not e.findings, "\n".join(map(str, e.findings))
    return e.traffic


@pytest.mark.parametrize(("offset", "sectors"), [(0, 4), (8, 4), (1, 5), (7, 5)])
def test_a_warp_that_reads_a_row(offset: int, sectors: int, own_kernels, schedule: str) -> None:
    x, out = torch.randn(64), torch.empty(32)
    t = traffic(own_kernels, schedule, "run_one_a_lane", x, out, offset)
    torch.testing.assert_close(out, x[offset : offset + 32])
    read, write = t.select(access="read"), t.select(access="write")
    assert (read.requests, read.bytes, read.unique, read.sectors) == (1, 128, 128, sectors)
    assert (write.requests, write.bytes, write.unique, write.sectors) == (1, 128, 128, 4)
    assert {line.buffer for line in read.lines} == {"x"} and {line.buffer for line in write.lines} == {"out"}


def test_vectors_are_one_access(own_kernels, schedule: str) -> None:
    t = traffic(own_kernels, schedule, "run_four_a_lane", torch.randn(128), torch.empty(128))
    for access in ("read", "write"):
        lines = t.select(access=access)
        assert (lines.requests, lines.bytes, lines.sectors) == (1, 512, 16)
        assert [line.bytes_per_lane for line in lines.lines] == [16]


def test_a_broadcast_is_one_sector(own_kernels, schedule: str) -> None:
    t = traffic(own_kernels, schedule, "run_same_for_all", torch.randn(1), torch.empty(32))
    read = t.select(buffer="x")
    assert (read.bytes, read.unique, read.sectors) == (128, 4, 1)


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (3, 12), (8, 32), (33, 32)])
def test_strided_reads(stride: int, sectors: int, own_kernels, schedule: str) -> None:
    t = traffic(own_kernels, schedule, "run_every", torch.randn(32 * stride), torch.empty(32), stride)
    assert t.select(access="read").sectors == sectors


def test_a_second_pass_is_requested_but_not_unique(own_kernels, schedule: str) -> None:
    t = traffic(own_kernels, schedule, "run_two_passes", torch.randn(100), torch.empty(32), 100).select(access="read")
    assert (t.bytes, t.unique, t.requests) == (800, 400, 8)


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 1), (2, 2), (3, 1), (4, 4), (32, 32), (33, 1), (40, 8)])
def test_banks_of_four_bytes(stride: int, wavefronts: int, own_kernels, schedule: str) -> None:
    t = traffic(own_kernels, schedule, "run_banks", torch.randn(32), torch.empty(32), stride).select(space="shared")
    for access in ("read", "write"):
        lines = t.select(access=access)
        assert (lines.wavefronts, lines.ideal_wavefronts, lines.bytes) == (wavefronts, 1, 128)


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 4), (2, 8), (3, 4), (8, 32), (9, 4)])
def test_sixteen_bytes_a_lane_go_by_quarters_of_a_warp(stride: int, wavefronts: int, own_kernels, schedule) -> None:
    t = traffic(own_kernels, schedule, "run_wide_banks", torch.randn(128), torch.empty(128), stride)
    for access in ("read", "write"):
        lines = t.select(space="shared", access=access)
        assert (lines.wavefronts, lines.ideal_wavefronts) == (wavefronts, 4)


@pytest.mark.parametrize(("row", "wavefronts"), [(8, 4), (32, 16), (64, 32), (72, 4)])
def test_rows_for_ldmatrix(row: int, wavefronts: int, own_kernels, schedule: str) -> None:
    t = traffic(own_kernels, schedule, "run_tiles", torch.randn(128), torch.empty(32), row)
    read = t.select(space="shared", access="read")
    assert (read.wavefronts, read.ideal_wavefronts, read.bytes) == (wavefronts, 4, 512)


def test_lines_are_those_of_the_source(own_kernels) -> None:
    t = traffic(own_kernels, "forward", "run_one_a_lane", torch.randn(32), torch.empty(32), 0)
    source = next(s for s in own_kernels.sources if s.name == "accesses.cu").read_text().splitlines()
    expected = next(i for i, text in enumerate(source, 1) if "out[threadIdx.x] = x[threadIdx.x];" in text)
    assert {(x.file, x.line, x.kernel) for x in t.lines} == {("accesses.cu", expected, "one_a_lane")}
    assert f"one_a_lane accesses.cu:{expected}" in t.table()
    assert set(t.by("space", "access")) == {("global", "read"), ("global", "write")}


def test_wrong_questions_are_refused(own_kernels) -> None:
    t = traffic(own_kernels, "forward", "run_four_a_lane", torch.randn(128), torch.empty(128))
    with pytest.raises(TypeError, match="expected fields of TrafficLine"):
        t.select(colour="red")
    with pytest.raises(AttributeError, match="expected one of requests"):
        t.cycles  # noqa: B018
