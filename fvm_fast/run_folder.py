# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: ``config.yaml``, ``metrics.jsonl``, ``train.log``, ``checkpoints/``; later results, figures."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

from fvm_fast.checkpoint import newest_checkpoint
from fvm_fast.files import flush, write_text

log = logging.getLogger("fvm_fast")


class RunFolder:
    """Paths of a run, and its metrics file.

    Args:
        path: the folder; made when missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.yaml"
        self._file = None
        self._handler: logging.Handler | None = None

    def open(self, config_yaml: str, step: int) -> None:
        """Start writing after step ``step``: metrics of later steps, left by a run that was cut off, are dropped."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config, config_yaml)
        write_text(self.metrics, "".join(line + "\n" for line in self._lines_until(step)))
        self._file = self.metrics.open("a", encoding="utf-8")
        self._handler = logging.FileHandler(self.path / "train.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(self._handler)

    def changes(self, config_yaml: str) -> list[str]:
        """What differs between the stored configuration and ``config_yaml``, where it matters to the weights."""
        import yaml

        if not self.config.is_file():
            return []
        before, now = (yaml.safe_load(text) for text in (self.config.read_text(encoding="utf-8"), config_yaml))
        return [
            f"{section}.{name} was {before.get(section, {}).get(name)} and is {value} now"
            for section in ("data", "model", "objective", "optimizer", "schedule")
            for name, value in now[section].items()
            if before.get(section, {}).get(name) != value
        ]

    def record(self, values: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Force the metrics to the disk; done before each checkpoint."""
        flush(self.metrics)

    def close(self) -> None:
        """Close the files; harmless when done twice."""
        if self._file is not None:
            self._file.close()
            log.removeHandler(self._handler)
            self._handler.close()
            self._file = None

    def _lines_until(self, step: int) -> list[str]:
        if not self.metrics.is_file():
            return []
        kept = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                break  # the line that was being written when the process was killed
        return kept


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``.

    Raises:
        FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"metrics: there is no file {path}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def choose_folder(name: str, out: str | None, resume: bool, runs: Path = Path("runs")) -> Path:
    """The folder of a run: ``out``, else the newest ``runs/<name>-*`` when resuming, else a new one with the date."""
    if out is not None:
        return Path(out)
    if resume:
        stamped = [path for path in runs.glob(f"{name}-*") if (path / "checkpoints").is_dir()]
        if stamped:
            return max(stamped, key=lambda path: (path / "checkpoints").stat().st_mtime)
    return runs / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def find_resume_point(folder: RunFolder, resume: str | None) -> Path | None:
    """The checkpoint to continue from, None for a fresh start.

    Raises:
        ValueError: the folder holds a run and ``resume`` was not asked for, or its checkpoints are all damaged.
        FileNotFoundError: ``resume`` names a path that is no checkpoint.
    """
    if resume is None or resume == "no":
        if folder.checkpoints.is_dir() and any(folder.checkpoints.glob("step-*")):
            raise ValueError(
                f"run.out: {folder.path} already holds a run; continue it with --resume auto, or choose another folder"
            )
        return None
    if resume != "auto":
        if not (Path(resume) / "state.json").is_file():
            raise FileNotFoundError(
                f"--resume: expected 'auto' or a checkpoint folder with a state.json, got {resume!r}"
            )
        return Path(resume)
    path, complaints = newest_checkpoint(folder.checkpoints)
    for complaint in complaints:
        log.warning("%s", complaint)
    if path is None and complaints:
        raise ValueError(
            f"--resume auto: no checkpoint below {folder.checkpoints} is whole; start again in a new folder"
        )
    if path is None:
        log.info("--resume auto: no checkpoint below %s yet, so training starts at step 0", folder.checkpoints)
    return path
