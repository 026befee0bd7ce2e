# SPDX-License-Identifier: Apache-2.0
"""The README's speed table: some rows of RESULTS.md.

python benchmarks/summary.py            # prints it
python benchmarks/summary.py --write    # puts it between the markers in README.md
"""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

import report

README = Path(__file__).resolve().parents[1] / "README.md"
MARKS = "<!-- benchmarks/summary.py -->\n", "<!-- end -->\n"
FORWARD, BOTH = "forward", "forward + backward"


class Row(NamedTuple):
    """A line of the table: which measurement it is, and the eager rival that it names."""

    label: str
    section: str
    problem: str
    which: str
    eager: str


CONTRASTIVE, PATCHES, WINDOWS = "bench_contrastive_loss", "bench_patch_embed", "bench_window_attention"
MAE = "embed 25 % (MAE), 32 x 224 px, patch 16, D 768, float32"
VIT = "embed, 32 x 224 px, patch 16, D 768, float32"
RESTORE = "restore_tokens, 32 x 50 tokens of 512 to 197, float32"
QUEUE, DENSE = "info_nce_loss, n 256, queue 65536, D 128, float32", "dense formula"
SWIN_V2 = "Swin v2-T stage 1, 8 x 64 x 64, C 96, window 16, shift 8, bfloat16"
SWIN = "Swin-T stage 1, 8 x 56 x 56, C 96, window 7, shift 3, float32"
ROWS = (
    Row("`clip_loss`, 283 pairs, D 128", CONTRASTIVE, "clip_loss, n 283, D 128, float32", BOTH, "open_clip"),
    Row("same, 8192 pairs, D 512", CONTRASTIVE, "clip_loss, n 8192, D 512, float32", BOTH, "open_clip"),
    Row("same, bfloat16", CONTRASTIVE, "clip_loss, n 8192, D 512, bfloat16", BOTH, "open_clip"),
    Row("`siglip_loss`, 8192 pairs, D 512", CONTRASTIVE, "siglip_loss, n 8192, D 512, float32", BOTH, "open_clip"),
    Row(
        "`nt_xent_loss`, 2048 pairs, D 128", CONTRASTIVE, "nt_xent_loss, n 2048, D 128, float32", BOTH, "dense formula"
    ),
    Row(
        "`info_nce_loss`, 256 x 65,536, D 128",
        CONTRASTIVE,
        "info_nce_loss, n 256, queue 65536, D 128, float32",
        BOTH,
        "dense formula",
    ),
    Row("`window_attention`, Swin-T stage 1, forward", WINDOWS, SWIN, FORWARD, "timm's order"),
    Row("same, forward and backward", WINDOWS, SWIN, BOTH, "timm's order"),
    Row("same, Swin v2, window 16, bfloat16", WINDOWS, SWIN_V2, BOTH, "timm's order"),
    Row("`patch_embed`, ViT-B/16, 32 images", PATCHES, VIT, BOTH, "timm's order"),
    Row("same, MAE's 25 % of the patches", PATCHES, MAE, BOTH, "MAE's order"),
    Row("same, forward", PATCHES, MAE, FORWARD, "MAE's order"),
    Row("`restore_tokens`, 32 x 197 x 512", "bench_token_gather", RESTORE, BOTH, "MAE's order"),
)


def measured(section: str, row: Row) -> dict[str, dict[str, str]]:
    """The rivals of one table of RESULTS.md: name -> column -> cell.

    Raises:
        ValueError: it was not measured.
    """
    if f"### {row.problem}\n" not in section:
        raise ValueError(f"summary: RESULTS.md should have {row.problem!r} in {row.section}; run it with --write")
    text = section.split(f"### {row.problem}\n")[1].split("\n### ")[0]
    table = re.search(rf"\| {re.escape(row.which)} *\|.*\n\|[-: |]+\n(?:\|.*(?:\n|$))+", text)[0].strip().splitlines()
    header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    return {cells[0]: dict(zip(header, cells, strict=True)) for cells in lines}


def summary() -> str:
    """The table, as Markdown."""
    sections, lines = report.read_sections(report.RESULTS), []
    for row in ROWS:
        rivals = measured(sections[row.section], row)
        ours, eager = rivals["fvm_fast"], rivals[row.eager]
        compiled = next(rival for name, rival in rivals.items() if "torch.compile" in name)
        factors = f"{row.eager} {eager['time / ours']}x", f"{compiled['time / ours']}x"
        memory = f"{ours['extra MB']} / {eager['extra MB']} MB"
        lines.append([row.label, f"{ours['ms']} ms", ours["of floor"], *factors, memory])
    header = ["work", "ours", "of the floor", "eager rival", "torch.compile", "extra memory, ours / eager"]
    return report.table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    if not parser.parse_args().write:
        return print(summary())
    begin, end = MARKS
    before, rest = README.read_text().split(begin)
    README.write_text(f"{before}{begin}\n{summary()}\n\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    main()
