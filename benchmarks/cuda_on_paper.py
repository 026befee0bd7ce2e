# SPDX-License-Identifier: Apache-2.0
"""On paper: the bytes that our CUDA kernels have to move, and how long three GPUs would take for them at the least.

    python benchmarks/cuda_on_paper.py            # prints the table, for bfloat16
    python benchmarks/cuda_on_paper.py --write    # and records it in CUDA_ON_PAPER.md

Nothing here was measured. Bytes are the compulsory traffic: each byte of input read and each of output written once a
pass; tests/cusim compares the kernels with it. FLOP are two for each multiply-add of the algorithm. Time is one of them
divided by what the data sheet promises; the longer of the two is a bound, never a prediction of what is reached.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "CUDA_ON_PAPER.md"
WIDE = 4  # bytes of a float32, in which sums, statistics and gradients of parameters are kept
INDEX = 8  # bytes of an id


class Device(NamedTuple):
    """Rates of a GPU: its data sheet's, without sparsity."""

    name: str
    bandwidth: float  # bytes a second
    tensor: float  # FLOP a second, bfloat16 or float16
    source: str


DEVICES = (
    Device("A100 80 GB SXM", 2.039e12, 312e12, "NVIDIA A100 Tensor Core GPU data sheet"),
    Device("H100 SXM", 3.35e12, 989e12, "NVIDIA H100 Tensor Core GPU data sheet"),
    Device("B200", 8.0e12, 2250e12, "NVIDIA Blackwell architecture technical brief, HGX B200"),
)


class Work(NamedTuple):
    """What a pass has to move and to compute."""

    bytes: int
    flop: int = 0


# ---- token_gather: rows of D values of e bytes


def gather_tokens_fwd(B: int, L: int, K: int, D: int, e: int) -> Work:
    return Work(2 * e * B * K * D + INDEX * B * K)


def gather_tokens_bwd(B: int, L: int, K: int, D: int, e: int) -> Work:
    """Gradients of the rows taken in; all rows out, zero where nobody took one."""
    return Work(e * B * (K + L) * D + INDEX * B * K)


def restore_tokens_fwd(B: int, P: int, K: int, L: int, D: int, e: int) -> Work:
    return Work(e * D * (B * (P + K) + B * (P + L) + (P + L) + 1) + INDEX * B * L)


def restore_tokens_bwd(B: int, P: int, K: int, L: int, D: int, e: int) -> Work:
    """The output's gradient read once; out those of tokens, positions and the mask token."""
    return restore_tokens_fwd(B, P, K, L, D, e)


# ---- patch_embed: K of the patches of F pixel values of e_pixel bytes each


def patch_embed_fwd(B: int, K: int, F: int, D: int, P: int, e_pixel: int, e: int) -> Work:
    """Images, weight, bias, positions and prefix in; tokens out."""
    return Work(B * K * F * e_pixel + F * D * e + (1 + P + K + P) * D * WIDE + B * (P + K) * D * e, 2 * B * K * F * D)


def patch_embed_bwd(B: int, K: int, F: int, D: int, P: int, e_pixel: int, e: int) -> Work:
    """To weight, bias, positions and prefix; images have no gradient."""
    return Work(B * K * F * e_pixel + B * (P + K) * D * e + (F + 1 + P + K + P) * D * WIDE, 2 * B * K * F * D)


# ---- window_attention: T tokens of C channels in windows of N, with a bias [heads, N, N]


def window_attention_fwd(T: int, C: int, heads: int, N: int, e: int) -> Work:
    return Work(4 * e * T * C + heads * N * N * WIDE, 4 * T * N * C)


def window_attention_bwd(T: int, C: int, heads: int, N: int, e: int) -> Work:
    """qkv and the output's gradient in, that of qkv out; the probabilities are computed again."""
    return Work(7 * e * T * C + 2 * heads * N * N * WIDE, 10 * T * N * C)


# ---- contrastive losses: n rows against m columns of D values


def clip_loss_fwd(n: int, m: int, D: int, e: int) -> Work:
    return Work(e * (n + m) * D + 2 * WIDE * (n + m), 2 * n * m * D)


def clip_loss_bwd(n: int, m: int, D: int, e: int) -> Work:
    return Work((e + WIDE) * (n + m) * D + 2 * WIDE * (n + m), 6 * n * m * D)


def siglip_loss(n: int, m: int, D: int, e: int) -> Work:
    """The forward pass makes the gradients too."""
    return Work((e + WIDE) * (n + m) * D, 6 * n * m * D)


def nt_xent_loss_fwd(N: int, D: int, e: int) -> Work:
    """2 N rows against themselves: one triangle."""
    return Work(2 * N * D * e + 2 * N * WIDE, (2 * N) ** 2 * D)


