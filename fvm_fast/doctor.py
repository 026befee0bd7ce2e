# SPDX-License-Identifier: Apache-2.0
"""``fvm-fast doctor``: what runs native on this machine, what does not, why, and the one-line remedy."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fvm_fast
from fvm_fast import doctor_cuda, ops
from fvm_fast.ops import _backend

# What brings a C++ compiler and Python.h, by the program that installs packages.
PACKAGES = {
    "apt-get": "apt-get install -y g++ python3-dev",
    "dnf": "dnf install -y gcc-c++ python3-devel",
    "apk": "apk add g++ python3-dev",
    "pacman": "pacman -S --noconfirm gcc",
    "xcode-select": "xcode-select --install",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report (``--json``: for programs) and return 0: a missing core is a fact, not a failure."""
    parser = argparse.ArgumentParser(prog="fvm-fast doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(argv)
    report = examine()
    print(json.dumps(report, indent=2) if options.json else format_report(report))
    return 0


def examine() -> dict:
    """Everything the report says, as JSON types.

    Returns:
        versions, processor, core, threads, openmp, backend, cuda, ops (name -> backend and why), extras (name -> the
        packages that are missing) and remedies (sentences, each with a command; empty when all is well).
    """
    core, cuda = examine_core(), doctor_cuda.examine()
    return {
        "versions": {
            "fvm_fast": fvm_fast.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "processor": {"model": processor_model(), "cores": usable_cores()},
        "core": core,
        "threads": torch.get_num_threads(),
        "openmp": examine_openmp(core["file"]),
        "backend": _backend._mode,
        "cuda": cuda,
        "ops": {name: examine_op(name) for name in op_names()},
        "extras": examine_extras(),
        "remedies": remedies(core) + doctor_cuda.remedies(cuda, reinstall_command()),
    }


# ---- the machine and the core


def processor_model() -> str:
    """The processor's own name where the system tells it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def examine_core() -> dict:
    """File and instruction sets of the compiled core, or why there is none."""
    core = _backend._C
    if core is None:
        return {"file": None, "built": [], "usable": [], "active": None, "why_not": why_no_core()}
    return {
        "file": core.__file__,
        "built": core.isas_built(),
        "usable": core.isas_usable(),
        "active": core.isa(),
        "why_not": None,
    }


def why_no_core() -> str:
    """One sentence about a core that is not there, or does not load."""
    files = sorted(Path(__file__).parent.glob("_C.*so"))
    if not files:
        return "it was left out when fvm_fast was installed"
    return f"{files[0]} does not load: {_backend._why_no_core}"


def examine_openmp(core_file: str | None) -> dict:
    """Whether the kernels run on torch's thread pool: then ``torch.set_num_threads`` holds for them."""
    if core_file is None:
        return {"verdict": "no core to share it with", "runtimes": []}
    try:
        loaded = sorted(set(re.findall(r"/\S*/lib(?:g|i)?omp[^/\s]*\.so\S*", Path("/proc/self/maps").read_text())))
    except OSError:
        loaded = []
    if not re.search(rb"lib(g|i)?omp", Path(core_file).read_bytes()):
        verdict = "the core was built without OpenMP: its kernels run on one thread"
    elif len(loaded) > 1:
        verdict = "several runtimes are loaded: torch.set_num_threads may not hold for the kernels"
    else:
        verdict = "one runtime, shared with torch"
    return {"verdict": verdict, "runtimes": loaded}


# ---- the ops: each is run once on a small sample


def sample(name: str) -> tuple[tuple, dict]:
    """Small arguments for the op ``name``."""
    random = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=random)

    features, ids = (rand(3, 8), rand(3, 8)), torch.tensor([[2, 0, 1]])
    return {
        "patch_embed": ((rand(1, 3, 8, 8), rand(5, 3, 4, 4), rand(5)), {}),
        "random_masking": ((2, 4, 0.5), {"noise": rand(2, 4)}),
        "gather_tokens": ((rand(1, 3, 5), ids[:, :2]), {}),
        "restore_tokens": ((rand(1, 2, 5), ids, rand(5)), {}),
        "clip_loss": ((*features, torch.tensor(2.0)), {}),
        "info_nce_loss": ((*features, rand(5, 8), torch.tensor(0.5)), {}),
        "nt_xent_loss": ((*features, torch.tensor(0.5)), {}),
        "siglip_loss": ((*features, torch.tensor(2.0), torch.tensor(-1.0)), {}),
        "window_attention": ((rand(1, 3, 5, 12), rand(2, 4, 4)), {"num_heads": 2, "window_size": 2, "shift_size": 1}),
    }[name]


def op_names() -> list[str]:
    """The public ops: those of ``fvm_fast.ops`` that have a reference."""
    return [name for name in ops.__all__ if f"{name}_reference" in ops.__all__]


class _NativeCalls(TorchDispatchMode):
    """Counts the calls that reach operators of this package."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "fvm_fast"
        return func(*args, **(kwargs or {}))


def examine_op(name: str) -> dict:
    """Run ``name`` on its sample: which backend took it, why, and whether it agrees with its reference."""
    args, kwargs = sample(name)
    try:
        with _NativeCalls() as calls:
            result = getattr(ops, name)(*args, **kwargs)
        torch.testing.assert_close(result, getattr(ops, f"{name}_reference")(*args, **kwargs))
    except Exception as error:  # whatever is wrong with one op, the report goes on
        return {"backend": "broken", "why": str(error).strip().splitlines()[0]}
    if calls.count:
        return {"backend": "native", "why": f"{_backend.isa()}; agrees with its reference"}
    if _backend._mode == "torch":
        return {"backend": "torch", "why": "FVM_FAST_BACKEND=torch asks for it"}
    if _backend._C is None:
        return {"backend": "torch", "why": "there is no compiled core"}
    return {"backend": "torch", "why": "plain torch serves here: no kernel of its own"}


# ---- what pip installed, and remedies


def examine_extras() -> dict[str, list[str]]:
    """For each extra that users choose, its packages that are not installed."""
    try:
        wanted = metadata.requires("fvm_fast") or []
    except metadata.PackageNotFoundError:
        return {}
    missing: dict[str, list[str]] = {}
    for requirement in wanted:
        package, extra = re.match(r"[\w.-]+", requirement), re.search(r"extra\s*==\s*['\"](\w+)", requirement)
        if package and extra and extra[1] != "build":  # pip brings those by itself where it builds
            missing.setdefault(extra[1], [])
            if not _is_installed(package[0]):
                missing[extra[1]].append(package[0])
    return missing


def _is_installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def remedies(core: dict) -> list[str]:
    """What to do, most important first; each sentence ends in one command line."""
    if core["file"]:
        return []
    lacking = [sentence for sentence in (compiler_problem(), header_problem()) if sentence]
    if not lacking:
        return [f"a compiler is here, so the core can be built now: {reinstall_command()}"]
    packages = next((line for program, line in PACKAGES.items() if shutil.which(program)), None)
    if packages is None:
        return [f"{'; '.join(lacking)}; once that is mended: {reinstall_command()}"]
    return [f"{'; '.join(lacking)}: {packages} && {reinstall_command()}"]


def compiler_problem() -> str | None:
    """Why no C++ compiler of this machine can build the core, or None when one can."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        return f"no C++ compiler was found (looked for {', '.join(names)})"
    half = "__fp16" if platform.machine() in ("aarch64", "arm64") else "_Float16"
    program = f"auto f = []<class T>(T x) {{ return x; }}; float y = f({half}(0));"
    command = [compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(command, input=program, text=True, capture_output=True).returncode:
        return f"{compiler} is too old (GCC 12 or Clang 15 is needed)"
    return None


def header_problem() -> str | None:
    """A sentence when Python.h, which compiled modules need, is not there."""
    folder = sysconfig.get_paths()["include"]
    return None if Path(folder, "Python.h").exists() else f"the header Python.h is not in {folder}"


def reinstall_command() -> str:
    """The pip line that builds the core again from where this package came, past the wheel that pip keeps."""
    checkout = Path(__file__).resolve().parents[1]
    source = f"-e {checkout}" if (checkout / "setup.py").exists() else "fvm_fast"
    try:
        url = metadata.distribution("fvm_fast").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        url = None
    if url and source == "fvm_fast":
        source = json.loads(url)["url"].removeprefix("file://")
    return f"{sys.executable} -m pip install --force-reinstall --no-deps --no-cache-dir {source}"


# ---- plain text


def format_report(report: dict) -> str:
    """The report as text: facts, the table of the ops, extras, remedies."""
    versions, processor, openmp = report["versions"], report["processor"], report["openmp"]
    facts = {
        "versions": f"fvm_fast {versions['fvm_fast']}, torch {versions['torch']}, Python {versions['python']}",
        "system": versions["system"],
        "processor": f"{processor['model']}, {processor['cores']} cores",
        "core": format_core(report["core"]),
        "threads": f"{report['threads']} (OMP_NUM_THREADS or torch.set_num_threads)",
        "OpenMP": f"{openmp['verdict']}: {', '.join(openmp['runtimes'])}".removesuffix(": "),
        "backend": f"{report['backend']} (FVM_FAST_BACKEND or fvm_fast.backend)",
        "CUDA": doctor_cuda.format_line(report["cuda"]),
    }
    lines = [f"{name:<14}{text}" for name, text in facts.items()]
    lines += ["", f"{'op':<18}{'backend':<10}why"]
    lines += [f"{name:<18}{op['backend']:<10}{op['why']}" for name, op in report["ops"].items()]
    lines += [""] * bool(report["extras"])
    for extra, missing in report["extras"].items():
        state = f"missing {', '.join(missing)}: pip install 'fvm_fast[{extra}]'" if missing else "installed"
        lines.append(f"{f'[{extra}]':<14}{state}")
    lines += ["", *(f"remedy: {sentence}" for sentence in report["remedies"] or ["none needed"])]
    return "\n".join(lines)


def format_core(core: dict) -> str:
    """One line about the compiled core and its instruction sets."""
    if core["file"] is None:
        return f"none: {core['why_not']}"
    idle = [isa for isa in core["built"] if isa not in core["usable"]]
    cannot = f" (this processor lacks {', '.join(idle)})" if idle else ""
    return f"built for {', '.join(core['built'])}{cannot}; active: {core['active']} (FVM_FAST_ISA)"


if __name__ == "__main__":
    sys.exit(main())
