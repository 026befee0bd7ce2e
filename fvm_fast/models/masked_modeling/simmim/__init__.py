# SPDX-License-Identifier: Apache-2.0
"""SimMIM: a Simple Framework for Masked Image Modeling (https://arxiv.org/abs/2111.09886)."""

from fvm_fast.models.masked_modeling.simmim.encoders import SwinTransformerForSimMIM, VisionTransformerForSimMIM
from fvm_fast.models.masked_modeling.simmim.model import SimMIM

__all__ = ["SimMIM", "SwinTransformerForSimMIM", "VisionTransformerForSimMIM"]
