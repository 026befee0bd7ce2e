# SPDX-License-Identifier: Apache-2.0
"""The README's speed table says what RESULTS.md says."""

import pytest
import summary


def test_the_readme_has_the_recorded_figures():
    begin, end = summary.MARKS
    table = summary.README.read_text().split(begin)[1].split(end)[0].strip()
    assert table == summary.summary()
    assert table.count("\n") == 1 + len(summary.ROWS)


def test_a_row_that_was_not_measured_stops():
    row = summary.ROWS[0]._replace(problem="clip_loss, n 7, D 7, float32")
    sections = summary.report.read_sections(summary.report.RESULTS)
    with pytest.raises(ValueError, match=r"RESULTS.md should have 'clip_loss, n 7, D 7, float32'"):
        summary.measured(sections[row.section], row)
