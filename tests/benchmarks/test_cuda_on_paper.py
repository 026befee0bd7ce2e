# SPDX-License-Identifier: Apache-2.0
"""The table of predictions is the one that its formulas make, and says of itself that nothing was measured."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cuda_on_paper  # noqa: E402


def test_the_recorded_table_is_up_to_date():
    remedy = "python benchmarks/cuda_on_paper.py --write"
    assert cuda_on_paper.RESULTS.read_text() == cuda_on_paper.table(), remedy


def test_it_says_that_nothing_was_measured():
    text = cuda_on_paper.table()
    assert text.startswith("# On paper\n\nComputed, not measured")
    assert all(f"- {device.name}: " in text and device.source in text for device in cuda_on_paper.DEVICES)


def test_figures_by_hand():
    """Swin-T's first stage: qkv read and the output written once, 401,408 tokens of 96 channels."""
    work = cuda_on_paper.window_attention_fwd(128 * 56 * 56, 96, 3, 49, 2)
    assert work.bytes == 4 * 2 * 401_408 * 96 + 3 * 49 * 49 * 4
    (line,) = [x for x in cuda_on_paper.table().splitlines() if "window_attention fwd | Swin-T stage 1" in x]
    assert line.split(" | ")[2:5] == ["308", "7.55", "151"]
