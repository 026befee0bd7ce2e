# SPDX-License-Identifier: Apache-2.0
"""What contrastive losses are told about their pairs, and the checks of what they are given."""

from typing import NamedTuple

import torch
from torch import Tensor

from fvm_fast.ops._backend import accumulation_dtype, check_same_device, check_same_dtype


class ClassIds(NamedTuple):
    """Several positives: row ``i`` and column ``j`` belong together where their ids are equal.

    Attributes:
        rows: [n] integers. cols: [m] integers.
    """

    rows: Tensor
    cols: Tensor


class Teacher(NamedTuple):
    """Soft targets ``alpha * softmax(logit_scale * image @ text.T) + (1 - alpha) * positives``, without gradients.

    Attributes:
        image: [n, Dt], text: [m, Dt], in the dtype of the student's features; Dt may differ from the student's width.
        logit_scale: the teacher's, already exponentiated.
        alpha: the teacher's share, in [0, 1]. The rest goes to pair (i, i).
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor | float
    alpha: float = 1.0


def loss_dtype(features: Tensor) -> torch.dtype:
    """In which a loss over these features is computed and returned: float64 for float64, float32 for all else."""
    return accumulation_dtype(features.dtype)


def scalar(op: str, name: str, value: Tensor | float, features: Tensor) -> Tensor:
    """A scale or bias as a 0-d tensor of the loss's dtype beside ``features``; numbers are constants."""
    dtype = loss_dtype(features)
    if not isinstance(value, Tensor):
        return features.new_full((), value, dtype=dtype)
    if value.dim() == 0 and value.dtype == dtype and value.device == features.device:
        return value
    if value.numel() != 1 or value.dim() > 1 or not value.is_floating_point():
        raise ValueError(
            f"{op}: expected {name} to be a number or a floating tensor [] or [1], "
            f"got {value.dtype} {tuple(value.shape)}"
        )
    check_same_device(op, features=features, **{name: value})
    return value.reshape(()).to(dtype)


def temperature_scalar(op: str, value: Tensor | float, features: Tensor) -> Tensor:
    """A temperature as :func:`scalar` makes it; a number has to be above 0."""
    if not isinstance(value, Tensor) and value <= 0:
        raise ValueError(f"{op}: expected a temperature above 0, got {value}; logits are divided by it")
    return scalar(op, "temperature", value, features)


def check_features(op: str, image_features: Tensor, text_features: Tensor, names: tuple[str, str]) -> None:
    """Raise unless they are floating [n, D] and [m, D], of one dtype, on one device."""
    x, y = image_features, text_features
    alike = x.dim() == y.dim() == 2 and x.shape[1] == y.shape[1] and x.device == y.device and x.dtype == y.dtype
    if alike and x.is_floating_point():
        return  # before anything is made for a sentence: a small batch would notice
    image, text = names
    for name, x in ((image, image_features), (text, text_features)):
        if x.dim() != 2:
            raise ValueError(f"{op}: expected {name} [n, D], got {x.dim()} dimensions {tuple(x.shape)}")
    if image_features.shape[1] != text_features.shape[1]:
        raise ValueError(
            f"{op}: expected {image} and {text} of one width, "
            f"got {tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    check_same_device(op, **{image: image_features, text: text_features})
    check_same_dtype(op, **{image: image_features, text: text_features})


def check_targets(op: str, targets: ClassIds | Teacher | None, x: Tensor, y: Tensor) -> None:
    """Raise unless ``targets`` fit the local features ``x [n, D]`` and ``y [m, D]``."""
    if isinstance(targets, ClassIds):
        for name, ids, size in (("rows", targets.rows, len(x)), ("cols", targets.cols, len(y))):
            if ids.dtype != torch.int64 or tuple(ids.shape) != (size,):
                raise ValueError(
                    f"{op}: expected ClassIds.{name} int64 [{size}], one for each feature, "
                    f"got {ids.dtype} {tuple(ids.shape)}"
                )
        check_same_device(op, image_features=x, rows=targets.rows, cols=targets.cols)
    elif isinstance(targets, Teacher):
        check_features(op, targets.image, targets.text, ("Teacher.image", "Teacher.text"))
        if len(targets.image) != len(x) or len(targets.text) != len(y):
            raise ValueError(
                f"{op}: expected a Teacher of {len(x)} images and {len(y)} texts, "
                f"got {len(targets.image)} and {len(targets.text)}"
            )
        if not 0 <= targets.alpha <= 1:
            raise ValueError(f"{op}: expected Teacher.alpha in [0, 1], got {targets.alpha}")
        check_same_device(op, image_features=x, teacher=targets.image)
        check_same_dtype(op, image_features=x, teacher=targets.image)
    elif targets is not None:
        raise TypeError(f"{op}: expected targets to be None, ClassIds or Teacher, got {type(targets).__name__}")


def check_sizes(op: str, targets: ClassIds | Teacher | None, n: int, m: int) -> None:
    """Raise unless the joined batch has rows and columns, and as many of both where pair (i, i) is the positive one."""
    if n == 0 or m == 0:
        raise ValueError(f"{op}: expected at least one pair to take the mean over, got {n} rows and {m} columns")
    if n == m or isinstance(targets, ClassIds) or (isinstance(targets, Teacher) and targets.alpha == 1):
        return
    raise ValueError(
        f"{op}: expected as many rows as columns, for row i belongs to column i, got {n} and {m}; "
        "give targets=ClassIds(rows, cols)"
    )


def check_reduction(op: str, grad_reduction: str) -> None:
    """Raise for a ``grad_reduction`` that is neither ``"mean"`` nor ``"sum"``."""
    if grad_reduction not in ("mean", "sum"):
        raise ValueError(f"{op}: expected grad_reduction to be 'mean' or 'sum', got {grad_reduction!r}")


def row_numbers(n: int, device: torch.device, first: int = 0) -> Tensor:
    """Ids [n] that make pair (i, i) the positive one. They are int32, which tells them from ids that were given."""
    return torch.arange(first, first + n, dtype=torch.int32, device=device)


# Ids are compared by sorting: to number or count them by value would wait for the device, to learn how many there are.


def small_ids(rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """int32 ids [n] and [m] of 0 and more that are equal where the given ones are, as the kernels take them."""
    if rows.dtype == cols.dtype == torch.int32:
        return rows, cols
    both = torch.cat([rows, cols])
    rows, cols = torch.searchsorted(both.sort().values, both, out_int32=True).split([len(rows), len(cols)])
    return rows.clone(), cols.clone()


def occurrences(ids: Tensor, among: Tensor) -> Tensor:
    """How often each of ``ids`` [n] is found ``among`` others [m] of its dtype: int64 [n]."""
    ids, ordered = ids.contiguous(), among.sort().values
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)


def count_positives(rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the number of columns of its id, for each column that of rows: float64 [n] and [m]."""
    return occurrences(rows, cols).double(), occurrences(cols, rows).double()
