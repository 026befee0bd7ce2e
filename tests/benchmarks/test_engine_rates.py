# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the engine compiles with the flags of the kernels, and its figures are those of a real product."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_engine  # noqa: E402


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[bench_engine.Rates]:
    return bench_engine.measure(bench_engine.build(tmp_path_factory.mktemp("engine"), "native"), rounds=1)


def test_every_dtype_has_a_rate(rows):
    assert len({r.isa for r in rows}) == 1, "the one of this machine"
    assert [r.dtype for r in rows] == ["float64", "float32", "bfloat16"]


def test_nothing_beats_the_bare_loop(rows):
    """By more than a busy machine explains: a loop that the compiler removed, or that waits for itself, would be."""
    for r in rows:
        assert 0 < r.packed < r.product < 1.5 * r.tile and r.tile < 1.5 * r.bare, r


def test_the_table_has_a_line_for_each(rows):
    lines = bench_engine.table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and len({len(line) for line in lines}) == 1
