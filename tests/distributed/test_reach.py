"""Reach: meeting partners over the wire equals the same blocks met in one process."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.bench.ranks import run_ranks
from pipeline.engine.partners import PartnerExchange, partner
from pipeline.losses.gamma import Features, GammaLoss, LossValue

LOCAL, DIM, STEPS = 3, 8, 4


def _pairs(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    image, text = torch.randn(2, LOCAL, DIM, generator=generator, dtype=torch.float64)
    return F.normalize(image, dim=1).requires_grad_(), F.normalize(text, dim=1).requires_grad_()


def _scale() -> Tensor:
    return torch.tensor(9.0, dtype=torch.float64, requires_grad=True)


def _gradients(value: LossValue, image: Tensor, text: Tensor, scale: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(value.loss, (image, text, scale))
    return [value.loss.detach(), *found]


def _over_the_wire(numbers: list[int]) -> list[tuple[list[list[Tensor]], int]]:
    """For each number of partners: this rank's results by step, and the bytes it sends in one."""
    return [(_steps(partners), _bytes_moved(partners)) for partners in numbers]


def _steps(partners: int) -> list[list[Tensor]]:
    import torch.distributed as dist

    virtual_batch = LOCAL * dist.get_world_size()
    loss = GammaLoss(virtual_batch=virtual_batch, reach=PartnerExchange(partners))
    results = []
    for step in range(STEPS):
        image, text = _pairs(step, dist.get_rank())
        scale = _scale()
        results.append(_gradients(loss(image, text, scale), image, text, scale))
    return results


def _of(everyone: list[Any], peers: list[int]) -> list[Any]:
    return [everyone[peer] for peer in peers]


def _in_one_process(partners: int, world_size: int) -> list[list[list[Tensor]]]:
    """By rank and step: value, gradients."""
    results: list[list[list[Tensor]]] = [[] for _ in range(world_size)]
    for step in range(STEPS):
        pairs = [_pairs(step, rank) for rank in range(world_size)]
        scales = [_scale() for _ in pairs]
        features = [Features(image=x.detach(), text=y.detach()) for x, y in pairs]
        peers = [
            [
                other
                for round_ in range(step * partners, (step + 1) * partners)
                if (other := partner(rank, world_size, round_)) is not None
            ]
            for rank in range(world_size)
        ]
        losses = [GammaLoss(virtual_batch=LOCAL * world_size) for _ in pairs]
        opened = [
            losses[rank].open(
                *pairs[rank], scales[rank], partners=partial(_of, features, peers[rank])
            )
            for rank in range(world_size)
        ]
        weights = [half.weights for half in opened]
        for rank in range(world_size):
            value = losses[rank].close(opened[rank], partial(_of, weights, peers[rank]))
            results[rank].append(_gradients(value, *pairs[rank], scales[rank]))
    return results


def _bytes_moved(partners: int) -> int:
    """Bytes this rank sends in a loss of LOCAL fp32 pairs."""
    import torch.distributed as dist

    sent = 0
    original = dist.batch_isend_irecv

    def count(operations: list[dist.P2POp]) -> list[dist.Work]:
        nonlocal sent
        sent += sum(
            operation.tensor.nbytes for operation in operations if operation.op is dist.isend
        )
        return original(operations)

    dist.batch_isend_irecv = count
    try:
        image, text = (tensor.detach().float() for tensor in _pairs(0, dist.get_rank()))
        GammaLoss(virtual_batch=64, reach=PartnerExchange(partners))(image, text, torch.tensor(9.0))
    finally:
        dist.batch_isend_irecv = original
    return sent


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "numbers"), [(2, [1]), (3, [1]), (4, [1, 3])])
def test_the_wire_changes_nothing_and_bytes_do_not_grow(
    world_size: int, numbers: list[int]
) -> None:
    """2 b d embeddings and 2 b weights for each partner, however many workers there are."""
    ranks = run_ranks(_over_the_wire, world_size, numbers)
    for index, partners in enumerate(numbers):
        expected = _in_one_process(partners, world_size)
        torch.testing.assert_close([rank[index][0] for rank in ranks], expected)
        if world_size % 2 == 0:  # else one worker sits out each round
            sent = partners * 4 * (2 * LOCAL * DIM + 2 * LOCAL)
            assert [rank[index][1] for rank in ranks] == [sent] * world_size