def nt_xent_loss_bwd(N: int, D: int, e: int) -> Work:
    return Work(2 * N * D * (e + WIDE) + 2 * N * WIDE, 3 * (2 * N) ** 2 * D)


def info_nce_loss(n: int, m: int, D: int, e: int) -> Work:
    """Both passes: the queue is keys and values, as in attention, and the backward pass is of the size of the query."""
    return Work(e * (2 * n + m) * D + 2 * WIDE * n * D, 4 * n * m * D)


# ---- the table


def works(e: int) -> Iterator[tuple[str, str, Work]]:
    """(op, sizes, work) for values of ``e`` bytes."""
    mae = "MAE ViT-B/16, B 256, 49 of 196"
    yield "patch_embed fwd", f"{mae}, uint8 images", patch_embed_fwd(256, 49, 768, 768, 1, 1, e)
    yield "patch_embed bwd", f"{mae}, uint8 images", patch_embed_bwd(256, 49, 768, 768, 1, 1, e)
    yield "patch_embed fwd", "ViT-B/16, B 256", patch_embed_fwd(256, 196, 768, 768, 1, e, e)
    yield "patch_embed bwd", "ViT-B/16, B 256", patch_embed_bwd(256, 196, 768, 768, 1, e, e)
    yield "gather_tokens fwd", f"{mae}, D 768", gather_tokens_fwd(256, 196, 49, 768, e)
    yield "gather_tokens bwd", f"{mae}, D 768", gather_tokens_bwd(256, 196, 49, 768, e)
    yield "restore_tokens fwd", f"{mae}, D 512", restore_tokens_fwd(256, 1, 49, 196, 512, e)
    yield "restore_tokens bwd", f"{mae}, D 512", restore_tokens_bwd(256, 1, 49, 196, 512, e)
    for stage, (side, C, heads) in enumerate([(56, 96, 3), (28, 192, 6), (14, 384, 12), (7, 768, 24)], 1):
        sizes = f"Swin-T stage {stage}, B 128, {side} x {side} x {C}"
        yield "window_attention fwd", sizes, window_attention_fwd(128 * side * side, C, heads, 49, e)
        yield "window_attention bwd", sizes, window_attention_bwd(128 * side * side, C, heads, 49, e)
    for n in (8192, 32768):
        yield "clip_loss fwd", f"{n} x {n}, D 512", clip_loss_fwd(n, n, 512, e)
        yield "clip_loss bwd", f"{n} x {n}, D 512", clip_loss_bwd(n, n, 512, e)
        yield "siglip_loss", f"{n} x {n}, D 512", siglip_loss(n, n, 512, e)
    yield "nt_xent_loss fwd", "2 x 4096, D 128", nt_xent_loss_fwd(4096, 128, e)
    yield "nt_xent_loss bwd", "2 x 4096, D 128", nt_xent_loss_bwd(4096, 128, e)
    yield "info_nce_loss", "256 x 65536, D 128", info_nce_loss(256, 65536, 128, e)


def table(e: int = 2) -> str:
    """The page, headed "on paper"."""
    names = [device.name for device in DEVICES]
    head = ["op", "sizes", "MB", "GFLOP", *(f"{n}: bytes" for n in names), *(f"{n}: FLOP" for n in names)]
    lines = [
        "# On paper",
        "",
        "Computed, not measured: no GPU was at hand. Microseconds that the compulsory bytes take at 100 % of the",
        "memory bandwidth, and the FLOP at 100 % of the tensor cores; whichever is longer is a bound that no kernel",
        "beats while its data come from memory. bfloat16; sums and gradients of parameters in float32.",
        f"Made by `python benchmarks/{Path(__file__).name} --write`.",
        "",
        *(f"- {d.name}: {d.bandwidth / 1e12:g} TB/s, {d.tensor / 1e12:g} TFLOPS ({d.source})" for d in DEVICES),
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for op, sizes, work in works(e):
        by_bytes = (figure(1e6 * work.bytes / device.bandwidth) for device in DEVICES)
        by_flop = (figure(1e6 * work.flop / device.tensor) if work.flop else "-" for device in DEVICES)
        cells = [op, sizes, figure(work.bytes / 1e6), figure(work.flop / 1e9) if work.flop else "-"]
        lines.append(f"| {' | '.join([*cells, *by_bytes, *by_flop])} |")
    return "\n".join(lines) + "\n"


def figure(x: float) -> str:
    """Three digits, at most."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def main() -> None:
    """Print the page and, if asked, record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"record the table in {RESULTS.name}")
    text = table()
    if parser.parse_args().write:
        RESULTS.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
