# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses that never hold the n x m matrix of logits."""

from fvm_fast.ops.contrastive_loss._targets import ClassIds, Teacher
from fvm_fast.ops.contrastive_loss.clip_loss import clip_loss, clip_loss_reference
from fvm_fast.ops.contrastive_loss.info_nce_loss import info_nce_loss, info_nce_loss_reference
from fvm_fast.ops.contrastive_loss.nt_xent_loss import nt_xent_loss, nt_xent_loss_reference
from fvm_fast.ops.contrastive_loss.siglip_loss import siglip_loss, siglip_loss_reference

__all__ = [
    "ClassIds",
    "Teacher",
    "clip_loss",
    "clip_loss_reference",
    "info_nce_loss",
    "info_nce_loss_reference",
    "nt_xent_loss",
    "nt_xent_loss_reference",
    "siglip_loss",
    "siglip_loss_reference",
]
