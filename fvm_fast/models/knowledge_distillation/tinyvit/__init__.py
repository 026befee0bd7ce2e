# SPDX-License-Identifier: Apache-2.0
"""TinyViT: Fast Pretraining Distillation for Small Vision Transformers (https://arxiv.org/abs/2207.10666)."""

from fvm_fast.models.knowledge_distillation.tinyvit.model import TinyVit

__all__ = ["TinyVit"]
