# SPDX-License-Identifier: Apache-2.0
"""How a model is trained: an objective owns the model and its loss, and maps a batch to ``{"loss": ...}``."""

from fvm_fast.objectives.contrastive import ContrastivePretraining

__all__ = ["ContrastivePretraining"]
