# SPDX-License-Identifier: Apache-2.0
"""How a model is trained: an objective owns the model and its loss, and maps a batch to ``{"loss": ...}``."""

from fvm_fast.objectives.classification import Classification, ClassificationLoss
from fvm_fast.objectives.contrastive import ContrastivePretraining
from fvm_fast.objectives.distillation import Distillation, StoredDistillation
from fvm_fast.objectives.masked_autoencoder import MaskedAutoencoding
from fvm_fast.objectives.masked_image_modeling import MaskedImageModeling
from fvm_fast.objectives.masked_tokens import MaskedTokenPrediction
from fvm_fast.objectives.stored_logits import CorruptRecord, StoredLogits, StoredLogitsWriter, TeacherRecords

__all__ = [
    "Classification",
    "ClassificationLoss",
    "ContrastivePretraining",
    "CorruptRecord",
    "Distillation",
    "MaskedAutoencoding",
    "MaskedImageModeling",
    "MaskedTokenPrediction",
    "StoredDistillation",
    "StoredLogits",
    "StoredLogitsWriter",
    "TeacherRecords",
]
