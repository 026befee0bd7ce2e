# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in and out: timm, transformers, torchvision, open_clip, the papers' own.

``load_weights(model, "model.safetensors")`` reads any spelling; ``export_weights(model, to="transformers")`` writes it.
"""

from fvm_fast.weights.export import export_weights
from fvm_fast.weights.files import read_checkpoint, write_safetensors
from fvm_fast.weights.load import LoadReport, load_weights

__all__ = ["LoadReport", "export_weights", "load_weights", "read_checkpoint", "write_safetensors"]
