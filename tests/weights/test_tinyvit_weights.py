# SPDX-License-Identifier: Apache-2.0
"""TinyViT weights between timm and microsoft's repository: same logits and gradients, strict names."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.tiny_vit import TinyVit as TimmTinyVit
from timm.models.tiny_vit import checkpoint_filter_fn
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from fvm_fast import export_weights, load_weights
from fvm_fast.models import TinyVit

SIZES = dict(
    num_classes=5,
    embed_dims=(8, 16, 24, 32),
    depths=(1, 1, 2, 1),
    num_heads=(1, 2, 3, 4),
    window_sizes=(7, 4, 3, 2),
    drop_path_rate=0.0,
)


def our_model(**kwargs) -> TinyVit:
    return randomise(TinyVit(**SIZES | kwargs))


def timm_model(**kwargs) -> TimmTinyVit:
    return randomise(TimmTinyVit(**SIZES | kwargs))


def randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(3)
    return model.double().eval()


def images() -> torch.Tensor:
    return torch.randn(4, 3, 61, 72, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def logits_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = model(images())
    cross_entropy(logits, torch.tensor([0, 1, 2, 4])).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same_logits_and_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    (logits, gradients), (expected, their_gradients) = logits_and_gradients(ours), logits_and_gradients(theirs)
    assert_close(logits, expected, atol=1e-9, rtol=1e-9)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, their_gradients[name], atol=1e-9, rtol=1e-9, msg=name)


def test_from_timm():
    theirs, ours = timm_model(), TinyVit(**SIZES).double().eval()
    report = load_weights(ours, theirs.state_dict())
    assert report.spelling == "timm" and report.loaded == len(theirs.state_dict()) and not report.notes
    assert_same_logits_and_gradients(ours, theirs)


@pytest.mark.parametrize("through", ["timm", "microsoft"])
def test_to_timm(through, tmp_path):
    ours, between, theirs = our_model(), TinyVit(**SIZES).double(), TimmTinyVit(**SIZES).double().eval()
    export_weights(ours, to=through, path=tmp_path / "weights.safetensors")
    assert load_weights(between, tmp_path / "weights.safetensors").spelling == through
    theirs.load_state_dict(export_weights(between, to="timm"), strict=True)
    assert_same_logits_and_gradients(ours, theirs)


MICROSOFT = {  # a tensor of each kind, as the repository names it -> as we do
    "patch_embed.seq.0.c.weight": "patch_embed.conv1.conv.weight",
    "patch_embed.seq.2.bn.running_var": "patch_embed.conv2.bn.running_var",
    "layers.0.blocks.0.conv3.c.weight": "stages.0.blocks.0.conv3.conv.weight",
    "layers.0.blocks.0.conv2.bn.num_batches_tracked": "stages.0.blocks.0.conv2.bn.num_batches_tracked",
    "layers.0.downsample.conv1.c.weight": "stages.1.downsample.conv1.conv.weight",
    "layers.2.downsample.conv3.bn.bias": "stages.3.downsample.conv3.bn.bias",
    "layers.2.blocks.1.attn.attention_biases": "stages.2.blocks.1.attn.attention_biases",
    "layers.2.blocks.1.attn.norm.weight": "stages.2.blocks.1.attn.norm.weight",
    "layers.2.blocks.1.attn.qkv.bias": "stages.2.blocks.1.attn.qkv.bias",
    "layers.2.blocks.1.attn.proj.weight": "stages.2.blocks.1.attn.proj.weight",
    "layers.2.blocks.1.mlp.norm.bias": "stages.2.blocks.1.mlp.norm.bias",
    "layers.2.blocks.1.mlp.fc1.weight": "stages.2.blocks.1.mlp.fc1.weight",
    "layers.2.blocks.1.mlp.fc2.bias": "stages.2.blocks.1.mlp.fc2.bias",
    "layers.2.blocks.1.local_conv.c.weight": "stages.2.blocks.1.local_conv.conv.weight",
    "layers.2.blocks.1.local_conv.bn.running_mean": "stages.2.blocks.1.local_conv.bn.running_mean",
    "norm_head.weight": "head.norm.weight",
    "head.bias": "head.fc.bias",
}


def test_microsofts_names():
    ours = our_model()
    state, native = export_weights(ours, to="microsoft"), ours.state_dict()
    assert len(state) == len(native)
    for theirs, name in MICROSOFT.items():
        assert torch.equal(state[theirs], native[name]), theirs
    assert {name.split(".")[0] for name in state} == {"patch_embed", "layers", "norm_head", "head"}
    assert not any(".conv." in name for name in state)


def test_a_training_checkpoint_of_microsofts_with_its_buffers():
    state = export_weights(our_model(), to="microsoft")
    state["layers.1.blocks.0.attn.attention_bias_idxs"] = torch.zeros(16, 16, dtype=torch.int64)
    ours = TinyVit(**SIZES).double().eval()
    assert load_weights(ours, {"model": state, "epoch": 3}).spelling == "microsoft"
    assert_close(ours(images()), our_model()(images()), atol=0.0, rtol=0.0)


@pytest.mark.parametrize("to", ["timm", "microsoft"])
def test_there_and_back(to, tmp_path):
    ours, again = our_model(), TinyVit(**SIZES).double()
    export_weights(ours, to=to, path=tmp_path / "weights.safetensors")
    report = load_weights(again, tmp_path / "weights.safetensors")
    assert report.spelling == to and not report.notes and not report.missing
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("spelling", ["timm", "microsoft"])
def test_biases_are_resized_to_other_windows_as_timm_does(spelling):
    other = dict(window_sizes=(7, 6, 3, 1))
    source = our_model()
    ours, theirs = TinyVit(**SIZES | other).double().eval(), TimmTinyVit(**SIZES | other).double().eval()
    report = load_weights(ours, export_weights(source, to=spelling))
    assert report.notes == (
        "resized stages.1.blocks.0.attn.attention_biases to windows of 6 x 6 (timm rule)",
        "resized stages.3.blocks.0.attn.attention_biases to windows of 1 x 1 (timm rule)",
    )
    theirs.load_state_dict(checkpoint_filter_fn(source.state_dict(), theirs), strict=True)
    assert_close(ours(images()), theirs(images()), atol=1e-6, rtol=1e-6)  # timm resizes in float32


def test_biases_are_resized_to_other_windows_as_microsoft_does():
    source, ours = our_model(), TinyVit(**SIZES | dict(window_sizes=(7, 4, 3, 1))).double()
    report = load_weights(ours, source.state_dict(), resize="microsoft")
    assert len(report.notes) == 1 and report.notes[0].endswith("windows of 1 x 1 (microsoft rule)")
    table = source.stages[3].blocks[0].attn.attention_biases.detach()
    expected = F.interpolate(table.view(1, 4, 2, 2), size=(1, 1), mode="bicubic").view(4, 1)
    assert_close(ours.stages[3].blocks[0].attn.attention_biases.detach(), expected)


def test_numerics_travel_with_the_file(tmp_path):
    export_weights(our_model(act_layer="silu"), path=tmp_path / "ours.safetensors")
    with pytest.raises(ValueError, match="act='silu', the model has 'gelu'; build it to match"):
        load_weights(our_model(), tmp_path / "ours.safetensors")


REFUSALS = {
    "pool": (dict(global_pool="max"), "global_pool='max'"),
    "eps": (dict(norm_eps=1e-3), "an epsilon of 1e-5, the model 0.001"),
    "act": (dict(act_layer="silu"), "its activation is gelu, the model's silu"),
}


@pytest.mark.parametrize("kwargs, message", REFUSALS.values(), ids=REFUSALS.keys())
def test_export_refuses_what_microsofts_code_lacks(kwargs, message):
    with pytest.raises(ValueError, match=f"microsoft cannot hold this TinyVit: .*{message}"):
        export_weights(our_model(**kwargs), to="microsoft")
