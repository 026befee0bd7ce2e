# SPDX-License-Identifier: Apache-2.0
"""Batches and options that the tests of the contrastive losses share."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fvm_fast.ops import ClassIds, Teacher

TARGETS = ["none", "smooth", "classes", "smooth classes", "teacher", "smooth mixed teacher"]


def features(n: int, D: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(n, D, dtype=torch.float64), dim=1).to(dtype)


def class_ids(n: int, m: int, classes: int) -> ClassIds:
    return ClassIds(*((torch.randint(classes, (size,)) - classes // 2) * 2**40 for size in (n, m)))


def clip_options(kind: str, n: int, m: int, dtype: torch.dtype) -> dict:
    """Options of clip_loss by name."""
    options = {"label_smoothing": 0.2} if "smooth" in kind else {}
    if "classes" in kind:
        options["targets"] = class_ids(n, m, max(n // 3, 2))
    elif "teacher" in kind:
        options["targets"] = Teacher(features(n, 7, dtype), features(m, 7, dtype), 8.0, 0.6 if "mixed" in kind else 1.0)
    return options
