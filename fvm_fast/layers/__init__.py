# SPDX-License-Identifier: Apache-2.0
"""nn.Modules that two models or more share, under the names the field knows them by."""

from fvm_fast.layers.activation import QuickGELU, activation_name, get_act_layer
from fvm_fast.layers.attention import Attention
from fvm_fast.layers.attention_bias import attention_bias_index, resize_attention_biases
from fvm_fast.layers.backbone import Backbone
from fvm_fast.layers.block import Block
from fvm_fast.layers.classifier_head import ClassifierHead
from fvm_fast.layers.contrastive_loss import ClipLoss, SigLipLoss
from fvm_fast.layers.drop_path import DropPath
from fvm_fast.layers.feature_extractor import FeatureExtractor, FeatureInfo, take_indices
from fvm_fast.layers.global_response_norm import GlobalResponseNorm
from fvm_fast.layers.image_normalize import ImageNormalize
from fvm_fast.layers.layer_scale import LayerScale
from fvm_fast.layers.mlp import Mlp
from fvm_fast.layers.patch_embed import PatchEmbed
from fvm_fast.layers.pointwise_conv import PointwiseConv
from fvm_fast.layers.pos_embed import resize_pos_embed
from fvm_fast.layers.relative_position import relative_position_index, resize_relative_position_bias
from fvm_fast.layers.relative_position_attention import (
    RelativePositionAttention,
    RelativePositionBias,
    RelativePositionBlock,
)
from fvm_fast.layers.residual_attention import ResidualAttentionBlock, Transformer
from fvm_fast.layers.sincos_pos_embed import sincos_pos_embed
from fvm_fast.layers.staged_backbone import StagedBackbone
from fvm_fast.layers.swin_transformer import SwinTransformer, SwinTransformerV2
from fvm_fast.layers.vision_transformer import VisionTransformer
from fvm_fast.layers.window_attention import WindowAttention, WindowAttentionV2

__all__ = [
    "Attention",
    "Backbone",
    "Block",
    "ClassifierHead",
    "ClipLoss",
    "DropPath",
    "FeatureExtractor",
    "FeatureInfo",
    "GlobalResponseNorm",
    "ImageNormalize",
    "LayerScale",
    "Mlp",
    "PatchEmbed",
    "PointwiseConv",
    "QuickGELU",
    "RelativePositionAttention",
    "RelativePositionBias",
    "RelativePositionBlock",
    "ResidualAttentionBlock",
    "SigLipLoss",
    "StagedBackbone",
    "SwinTransformer",
    "SwinTransformerV2",
    "Transformer",
    "VisionTransformer",
    "WindowAttention",
    "WindowAttentionV2",
    "activation_name",
    "attention_bias_index",
    "get_act_layer",
    "relative_position_index",
    "resize_attention_biases",
    "resize_pos_embed",
    "resize_relative_position_bias",
    "sincos_pos_embed",
    "take_indices",
]
