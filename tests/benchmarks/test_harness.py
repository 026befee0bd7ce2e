# SPDX-License-Identifier: Apache-2.0
"""The timer refuses wrong answers, gives every rival the same turns, and counts what it says it counts."""

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import harness  # noqa: E402
import machine  # noqa: E402
import report  # noqa: E402
from memory import peak_extra_bytes  # noqa: E402
from problem import FORWARD, FORWARD_BACKWARD, Floor, Measurement, Problem, Rival, rivals_on  # noqa: E402

MB = 2**20


def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


def cube_with_wrong_gradient(x: torch.Tensor) -> torch.Tensor:
    return (x**3).detach() + 0 * x


class Clock:
    """Seconds pass only when a rival works."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def __call__(self) -> float:
        return self.now

    def worker(self, name: str, seconds: float):
        def work() -> None:
            self.log.append(name)
            self.now += seconds

        return work


# ---- validation


def run_both(other, which: str, x: torch.Tensor) -> list[Measurement]:
    problem = Problem("cube", rivals_on([x], {"ours": cube, "theirs": other}))
    return harness.measure(problem, which, seconds=0.0)


def test_rivals_that_agree_are_timed():
    rows = run_both(lambda x: x * x * x, FORWARD_BACKWARD, torch.randn(3, 5, requires_grad=True))
    assert [row.name for row in rows] == ["ours", "theirs"]
    assert all(len(row.seconds) >= 3 and row.median > 0 for row in rows)


def test_wrong_output_stops():
    with pytest.raises(
        ValueError, match=r"'theirs' and 'ours' should agree to 0.0001 .* got a difference of .* output \(3, 5\)"
    ):
        run_both(lambda x: x**3 + 1e-2, FORWARD, torch.randn(3, 5))


def test_wrong_gradient_stops_although_the_output_agrees():
    x = torch.randn(3, 5, requires_grad=True)
    assert len(run_both(cube_with_wrong_gradient, FORWARD, x)) == 2
    with pytest.raises(harness.Disagreement, match="gradient 0"):
        run_both(cube_with_wrong_gradient, FORWARD_BACKWARD, x)


def test_gradients_of_mixed_up_tokens_stop():
    """A gradient of ones at the output would be blind to this."""
    x = torch.ones(4, 2, requires_grad=True)
    problem = Problem("rows", rivals_on([x], {"ours": lambda x: x * 2, "theirs": lambda x: x.flip(0) * 2}))
    with pytest.raises(harness.Disagreement, match="gradient 0"):
        harness.measure(problem, FORWARD_BACKWARD, seconds=0.0)


def test_nan_and_other_shapes_stop():
    with pytest.raises(harness.Disagreement, match="difference of nan"):
        harness.validate({"ours": [torch.ones(2)], "theirs": [torch.tensor([1.0, float("nan")])]}, 1e-4)
    with pytest.raises(harness.Disagreement, match=r"should give the shapes of 'ours', \[\(2,\)\], got \[\(1, 2\)\]"):
        harness.validate({"ours": [torch.ones(2)], "theirs": [torch.ones(1, 2)]}, 1e-4)
    with pytest.raises(harness.Disagreement, match="should give the shapes"):
        harness.validate({"ours": [torch.ones(2)], "theirs": [torch.ones(2), torch.ones(2)]}, 1e-4)


def test_a_gradient_of_rounding_noise_is_measured_against_the_others():
    ours, theirs = [torch.ones(3), torch.full((2,), 1e-9)], [torch.ones(3), torch.full((2,), -1e-9)]
    harness.validate({"ours": ours, "theirs": theirs}, 1e-4)
    with pytest.raises(harness.Disagreement, match="gradient 0"):
        harness.validate({"ours": ours, "theirs": [torch.ones(3), torch.full((2,), 1e-6)]}, 1e-4)


def test_empty_tensors_agree():
    harness.validate({"ours": [torch.empty(0, 3)], "theirs": [torch.empty(0, 3)]}, 1e-4)
    with pytest.raises(harness.Disagreement, match="shapes"):
        harness.validate({"ours": [torch.empty(0, 3)], "theirs": [torch.empty(0, 2)]}, 1e-4)


def test_a_script_stops_with_a_sentence():
    def problems(args):
        yield Problem("cube of 2", rivals_on([torch.ones(2)], {"ours": cube, "theirs": torch.exp}))

    with pytest.raises(SystemExit, match="cube of 2, float32, forward: 'theirs' and 'ours' should agree"):
        harness.main("bench_cube.py", "", problems, ["--quick"])


# ---- timing


def test_every_round_gives_each_rival_one_turn():
    clock = Clock()
    runs = {name: clock.worker(name, seconds) for name, seconds in [("a", 1.0), ("b", 2.0), ("c", 3.0)]}
    samples = harness.time_in_turns(runs, seconds=60.0, clock=clock)
    assert samples == {"a": [1.0] * 10, "b": [2.0] * 10, "c": [3.0] * 10}
    rounds = [tuple(clock.log[i : i + 3]) for i in range(3, len(clock.log), 3)]
    assert all(sorted(turns) == ["a", "b", "c"] for turns in rounds)
    assert len(set(rounds)) > 1, "the order should change"


def test_slow_rivals_get_three_rounds_and_fast_ones_stop_at_the_bound():
    clock = Clock()
    assert len(harness.time_in_turns({"slow": clock.worker("slow", 100.0)}, 1.0, clock)["slow"]) == 3
    assert len(harness.time_in_turns({"fast": clock.worker("fast", 0.01)}, 1e6, clock, max_rounds=7)["fast"]) == 7


def test_short_calls_are_repeated_until_the_clock_can_see_them():
    clock = Clock()
    samples = harness.time_in_turns({"short": clock.worker("short", 1e-4)}, 0.0, clock)["short"]
    assert samples == pytest.approx([1e-4] * 3)
    assert len(clock.log) == 1 + 3 * 20


def test_median_spread_and_ratio():
    ours = Measurement("ours", [1.0, 2.0, 3.0, 4.0, 5.0], None)
    # Twice as slow in every round while the machine slows down: the ratio does not see the machine.
    theirs = Measurement("theirs", [2.0, 4.0, 6.0, 8.0, 10.0], None)
    assert (ours.median, ours.spread, theirs.relative_to(ours)) == (3.0, pytest.approx(1 / 3), 2.0)


# ---- memory


def allocate(megabytes: int, pieces: int = 1):
    return lambda: [torch.ones(megabytes * MB // 4 // pieces) for _ in range(pieces)]


@pytest.mark.parametrize("pieces", [1, 16, 256], ids=lambda n: f"{n} pieces")
def test_peak_memory_is_seen_each_time(pieces):
    """Small pieces come from a heap that keeps what is freed: without a trim the second call would cost nothing."""
    call = allocate(64, pieces)
    call()
    for _ in range(2):
        assert peak_extra_bytes(call) == pytest.approx(64 * MB, abs=MB)


def test_peak_memory_counts_the_peak_of_this_call_alone():
    def two_halves() -> None:
        allocate(32)()
        allocate(32)()

    allocate(128)()
    two_halves()
    assert peak_extra_bytes(two_halves) == pytest.approx(32 * MB, abs=MB)
    assert peak_extra_bytes(lambda: None) < MB


# ---- report


def test_table_is_aligned_markdown():
    assert report.table(["rival", "ms"], [["ours", "1.00"], ["theirs, eager", "10.0"]]) == (
        "| rival         |   ms |\n| ------------- | ---: |\n| ours          | 1.00 |\n| theirs, eager | 10.0 |"
    )


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0.00"), (0.01234, "0.0123"), (1.0, "1.00"), (99.97, "100"), (123.4, "123"), (65536.0, "65536")],
)
def test_number(value, text):
    assert report.number(value) == text


def test_share_of_the_floor(monkeypatch):
    """2 GFLOP at 100 GFLOP/s take 20 ms and 0.4 GB at 10 GB/s take 40 ms: memory is the floor of a 50 ms call."""
    monkeypatch.setattr(machine, "matmul_ceiling", lambda dtype: 100e9)
    monkeypatch.setattr(machine, "copy_ceiling", lambda nbytes: 10e9)
    problem = Problem("p", [], forward=Floor(1e9, 0.2e9), backward=Floor(1e9, 0.2e9), items=5, unit="images")
    rows = [Measurement("ours", [0.05] * 5, 3_000_000), Measurement("theirs", [0.1] * 5, None)]
    text = report.render(problem, FORWARD_BACKWARD, rows)
    assert (
        "Floor 40.0 ms: 2.00 GFLOP take 20.0 ms at mm's 100 GFLOP/s; 400 MB take 40.0 ms at a copy's 10.0 GB/s." in text
    )
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    table = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    assert table[0] == {
        "forward + backward": "ours", "ms": "50.0", "spread": "0%", "images/s": "100", "GFLOP/s": "40.0",
        "of mm": "40%", "GB/s": "8.00", "of copy": "80%", "of floor": "80%", "extra MB": "3.0", "time / ours": "1.00",
    }  # fmt: skip
    assert (table[1]["extra MB"], table[1]["time / ours"], table[1]["of floor"]) == ("?", "2.00", "40%")


def test_ceilings_are_measured():
    assert machine.matmul_ceiling(torch.float32) > 1e8
    assert machine.copy_ceiling(4 * MB) > 1e7


def test_sections_are_replaced_and_sorted(tmp_path):
    path = tmp_path / "RESULTS.md"
    report.write_section("bench_b", "second\n\n| x |", path)
    report.write_section("bench_a", "first", path)
    report.write_section("bench_b", "second again", path)
    assert report.read_sections(path) == {"bench_a": "first", "bench_b": "second again"}
    assert path.read_text().index("first") < path.read_text().index("second again")
    assert [p.name for p in tmp_path.iterdir()] == ["RESULTS.md"], "a temporary file stayed behind"


def test_write_refuses_incomplete_runs(capsys):
    with pytest.raises(SystemExit):
        harness.parse_arguments("", ["--quick", "--write"])
    assert "--write records complete runs" in capsys.readouterr().err


# ---- scripts


# The engine's has no rivals that compute the same: its own test is test_engine_rates.py.
@pytest.mark.parametrize("name", sorted({path.stem for path in BENCHMARKS.glob("bench_*.py")} - {"bench_engine"}))
def test_the_rivals_of_every_benchmark_agree(name):
    """At the sizes of --quick, in all dtypes; but for torch.compile, which takes longer than all the rest."""
    args = harness.parse_arguments("", ["--quick"])
    for problem in import_module(name).problems(args):
        eager = replace(problem, rivals=[rival for rival in problem.rivals if not rival.needs_compiler])
        assert len(eager.rivals) >= 2
        for which in problem.passes:
            harness.check(eager, which)


def test_a_run_prints_and_records_its_tables(tmp_path, monkeypatch, capsys):
    def problems(args):
        for dtype in args.dtypes:
            x = torch.randn(64, 64).to(dtype).requires_grad_()
            yield Problem("cube", rivals_on([x], {"ours": cube, "theirs": lambda x: x * x * x}), dtype)

    monkeypatch.setattr(report, "RESULTS", tmp_path / "RESULTS.md")
    threads = torch.get_num_threads()
    harness.main("benchmarks/bench_cube.py", "", problems, ["--write", "--seconds", "0"])
    assert torch.get_num_threads() == threads
    section = report.read_sections(tmp_path / "RESULTS.md")["bench_cube"]
    assert section.count("### cube, float32") == 1 and section.count("### cube, bfloat16") == 1
    assert section.count("| theirs ") == 4, "two passes of two dtypes"
    assert f"torch {torch.__version__}" in section
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert printed == [line for line in section.splitlines() if line]


def test_the_compiled_rival_runs():
    x = torch.randn(3, 5, requires_grad=True)
    rivals = rivals_on([x], {"ours": cube}, {"theirs, torch.compile": lambda x: x * x * x})
    assert [rival.needs_compiler for rival in rivals] == [False, True]
    rows = harness.measure(Problem("cube", rivals), FORWARD_BACKWARD, seconds=0.0)
    assert [row.name for row in rows] == ["ours", "theirs, torch.compile"]


def test_a_rival_may_bring_its_own_parameters():
    weights = [torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)]
    rivals = [Rival(name, lambda w=w: (w * 3).sum(), [w]) for name, w in zip(["ours", "theirs"], weights, strict=True)]
    assert len(harness.measure(Problem("sum", rivals), FORWARD_BACKWARD, seconds=0.0)) == 2
    assert all(w.grad is None for w in weights)
