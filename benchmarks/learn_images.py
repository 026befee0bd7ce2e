# SPDX-License-Identifier: Apache-2.0
"""Does each image model and objective learn? Fashion-MNIST, minutes on a CPU, beside what needs no learning.

    python benchmarks/learn_images.py                    # every row, prints the table
    python benchmarks/learn_images.py --only mae --steps 200
    python benchmarks/learn_images.py --write            # and records it in docs/learning/README.md

Each network is its family's test size on 32 x 32 pixels, trained from random weights by AdamW, warm-up and cosine. Its
features are then frozen: ``probe`` is a logistic regression on them and ``kNN`` the vote of the 20 nearest by cosine,
both from 10,000 training images, right on the 10,000 test images. The same network untrained, and the raw pixels, stand
beside it. ``accuracy`` is that of the network's own head.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import machine
import report
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from fvm_fast.data.fashion_mnist import fashion_mnist
from fvm_fast.files import write_text
from fvm_fast.models import create_model
from fvm_fast.objectives import Classification, Distillation, MaskedAutoencoding

RESULT = Path(__file__).resolve().parents[1] / "docs/learning/README.md"
SIDE, CLASSES, STEPS, BATCH, PROBED, NEIGHBOURS = 32, 10, 800, 128, 10_000, 20
MEAN, STD = 0.286, 0.353  # of the training images


class Data(NamedTuple):
    """Normalised float images [n, 1, 32, 32] and labels [n]."""

    images: Tensor
    labels: Tensor


def load(split: str) -> Data:
    """A split, padded to 32 x 32 and normalised."""
    images, labels = fashion_mnist(split)
    return Data(F.pad((images / 255 - MEAN) / STD, (2, 2, 2, 2), value=-MEAN / STD), labels)


# ---- the rows: a network, how it is trained, how its features are read


def network(name: str, **kwargs: object) -> nn.Module:
    """A test size for these images, dropping no paths: it sees each image a few times only."""
    return create_model(name, img_size=SIDE, in_chans=1, num_classes=CLASSES, drop_path_rate=0.0, **kwargs)


def pooled(model: nn.Module, images: Tensor) -> Tensor:
    """What the head of a classifier reads."""
    return model.forward_head(model.forward_features(images), pre_logits=True)


def mean_of_patches(model: nn.Module, images: Tensor) -> Tensor:
    """Of an encoder without a head."""
    return model.forward_features(images)[:, 1:].mean(dim=1)


def distilled() -> nn.Module:
    """A distilled DeiT taught by a ConvNeXt that was trained here just before."""
    teacher = network("convnext_test")
    train(Classification(teacher), TRAIN, arguments.steps)
    return Distillation(network("deit_test_distilled_patch16_64", patch_size=4), teacher)


class Row(NamedTuple):
    """How a network is built with its objective, and how its features are read."""

    build: Callable[[], nn.Module]
    features: Callable[[nn.Module, Tensor], Tensor] = pooled
    rate: float = 1e-3


ROWS = {
    "ViT, classification": Row(lambda: Classification(network("vit_test_patch16_64", patch_size=4))),
    "Swin, classification": Row(lambda: Classification(network("swin_test_patch4_window4_64", patch_size=2))),
    "Swin v2, classification": Row(lambda: Classification(network("swinv2_test_window4_64", patch_size=2))),
    "ConvNeXt, classification": Row(lambda: Classification(network("convnext_test"))),
    "TinyViT, classification": Row(lambda: Classification(create_tinyvit())),
    "DeiT, distilled from the ConvNeXt": Row(distilled),
    "MAE, hidden pixels": Row(
        lambda: MaskedAutoencoding(
            create_model("mae_vit_test_patch8", img_size=SIDE, patch_size=4, in_chans=1, norm_pix_loss=True)
        ),
        mean_of_patches,
        rate=2e-3,
    ),
}


def create_tinyvit() -> nn.Module:
    """Its stem takes images of any size."""
    return create_model("tiny_vit_test", in_chans=1, num_classes=CLASSES, drop_path_rate=0.0, img_size=SIDE)


# ---- training and reading


def train(objective: nn.Module, data: Data, steps: int, rate: float = 1e-3) -> None:
    """AdamW, a tenth of the steps to warm up, then a cosine; images are flipped at random."""
    objective.train()
    optimizer = torch.optim.AdamW(objective.model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(data.labels), (BATCH,), generator=generator)
        images = data.images[rows]
        images = images.flip(-1) if torch.rand((), generator=generator) < 0.5 else images
        optimizer.zero_grad()
        objective({"images": images, "labels": data.labels[rows]})["loss"].backward()
        optimizer.step()
        schedule.step()
        objective.after_step()


@torch.no_grad()
def over(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """``function`` of all images, a batch at a time."""
    return torch.cat([function(part) for part in images.split(500)])


def probe(features: Tensor, test_features: Tensor) -> float:
    """Share of the test images that a logistic regression names."""
    scale = StandardScaler().fit(features)
    regression = LogisticRegression(C=0.1, max_iter=200).fit(scale.transform(features), TRAIN.labels[:PROBED])
    return float(regression.score(scale.transform(test_features), TEST.labels))


def nearest(features: Tensor, test_features: Tensor) -> float:
    """Share of the test images that the nearest training images name."""
    found = (F.normalize(test_features) @ F.normalize(features).T).topk(NEIGHBOURS).indices
    votes = F.one_hot(TRAIN.labels[:PROBED][found], CLASSES).sum(dim=1)
    return float((votes.argmax(dim=1) == TEST.labels).float().mean())


def read(features: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Probe and kNN of what ``features`` makes of images."""
    pair = over(features, TRAIN.images[:PROBED]), over(features, TEST.images)
    return probe(*pair), nearest(*pair)


