# SPDX-License-Identifier: Apache-2.0
"""How tensors get to the CUDA kernels: the choice, the launch and what surrounds it, as far as no GPU is needed."""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fvm_fast.ops import _backend, backend, gather_tokens


class Recorder:
    """A module like ``_C_cuda`` that writes down what it is asked."""

    kernels = ("gather_tokens_fwd", "gather_tokens_bwd")

    def __init__(self) -> None:
        self.calls, self.set_up_devices = [], []

    def architectures(self) -> str:
        return "80,90"

    def set_up(self, device: int) -> None:
        self.set_up_devices.append(device)

    def gather_tokens_fwd(self, *args) -> None:
        self.calls.append(args)

    def some_workspace(self, *args) -> int:
        self.calls.append(args)
        return 24


@pytest.fixture
def core(monkeypatch) -> Recorder:
    """The recorder in the place of the CUDA module, and a first GPU of each kind."""
    recorder = Recorder()
    monkeypatch.setattr(_backend, "_C_cuda", recorder)
    monkeypatch.setattr(_backend, "_set_up_devices", set())
    monkeypatch.setattr(_backend, "_CHECK", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=70 + device.index))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return recorder


def on_gpu(index: int = 0) -> list[torch.Tensor]:
    """x and ids as fake tensors: a device, shapes and no data."""
    with FakeTensorMode():
        return [
            torch.empty(2, 5, 3, device=f"cuda:{index}"),
            torch.zeros(2, 4, dtype=torch.int64, device=f"cuda:{index}"),
        ]


# ---- the choice


def test_gpu_tensors_are_native_where_there_are_kernels(core):
    assert _backend.use_native("gather_tokens", *on_gpu())


def test_without_the_module_the_reason_is_told(core, monkeypatch):
    monkeypatch.setattr(_backend, "_C_cuda", None)
    monkeypatch.setattr(_backend, "_why_no_cuda", "there are no CUDA kernels (no file)")
    assert not _backend.use_native("gather_tokens", *on_gpu())
    with backend("native"), pytest.raises(RuntimeError, match="asked for, but there are no CUDA kernels"):
        _backend.use_native("gather_tokens", *on_gpu())


def test_an_op_without_a_kernel_takes_the_torch_path(core):
    assert not _backend.use_native("patch_embed", *on_gpu())
    with backend("native"), pytest.raises(RuntimeError, match="patch_embed: .* it has no CUDA kernel in this build"):
        _backend.use_native("patch_embed", *on_gpu())


def test_an_old_gpu_takes_the_torch_path(core):
    assert not _backend.use_native("gather_tokens", *on_gpu(1))
    with backend("native"), pytest.raises(RuntimeError, match="cuda:1 is an sm_75 .* built for sm_80 and later"):
        _backend.use_native("gather_tokens", *on_gpu(1))


def test_cpu_tensors_do_not_ask_for_a_gpu(core, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: pytest.fail("asked"))
    assert _backend.use_native("gather_tokens", torch.ones(1, 1, 1))


def test_ops_are_registered_for_cuda():
    for name in ("gather_tokens", "gather_tokens_bwd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fvm_fast::{name}", "CUDA")


def test_shapes_are_traced_on_a_gpu(core):
    with FakeTensorMode():
        x, ids = torch.empty(2, 5, 3, device="cuda:0"), torch.zeros(2, 4, dtype=torch.int64, device="cuda:0")
        out = gather_tokens(x, ids)
        dx = torch.ops.fvm_fast.gather_tokens_bwd(out, ids, 5)
    assert out.shape == (2, 4, 3) and dx.shape == x.shape and out.device == dx.device == x.device
    assert not core.calls


def test_the_choice_compiles_without_a_break(core, monkeypatch):
    torch._dynamo.reset()

    def chosen(x, ids):
        return gather_tokens(x, ids) + (_backend._why_not_on_gpu(0) is None) + 2 * (_backend._why_not_on_gpu(1) is None)

    monkeypatch.setattr(_backend, "_CUDA_DEVICES", ("cuda", "cpu"))
    targets = []

    def record(graph, example_inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return lambda x, ids: (torch.zeros(2, 4, 3) + 1,)

    torch.compile(chosen, fullgraph=True, backend=record)(torch.ones(2, 5, 3), torch.zeros(2, 4, dtype=torch.int64))
    assert [target for target in targets if target.startswith("fvm_fast.gather_tokens")]


# ---- the launch


def launch(device: str = "cuda:1") -> int | None:
    return _backend._launch("gather_tokens_fwd", torch.device(device), (2, torch.bfloat16, None))


def test_a_launch_names_its_device_and_current_stream(core):
    assert launch() is None
    (call,) = core.calls
    assert call == (2, 2, 0, (1, 71, 0))


def test_a_device_is_set_up_once(core):
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        launch(device)
    assert core.set_up_devices == [1, 0]


def test_a_capture_before_the_first_launch_is_refused(core, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError, match="gather_tokens_fwd: expected a kernel to have run on cuda:1 before a CUDA graph"
    ):
        launch()
    assert not core.calls and not core.set_up_devices
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launch()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launch()
    assert len(core.calls) == 2


def test_a_capture_does_not_read_the_word_for_bad_indices(core, monkeypatch):
    launch()
    monkeypatch.setattr(_backend, "_CHECK", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launch() is None and core.calls[-1][-1] == (1, 71, 0)


def test_the_word_for_bad_indices_is_read_where_it_is_asked_for(core, monkeypatch):
    monkeypatch.setattr(_backend, "_CUDA_DEVICES", ("cuda", "cpu"))
    assert _backend.call("gather_tokens_fwd", torch.ones(1)) is None and core.calls[-1][-1] == (0, 0, 0)
    monkeypatch.setattr(_backend, "_CHECK", True)
    assert _backend.call("gather_tokens_fwd", torch.ones(1)) == -1  # as it was filled: the recorder found none
    assert core.calls[-1][-1][2] != 0


@pytest.mark.parametrize(("value", "wanted"), [("0", False), ("1", True)])
def test_environment_asks_for_the_check(value, wanted):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "FVM_FAST_CHECK": value}
    code = "from fvm_fast.ops import _backend; print(_backend._CHECK)"
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == str(wanted), ran.stderr


def test_tensors_of_two_devices_are_a_sentence(core, monkeypatch):
    monkeypatch.setattr(_backend, "_CUDA_DEVICES", ("cuda", "cpu"))
    with pytest.raises(ValueError, match="gather_tokens_fwd: expected all tensors on one device, got cpu and meta"):
        _backend.call("gather_tokens_fwd", 3, torch.ones(1), torch.ones(1, device="meta"))
    assert not core.calls


# ---- workspaces


def test_workspaces_are_on_the_device_of_the_tensors(core, monkeypatch):
    monkeypatch.setattr(_backend, "_C", SimpleNamespace(some_workspace=lambda *sizes: 10 * len(sizes)))
    like = torch.ones(3)
    assert _backend.workspace("some_workspace", 4, torch.float32, like=like).shape == (30,)  # threads come with them
    (x, _) = on_gpu()
    with FakeTensorMode(allow_non_fake_inputs=True):
        memory = _backend.workspace("some_workspace", 4, torch.float32, like=x)
    assert memory.shape == (24,) and memory.dtype == torch.uint8 and memory.device == x.device
    assert core.calls == [(4, 1)]
