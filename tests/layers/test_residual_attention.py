# SPDX-License-Identifier: Apache-2.0
"""The transformer of CLIP against torch's MultiheadAttention, and its one-token last block against the full one."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fvm_fast.layers.residual_attention import MultiHeadSelfAttention, QuickGELU, Transformer, take_token

POOLS = {"first": 0, "middle": 3, "each its own": torch.tensor([6, 0, 2])}


def make_tokens(B=3, N=7, D=24):
    return torch.randn(B, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_is_torchs(is_causal, heads):
    x = make_tokens()
    oracle = nn.MultiheadAttention(24, heads, batch_first=True).double()
    nn.init.normal_(oracle.in_proj_bias)
    attention = MultiHeadSelfAttention(24, heads).double()
    attention.load_state_dict(oracle.state_dict(), strict=True)
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1) if is_causal else None
    expected, _ = oracle(x, x, x, attn_mask=mask, need_weights=False)
    assert_close(attention(x, is_causal), expected, rtol=1e-10, atol=1e-12)
    for token in POOLS.values():
        one = attention.forward_token(x, token, is_causal)
        assert_close(one, take_token(expected, token), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_pooling_inside_the_last_block_changes_nothing(is_causal, layers, pool):
    transformer = Transformer(24, layers, 3, mlp_ratio=1.7, act_layer=QuickGELU).double()
    x = make_tokens().requires_grad_()
    leaves = [x, *transformer.parameters()]
    inside = transformer(x, is_causal, pool)
    after = take_token(transformer(x, is_causal), pool)
    assert inside.shape == (3, 24)
    assert_close(inside, after, rtol=1e-10, atol=1e-12)
    weights = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((inside * weights).sum(), leaves)
    assert_close(ours, torch.autograd.grad((after * weights).sum(), leaves), rtol=1e-9, atol=1e-12)


def test_last_block_projects_one_query():
    transformer = Transformer(24, 2, 3)
    shapes = []
    for block in transformer.resblocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    transformer(make_tokens().float(), pool=0)
    assert shapes == [(3, 7, 24), (3, 24)]


def test_intermediates_end_with_the_output():
    transformer = Transformer(24, 3, 3).double()
    x = make_tokens()
    outputs = transformer.intermediates(x, is_causal=True)
    assert len(outputs) == 3
    assert_close(outputs[-1], transformer(x, is_causal=True))
    assert_close(outputs[0], transformer.resblocks[0](x, True))


def test_quick_gelu():
    x = torch.tensor([-2.0, 0.0, 1.5], dtype=torch.float64)
    assert_close(QuickGELU()(x), x / (1 + (-1.702 * x).exp()), rtol=1e-14, atol=0)


def test_bad_sizes_are_a_sentence():
    with pytest.raises(ValueError, match="multiple of the number of heads, got 10 and 3"):
        MultiHeadSelfAttention(10, 3)
    with pytest.raises(ValueError, match="at least one layer is needed, got 0"):
        Transformer(24, 0, 3)
