# SPDX-License-Identifier: Apache-2.0
"""What of `make test-gpu` needs no GPU: its commands, its refusal, and the reading of the profiler's output."""

import os
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]

import bench_window_attention as bench  # noqa: E402
import gpu  # noqa: E402
import gpu_counters  # noqa: E402
import test_gpu as script  # noqa: E402
from gpu_counters import CONFLICTS, SECTORS, Counters  # noqa: E402

from fvm_fast.ops import _backend  # noqa: E402

HEAD = '"ID","Process ID","Kernel Name","Context","Metric Name","Metric Unit","Metric Value"'


def profile(*launches: tuple[str, int, int, int, int]) -> str:
    """Output of ncu for (kernel, sectors loaded, stored, copied, conflicts)."""
    lines = ["==PROF== Connected to process 7", "gather_tokens", HEAD]
    for i, (kernel, *values) in enumerate(launches):
        for metric, value in zip((*SECTORS, CONFLICTS), values, strict=True):
            lines.append(f'"{i}","7","{kernel}","1","{metric}","sector","{value:,}"')
    return "\n".join(lines)


EMBED = "void fvm::cuda::<unnamed>::embed<__nv_bfloat16>(fvm::cuda::Embedding<T1>)"
GATHER = "void fvm::cuda::(anonymous namespace)::gather_rows<float, (int)4>(const T1 *, long)"


# ---- the profiler


@pytest.mark.parametrize(("text", "name"), [(EMBED, "embed"), (GATHER, "gather_rows"), ("link(int)", "link")])
def test_kernels_are_known_by_their_names(text, name):
    assert gpu_counters.kernel_name(text) == name


def test_launches_of_a_kernel_are_added_up():
    output = profile((EMBED, 1, 20, 300, 4), (GATHER, 1000, 2, 0, 0), (EMBED, 1, 0, 0, 1))
    assert gpu_counters.measured(output) == {"embed": Counters(322, 5), "gather_rows": Counters(1002, 0)}


def test_what_is_no_profile_is_a_sentence():
    with pytest.raises(ValueError, match="expected the table of ncu --csv, got '==ERROR== no permission'"):
        gpu_counters.measured("==ERROR== no permission")
    with pytest.raises(ValueError, match=f"expected a number for {CONFLICTS}, got 'n/a'"):
        gpu_counters.measured(profile((EMBED, 1, 1, 1, 1)).removesuffix('"1"') + '"n/a"')
    with pytest.raises(ValueError, match=f"expected {CONFLICTS} of embed, got no such line"):
        gpu_counters.measured("\n".join(profile((EMBED, 1, 1, 1, 1)).splitlines()[:-1]))


def test_more_than_pinned_is_told():
    pinned = {"embed": Counters(100, 0), "gather_rows": Counters(50, 10), "sum_rows": Counters(5, 0)}
    lines, passed = gpu_counters.compare(pinned, {"embed": Counters(109, 0), "gather_rows": Counters(50, 12)})
    assert not passed
    assert lines == [
        "| embed | 100 / 109 | 0 / 0 |  |",
        "| gather_rows | 50 / 50 | 10 / 12 | more than pinned |",
        "| sum_rows | 5 / - | 0 / - | did not run |",
    ]
    assert gpu_counters.compare(pinned, pinned)[1]


# ---- the script


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "test_gpu.py", *arguments]
    return subprocess.run(command, text=True, capture_output=True)


def test_commands_are_listed_and_exist():
    ran = run("--list")
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0 and len(lines) == len(script.steps())
    assert [line for line in lines if "compute-sanitizer --error-exitcode 1 --tool racecheck" in line]
    for step in script.steps():
        files = [word for word in step.command if word.endswith(".py")]
        assert all((ROOT / file).exists() for file in files), step.line()
    assert run("--from", "ops", "--list").stdout.splitlines() == lines[5:]


def test_an_unknown_step_is_refused():
    ran = run("--from", "nothing")
    assert ran.returncode == 2 and "invalid choice: 'nothing'" in ran.stderr


def test_what_is_missing_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.why_not(script.steps()).startswith("expected a GPU, torch sees none; without one")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_backend, "_C_cuda", None)
    assert script.why_not(script.steps()).startswith("expected the CUDA module, but ")
    monkeypatch.setattr(_backend, "_C_cuda", object())
    monkeypatch.setattr(script.shutil, "which", lambda tool: None if tool == "ncu" else tool)
    assert script.why_not(script.steps()).startswith("expected ncu on the PATH for the step 'counters', got none")


def test_a_failing_step_ends_it(monkeypatch, capsys):
    ok, bad = (script.Step(name, [sys.executable, "-c", f"exit({code})"]) for name, code in (("a", 0), ("b", 3)))
    monkeypatch.setattr(script, "steps", lambda: [ok, bad, ok])
    monkeypatch.setattr(script, "why_not", lambda chosen: None)
    assert script.main([]) == 3
    assert "the step 'b' failed (3)" in capsys.readouterr().err


def test_op_tests_on_a_gpu_that_is_not_there_are_refused():
    env = {**os.environ, "FVM_TEST_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "tests/ops/test_token_gather.py", "-k", "nothing_at_all or empty"]
    ran = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    assert ran.returncode == 2 and "FVM_TEST_DEVICE=cuda: expected a GPU, torch sees none" in ran.stdout + ran.stderr


# ---- the benchmarks' clock


def test_benchmarks_refuse_a_gpu_that_is_not_there():
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, ROOT / "benchmarks" / "bench_token_gather.py", "--quick", "--device", "cuda"]
    ran = subprocess.run(command, env=env, text=True, capture_output=True)
    assert ran.returncode == 2 and "--device cuda: expected a GPU, torch sees none" in ran.stderr


def test_rivals_are_timed_in_turns_on_a_gpu(monkeypatch):
    order, milliseconds = [], iter(range(1, 100))
    testing = types.ModuleType("triton.testing")
    testing.do_bench = lambda run, rep, return_mode: (run(), float(next(milliseconds)))[1]
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.testing", testing)
    samples = gpu.time_in_turns({name: partial(order.append, name) for name in "abc"}, 1.0)
    assert [len(s) for s in samples.values()] == [gpu.ROUNDS] * 3
    assert sorted(sum(samples.values(), [])) == [n / 1e3 for n in range(1, 3 * gpu.ROUNDS + 1)]
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len({tuple(r) for r in rounds}) > 1


def attention_by_formula(q, k, v, attn_bias, scale):
    """What xformers' function is documented to compute: [B, N, heads, d] each, a bias [B, heads, N, N]."""
    assert attn_bias.stride(2) % 8 == 0, "rows of the bias are not aligned"
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * scale + attn_bias
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v)


@pytest.mark.parametrize("v2", (False, True), ids=("products", "cosines"))
def test_the_rival_that_needs_a_gpu_computes_the_same(monkeypatch, v2):
    module = types.ModuleType("xformers.ops")
    module.memory_efficient_attention = lambda q, k, v, bias, scale: attention_by_formula(q, k, v, bias, scale)
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    size = bench.Size(2, 10, 3, 5, 2, d=8)
    qkv, bias = torch.randn(2, 10, 10, 3 * size.C), torch.randn(3, 25, 25)
    inputs = (qkv, bias, torch.full((3,), 10.0) if v2 else None, bench.shift_mask(size), size)
    torch.testing.assert_close(bench.xformers(*inputs), bench.timm_order(*inputs), rtol=1e-4, atol=1e-5)
