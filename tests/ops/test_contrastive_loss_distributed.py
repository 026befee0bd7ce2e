# SPDX-License-Identifier: Apache-2.0
"""The contrastive losses in a process group: equal to the joined batch's, however it is divided (gloo, CPU)."""

import contrastive_worker as worker
import pytest
import torch
from processes_common import run_group

from fvm_fast.ops import backend


@pytest.fixture(scope="module", params=[2, 3])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What every process of a world of two, then of three, has computed."""
    return run_group(worker.__file__, request.param, tmp_path_factory.mktemp("world"))


def test_equal_to_the_joined_batch(results: list[dict]) -> None:
    world = len(results)
    for case in results[0]:
        if case == "errors":
            continue
        name, dtype, implementation, loss = case
        rows, cols = worker.RECTANGULAR if name == "rectangular" else worker.SIZES[name]
        op, options = worker.losses((cols or rows) == rows)[loss]
        b = worker.batch(sum(rows), sum(cols or rows), dtype)
        options = options(b)
        factor = 1 if options.pop("grad_reduction", "mean") == "sum" else world
        with backend("torch"):
            value, dx, dy, *scalars = worker.loss_and_grads(op, b, options)
        close = {torch.float64: (1e-9, 1e-12), torch.float32: (2e-4, 2e-6), torch.bfloat16: (3e-2, 2e-3)}[dtype]

        def check(ours: torch.Tensor, expected: torch.Tensor, what: str, case=case, close=close) -> None:
            rtol, atol = close
            torch.testing.assert_close(
                ours,
                expected,
                rtol=rtol,
                atol=atol * max(float(expected.abs().max()), 1e-6) * 10,
                msg=lambda m: f"{case}, {what}: {m}",
            )

        for rank, part in enumerate(results):
            check(part[case][0], value, f"value on {rank}")
            for k, expected in enumerate(scalars):
                check(part[case][3 + k], expected, f"scalar gradient {k} on {rank}")
            assert torch.equal(part[case][0], results[0][case][0])
        check(torch.cat([part[case][1] for part in results]), factor * dx, "image gradient")
        check(torch.cat([part[case][2] for part in results]), factor * dy, "text gradient")


def test_errors_are_sentences(results: list[dict]) -> None:
    for part in results:
        empty, unequal, twice = part["errors"]
        assert "expected at least one pair" in empty
        assert "expected as many rows as columns" in unequal
        assert "backend('torch')" in twice
