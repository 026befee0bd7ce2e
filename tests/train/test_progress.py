# SPDX-License-Identifier: Apache-2.0
"""Progress: plain lines in a pipe, a live bar on a terminal, and train.log in either case."""

import io
import logging
import sys

import pytest

from fvm_fast.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def follow(steps: int = 6, **options: object) -> None:
    with Progress(steps, print_every=2, **options) as progress:
        for step in range(1, steps + 1):
            progress.show(step, loss=1.5, lr=1e-3, pairs_per_second=1234.0, seconds=30.0 * step)


def test_plain_lines(caplog):
    caplog.set_level(logging.INFO, "fvm_fast")
    follow(start=0)
    assert caplog.messages == [
        "step 2/6  loss 1.500  lr 1.0e-03  1,234 pairs/s  2:00 left",
        "step 4/6  loss 1.500  lr 1.0e-03  1,234 pairs/s  1:00 left",
        "step 6/6  loss 1.500  lr 1.0e-03  1,234 pairs/s  0:00 left",
    ]
    assert not any(record.only_file for record in caplog.records)


def test_live_bar(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "fvm_fast")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    follow()
    assert "6/6" in terminal.getvalue() and "1,234 pairs/s" in terminal.getvalue()
    assert len(caplog.records) == 3 and all(record.only_file for record in caplog.records)


@pytest.mark.parametrize("terminal", [False, True])
def test_silence(caplog, monkeypatch, capsys, terminal):
    caplog.set_level(logging.INFO, "fvm_fast")
    monkeypatch.setattr(sys, "stderr", stream := Terminal() if terminal else io.StringIO())
    follow(enabled=False)
    assert stream.getvalue() == "" and not caplog.records
