# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of the contrastive losses against the number of pairs: a table and a picture.

python benchmarks/plot_contrastive_loss.py [--large] [--write]

--large adds a matrix of 65536 x 65536 (nt_xent_loss's at 32768 pairs), ours alone: minutes, and a failure if that needs
1 GB or more beyond the inputs.
--write records the table in RESULTS.md and the picture in docs/contrastive_loss/.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import bench_contrastive_loss as losses
import machine
import report
import torch
from harness import time_in_turns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from memory import peak_extra_bytes
from torch import Tensor

PICTURE = Path(__file__).parents[1] / "docs/contrastive_loss/time_and_memory.svg"
WIDTH, LARGE, LARGE_BYTES = 512, 65536, 1e9
SIZES = [256, 512, 1024, 2048, 4096, 8192, 16384]
DENSE_SIZES = SIZES[:-1]  # one more would take the dense formulas 4 GB and 15 s a call
OURS, EAGER, COMPILED = "fvm_fast", "dense formula", "dense formula, torch.compile"
COLOURS = {OURS: "#1f5fa8", EAGER: "#8a97a8", COMPILED: "#d08a2e"}


class Loss(NamedTuple):
    """Ours and the dense formula of one loss, its learned scalars, and the side of its matrix for each pair."""

    ours: Callable[..., Tensor]
    dense: Callable[..., Tensor]
    scalars: tuple[float, ...] = ()
    side: int = 1


LOSSES = {
    "clip_loss": Loss(losses.ours_clip, losses.dense_clip, (1 / 0.07,)),
    "siglip_loss": Loss(losses.ours_siglip, losses.dense_siglip, (10.0, -10.0)),
    "nt_xent_loss": Loss(losses.ours_nt_xent, losses.dense_nt_xent, side=2),
}


class Point(NamedTuple):
    """One call, forward and backward."""

    loss: str
    rival: str
    pairs: int
    seconds: float
    extra_bytes: int


def points(name: str, pairs: int, seconds: float) -> Iterator[Point]:
    """Every rival that can, in turns."""
    loss = LOSSES[name]
    inputs = [*losses.paired_features(pairs, WIDTH, torch.float32), *map(losses.scalar, loss.scalars)]
    functions = {OURS: loss.ours}
    if pairs in DENSE_SIZES:
        torch.compiler.reset()
        functions |= {EAGER: loss.dense, COMPILED: torch.compile(loss.dense, fullgraph=True, dynamic=False)}
    runs = {rival: partial(_forward_backward, f, inputs) for rival, f in functions.items()}
    if pairs not in SIZES:  # one call tells both
        start = time.perf_counter()
        extra_bytes = peak_extra_bytes(runs[OURS]) or 0
        yield Point(name, OURS, pairs, time.perf_counter() - start, extra_bytes)
        return
    for run in runs.values():
        run()
    extra = {rival: peak_extra_bytes(run) or 0 for rival, run in runs.items()}
    for rival, samples in time_in_turns(runs, seconds).items():
        yield Point(name, rival, pairs, median(samples), extra[rival])


def _forward_backward(function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    torch.autograd.grad(function(*inputs), inputs)


def table(measured: list[Point]) -> str:
    """A row for each loss and size."""
    rows = []
    for loss, pairs in dict.fromkeys((p.loss, p.pairs) for p in measured):
        of = {p.rival: p for p in measured if (p.loss, p.pairs) == (loss, pairs)}
        cells = [(report.number(p.seconds * 1e3), f"{p.extra_bytes / 1e6:.1f}") for p in map(of.get, COLOURS) if p]
        cells += [("", "")] * (len(COLOURS) - len(cells))
        rows.append([f"{loss}, {pairs}", *(cell for pair in cells for cell in pair)])
    header = [column for rival in COLOURS for column in (f"{rival}: ms", "extra MB")]
    return report.table([f"loss, pairs (D {WIDTH}, float32)", *header], rows)


def draw(measured: list[Point], out: Path) -> None:
    """Time above, memory below, a column for each loss."""
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "fvm_fast", "font.size": 9}
    figure, axes = plt.subplots(2, len(LOSSES), figsize=(10, 5.4), sharex=True, sharey="row", layout="constrained")
    for column, loss in enumerate(LOSSES):
        for rival, colour in COLOURS.items():
            own = [p for p in measured if (p.loss, p.rival) == (loss, rival)]
            pairs, style = [p.pairs for p in own], {"color": colour, "marker": "o", "markersize": 3, "label": rival}
            axes[0, column].plot(pairs, [p.seconds * 1e3 for p in own], **style)
            axes[1, column].plot(pairs, [p.extra_bytes / 1e6 for p in own], **style)
        axes[0, column].set_title(loss)
        axes[1, column].set_xlabel("pairs")
    axes[0, 0].set_ylabel("forward + backward, ms")
    axes[1, 0].set_ylabel("peak extra memory, MB")
    for each in axes.flat:
        _logarithmic(each, sorted({p.pairs for p in measured}))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


def _logarithmic(axes: Axes, pairs: list[int]) -> None:
    axes.set(xscale="log", yscale="log", xticks=pairs[::2])
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.grid(color="#e6eaf0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help=f"also {LARGE} pairs, ours alone")
    parser.add_argument("--only", default="", metavar="WORD", help="only the losses whose name has this word")
    parser.add_argument("--most", type=int, default=SIZES[-1], metavar="PAIRS", help="leave out larger batches")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each loss and size")
    parser.add_argument("--write", action="store_true", help="record table and picture")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    heading = f"## plot_contrastive_loss\n\n{machine.describe()}.\n"
    print(heading, flush=True)
    measured = []
    for name in (name for name in LOSSES if args.only in name):
        for pairs in [size for size in SIZES if size <= args.most] + [LARGE // LOSSES[name].side] * args.large:
            measured += points(name, pairs, args.seconds)
            print(table(measured[-1:] if pairs not in DENSE_SIZES else measured[-3:]).splitlines()[-1], flush=True)
    if args.write:
        report.write_section("plot_contrastive_loss", f"{heading}\n{table(measured)}", report.RESULTS)
        draw(measured, PICTURE)
    too_much = [p for p in measured if p.pairs not in SIZES and p.extra_bytes >= LARGE_BYTES]
    if too_much:
        raise SystemExit(f"expected less than {LARGE_BYTES / 1e6:.0f} MB beyond the inputs, got {too_much}")


if __name__ == "__main__":
    main()
