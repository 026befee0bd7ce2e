# SPDX-License-Identifier: Apache-2.0
"""Whole training passes of ViT and CLIP: ours, native and plain torch, against timm's and open_clip's on equal weights.

python benchmarks/bench_models.py
"""

from argparse import Namespace
from collections.abc import Callable, Iterator

import open_clip
import timm
import torch
import torch.nn.functional as F
from harness import main
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from problem import FORWARD_BACKWARD, Problem, Rival
from torch import Tensor, nn

from fvm_fast import backend, create_model, ops

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
# float32 proves the arithmetic. Under autocast and untrained, with features nearly equal, some gradients of open_clip
# are up to 0.6 away from its own in float32 (ours up to 0.05): bfloat16 is only guarded against gross errors.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.9}


def model_rival(name: str, model: nn.Module, kind: str, forward: Callable[[], Tensor], dtype: torch.dtype) -> Rival:
    """``forward`` on a backend (``native`` or ``torch``), under autocast unless ``dtype`` is float32."""

    def run() -> Tensor:
        with backend(kind), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            return forward()

    return Rival(name, run, [parameter for _, parameter in sorted(model.named_parameters())])


def training_problem(title: str, rivals: list[Rival], items: int, unit: str, dtype: torch.dtype) -> Problem:
    """Both passes at once: the time of a training step but for the optimiser."""
    passes, tolerance = [FORWARD_BACKWARD], TOLERANCE[dtype]
    return Problem(title, rivals, dtype, items=items, unit=unit, passes=passes, tolerance=tolerance)


def vit_problem(name: str, batch: int, dtype: torch.dtype) -> Problem:
    """Classify float images, both passes to every parameter."""
    theirs = timm.create_model(name).train()
    ours = create_model(name).train()
    ours.load_state_dict(theirs.state_dict())
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    rivals = [
        model_rival(who, model, kind, lambda model=model: F.cross_entropy(model(images), labels), dtype)
        for who, model, kind in [
            ("fvm_fast", ours, "native"),
            ("fvm_fast, torch", ours, "torch"),
            ("timm", theirs, "auto"),
        ]
    ]
    return training_problem(f"{name}, {batch} images", rivals, batch, "images", dtype)


def captions(n: int, context_length: int, vocab_size: int) -> Tensor:
    """Token ids [n, context_length] as a tokenizer leaves them: 4 to 14 words between start and end, then zeros."""
    tokens = torch.zeros(n, context_length, dtype=torch.int64)
    for row in tokens:
        words = int(torch.randint(4, 15, ()))
        row[: words + 2] = torch.randint(1, vocab_size - 2, (words + 2,))
        row[0], row[words + 1] = vocab_size - 2, vocab_size - 1
    return tokens


def clip_problem(name: str, theirs: CLIP, batch: int, side: int, dtype: torch.dtype) -> Problem:
    """A contrastive step but for the optimiser: uint8 images and tokens to the gradient of every parameter."""
    ours = create_model(name)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8)
    tokens = captions(batch, ours.context_length, ours.vocab_size)
    mean, std, loss = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1), ClipLoss()
    rivals = [
        model_rival(who, ours, kind, lambda: ops.clip_loss(*ours(images, tokens)), dtype)
        for who, kind in [("fvm_fast", "native"), ("fvm_fast, torch", "torch")]
    ]
    plain = model_rival("open_clip", theirs, "auto", lambda: loss(*theirs((images / 255 - mean) / std, tokens)), dtype)
    return training_problem(f"{name}, {batch} pairs of {side} px", [*rivals, plain], batch, "pairs", dtype)


def emoji_clip() -> CLIP:
    """open_clip at the size of ``clip_vit_emoji``."""
    vision = CLIPVisionCfg(image_size=48, patch_size=8, width=128, layers=4, head_width=32)
    return CLIP(128, vision, CLIPTextCfg(context_length=16, vocab_size=3072, width=128, heads=4, layers=2))


def vit_b_32_clip() -> CLIP:
    """open_clip's ViT-B/32."""
    vision = CLIPVisionCfg(image_size=224, patch_size=32, width=768, layers=12)
    return CLIP(512, vision, CLIPTextCfg(context_length=77, vocab_size=49408, width=512, heads=8, layers=12))


def problems(args: Namespace) -> Iterator[Problem]:
    """A ViT, the emoji demo's CLIP at its batch size, and CLIP's ViT-B/32."""
    vit = ("vit_tiny_patch16_224", 2) if args.quick else ("vit_small_patch16_224", 8)
    for dtype in args.dtypes:
        yield vit_problem(*vit, dtype)
        yield clip_problem("clip_vit_emoji", emoji_clip(), 32 if args.quick else 283, 48, dtype)
        if not args.quick:
            yield clip_problem("clip_vit_b_32", vit_b_32_clip(), 8, 224, dtype)


if __name__ == "__main__":
    main(__file__, __doc__, problems)
