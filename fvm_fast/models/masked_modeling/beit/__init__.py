# SPDX-License-Identifier: Apache-2.0
"""BEiT: BERT Pre-Training of Image Transformers (https://arxiv.org/abs/2106.08254), and BEiT v2."""

from fvm_fast.models.masked_modeling.beit.discrete_vae import DiscreteVAE
from fvm_fast.models.masked_modeling.beit.model import Beit
from fvm_fast.models.masked_modeling.beit.pretraining import BeitForMaskedImageModeling
from fvm_fast.models.masked_modeling.beit.vqkd import VQKD

__all__ = ["VQKD", "Beit", "BeitForMaskedImageModeling", "DiscreteVAE"]
