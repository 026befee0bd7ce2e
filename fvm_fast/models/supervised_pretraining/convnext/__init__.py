# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt: A ConvNet for the 2020s (https://arxiv.org/abs/2201.03545), and its second version."""

from fvm_fast.models.supervised_pretraining.convnext.model import ConvNeXt

__all__ = ["ConvNeXt"]
