# SPDX-License-Identifier: Apache-2.0
"""CLIP: image and text towers on one sphere."""

from fvm_fast.models.contrastive_learning.clip.model import CLIP
from fvm_fast.models.contrastive_learning.clip.vision import CLIPVisionTransformer

__all__ = ["CLIP", "CLIPVisionTransformer"]
