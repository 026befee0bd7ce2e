# SPDX-License-Identifier: Apache-2.0
"""MAE: Masked Autoencoders Are Scalable Vision Learners (https://arxiv.org/abs/2111.06377)."""

from fvm_fast.models.self_supervised.mae.model import MaskedAutoencoderViT

__all__ = ["MaskedAutoencoderViT"]
