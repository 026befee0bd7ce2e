# SPDX-License-Identifier: Apache-2.0
"""Results as tables on the terminal: with rich where it is installed, in plain text otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Scores = Mapping[str, Mapping[str, float]]


def zero_shot_table(style: str, settings: Mapping[str, Scores]) -> None:
    """Print top-1 / 5 / 10 of every row, aligned and anywhere side by side."""
    first = next(iter(settings.values()))
    body = [[name, *(_triple(rows[name]) for rows in settings.values())] for name in first]
    ks = " / ".join(name.removeprefix("top") for name in next(iter(first.values())))
    print_table(f"zero-shot on {style}, % right in the top {ks}", ["", *settings], body)


def retrieval_table(pairs: str, scores: Scores) -> None:
    """Print recall at k in both directions."""
    columns = list(next(iter(scores.values())))
    body = [[direction, *(f"{value:.1f}" for value in recalls.values())] for direction, recalls in scores.items()]
    print_table(f"retrieval on {pairs}, %", ["", *columns], body)


def _triple(scores: Mapping[str, float]) -> str:
    return " / ".join(f"{value:4.1f}" for value in scores.values())


def print_table(title: str, columns: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is text, the others are numbers."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        widths = [max(len(row[i]) for row in [columns, *body]) for i in range(len(columns))]
        for row in [columns, *body]:
            print(
                row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            )
        return
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in body:
        table.add_row(*row)
    Console().print(table)
