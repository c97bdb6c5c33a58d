"""Both levels of the shuffle do their work: row groups, and rows of a window."""

import itertools
import math

import numpy as np
import pytest

from jobs.bench.shuffle import compare, correlate, lay_out, make_order
from pipeline.data.order import permutation

GROUPS, GROUP_ROWS, HELD = 200, 50, 10  # row groups, their rows, row groups in a window
ROWS = GROUPS * GROUP_ROWS
DEVIATIONS = 4.5  # of a shuffle's rank correlation, 1 / sqrt(n - 1)

seeds = pytest.mark.parametrize("seed", range(4))


@seeds
def test_position_says_nothing_about_place_in_the_file(seed: int) -> None:
    """Row groups in file order have a correlation near 1."""
    order = make_order(ROWS, GROUP_ROWS, HELD * GROUP_ROWS, seed)
    rows = lay_out(order, 0)
    assert sorted(rows) == list(range(ROWS))
    assert abs(correlate(np.arange(ROWS), rows)) < DEVIATIONS / math.sqrt(GROUPS - 1)


@seeds
def test_rows_of_a_window_are_spread_over_it(seed: int) -> None:
    """A row's number in the window says nothing about its place there, in each window."""
    order = make_order(ROWS, GROUP_ROWS, HELD * GROUP_ROWS, seed)
    for window in order.windows(0):
        inside = permutation(seed, 0, window, shuffle=True)
        assert len(inside) == HELD * GROUP_ROWS
        limit = DEVIATIONS / math.sqrt(len(inside) - 1)
        assert abs(correlate(np.arange(len(inside)), inside)) < limit
    rows = lay_out(order, 0)
    following = np.mean(np.diff(rows) == 1)
    assert following < 0.01, "as after a full shuffle of the window: one in 500"
    found = compare(rows, lay_out(order, 1), GROUP_ROWS)
    assert found["worth"] > 0.9 * HELD, "a batch draws from all row groups of its window"
    assert found["distance"] / (ROWS / 3) > 1 - 1.5 / HELD


@seeds
def test_the_next_epoch_has_another_order_at_both_levels(seed: int) -> None:
    order = make_order(ROWS, GROUP_ROWS, HELD * GROUP_ROWS, seed)
    first, second = order.windows(0), order.windows(1)
    found = compare(lay_out(order, 0), lay_out(order, 1), GROUP_ROWS)
    assert abs(found["epochs"]) < DEVIATIONS / math.sqrt(GROUPS - 1)
    insides = [permutation(seed, 0, window, shuffle=True) for window in first[:3]]
    insides += [permutation(seed, 1, window, shuffle=True) for window in second[:3]]
    limit = DEVIATIONS / math.sqrt(HELD * GROUP_ROWS - 1)
    for one, other in itertools.combinations(insides, 2):
        assert abs(correlate(one, other)) < limit
