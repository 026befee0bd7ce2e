# SPDX-License-Identifier: Apache-2.0
"""The emulator's interface: what it is given, what it gives back, and that its variants agree."""

import re

import emulator
import pytest
import torch
from cusim_build import CUDA


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.arange(1.0, 129)


def test_a_finding_names_the_place_and_both_threads(own_kernels, x) -> None:
    with emulator.Emulation(own_kernels) as e:
        e.call("run_missing_barrier", False, x, torch.empty(128))
    source = next(s for s in own_kernels.sources if s.name == "synchronisation_defects.cu").read_text().splitlines()
    races = {source[f.line - 1].strip(): f for f in e.findings if f.kind == "race"}
    finding = races["out[threadIdx.x] = tile[127 - threadIdx.x];"]
    assert "which thread" in finding.text and "writes" in finding.text and finding.count > 1
    assert str(finding).startswith("race at synchronisation_defects.cu:")


def test_an_address_outside_names_the_buffer(own_kernels) -> None:
    with emulator.Emulation(own_kernels) as e:
        e.call("run_one_too_many", False, torch.randn(100), torch.empty(100))
    assert [f.text for f in e.findings] == ["access to bytes 400 to 403 of x, which has 400"]


def test_findings_and_traffic_add_up_over_calls(own_kernels, x) -> None:
    with emulator.Emulation(own_kernels) as e:
        for _ in range(2):
            e.call("run_missing_barrier", True, x, torch.empty(128))
    assert len(e.launches) == 2 and e.traffic.select(buffer="x").unique == 2 * 512
    assert e.traffic.select(launch=1).bytes == e.traffic.bytes // 2


def test_counters_do_not_depend_on_the_schedule(own_kernels) -> None:
    tables = set()
    for schedule in (*emulator.SCHEDULES, "random:2", "random:3"):
        with emulator.Emulation(own_kernels, schedule=schedule) as e:
            e.call("run_missing_barrier_in_reduction", True, torch.randn(128), torch.empty(128))
            e.call("run_swapped_fragments", True, torch.randn(128), torch.empty(128))
        tables.add(e.traffic.table())
    assert len(tables) == 1


def test_the_plain_build_computes_the_same(own_kernels, schedule: str, x) -> None:
    out = torch.empty(128)
    with emulator.Emulation(own_kernels, schedule=schedule, check=False) as e:
        e.call("run_swapped_fragments", True, x, out)
    torch.testing.assert_close(out, x.flip(0))
    assert not e.findings and not e.traffic.lines and e.launches[0].mma == 1


def test_shared_memory_is_poisoned_in_the_plain_build_too(own_kernels, x) -> None:
    out = torch.empty(128)
    with emulator.Emulation(own_kernels, check=False) as e:
        e.call("run_blank_shared", False, x, out)
        e.call("run_missing_wait", False, x, missing := torch.empty(128))
    assert out[0].isnan() and missing.isnan().any()


def test_alignment_of_a_tensor_is_kept(own_kernels) -> None:
    storage = torch.arange(130.0)
    for offset, kinds in ((0, set()), (1, {"misaligned"})):
        with emulator.Emulation(own_kernels) as e:
            e.call("run_four_a_lane", storage[offset : offset + 128], torch.empty(128))
        assert {f.kind for f in e.findings} == kinds


def test_inputs_may_be_numpy_arrays_and_the_same_tensor(own_kernels, x) -> None:
    out = torch.empty(128)
    with emulator.Emulation(own_kernels) as e:
        e.call("run_swapped_fragments", right=True, x=x.numpy(), out=out)
        assert not e.findings
        e.call("run_missing_barrier", True, out, out)  # in place, each thread behind the barrier
    assert not e.findings, "\n".join(map(str, e.findings))
    torch.testing.assert_close(out, x)


def test_what_cannot_be_called_is_refused_in_a_sentence(own_kernels, x) -> None:
    out = torch.empty(128)
    with emulator.Emulation(own_kernels) as e:
        with pytest.raises(ValueError, match="expected a definition of nothing_of_that_name"):
            e.call("nothing_of_that_name", x)
        with pytest.raises(TypeError, match="expected the arguments right, x, out, stream"):
            e.call("run_missing_barrier", True, x)
        with pytest.raises(TypeError, match="expected the arguments right, x, out, stream"):
            e.call("run_missing_barrier", True, x, out, colour=3)
        with pytest.raises(ValueError, match="out: expected a contiguous CPU tensor"):
            e.call("run_missing_barrier", True, x, torch.empty(128, 2)[:, 0])
        with pytest.raises(TypeError, match="in_out"):
            e.call("run_missing_barrier", True, x, out, in_out=("output",))
    with pytest.raises(ValueError, match="expected schedule forward, reverse or random:SEED"):
        emulator.Emulation(own_kernels, schedule="backwards")


def test_the_compiler_speaks_for_itself(tmp_path) -> None:
    broken = tmp_path / "broken.cu"
    broken.write_text("__global__ void kernel() { no_such_function(); }\n")
    with pytest.raises(RuntimeError, match="no_such_function"):
        emulator.build(broken)


# ---- the emulator and the rest of the CUDA side


def test_inline_ptx_is_in_one_file_and_as_it_was_checked() -> None:
    sources = {p: p.read_text() for p in CUDA.iterdir() if p.suffix in (".cu", ".cuh", ".h", ".cpp")}
    assert [p.name for p, text in sources.items() if re.search(r"\basm\b", text)] == ["primitives.cuh"]
    text = re.sub(r"\s*\\?\n\s*", " ", sources[CUDA / "primitives.cuh"])
    for line in (
        '"cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(from_global)',
        '"cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes), "r"(from_global)',
        '"ldmatrix.sync.aligned.m8n8." shape ".trans.shared.b16 " outputs ", [" address "];"',
        '"ldmatrix.sync.aligned.m8n8." shape ".shared.b16 " outputs ", [" address "];"',
        'FVM_LDMATRIX("x1", "{%0}", "%1", "=r"(tiles[0]));',
        'FVM_LDMATRIX("x2", "{%0, %1}", "%2", "=r"(tiles[0]), "=r"(tiles[1]));',
        'FVM_LDMATRIX("x4", "{%0, %1, %2, %3}", "%4", "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3]));',
        '"mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "',
        '"{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"',
        '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)',
    ):
        assert line in text, line


def test_emulated_core_has_the_bindings_of_the_real_one() -> None:
    core = emulator.emulated_core()
    B, L, K, D = 2, 7, 3, 8
    tokens, ids, out = torch.randn(B, L, D), torch.tensor([[6, 0, 3], [1, 1, 5]]), torch.empty(B, K, D)
    addresses = (t.data_ptr() for t in (tokens, ids, out))
    core.gather_tokens_fwd(*addresses, B, L, K, D, 1, (0, 0, 0))
    torch.testing.assert_close(out, torch.gather(tokens, 1, ids[..., None].expand(-1, -1, D)), rtol=0, atol=0)
    with pytest.raises(ValueError, match="got null"):
        core.gather_tokens_fwd(0, ids.data_ptr(), out.data_ptr(), B, L, K, D, 1, (0, 0, 0))
