# SPDX-License-Identifier: Apache-2.0
"""How tensors get to the CUDA kernels: the choice, the launch and what surrounds it, as far as no GPU is needed."""

import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fvm_fast.ops import _backend, backend, gather_tokens, window_attention, window_attention_reference


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


# ---- every op: its kernels on fake tensors of the second GPU, whose numbers nobody can read

GPU = torch.device("cuda:1")


class AnyKernel:
    """Like the recorder, for kernels of any name."""

    def __init__(self) -> None:
        self.calls, self.set_up_devices = [], []

    def set_up(self, device: int) -> None:
        self.set_up_devices.append(device)

    def __getattr__(self, name: str):
        def record(*args) -> int:
            self.calls.append((name, args))
            return 24

        return record


def kernel_of(module: str, name: str) -> Callable:
    """What runs on a GPU below the dispatcher, which gives shapes for fake tensors and stops there."""
    return getattr(importlib.import_module(f"fvm_fast.ops.{module}"), name)


def run_gather() -> None:
    x, ids = torch.empty(2, 5, 3, device=GPU), torch.zeros(2, 4, dtype=torch.int64, device=GPU)
    out = kernel_of("token_gather", "_gather_kernel")(x, ids)
    kernel_of("token_gather", "_gather_bwd_kernel")(out, ids, 5)


def run_restore() -> None:
    x, mask_token, pos = (torch.empty(shape, device=GPU) for shape in ((2, 3, 4), (4,), (6, 4)))
    ids = torch.zeros(2, 5, dtype=torch.int64, device=GPU)
    out = kernel_of("token_gather", "_restore_kernel")(x, ids, mask_token, pos, 1)
    kernel_of("token_gather", "_restore_bwd_kernel")(out, ids, 1, 2, 6, True, True, True)


def run_patch_embed() -> None:
    images, weight = torch.empty(2, 3, 8, 12, device=GPU), torch.empty(5, 3, 4, 4, device=GPU)
    statistics = [torch.empty(3, dtype=torch.float64, device=GPU)] * 2
    ids, mask = torch.zeros(2, 4, dtype=torch.int64, device=GPU), torch.zeros(2, 6, dtype=torch.bool, device=GPU)
    bias, pos, prefix = (torch.empty(shape, device=GPU) for shape in ((5,), (7, 5), (1, 5)))
    out = kernel_of("patch_embed", "_kernel")(images, weight, bias, pos, prefix, ids, *statistics, mask, bias)
    kernel_of("patch_embed", "_bwd_kernel")(out, images, weight, ids, *statistics, mask, 1, 7, [True] * 6)


def run_window_attention() -> None:
    qkv, bias, logit_scale, pad = (torch.empty(s, device=GPU) for s in ((1, 5, 7, 24), (2, 9, 9), (2,), (24,)))
    seed = torch.zeros((), dtype=torch.int64, device=GPU)
    inputs = (qkv, bias, logit_scale, pad, seed, 2, (3, 3), (1, 1), 1.0, -100.0, False, False, 0.5)
    out = kernel_of("window_attention.window_attention", "_kernel")(*inputs)
    kernel_of("window_attention.window_attention", "_bwd_kernel")(out, [True] * 4, *inputs)


def loss_inputs(K: int = 6) -> tuple[torch.Tensor, ...]:
    """Features [6, 8] and [K, 8], a number, ids [6] and [K]."""
    return (
        *(torch.empty(n, 8, device=GPU) for n in (6, K)),
        torch.empty((), device=GPU),
        *(torch.zeros(n, dtype=torch.int64, device=GPU) for n in (6, K)),
    )


def run_clip_loss() -> None:
    x, y, scale, *ids = loss_inputs(7)
    for targets in ((*ids, None, None, None), (None, None, x, y, scale)):
        _, *saved = kernel_of("contrastive_loss.clip_loss", "_clip_kernel")(x, y, scale, *targets, 0.5, 0.1, True)
        want = (True, True, True)
        kernel_of("contrastive_loss.clip_loss", "_clip_bwd_kernel")(
            scale, x, y, scale, *targets, *saved, 0.5, 0.1, *want
        )


