# SPDX-License-Identifier: Apache-2.0
"""One process of test_nt_xent_loss_distributed.py: python nt_xent_worker.py RANK WORLD FOLDER."""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes_common import said
from torch import Tensor

from fvm_fast.ops import backend, nt_xent_loss

# images of each process
SIZES = {"even": [5, 5], "uneven": [37, 6], "one empty": [0, 9], "one image": [1, 0], "three": [20, 1, 120]}


def batch(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two views of the joined batch, the same on every process."""
    draw = torch.Generator().manual_seed(n)
    z1 = torch.randn(n, 24, dtype=torch.float64, generator=draw)
    z2 = z1 + torch.randn(n, 24, dtype=torch.float64, generator=draw)
    return F.normalize(z1, dim=1).to(dtype), F.normalize(z2, dim=1).to(dtype)


def loss_and_grads(z1: Tensor, z2: Tensor, temperature: float, **options) -> list[Tensor]:
    """Loss and gradients of both views and the temperature."""
    leaves = [z1.clone().requires_grad_(), z2.clone().requires_grad_()]
    leaves.append(torch.tensor(temperature, dtype=torch.float64, requires_grad=True))
    loss = nt_xent_loss(*leaves, **options)
    (loss * 3).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    results = {}
    for name, sizes in SIZES.items():
        if len(sizes) != world:
            continue
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            part = [z.split(sizes)[rank] for z in batch(sum(sizes), dtype)]
            for implementation in ("native", "torch"):
                for temperature, reduction in ((0.1, "mean"), (0.02, "sum")):
                    options = {"group": dist.group.WORLD, "grad_reduction": reduction}
                    with backend(implementation):
                        got = loss_and_grads(*part, temperature, **options)
                    results[name, dtype, implementation, temperature, reduction] = got
    results["errors"] = errors(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def errors(rank: int) -> list[str]:
    """What wrong use says."""
    none, some = torch.zeros(0, 8), torch.randn(3 + rank, 8, requires_grad=True)
    return said(
        lambda: nt_xent_loss(none, none, 1.0, group=dist.group.WORLD),
        lambda: torch.autograd.grad(nt_xent_loss(some, some, 0.5, group=dist.group.WORLD), some, create_graph=True),
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