def measure(name: str, row: Row) -> list[str]:
    """One line of the table."""
    torch.manual_seed(0)
    objective = row.build()
    model = objective.model
    before = read(lambda images: row.features(model.eval(), images))
    start = time.perf_counter()
    train(objective, TRAIN, arguments.steps, row.rate)
    seconds = time.perf_counter() - start
    after = read(lambda images: row.features(model.eval(), images))
    accuracy = ""
    if isinstance(objective, Classification | Distillation):
        accuracy = percent(float((over(model, TEST.images).argmax(dim=1) == TEST.labels).float().mean()))
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"
    return [name, size, f"{seconds:.0f}", accuracy, *map(percent, (after[0], before[0], after[1], before[1]))]


def percent(share: float) -> str:
    """As the table has it."""
    return f"{100 * share:.1f}"


HEADER = ["model, objective", "M parameters", "seconds", "accuracy", "probe", "untrained", "kNN", "untrained"]


def verdict(lines: list[list[str]]) -> str:
    """Which rows are behind the raw pixels, the first line."""
    pixels, *rows = lines
    behind = [row[0] for row in rows if float(row[4]) < float(pixels[4]) and float(row[6]) < float(pixels[6])]
    return (
        f"Behind the raw pixels after so few steps: {'; '.join(behind)}." if behind else "All are ahead of the pixels."
    )


def document(lines: list[list[str]]) -> str:
    """docs/learning/README.md."""
    return f"""# What the image models learn in minutes

Fashion-MNIST, {arguments.steps} steps of {BATCH} images from random weights, one seed. Made by
`python benchmarks/learn_images.py --write` ({machine.describe()}).

% of the 10,000 test images. `probe` and `kNN` read frozen features with 10,000 labelled images; `untrained` is the same
network before training; the raw pixels are the baseline that needs no network.

{report.table(HEADER, lines)}

{verdict(lines)}
"""


def main() -> None:
    print(f"{machine.describe()}\n", flush=True)
    pixels = read(lambda images: images.flatten(1))
    lines = [["raw pixels, no learning", "", "", "", percent(pixels[0]), "", percent(pixels[1]), ""]]
    print(lines[0], flush=True)
    for name, row in ROWS.items():
        if arguments.only in name.lower():
            lines.append(measure(name, row))
            print(lines[-1], flush=True)
    print(f"\n{report.table(HEADER, lines)}")
    if arguments.write:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        write_text(RESULT, document(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", default="", metavar="WORD", help="only the rows whose name has this word")
    parser.add_argument("--write", action="store_true", help="record the table")
    arguments = parser.parse_args()
    if arguments.write and (arguments.only or arguments.steps != STEPS):
        parser.error("--write records the whole table: drop --only and --steps")
    TRAIN, TEST = load("train"), load("test")
    main()
