# SPDX-License-Identifier: Apache-2.0
"""A ring of processes: each in turn sees what every other one holds, and none holds it all.

A packet starts at its owner and goes from rank to rank. Its `fixed` part (features, ids) is only read, and sent on
while the visit computes; its `carried` part (column sums, gradients) collects what each rank adds, in the order of the
ring, and comes home with the sum.
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

# Weak, so that they die with destroy_process_group and not, threads running, with the interpreter.
_own_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def _own_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks for the ring alone: its traffic never meets that of DDP or FSDP."""
    if group not in _own_groups:
        ranks = dist.get_process_group_ranks(group)
        _own_groups[group] = dist.new_group(ranks, use_local_synchronization=True)
    return _own_groups[group]


class Ring:
    """The processes of ``group``, each with local batches of its own sizes.

    Args:
        group: whose ranks form the ring; every one of them has to construct it, with as many ``sizes``.
        sizes: integers of this process, of which every process learns all: ``ring.sizes[i, rank]``.
    """

    def __init__(self, group: dist.ProcessGroup, *sizes: int, device: torch.device) -> None:
        self.group = _own_group(group)
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.device = device
        self.sizes = self.gather(torch.tensor(sizes, dtype=torch.int64, device=device)).T.tolist()

    def gather(self, x: Tensor) -> Tensor:
        """[world, *x.shape]: everybody's ``x``, all of one shape."""
        out = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(out, x.contiguous(), group=self.group)
        return torch.stack(out)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of everybody's ``x``, added up in the order of ranks: the same bits on every one."""
        return self.gather(x).sum(0)

    def offset(self, sizes: list[int]) -> int:
        """Where this process's part of a joined batch begins."""
        return sum(sizes[: self.rank])

    def turn(
        self,
        sizes: list[int],
        fixed: list[Tensor | None],
        carried: list[Tensor | None],
        visit: Callable[[list[Tensor | None], list[Tensor | None]], None],
    ) -> list[Tensor | None]:
        """Send this process's packet once around and see all others' pass.

        Args:
            sizes: rows of each process's packet.
            fixed, carried: its tensors, [sizes[rank], ...] each; None travels as None.
            visit: called with every packet that comes by, this process's own first; it updates ``carried`` in place.

        Returns:
            What this process's ``carried`` has become.
        """
        for step in range(self.world):
            following = sizes[(self.rank - step - 1) % self.world]
            is_last = step == self.world - 1
            work, next_fixed = ([], fixed) if is_last else self._pass_on(fixed, following)
            visit(fixed, carried)
            more_work, carried = self._pass_on(carried, following)
            for request in (*work, *more_work):
                request.wait()
            fixed = next_fixed
        return carried

    def _pass_on(self, tensors: list[Tensor | None], rows: int) -> tuple[list[dist.Work], list[Tensor | None]]:
        """Begin to send ``tensors`` to the next rank, and to receive as many of ``rows`` rows from the one before."""
        if self.world == 1:
            return [], tensors
        after, before = (dist.get_global_rank(self.group, (self.rank + d) % self.world) for d in (1, -1))
        received = [None if t is None else t.new_empty(rows, *t.shape[1:]) for t in tensors]
        operations = []
        for sent, room in zip(tensors, received, strict=True):
            if sent is not None and sent.numel():
                operations.append(dist.P2POp(dist.isend, sent.contiguous(), after, self.group))
            if room is not None and room.numel():
                operations.append(dist.P2POp(dist.irecv, room, before, self.group))
        return (dist.batch_isend_irecv(operations) if operations else []), received
