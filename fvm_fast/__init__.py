# SPDX-License-Identifier: Apache-2.0
"""fvm_fast: fused kernels and sixteen vision foundation models for PyTorch."""

from fvm_fast.ops._backend import backend

__version__ = "0.1.0"

__all__ = ["__version__", "backend", "create_model", "export_weights", "list_models", "load_weights"]

_LAZY = {
    "create_model": "fvm_fast.models",
    "list_models": "fvm_fast.models",
    "load_weights": "fvm_fast.weights",
    "export_weights": "fvm_fast.weights",
}


def __getattr__(name: str):
    """Import the model and weight machinery on first use, so that ``fvm_fast.ops`` alone stays light."""
    from importlib import import_module

    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fvm_fast' has no attribute {name!r}")