def run_siglip_loss() -> None:
    x, y, scale, *ids = loss_inputs()
    _, *saved = kernel_of("contrastive_loss.siglip_loss", "_siglip_kernel")(x, y, scale, scale, *ids, True, True)
    kernel_of("contrastive_loss.siglip_loss", "_siglip_bwd_kernel")(scale, x, y, scale, scale, *saved, *[True] * 4)


def run_nt_xent_loss() -> None:
    z, _, temperature, *_ = loss_inputs()
    _, lse = kernel_of("contrastive_loss.nt_xent_loss", "_nt_xent_kernel")(z, temperature)
    kernel_of("contrastive_loss.nt_xent_loss", "_nt_xent_bwd_kernel")(temperature, z, temperature, lse, True, True)


def run_info_nce_loss() -> None:
    query, keys, temperature, *ids = loss_inputs(9)
    for targets in ((None, None), ids):
        inputs = (query, query, keys, temperature, *targets)
        _, *saved = kernel_of("contrastive_loss.info_nce_loss", "_info_nce_kernel")(*inputs, True)
        kernel_of("contrastive_loss.info_nce_loss", "_info_nce_bwd_kernel")(temperature, *inputs, *saved, *[True] * 4)


RUNS = {
    "gather_tokens": run_gather,
    "restore_tokens": run_restore,
    "patch_embed": run_patch_embed,
    "window_attention": run_window_attention,
    "clip_loss": run_clip_loss,
    "siglip_loss": run_siglip_loss,
    "nt_xent_loss": run_nt_xent_loss,
    "info_nce_loss": run_info_nce_loss,
}


@pytest.mark.parametrize("op", RUNS)
@pytest.mark.parametrize("capturing", (False, True), ids=("eager", "captured"))
def test_every_op_launches_beside_its_tensors(core, monkeypatch, op, capturing):
    """On their device and its current stream, with workspaces there; and a fake tensor raises if it is to be read."""
    if not torch.backends.cuda.is_built():  # then not even a fake tensor of a GPU can be indexed
        pytest.skip("this torch is built without CUDA")
    recorder = AnyKernel()
    monkeypatch.setattr(_backend, "_C_cuda", recorder)
    monkeypatch.setattr(_backend, "_argument", lambda value: value)
    monkeypatch.setattr(_backend, "_set_up_devices", {1} if capturing else set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with FakeTensorMode(), torch.no_grad():
        RUNS[op]()
    launches = [(name, args) for name, args in recorder.calls if isinstance(args[-1], tuple)]
    assert {name.split("_fwd")[0].split("_bwd")[0] for name, _ in launches} >= {op}
    for name, args in launches:
        assert args[-1] == (1, 71, None), name
        assert all(a.device == GPU for a in args if isinstance(a, torch.Tensor)), name
    assert recorder.set_up_devices == ([] if capturing else [1])


@pytest.mark.parametrize("op", RUNS)
def test_every_op_is_registered_for_cuda(op):
    for name in (op, f"{op}_bwd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fvm_fast::{name}", "CUDA")


def test_heads_that_are_too_large_take_the_torch_path(core, monkeypatch):
    monkeypatch.setattr(core, "kernels", ("window_attention_fwd",), raising=False)
    monkeypatch.setattr(_backend, "_CUDA_DEVICES", ("cuda", "cpu"))
    qkv, options = torch.randn(1, 2, 2, 3 * 136), {"num_heads": 1, "window_size": 2}
    assert torch.equal(window_attention(qkv, **options), window_attention_reference(qkv, **options))
    with backend("native"), pytest.raises(RuntimeError, match="heads of at most 128 channels, and these have 136"):
        window_attention(qkv, **options)
