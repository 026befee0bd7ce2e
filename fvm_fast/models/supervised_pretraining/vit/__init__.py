# SPDX-License-Identifier: Apache-2.0
"""ViT: An Image is Worth 16x16 Words (https://arxiv.org/abs/2010.11929)."""

from fvm_fast.models.supervised_pretraining.vit.model import VisionTransformer

__all__ = ["VisionTransformer"]
