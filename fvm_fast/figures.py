# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run as PNG: the loss curve, which caption fits which image, and what free words find."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvm_fast.run_folder import read_metrics

BLUE, GREY = "#1f5fa8", "#b8c4d4"


def loss_curve(metrics: Path, out: Path, baseline: float | None = None) -> Path:
    """Loss over steps from a ``metrics.jsonl``: every logged step in grey, a running mean in blue.

    Args:
        metrics: the file.
        out: where the PNG goes.
        baseline: a level to mark, such as ``log(batch)``, the loss of guessing.
    """
    rows = read_metrics(metrics)
    if not rows:
        raise ValueError(f"loss_curve: {metrics} holds no line yet; train for run.log_every steps first")
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    figure, axes = _figure(7, 4)
    axes.plot(steps, losses, color=GREY, linewidth=1)
    axes.plot(steps, _running_mean(losses, max(len(losses) // 40, 1)), color=BLUE, linewidth=2)
    if baseline is not None:
        axes.axhline(baseline, color="black", linewidth=0.8, linestyle=":")
        axes.annotate("guessing", (steps[-1], baseline), ha="right", va="bottom", fontsize=9)
    axes.set(xlabel="step", ylabel="contrastive loss", title=f"{rows[-1]['seconds'] / 60:.1f} minutes of training")
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, out)


def similarity_matrix(similarities: Tensor, images: Tensor, captions: Sequence[str], out: Path) -> Path:
    """Cosine similarity of every caption with every image; the diagonal is what should be bright.

    Args:
        similarities: ``[captions, images]``.
        images: uint8 ``[n, 3, S, S]``, drawn along the top.
        captions: one text an image, written down the side.
        out: where the PNG goes.
    """
    count = len(captions)
    figure, axes = _figure(0.55 * count + 2.2, 0.55 * count + 0.8)
    axes.imshow(similarities.float().numpy(), cmap="viridis")
    for (row, column), value in _cells(similarities):
        bright = value > float(similarities.float().quantile(0.8))
        axes.text(
            column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="black" if bright else "white"
        )
    for column, image in enumerate(images):
        inset = axes.inset_axes((column - 0.45, -1.5, 0.9, 0.9), transform=axes.transData)
        inset.imshow(image.permute(1, 2, 0).numpy())
        inset.set_axis_off()
    axes.set_yticks(range(count), captions, fontsize=9)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    return _save(figure, out)


def search_strip(results: Sequence[tuple[str, Tensor]], out: Path) -> Path:
    """One row a query: its words, then the images found, best first.

    Args:
        results: ``(query, images uint8 [k, 3, S, S])`` pairs.
        out: where the PNG goes.
    """
    rows, columns = len(results), max(len(images) for _, images in results)
    figure, grid = _figure(0.8 * columns + 2, 0.85 * rows, rows, columns)
    for (query, images), cells in zip(results, grid, strict=True):
        cells[0].text(-0.15, 0.5, query, transform=cells[0].transAxes, ha="right", va="center", fontsize=11)
        for cell in cells:
            cell.set_axis_off()
        for cell, image in zip(cells, images, strict=False):
            cell.imshow(image.permute(1, 2, 0).numpy())
    figure.subplots_adjust(wspace=0.06, hspace=0.1)
    return _save(figure, out)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes (a list of lists when there are several), without touching matplotlib's global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "figures are drawn with matplotlib, which is not installed: pip install 'fvm_fast[eval]'"
        ) from None
    figure = Figure(figsize=(width, height))
    if rows == columns == 1:
        return figure, figure.subplots()
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, bbox_inches="tight", metadata={"Software": None})
    return out


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    total = torch.tensor([0.0, *values], dtype=torch.float64).cumsum(0)
    ends = torch.arange(1, len(values) + 1)
    starts = (ends - width).clamp(min=0)
    return ((total[ends] - total[starts]) / (ends - starts)).tolist()


def _cells(matrix: Tensor) -> list[tuple[tuple[int, int], float]]:
    return [((r, c), float(value)) for r, line in enumerate(matrix) for c, value in enumerate(line)]
