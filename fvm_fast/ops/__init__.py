# SPDX-License-Identifier: Apache-2.0
"""The fused operators: each agrees with its ``<name>_reference`` in plain torch and is once differentiable."""

from fvm_fast.ops._backend import backend
from fvm_fast.ops.contrastive_loss import (
    ClassIds,
    Teacher,
    clip_loss,
    clip_loss_reference,
    info_nce_loss,
    info_nce_loss_reference,
    nt_xent_loss,
    nt_xent_loss_reference,
    siglip_loss,
    siglip_loss_reference,
)
from fvm_fast.ops.patch_embed import patch_embed, patch_embed_reference
from fvm_fast.ops.token_gather import (
    gather_tokens,
    gather_tokens_reference,
    random_masking,
    random_masking_reference,
    restore_tokens,
    restore_tokens_reference,
)
from fvm_fast.ops.window_attention import window_attention, window_attention_reference

__all__ = [
    "ClassIds",
    "Teacher",
    "backend",
    "clip_loss",
    "clip_loss_reference",
    "gather_tokens",
    "gather_tokens_reference",
    "info_nce_loss",
    "info_nce_loss_reference",
    "nt_xent_loss",
    "nt_xent_loss_reference",
    "patch_embed",
    "patch_embed_reference",
    "random_masking",
    "random_masking_reference",
    "restore_tokens",
    "restore_tokens_reference",
    "siglip_loss",
    "siglip_loss_reference",
    "window_attention",
    "window_attention_reference",
]
