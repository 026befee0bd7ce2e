# SPDX-License-Identifier: Apache-2.0
"""Which Swin models the other libraries can hold: what their names alone do not show."""

from torch import nn

from fvm_fast.layers.swin_transformer import SwinTransformerV2


def refuse_transformers(model: nn.Module) -> str | None:
    """Why transformers' Swin or Swinv2 cannot hold this model, or None when it can."""
    if model.numerics["norm_eps"] != 1e-5:
        return f"its norms of patches and mergings have norm_eps=1e-5, the model has {model.numerics['norm_eps']}"
    if reason := _refuse(model):
        return reason
    windows = [stage.blocks[0].window_size for stage in model.layers]
    largest = max(max(window) for window in windows)
    expected = [(largest, largest)] * len(windows)
    if isinstance(model, SwinTransformerV2):
        rows, columns = model.patch_embed.grid_size
        expected = [(min(largest, rows // 2**i, columns // 2**i),) * 2 for i in range(len(windows))]
    if windows != expected:
        return f"its stages would have windows of {expected}, the model's are {windows}"
    if any(len(set(block.shift_size)) > 1 for block in blocks_of(model)):
        return "it shifts windows along both axes or none; one of the model's maps is covered along one axis only"
    return None


def refuse_torchvision(model: nn.Module) -> str | None:
    """Why torchvision's Swin cannot hold this model, or None when it can."""
    if reason := _refuse(model):
        return reason
    if len(windows := {block.window_size for block in blocks_of(model)}) > 1:
        return f"it gives all stages the same window, the model's are {sorted(windows)}"
    if model.numerics["act"] != "gelu":
        return f"its activation is gelu, the model's {model.numerics['act']}"
    if (in_chans := model.patch_embed.proj.in_channels) != 3:
        return f"its images have 3 channels, the model's {in_chans}"
    for block in blocks_of(model):
        if not has_qkv_bias(block.attn):
            return "it needs the biases of q, k and v, the model has qkv_bias=False"
        pretrained = getattr(block.attn, "pretrained_window_size", (0, 0))
        if pretrained not in ((0, 0), block.window_size):
            return f"it scales offsets by the window itself, the model by pretrained_window_sizes of {pretrained}"
    return None


def _refuse(model: nn.Module) -> str | None:
    """What holds for both: they average, pad before they shift, and never shift a window that covers the map."""
    blocks = blocks_of(model)
    if model.global_pool != "avg":
        return f"it averages over the map, the model has global_pool={model.global_pool!r}"
    if any(block.attn.proj.in_features != block.attn.proj.out_features for block in blocks):
        return "its heads share the channels of a stage, the model has a head_dim of its own"
    if len(ratios := {mlp_ratio(block) for block in blocks}) > 1:
        return f"it has one mlp_ratio for all stages, the model has {sorted(ratios)}"
    if any(block.window_size[0] != block.window_size[1] for block in blocks):
        return f"its windows are square, the model's are {sorted({block.window_size for block in blocks})}"
    if any(_shifts_what_covers(block) for block in blocks):
        return "it does not shift windows that cover the map; build the model with always_partition=False"
    if any(_pads_a_shifted_map(block) and block.attn.pad_order != "pad_roll" for block in blocks):
        return (
            "it pads a map before the shift where windows do not divide it; build the model with pad_order='pad_roll'"
        )
    return None


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of all stages."""
    return [block for stage in model.layers for block in stage.blocks]


def mlp_ratio(block: nn.Module) -> float:
    """Hidden width of a block's MLP over its channels."""
    return block.mlp.fc1.out_features / block.mlp.fc1.in_features


def has_qkv_bias(attn: nn.Module) -> bool:
    """Whether q and v have biases, in either version."""
    return (attn.q_bias if hasattr(attn, "q_bias") else attn.qkv.bias) is not None


def _shifts_what_covers(block: nn.Module) -> bool:
    axes = zip(block.input_resolution, block.window_size, block.shift_size, strict=True)
    return any(shift and side <= window for side, window, shift in axes)


def _pads_a_shifted_map(block: nn.Module) -> bool:
    sides = zip(block.input_resolution, block.window_size, strict=True)
    return any(block.shift_size) and any(side % window for side, window in sides)
