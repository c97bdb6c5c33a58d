import itertools

import pytest

from pipeline.engine.partners import partner


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8, 9, 16])
def test_all_meet_once_in_the_least_number_of_rounds(world_size: int) -> None:
    rounds = world_size - 1 if world_size % 2 == 0 else world_size
    met: list[tuple[int, int]] = []
    for round_ in range(rounds):
        idle = 0
        for rank in range(world_size):
            other = partner(rank, world_size, round_)
            if other is None:
                idle += 1
                continue
            assert other != rank
            assert partner(other, world_size, round_) == rank, "each meets who meets it"
            met.append((rank, other))
        assert idle == world_size % 2
    assert sorted(met) == sorted(itertools.permutations(range(world_size), 2))


def test_rounds_repeat() -> None:
    assert [partner(1, 4, round_) for round_ in range(6)] == [
        partner(1, 4, round_ + 3) for round_ in range(6)
    ]
