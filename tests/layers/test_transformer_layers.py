# SPDX-License-Identifier: Apache-2.0
"""Attention, Mlp, LayerScale, DropPath and PatchEmbed, each against its formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from fvm_fast.layers import (
    Attention,
    Block,
    DropPath,
    LayerScale,
    Mlp,
    PatchEmbed,
    QuickGELU,
    activation_name,
    get_act_layer,
)
from fvm_fast.layers.activation import ACTIVATIONS


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def random_bias(N: int) -> torch.Tensor:
    return tokens(1, 2, N, N)


MASKS = {
    "none": lambda N: {},
    "causal": lambda N: dict(is_causal=True),
    "boolean": lambda N: dict(attn_mask=torch.eye(N, dtype=torch.bool) | (torch.arange(N) % 2 == 0)),
    "additive": lambda N: dict(attn_mask=random_bias(N)),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("shape", [(2, 5, 8), (1, 1, 8), (3, 7, 8)])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_is_its_formula(shape, mask, qk_norm):
    B, N, D = shape
    layer = Attention(D, num_heads=2, qkv_bias=True, qk_norm=qk_norm).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x, settings = tokens(*shape), mask(N)
    q, k, v = (t.view(B, N, 2, D // 2).transpose(1, 2) for t in layer.qkv(x).chunk(3, dim=-1))
    scores = layer.q_norm(q) @ layer.k_norm(k).transpose(-1, -2) / (D // 2) ** 0.5
    if settings.get("is_causal"):
        scores = scores.masked_fill(torch.ones(N, N).triu(1).bool(), float("-inf"))
    attn_mask = settings.get("attn_mask")
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    expected = layer.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert_close(layer(x, **settings), expected, atol=1e-9, rtol=1e-9)


def test_block_is_two_residual_branches():
    block = Block(8, 2, mlp_ratio=1.5, init_values=0.25, drop_path=0.2).double().eval()
    x = tokens(2, 5, 8)
    y = x + 0.25 * block.attn(block.norm1(x))
    expected = y + 0.25 * block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(y))))
    assert_close(block(x), expected, atol=1e-9, rtol=1e-9)
    assert block.mlp.fc1.out_features == 12


def test_mlp_widths():
    assert Mlp(4, 6, 3, bias=False)(torch.zeros(2, 4)).shape == (2, 3)
    assert [name for name, _ in Mlp(4, bias=False).named_parameters()] == ["fc1.weight", "fc2.weight"]


def test_layer_scale():
    layer = LayerScale(3, 0.5)
    x = torch.randn(2, 3, requires_grad=True)
    layer(x).sum().backward()
    assert_close(layer(x), 0.5 * x)
    assert_close(layer.gamma.grad, x.detach().sum(0))


@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_drop_path_drops_whole_samples(scale_by_keep):
    torch.manual_seed(0)
    layer, x = DropPath(0.25, scale_by_keep), torch.ones(4000, 2, 3)
    y = layer(x)
    kept = y[:, 0, 0] != 0
    assert abs(kept.double().mean() - 0.75) < 0.03
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / 0.75 if scale_by_keep else 1.0))
    assert not y[~kept].any()
    assert layer.eval()(x) is x
    assert repr(layer) == "DropPath(drop_prob=0.25)"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_names_there_and_back(name):
    assert activation_name(get_act_layer(name)()) == name
    assert get_act_layer(QuickGELU) is QuickGELU and get_act_layer(None) is nn.GELU
    assert activation_name(nn.Hardswish()) == "Hardswish"


@pytest.mark.parametrize(
    "size, patch, padded", [((6, 10), 2, False), ((9, 6), 3, False), ((7, 5), 4, True), ((8, 8), 4, True)]
)
def test_patch_embed_is_a_convolution(size, patch, padded):
    layer = PatchEmbed(size, patch, in_chans=2, embed_dim=5, dynamic_img_pad=padded).double()
    images = tokens(3, 2, *size).requires_grad_()
    whole = F.pad(images, (0, -size[1] % patch, 0, -size[0] % patch))
    expected = layer.proj(whole).flatten(2).transpose(1, 2)
    assert layer.num_patches == expected.shape[1] and layer.grid_size == tuple(layer.proj(whole).shape[-2:])
    assert_close(layer(images), expected, atol=1e-9, rtol=1e-9)
    ours, theirs = (torch.autograd.grad((y**2).sum(), [images, *layer.parameters()]) for y in (layer(images), expected))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_patch_embed_keeps_its_statistics_out_of_the_state_dict():
    layer = PatchEmbed(8, 4, image_mean=(0.1, 0.2, 0.3), image_std=(1, 2, 3))
    assert list(layer.state_dict()) == ["proj.weight", "proj.bias"]
    assert layer.image_std == (1.0, 2.0, 3.0)
