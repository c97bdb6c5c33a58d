"""Order is a bijection; whatever the kills and resizes, every row is used once an epoch (P3)."""

import itertools
import json
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import (
    Cursor,
    Order,
    RowGroup,
    Source,
    as_intervals,
    complement,
    permutation,
    share,
    union,
)

intervals = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda p: (p[0], p[0] + p[1])), max_size=8
)


def _sources(sizes: list[list[int]], weights: list[float]) -> tuple[Source, ...]:
    """Sources of shards of three row groups each."""
    sources: list[Source] = []
    first = 0
    for mine, weight in zip(sizes, weights, strict=False):
        groups = [
            RowGroup(shard=first + i // 3, index=i % 3, rows=rows) for i, rows in enumerate(mine)
        ]
        sources.append(Source(row_groups=tuple(groups), weight=weight))
        first += len(mine)
    return tuple(sources)


sizes = st.lists(st.integers(0, 20), min_size=1, max_size=10).filter(any)
weights = st.sampled_from([1.0, 1.0, 2.0, 0.5, 0.3, 1.7])
orders = st.builds(
    lambda sizes, weights, window, seed: Order(
        sources=_sources(sizes, weights), window_rows=window, seed=seed
    ),
    st.lists(sizes, min_size=1, max_size=3),
    st.lists(weights, min_size=3, max_size=3),
    st.integers(1, 40),
    st.integers(0, 5),
).filter(lambda order: order.num_rows > 0)

Row = tuple[int, int, int]


def _rows_at(order: Order, epoch: int) -> list[tuple[Row, int]]:
    """The row at every position of an epoch, and in which turn of its source."""
    rows = []
    for window in order.windows(epoch):
        inside = [
            ((visit.group.shard, visit.group.index, int(row)), visit.turn)
            for visit in window.visits
            for row in visit.chosen(order.seed)
        ]
        rows += [inside[i] for i in permutation(order.seed, epoch, window, order.shuffle)]
    return rows


def _rows_of(source: Source) -> set[Row]:
    return {(g.shard, g.index, row) for g in source.row_groups for row in range(g.rows)}


@given(orders, st.integers(0, 3))
def test_an_epoch_takes_of_each_source_what_its_weight_says(order: Order, epoch: int) -> None:
    """With weights of 1 it is a permutation of all rows; never a row twice in one turn."""
    rows = _rows_at(order, epoch)
    assert len(rows) == order.num_rows
    assert len(set(rows)) == len(rows)
    for source in order.sources:
        mine = Counter(row for row, _ in rows if row in _rows_of(source))
        assert mine.total() == round(source.weight * source.rows)
        if source.weight == 1:
            assert set(mine) == _rows_of(source)
    starts = [window.start for window in order.windows(epoch)]
    assert starts == list(np.cumsum([0, *(w.rows for w in order.windows(epoch))])[:-1])


@given(orders, st.integers(1, 6))
def test_over_epochs_no_row_of_a_source_falls_behind(order: Order, epochs: int) -> None:
    """Each turn of a source is a whole pass, cut between epochs."""
    seen = [row for epoch in range(epochs) for row in _rows_at(order, epoch)]
    assert len(set(seen)) == len(seen)
    counts = Counter(row for row, _ in seen)
    for source in order.sources:
        mine = [counts[row] for row in _rows_of(source)]
        assert not mine or max(mine) - min(mine) <= 1


def test_order_depends_on_seed_and_epoch() -> None:
    sources = _sources([[10] * 10], [1.0])
    first = Order(sources=sources, window_rows=20, seed=0)
    assert _rows_at(first, 0) == _rows_at(first, 0)
    assert _rows_at(first, 0) != _rows_at(first, 1)
    assert _rows_at(first, 0) != _rows_at(Order(sources=sources, window_rows=20, seed=1), 0)
    in_order = Order(sources=sources, window_rows=20, seed=0, shuffle=False)
    assert _rows_at(in_order, 0) == sorted(_rows_at(in_order, 0))
    halves = _sources([[10] * 10], [0.5])
    mixed = (
        Order(sources=halves, window_rows=20, seed=0),
        Order(sources=halves, window_rows=20, seed=1),
    )
    assert {row for row, _ in _rows_at(mixed[0], 0)} != {row for row, _ in _rows_at(mixed[1], 0)}


@given(intervals)
def test_union_and_complement_split_the_range(pairs: list[tuple[int, int]]) -> None:
    covered = {x for start, end in pairs for x in range(start, end)}
    merged = union(pairs)
    assert {x for start, end in merged for x in range(start, end)} == covered
    assert all(a[1] < b[0] for a, b in itertools.pairwise(merged))
    rest = complement(pairs, 80)
    assert {x for start, end in rest for x in range(start, end)} == set(range(80)) - covered


@given(intervals, st.integers(1, 7))
def test_shares_are_equal_disjoint_and_whole(pairs: list[tuple[int, int]], world: int) -> None:
    merged = union(pairs)
    shares = [share(merged, world, rank) for rank in range(world)]
    flat = [x for part in shares for start, end in part for x in range(start, end)]
    assert flat == [x for start, end in merged for x in range(start, end)]
    sizes = [sum(end - start for start, end in part) for part in shares]
    assert max(sizes) - min(sizes) <= 1


@given(st.sets(st.integers(0, 50)))
def test_as_intervals_covers_exactly(positions: set[int]) -> None:
    shuffled = np.array(list(positions), dtype=np.int64)
    pairs = as_intervals(shuffled)
    assert [x for start, end in pairs for x in range(start, end)] == sorted(positions)
    assert union(pairs) == pairs


@settings(max_examples=60)
@given(orders, st.data())
def test_kills_and_resizes_use_every_row_once(order: Order, data: st.DataObject) -> None:
    """Attempts at any world size, each killed after any number of rows on each rank."""
    cursor = Cursor(digest="d")
    used: list[tuple[int, int]] = []
    goal = 2  # epochs
    for _ in range(8):
        world = data.draw(st.integers(1, 4))
        parts = []
        for rank in range(world):
            first = cursor.first_open(order.num_rows)
            pieces = order.pieces(cursor, world, rank, range(first, goal))
            stream = [(p.epoch, x) for p in pieces for x in range(*p.positions)]
            taken = stream[: data.draw(st.integers(0, len(stream)))]
            used += taken
            part = Cursor(digest="d")
            for epoch in {epoch for epoch, _ in taken}:
                part.add(epoch, as_intervals(np.array([x for e, x in taken if e == epoch])))
            parts.append(Cursor.from_json(json.loads(json.dumps(part.to_json()))))
        for part in data.draw(st.permutations(parts)):
            cursor.merge(part)
    first = cursor.first_open(order.num_rows)
    for rank in range(3):
        pieces = order.pieces(cursor, 3, rank, range(first, goal))
        used += [(p.epoch, x) for p in pieces for x in range(*p.positions)]
    assert sorted(used) == [(epoch, x) for epoch in range(goal) for x in range(order.num_rows)]


@settings(max_examples=100)
@given(orders, st.integers(1, 4), st.integers(1, 4), st.data())
def test_a_resume_reads_again_only_the_windows_that_were_cut(
    order: Order, before: int, now: int, data: st.DataObject
) -> None:
    """One for each worker of then, and those where a share begins; never a window that is done.

    So with one worker, and windows of single row groups, one row group at most is read again.
    """
    cursor = Cursor(digest="d")
    for rank in range(before):
        pieces = order.pieces(Cursor(digest="d"), before, rank, range(1))
        stream = [x for piece in pieces for x in range(*piece.positions)]
        taken = stream[: data.draw(st.integers(0, len(stream)))]
        cursor.add(0, as_intervals(np.array(taken, dtype=np.int64)))
    again = [
        piece.window
        for rank in range(now)
        for piece in order.pieces(cursor, now, rank, range(1))
        if _overlap(cursor.used.get(0, ()), piece.window.start, piece.window.rows)
    ]
    assert len(again) <= 2 * before - 1 + now - 1
    if before == now == 1 and all(len(window.visits) == 1 for window in order.windows(0)):
        assert sum(len(window.visits) for window in again) <= 1


def _overlap(used: tuple[tuple[int, int], ...], start: int, rows: int) -> bool:
    return any(low < start + rows and start < high for low, high in used)


def test_cursor_stays_compact() -> None:
    """64 workers far into an epoch of a billion rows: kilobytes."""
    cursor = Cursor(digest="d")
    for rank in range(64):
        start = rank * 15_625_000
        for step in range(50):
            cursor.add(0, [(start + step * 256, start + (step + 1) * 256)])
    assert len(cursor.used[0]) == 64
    assert len(json.dumps(cursor.to_json())) < 4096
