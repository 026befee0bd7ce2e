# SPDX-License-Identifier: Apache-2.0
"""What ``fvm-fast doctor`` says about CUDA: the kernels that were built, the GPUs that run them, why not, remedies."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from fvm_fast.ops import _backend

VERIFIED = "verified by emulation, not yet run on hardware"


def examine() -> dict:
    """The facts, as JSON types.

    Returns:
        file and architectures of the CUDA module (None and empty without it, and then why_not), verified (how far its
        kernels were tested), devices (for each GPU its name and architecture, and why_not where it cannot run them),
        nvcc (its path, or None).
    """
    core = _backend._C_cuda
    return {
        "file": None if core is None else core.__file__,
        "architectures": [] if core is None else [f"sm_{arch}" for arch in core.architectures().split(",")],
        "why_not": None if core is not None else why_no_module(),
        "verified": VERIFIED,
        "devices": [examine_device(i) for i in range(torch.cuda.device_count())],
        "nvcc": find_nvcc(),
    }


def examine_device(index: int) -> dict:
    """Name and architecture of a GPU, and why it runs no kernel of ours, or None."""
    major, minor = torch.cuda.get_device_capability(index)
    why_not = "there is no CUDA module" if _backend._C_cuda is None else _backend._why_not_on_gpu(index)
    return {"name": torch.cuda.get_device_name(index), "architecture": f"sm_{major}{minor}", "why_not": why_not}


def why_no_module() -> str:
    """One sentence about a CUDA module that is not there, or does not load."""
    files = sorted(Path(__file__).parent.glob("_C_cuda.*so"))
    if files:
        return f"{files[0]} does not load: {_backend._why_no_cuda}"
    return "it was left out when fvm_fast was installed" if find_nvcc() else "it was not built: there is no nvcc"


def find_nvcc() -> str | None:
    """The CUDA compiler that an installation would use: of CUDA_HOME, else of the PATH, else of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    places = [home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, filter(None, places))), None)


def remedies(cuda: dict, reinstall: str) -> list[str]:
    """What to do where there is a GPU and nothing to run on it; ``reinstall`` is the command that builds anew."""
    idle = [device for device in cuda["devices"] if device["why_not"]]
    if not idle:
        return []
    if cuda["file"]:
        archs = ";".join(sorted({device["architecture"].removeprefix("sm_") for device in idle if can_run(device)}))
        return [f"the GPU needs kernels of its own: FVM_FAST_CUDA_ARCHS={archs} {reinstall}"] if archs else []
    build = f"FVM_FAST_CUDA=1 {reinstall}"
    if cuda["nvcc"]:
        return [f"an nvcc is here ({cuda['nvcc']}), so the CUDA module can be built: {build}"]
    return [f"no nvcc was found (set CUDA_HOME, or install the CUDA toolkit {torch.version.cuda}); then: {build}"]


def can_run(device: dict) -> bool:
    """Whether kernels can be built for this GPU at all: they use what came with sm_80."""
    return int(device["architecture"].removeprefix("sm_")) >= 80


def format_line(cuda: dict) -> str:
    """One line: what was built, and which GPUs run it."""
    if cuda["file"] is None:
        return f"none: {cuda['why_not']}; tensors on a GPU take the torch path"
    built = f"kernels for {', '.join(cuda['architectures'])} and later ({cuda['verified']})"
    gpus = [f"{device['name']}: {device['why_not'] or 'runs them'}" for device in cuda["devices"]]
    return "; ".join([built, *(gpus or ["torch finds no GPU here"])])
