# SPDX-License-Identifier: Apache-2.0
"""Swin: Hierarchical Vision Transformer using Shifted Windows (https://arxiv.org/abs/2103.14030), and Swin V2."""

from fvm_fast.models.supervised_pretraining.swin.model import SwinTransformer, SwinTransformerV2

__all__ = ["SwinTransformer", "SwinTransformerV2"]
