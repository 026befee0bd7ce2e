# SPDX-License-Identifier: Apache-2.0
"""Short calls of all ops, for whoever wants to see each kernel run once: on the emulated device, or on a GPU::

python tests/cusim/op_calls.py --device cuda                       # all, forward and backward
python tests/cusim/op_calls.py --device cuda --only "clip_loss of a teacher"
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))  # where pytest finds it by itself

from contrastive_common import class_ids, clip_options, features  # noqa: E402
from torch import Tensor  # noqa: E402

from fvm_fast.ops import (  # noqa: E402
    backend,
    clip_loss,
    gather_tokens,
    info_nce_loss,
    nt_xent_loss,
    patch_embed,
    random_masking,
    restore_tokens,
    siglip_loss,
    window_attention,
)


def x(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def number(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def unit(n: int, D: int = 8) -> Tensor:
    return features(n, D).float().requires_grad_()


def make_calls() -> dict[str, Callable[[], Tensor]]:
    """Calls of all ops, in all the ways that take other paths to the kernels."""
    ids, classes = torch.tensor([[0, 3, 1], [2, 2, 4]]), {"targets": class_ids(6, 7, 3)}
    uint8, restore = torch.zeros(2, 3, 8, 12, dtype=torch.uint8), torch.rand(2, 5).argsort(1)
    constants = {"mean": (0.4, 0.5, 0.6), "std": [0.2, 0.3, 0.4]}
    statistics = {"mean": torch.rand(3), "std": torch.rand(3, dtype=torch.float64)}
    mask = {"mask": torch.rand(2, 6) < 0.5, "mask_token": x(5)}
    swin = {"num_heads": 2, "window_size": 3, "shift_size": 1}
    dropout = {"dropout_p": 0.5, "seed": torch.tensor(1 << 40)}
    return {
        "gather_tokens": partial(gather_tokens, x(2, 5, 4), ids),
        "restore_tokens": partial(restore_tokens, x(2, 3, 4), restore, x(4), x(6, 4), num_prefix_tokens=1),
        "random_masking": lambda: random_masking(2, 9, 0.5)[2],
        "patch_embed": partial(patch_embed, x(2, 3, 8, 12), x(5, 3, 4, 4), x(5), x(7, 5), x(1, 5), ids),
        "patch_embed of uint8": partial(patch_embed, uint8, x(5, 3, 4, 4), **constants),
        "patch_embed with a mask": partial(patch_embed, x(2, 3, 8, 12), x(5, 3, 4, 4), **statistics, **mask),
        "window_attention": partial(window_attention, x(1, 5, 7, 24), x(2, 9, 9), pad_qkv=x(24), **swin),
        "window_attention of cosines": partial(window_attention, x(1, 5, 7, 24), logit_scale=x(2), **dropout, **swin),
        "clip_loss": partial(clip_loss, unit(6), unit(6), number(5.0), label_smoothing=0.1),
        "clip_loss of a number": partial(clip_loss, unit(6), unit(6), 5.0),
        "clip_loss of classes": partial(clip_loss, unit(6), unit(7), number(5.0), **classes),
        "clip_loss of a teacher": partial(
            clip_loss, unit(6), unit(6), number(5.0), **clip_options("smooth mixed teacher", 6, 6, torch.float32)
        ),
        "siglip_loss": partial(siglip_loss, unit(6), unit(6), number(5.0), number(-2.0)),
        "siglip_loss of classes": partial(siglip_loss, unit(6), unit(7), number(5.0), number(-2.0), **classes),
        "nt_xent_loss": partial(nt_xent_loss, unit(6), unit(6), number(0.2)),
        "info_nce_loss": partial(info_nce_loss, unit(6), unit(6), unit(9), number(0.2)),
        "info_nce_loss of classes": partial(info_nce_loss, unit(6), unit(6), unit(7), number(0.2), **classes),
    }


def run(call: Callable[[], Tensor]) -> None:
    """Forward and, where there is one, backward."""
    out = call()
    if out.requires_grad:
        out.sum().backward()


def main(argv: list[str] | None = None) -> None:
    """Run them all, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help="the name of a call")
    options = parser.parse_args(argv)
    torch.set_default_device(options.device)
    torch.manual_seed(0)
    for name, call in make_calls().items():
        if options.only in (None, name):
            with backend("native"):
                run(call)
            print(name, flush=True)


if __name__ == "__main__":
    main()
