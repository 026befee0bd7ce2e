# SPDX-License-Identifier: Apache-2.0
"""Attention within the windows of a map."""

from fvm_fast.ops.window_attention.window_attention import window_attention, window_attention_reference

__all__ = ["window_attention", "window_attention_reference"]
