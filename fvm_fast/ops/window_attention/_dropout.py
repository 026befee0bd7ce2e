# SPDX-License-Identifier: Apache-2.0
"""Which attention weights survive dropout: a function of (seed, window, head, query, key), the same on every backend.

Nothing is stored between the passes and nothing depends on the order in which weights are visited: each weight has its
own 32-bit number, made by a chain of integer mixes (C. Wellons, https://github.com/skeeto/hash-prospector).
"""

import torch
from torch import Tensor

_LOW_32_BITS = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers, held in int64, in which every bit of ``x`` touches every bit of the result."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _LOW_32_BITS
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _LOW_32_BITS
    return x ^ (x >> 16)


def keep_mask(seed: Tensor, dropout_p: float, windows: int, num_heads: int, N: int) -> Tensor:
    """The weights to keep, about ``1 - dropout_p`` of them; none at all for ``dropout_p = 1``.

    Args:
        seed: int64, [] or [1]; its sign is not used.
        dropout_p: share of the weights to drop, in multiples of 2**-32.
        windows: of all images of the batch, image by image and row by row; windows * num_heads must be below 2**32.
        num_heads, N: heads, and tokens of a window.

    Returns:
        [windows, num_heads, N, N] bool, queries before keys.
    """
    if dropout_p == 1:
        return torch.zeros(windows, num_heads, N, N, dtype=torch.bool, device=seed.device)
    seed, place = seed.reshape(()), torch.arange(N, device=seed.device)
    row = _mix(seed & _LOW_32_BITS)
    row = _mix((row + ((seed >> 32) & 0x7FFFFFFF)) & _LOW_32_BITS)
    row = _mix((row + torch.arange(windows * num_heads, device=seed.device)) & _LOW_32_BITS)
    row = _mix((row[:, None] + place) & _LOW_32_BITS)
    number = _mix((row[..., None] + place * 0x9E3779B9) & _LOW_32_BITS)
    return (number >= int(dropout_p * 2**32)).view(windows, num_heads, N, N)
