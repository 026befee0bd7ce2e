# SPDX-License-Identifier: Apache-2.0
"""nn.Modules that two models or more share, under the names the field knows them by."""

from fvm_fast.layers.activation import QuickGELU, activation_name, get_act_layer
from fvm_fast.layers.attention import Attention
from fvm_fast.layers.backbone import Backbone
from fvm_fast.layers.block import Block
from fvm_fast.layers.contrastive_loss import ClipLoss, SigLipLoss
from fvm_fast.layers.drop_path import DropPath
from fvm_fast.layers.feature_extractor import FeatureExtractor, FeatureInfo, take_indices
from fvm_fast.layers.layer_scale import LayerScale
from fvm_fast.layers.mlp import Mlp
from fvm_fast.layers.patch_embed import PatchEmbed
from fvm_fast.layers.pos_embed import resize_pos_embed
from fvm_fast.layers.residual_attention import ResidualAttentionBlock, Transformer
from fvm_fast.layers.vision_transformer import VisionTransformer

__all__ = [
    "Attention",
    "Backbone",
    "Block",
    "ClipLoss",
    "DropPath",
    "FeatureExtractor",
    "FeatureInfo",
    "LayerScale",
    "Mlp",
    "PatchEmbed",
    "QuickGELU",
    "ResidualAttentionBlock",
    "SigLipLoss",
    "Transformer",
    "VisionTransformer",
    "activation_name",
    "get_act_layer",
    "resize_pos_embed",
    "take_indices",
]
