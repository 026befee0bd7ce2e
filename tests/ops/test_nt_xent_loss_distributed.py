# SPDX-License-Identifier: Apache-2.0
"""nt_xent_loss in a process group: equal to the joined batch's, however it is divided (gloo, CPU)."""

import nt_xent_worker as worker
import pytest
import torch
from processes_common import run_group

from fvm_fast.ops import backend

CLOSE = {torch.float64: (1e-9, 1e-12), torch.float32: (2e-4, 2e-6), torch.bfloat16: (3e-2, 2e-3)}


@pytest.fixture(scope="module", params=[2, 3])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What every process of a world of two, then of three, has computed."""
    return run_group(worker.__file__, request.param, tmp_path_factory.mktemp("world"))


def test_equal_to_the_joined_batch(results: list[dict]) -> None:
    cases = [case for case in results[0] if case != "errors"]
    assert len(cases) >= 12
    for case in cases:
        name, dtype, _, temperature, reduction = case
        factor = len(results) if reduction == "mean" else 1
        joined = [z.double() for z in worker.batch(sum(worker.SIZES[name]), dtype)]
        with backend("torch"):
            value, dz1, dz2, dT = worker.loss_and_grads(*joined, temperature)

        def check(ours: torch.Tensor, exact: torch.Tensor, what: str, terms: float = 0.0, case=case) -> None:
            rtol, atol = CLOSE[case[1]]
            atol *= max(10 * float(exact.abs().max()), terms, 1e-5)
            torch.testing.assert_close(ours.double(), exact, rtol=rtol, atol=atol, msg=lambda m: f"{case}, {what}: {m}")

        for rank, part in enumerate(results):
            check(part[case][0], value, f"value on {rank}", terms=1 / temperature)
            check(part[case][3], dT, f"temperature gradient on {rank}", terms=1 / temperature**2)
            assert torch.equal(part[case][0], results[0][case][0])
        for view, expected in ((1, dz1), (2, dz2)):
            got = torch.cat([part[case][view] for part in results])
            check(got, factor * expected, f"gradient of view {view}", terms=factor / (temperature * len(got)))


def test_errors_are_sentences(results: list[dict]) -> None:
    for part in results:
        empty, twice = part["errors"]
        assert "expected at least one pair" in empty
        assert "backend('torch')" in twice
