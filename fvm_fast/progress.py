# SPDX-License-Identifier: Apache-2.0
"""What a watching human sees: a live bar on a terminal; in a pipe and in train.log a plain line now and then."""

from __future__ import annotations

import logging
import sys
from types import TracebackType

log = logging.getLogger("fvm_fast")


class Progress:
    """Shows steps, loss, speed, rate and time left; a context manager.

    Args:
        steps: where the run ends.
        start: where it begins.
        print_every: steps between the plain lines.
        enabled: False shows nothing (all processes but the first).
    """

    def __init__(self, steps: int, start: int = 0, print_every: int = 50, enabled: bool = True) -> None:
        self.steps = steps
        self.start = start
        self.print_every = print_every
        self.enabled = enabled
        self._bar = _live_bar() if enabled and sys.stderr.isatty() else None
        self._task = None if self._bar is None else self._bar.add_task("", total=steps, completed=start, note="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, step: int, loss: float, lr: float, pairs_per_second: float, seconds: float) -> None:
        """Report that optimizer step number ``step`` = 1, 2, ... is done, ``seconds`` after the start."""
        if not self.enabled:
            return
        note = f"loss {loss:.3f}  lr {lr:.1e}  {pairs_per_second:,.0f} pairs/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
        if step % self.print_every == 0 or step == self.steps:
            left = seconds / max(step - self.start, 1) * (self.steps - step)
            only_file = {"only_file": self._bar is not None}  # the bar says it on the terminal
            log.info("step %d/%d  %s  %s left", step, self.steps, note, _clock(left), extra=only_file)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def _live_bar():
    """A rich progress bar, or None where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
    except ImportError:
        return None
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn()
    return RichProgress(*columns, console=Console(stderr=True))
