# SPDX-License-Identifier: Apache-2.0
"""window_attention on both backends against timm's and torchvision's Swin, Swin v2 and TinyViT, weights included."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.models import swin_transformer, swin_transformer_v2, tiny_vit
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from fvm_fast.ops import backend, window_attention

# map, window, shift. A window larger than the map is shrunk by timm, and not shifted, unless told otherwise.
GEOMETRIES = [
    ((14, 14), (7, 7), (3, 3)),
    ((13, 17), (7, 7), (3, 3)),
    ((13, 17), (7, 7), (0, 0)),
    ((9, 8), (4, 3), (2, 0)),
    ((9, 8), (4, 3), (0, 1)),
    ((8, 8), (4, 4), (1, 3)),
]
SMALL_MAPS = [((3, 12), (5, 5), (2, 2)), ((4, 3), (7, 8), (3, 1))]


def perturb(module: nn.Module) -> nn.Module:
    """In float64, no parameter at its initial zeros and ones; scales of Swin v2 partly above the clamp."""
    module = module.double().eval()
    for name, parameter in module.named_parameters():
        if name.endswith("logit_scale"):
            parameter.data = torch.linspace(1.0, 6.0, parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
        else:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return module


def assert_same_gradients(module: nn.Module, ours, theirs, x: Tensor) -> None:
    """``ours(x)`` and ``theirs(x)`` agree, with the gradients for x and for all parameters of ``module`` they use."""
    expected = value_and_all_gradients(module, theirs, x)
    assert any(g is not None for g in expected[2:])
    for name in ("native", "torch"):
        with backend(name):
            got = value_and_all_gradients(module, ours, x)
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


def value_and_all_gradients(module: nn.Module, f: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor | None]:
    """``f(x)`` and its gradients for x and for the parameters of ``module``, None where it does not use them."""
    leaf = x.clone().requires_grad_()
    out = f(leaf)
    dout = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad(out, [leaf, *module.parameters()], dout, allow_unused=True)]


def table_bias(attn: nn.Module) -> Tensor:
    """Swin's table of biases by relative position, as [heads, N, N]."""
    N = attn.window_area
    return attn.relative_position_bias_table[attn.relative_position_index.flatten()].view(N, N, -1).permute(2, 0, 1)


def continuous_bias(attn: nn.Module) -> Tensor:
    """Swin v2's bias by a network of the relative position, as [heads, N, N]."""
    N = attn.window_size[0] * attn.window_size[1]
    table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
    return 16 * table[attn.relative_position_index.flatten()].view(N, N, -1).permute(2, 0, 1).sigmoid()


def multiplier(attn: nn.Module) -> Tensor:
    """Swin v2's logit_scale as the op wants it."""
    return attn.logit_scale.clamp(max=math.log(100)).exp().flatten()


@pytest.mark.parametrize(("size", "window", "shift"), [*GEOMETRIES, *SMALL_MAPS])
def test_swin_of_timm(size, window, shift) -> None:
    torch.manual_seed(0)
    for always_partition in (False, True):
        block = swin_transformer.SwinTransformerBlock(
            12, size, num_heads=3, window_size=window, shift_size=shift, always_partition=always_partition
        )
        attn = perturb(block).attn
        attn.fused_attn = False

        def ours(x, attn=attn, block=block):
            out = window_attention(
                attn.qkv(x), table_bias(attn), num_heads=3, window_size=block.window_size, shift_size=block.shift_size,
                pad_qkv=attn.qkv.bias,
            )  # fmt: skip
            return attn.proj(out)

        assert_same_gradients(block, ours, block._attn, torch.randn(2, *size, 12, dtype=torch.float64))


@pytest.mark.parametrize(("size", "window", "shift"), [*GEOMETRIES, *SMALL_MAPS])
def test_swin_v2_of_timm(size, window, shift) -> None:
    torch.manual_seed(0)
    block = swin_transformer_v2.SwinTransformerV2Block(12, size, num_heads=3, window_size=window, shift_size=shift)
    attn = perturb(block).attn
    attn.k_bias.zero_()

    def ours(x):
        qkv_bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        out = window_attention(
            F.linear(x, attn.qkv.weight, qkv_bias), continuous_bias(attn), num_heads=3, window_size=block.window_size,
            shift_size=block.shift_size, logit_scale=multiplier(attn), pad_qkv=qkv_bias,
        )  # fmt: skip
        return attn.proj(out)

    assert_same_gradients(block, ours, block._attn, torch.randn(2, *size, 12, dtype=torch.float64))


@pytest.mark.parametrize("size", [(14, 7), (13, 17), (3, 4), (7, 7)])
def test_tiny_vit_of_timm(size) -> None:
    torch.manual_seed(0)
    block = tiny_vit.TinyVitBlock(12, num_heads=3, window_size=7)
    block.local_conv, block.mlp = nn.Identity(), nn.Identity()  # what is left: x + attention, twice
    attn = perturb(block).attn
    attn.fused_attn = False

    def ours(x):
        out = window_attention(
            attn.qkv(attn.norm(x)), attn.attention_biases[:, attn.attention_bias_idxs], num_heads=3, window_size=7,
            pad_qkv=attn.qkv(attn.norm.bias), qkv_layout="h3d",
        )  # fmt: skip
        return 2 * (x + attn.proj(out))

    assert_same_gradients(block, ours, block, torch.randn(2, *size, 12, dtype=torch.float64))


@pytest.mark.parametrize(("size", "window", "shift"), [*GEOMETRIES, ((13, 17), (5, 7), (2, 3))])
def test_swin_of_torchvision(size, window, shift) -> None:
    torch.manual_seed(0)
    attn = perturb(ShiftedWindowAttention(12, list(window), list(shift), num_heads=3))

    def ours(x):
        out = window_attention(
            attn.qkv(x), attn.get_relative_position_bias()[0], num_heads=3, window_size=window, shift_size=shift,
            pad_qkv=attn.qkv.bias, pad_order="pad_roll",
        )  # fmt: skip
        return attn.proj(out)

    assert_same_gradients(attn, ours, attn, torch.randn(2, *size, 12, dtype=torch.float64))


@pytest.mark.parametrize(("size", "window", "shift"), GEOMETRIES)
def test_swin_v2_of_torchvision(size, window, shift) -> None:
    torch.manual_seed(0)
    attn = perturb(ShiftedWindowAttentionV2(12, list(window), list(shift), num_heads=3))
    zero_key_bias = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64).repeat_interleave(12)

    def ours(x):
        qkv_bias = attn.qkv.bias * zero_key_bias
        out = window_attention(
            F.linear(x, attn.qkv.weight, qkv_bias), attn.get_relative_position_bias()[0], num_heads=3,
            window_size=window, shift_size=shift, logit_scale=multiplier(attn), pad_qkv=qkv_bias, pad_order="pad_roll",
        )  # fmt: skip
        return attn.proj(out)

    assert_same_gradients(attn, ours, attn, torch.randn(2, *size, 12, dtype=torch.float64))


def test_the_two_pad_orders_differ() -> None:
    qkv, pad_qkv = torch.randn(1, 13, 17, 12), torch.randn(12)
    roll_pad, pad_roll = (
        window_attention(qkv, num_heads=1, window_size=7, shift_size=3, pad_qkv=pad_qkv, pad_order=pad_order)
        for pad_order in ("roll_pad", "pad_roll")
    )
    assert not torch.allclose(roll_pad, pad_roll, atol=0.1)
