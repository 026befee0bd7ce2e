# SPDX-License-Identifier: Apache-2.0
"""One process of test_contrastive_loss_distributed.py: python contrastive_worker.py RANK WORLD FOLDER."""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes_common import said

from fvm_fast.ops import ClassIds, Teacher, backend, clip_loss, siglip_loss

# rows of each process; and columns, where they differ
SIZES = {"even": ([5, 5], None), "uneven": ([37, 6], None), "one empty": ([0, 9], None), "three": ([20, 1, 40], None)}
RECTANGULAR = ([7, 30], [18, 3])


def batch(n: int, m: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The joined batch, the same on every process."""
    draw = torch.Generator().manual_seed(n * 1000 + m)
    rand = {
        name: torch.randn(size, 24, dtype=torch.float64, generator=draw)
        for name, size in zip("xytu", (n, m, n, m), strict=True)
    }
    ids = {name: torch.randint(-4, 4, (size,), generator=draw) * 2**33 for name, size in (("rows", n), ("cols", m))}
    return {name: F.normalize(t, dim=1).to(dtype) for name, t in rand.items()} | ids


def losses(square: bool) -> dict[str, tuple]:
    """name -> (op, options from a batch)."""

    def by_class(b: dict) -> dict:
        return {"targets": ClassIds(b["rows"], b["cols"])}

    def teach(alpha: float):
        return lambda b: {"targets": Teacher(b["t"], b["u"], 20.0, alpha), "label_smoothing": 0.1}

    several = {
        "clip classes": (clip_loss, lambda b: by_class(b) | {"label_smoothing": 0.2}),
        "clip teacher": (clip_loss, teach(1.0)),
        "siglip classes": (siglip_loss, by_class),
    }
    plain = {
        "clip": (clip_loss, lambda b: {}),
        "clip mixed teacher": (clip_loss, teach(0.4)),
        "siglip": (siglip_loss, lambda b: {}),
        "clip sum": (clip_loss, lambda b: {"grad_reduction": "sum"}),
    }
    return several | plain if square else several


def loss_and_grads(op, b: dict, options: dict, group=None) -> list[torch.Tensor]:
    """Loss and gradients of features, scale and (siglip) bias."""
    leaves = [
        b["x"].clone().requires_grad_(),
        b["y"].clone().requires_grad_(),
        torch.tensor(30.0, dtype=torch.float64, requires_grad=True),
    ]
    if op is siglip_loss:
        leaves.append(torch.tensor([-9.0], dtype=torch.float64, requires_grad=True))
    loss = op(*leaves, **options, group=group)
    (loss * 3).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def local_part(b: dict, rows: list[int], cols: list[int], rank: int) -> dict:
    """This process's part of a joined batch."""
    by_row = {"x", "t", "rows"}
    return {name: t.split(rows if name in by_row else cols)[rank] for name, t in b.items()}


def main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    results = {}
    cases = [(name, rows, cols or rows) for name, (rows, cols) in SIZES.items() if len(rows) == world]
    cases += [("rectangular", *RECTANGULAR)] if world == 2 else []
    for name, rows, cols in cases:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for implementation in ("native", "torch"):
                for loss, (op, options) in losses(rows == cols).items():
                    part = local_part(batch(sum(rows), sum(cols), dtype), rows, cols, rank)
                    with backend(implementation):
                        results[name, dtype, implementation, loss] = loss_and_grads(
                            op, part, options(part), dist.group.WORLD
                        )
    results["errors"] = errors(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def errors(rank: int) -> list[str]:
    """What wrong use says."""
    none = torch.zeros(0, 8)
    some = torch.randn(3 + rank, 8, requires_grad=True)
    return said(
        lambda: clip_loss(none, none, 1.0, group=dist.group.WORLD),
        lambda: siglip_loss(some, some[1:], 1.0, 0.0, group=dist.group.WORLD),
        lambda: torch.autograd.grad(clip_loss(some, some, 10.0, group=dist.group.WORLD), some, create_graph=True),
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
