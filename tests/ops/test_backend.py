# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs, why, and what the compiled core is linked to and refuses."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch.distributed.tensor import distribute_tensor

from fvm_fast.ops import _backend, backend, gather_tokens, patch_embed

_C = _backend._C


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    """``code`` in a new interpreter."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **env}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def small():
    return torch.arange(6.0).view(1, 3, 2), torch.tensor([[2, 0]])


# ---- the choice


def test_blocks_nest_and_are_left_even_by_an_error():
    before = _backend._mode
    with backend("torch"):
        assert not _backend.use_native("op")
        with backend("native"):
            assert _backend.use_native("op")
            with pytest.raises(KeyError), backend("auto"):
                assert _backend.use_native("op")
                raise KeyError
            assert _backend._mode == "native"
        assert _backend._mode == "torch"
    assert _backend._mode == before


def test_unknown_backend_is_a_sentence():
    with (
        pytest.raises(ValueError, match="fvm_fast.backend: expected one of auto, native, torch, got 'cuda'"),
        backend("cuda"),
    ):
        pass


@pytest.mark.parametrize("mode", ("native", "torch", ""))
def test_environment_chooses_the_backend(mode):
    code = "from fvm_fast.ops import _backend; print(_backend._mode, _backend.use_native('op'))"
    assert run(code, FVM_FAST_BACKEND=mode).stdout.split() == [mode or "auto", str(mode != "torch")]


def test_environment_naming_no_backend_is_a_sentence():
    done = run("import fvm_fast.ops", FVM_FAST_BACKEND="fast")
    assert done.returncode and "FVM_FAST_BACKEND: expected one of auto, native, torch, got 'fast'" in done.stderr


def test_native_that_cannot_be_had_says_why(monkeypatch):
    x, ids = small()
    with backend("native"):
        with pytest.raises(
            RuntimeError, match="gather_tokens: the native backend was asked for, but the tensor is on meta"
        ):
            gather_tokens(x.to("meta"), ids.to("meta"))
        monkeypatch.setattr(_backend, "_C", None)
        monkeypatch.setattr(_backend, "_why_no_core", "the compiled core could not be imported (no file)")
        with pytest.raises(RuntimeError, match="could not be imported"):
            gather_tokens(x, ids)
    assert gather_tokens(x, ids).tolist() == [[[4, 5], [0, 1]]]  # auto goes on without it
    assert _backend.isa() is None


def test_tensor_subclasses_take_the_torch_path():
    class Logged(torch.Tensor):
        pass

    x, ids = small()
    x = x.as_subclass(Logged)
    assert "Logged is not a plain torch.Tensor" in _backend.why_not_native(x, ids)
    assert isinstance(gather_tokens(x, ids), Logged)
    assert _backend.why_not_native(torch.nn.Parameter(torch.ones(1)), None) is None


def test_dtensor_is_refused_and_the_remedy_named():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x, ids = small()
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        with pytest.raises(TypeError, match=r"got a DTensor.*\.to_local\(\)"):
            gather_tokens(distribute_tensor(x, mesh), ids)
    finally:
        dist.destroy_process_group()


def test_compiled_code_follows_the_choice():
    graphs = []

    def record(graph, example_inputs):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(gather_tokens, fullgraph=True, backend=record)
    x, ids = small()
    first = compiled(x, ids)
    with backend("torch"):
        second = compiled(x, ids)
    third = compiled(x, ids)
    assert torch.equal(first, second) and torch.equal(first, third)
    assert ["fvm_fast.gather_tokens" in g for g in graphs] == [True, False]


def test_autocast_dtype():
    x = torch.ones(1)
    assert _backend.autocast_dtype(x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert _backend.autocast_dtype(x) == torch.bfloat16
        assert _backend.autocast_dtype(x.to("meta")) is None
        with torch.autocast("cpu", enabled=False):
            assert _backend.autocast_dtype(x) is None
    with torch.autocast("cpu", torch.float16):
        assert _backend.autocast_dtype(x) == torch.float16


# ---- instruction sets


def test_every_usable_instruction_set_can_be_chosen(isa):
    assert _backend.isa() == isa
    assert set(_C.isas_usable()) <= set(_C.isas_built())


def test_environment_chooses_the_instruction_set():
    name = _C.isas_usable()[0]
    assert run("from fvm_fast.ops import _backend; print(_backend.isa())", FVM_FAST_ISA=name).stdout.strip() == name


def test_impossible_instruction_set_is_a_sentence():
    done = run("import fvm_fast.ops", FVM_FAST_ISA="sse9")
    assert done.returncode and re.search(r"FVM_FAST_ISA: expected one of .*got 'sse9'", done.stderr)
    with pytest.raises(ValueError, match="expected one of .*got 'sse9'"):
        _C.set_isa("sse9")


# ---- the compiled core


def test_core_links_no_torch_library():
    dynamic = subprocess.run(["readelf", "-dW", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert needed and not [n for n in needed if re.search("torch|c10|mkl|dnnl", n)]
    symbols = subprocess.run(["readelf", "--dyn-syms", "-W", _C.__file__], capture_output=True, text=True, check=True)
    undefined = [line.split()[-1] for line in symbols.stdout.splitlines() if " UND " in line]
    assert undefined and not [s for s in undefined if re.search("torch|c10|_ZN[K]?2at", s)]


def test_core_shares_the_openmp_runtime_of_torch():
    images, weight = torch.randn(8, 3, 32, 32), torch.randn(16, 3, 8, 8)
    patch_embed(images, weight)
    with open("/proc/self/maps") as maps:
        runtimes = {os.path.realpath(line.split()[-1]) for line in maps if re.search(r"lib[gi]omp", line)}
    assert len(runtimes) == 1


def test_core_refuses_null_negative_and_unknown_arguments():
    x, ids = small()
    out = torch.empty(1, 2, 2)
    good = [x.data_ptr(), ids.data_ptr(), out.data_ptr(), 1, 3, 2, 2, 1, 1]
    assert _C.gather_tokens_fwd(*good) == -1
    for place, value, sentence in (
        (0, 0, "null"),
        (2, 0, "null"),
        (4, -3, "not negative, got -3"),
        (7, 9, "dtype code"),
    ):
        with pytest.raises(ValueError, match=sentence):
            _C.gather_tokens_fwd(*good[:place], value, *good[place + 1 :])
    with pytest.raises(TypeError):
        _C.gather_tokens_fwd(*good[:-1])


def test_only_dense_tensors_become_addresses():
    flipped = torch.ones(3, dtype=torch.complex64).conj().imag
    assert flipped.is_neg()
    for tensor in (flipped, torch.eye(3).to_sparse()):
        with pytest.raises(TypeError, match="expected a dense tensor"):
            _backend._argument(tensor)
    with pytest.raises(RuntimeError, match=r"contiguous tensor, got strides \(1, 2\)"):
        _backend._argument(torch.ones(3, 2).T)
    assert gather_tokens(flipped.view(1, 3, 1), torch.tensor([[1]])).tolist() == [[[0.0]]]


FORK = """
import os, signal, sys, torch
from fvm_fast.ops import gather_tokens, patch_embed
torch.set_num_threads(3)
def ops():
    images, weight = torch.ones(8, 3, 32, 32, requires_grad=True), torch.ones(16, 3, 8, 8)
    tokens = patch_embed(images, weight)
    gather_tokens(tokens, torch.zeros(8, 2, dtype=torch.int64)).sum().backward()
    return images.grad.sum().item()
expected = ops()
child = os.fork()
if child == 0:
    signal.alarm(60)
    torch.set_num_threads(1)
    os._exit(0 if ops() == expected else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0)
"""


def test_a_forked_child_with_one_thread_does_not_wait_for_the_parents_threads():
    done = run(FORK)
    assert done.returncode == 0, done.stderr
