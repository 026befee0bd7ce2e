# SPDX-License-Identifier: Apache-2.0
"""How much memory a call needs at its peak, whoever allocates it."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


def peak_extra_bytes(call: Callable[[], object]) -> int | None:
    """Bytes by which resident memory rises at most while ``call`` runs, its outputs included.

    The operating system counts, so torch's allocations, oneDNN's scratch and our own workspaces are all seen. Call it
    once before: code that is loaded and pools that are filled on first use are not the call's. None where Linux's
    ``/proc/self/clear_refs`` is missing. Right to about 0.3 MB.
    """
    gc.collect()
    _return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the high-water mark
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _return_freed_memory() -> None:
    """Hand what malloc keeps for reuse back to the system; reused pages would not show as a rise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {field}, got none")
