"""Point-to-point exchange of blocks with rotating partners: the reach of the gamma loss.

Each meeting pairs the workers off by the circle method of round-robin tournaments, so that a worker
and its partner always meet each other, and everyone in the least number of rounds. Bytes sent and
received per worker: k * (2 b d embeddings + 2 b fp32 weights), whatever the number of workers.

Enters: this worker's embeddings and weights. Leaves: the partners'. Must not know: the loss.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def partner(rank: int, world_size: int, round_: int) -> int | None:
    """Whom `rank` meets in a round; None when the number of workers is odd and it sits out.

    Over `world_size - 1` rounds (`world_size` when odd) every two workers meet once.
    """
    circle = world_size - 1 if world_size % 2 == 0 else world_size
    round_ %= circle
    if rank == circle:  # the fixed seat, opposite the one that would meet itself
        return round_ * (circle + 1) // 2 % circle
    other = (round_ - rank) % circle
    if other != rank:
        return other
    return circle if world_size % 2 == 0 else None


class PartnerExchange:
    """Meets `partners` others at each meeting. All workers call it equally often."""

    def __init__(self, partners: int):
        self._partners = partners
        self._peers: list[int] = []

    def meet(self, meeting: int, mine: Sequence[Tensor]) -> Callable[[], list[list[Tensor]]]:
        """Start meeting number `meeting`: send `mine`. Waits, and gives each partner's, if called.

        Shapes and dtypes must be the same on all workers.
        """
        rounds = range(meeting * self._partners, (meeting + 1) * self._partners)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        found = [partner(rank, world_size, round_) for round_ in rounds]
        self._peers = [peer for peer in found if peer is not None]
        return self.again(mine)

    def again(self, mine: Sequence[Tensor]) -> Callable[[], list[list[Tensor]]]:
        """Send `mine` to the same partners once more; as `meet`."""
        sent = [tensor.contiguous() for tensor in mine]
        received = [[torch.empty_like(tensor) for tensor in sent] for _ in self._peers]
        operations = [
            operation
            for peer, buffers in zip(self._peers, received, strict=True)
            for tensor, buffer in zip(sent, buffers, strict=True)
            for operation in (
                dist.P2POp(dist.isend, tensor, peer),
                dist.P2POp(dist.irecv, buffer, peer),
            )
        ]
        works = dist.batch_isend_irecv(operations) if operations else []

        def arrive() -> list[list[Tensor]]:
            for work in works:
                work.wait()
            return received

        return arrive
