# SPDX-License-Identifier: Apache-2.0
"""DeiT: Training data-efficient image transformers (https://arxiv.org/abs/2012.12877), and DeiT III."""

from fvm_fast.models.knowledge_distillation.deit.model import VisionTransformerDistilled

__all__ = ["VisionTransformerDistilled"]
