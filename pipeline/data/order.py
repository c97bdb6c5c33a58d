"""The order of rows and the record of which were used: pure arithmetic.

An epoch is a sequence of positions 0..N-1. Row groups are permuted by (seed, epoch) and packed
into windows; inside a window all rows are permuted. So a position names one row, whatever the
number of workers. A `Cursor` is the set of positions used in each epoch, as intervals.

Of a source with weight w and n rows an epoch takes the next round(w n) rows of an endless sequence
of passes over the source, so that after any number of epochs no row was seen more than once more
often than another of its source.

Enters: row-group sizes, weights, seed. Leaves: windows, permutations, each rank's pieces, the
cursor.
Must not know: files, Ray, torch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Interval = tuple[int, int]  # [start, end)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroup:
    """One row group: index of its shard, its index in the shard, its rows."""

    shard: int
    index: int
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Row groups read alike; each row is seen `weight` times an epoch, on the average."""

    row_groups: tuple[RowGroup, ...]
    weight: float = 1.0

    @property
    def rows(self) -> int:
        """Rows of the source."""
        return sum(group.rows for group in self.row_groups)

    @property
    def rows_an_epoch(self) -> int:
        """Rows that an epoch takes."""
        return round(self.weight * self.rows)

    def visits(self, seed: int, number: int, epoch: int) -> "list[Visit]":
        """What an epoch takes, as row groups or parts of them; `number` is the source's own."""
        rows = self.rows
        start, end = epoch * self.rows_an_epoch, (epoch + 1) * self.rows_an_epoch
        found: list[Visit] = []
        for turn in range(start // rows, -(-end // rows)) if rows else ():
            low, high = max(start - turn * rows, 0), min(end - turn * rows, rows)
            groups = [group for group in self.row_groups if group.rows]
            if (low, high) != (0, rows):
                rng = np.random.default_rng([seed, number, turn, _CUT])
                groups = [groups[index] for index in rng.permutation(len(groups))]
            at = 0
            for group in groups:
                kept = max(low - at, 0), min(high - at, group.rows)
                if kept[0] < kept[1]:
                    found.append(Visit(group=group, turn=turn, kept=kept))
                at += group.rows
        return found


_CUT = 7  # keeps the draws that cut a pass in parts apart from those of the order


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """A row group in one turn (pass over its source); of its rows in random order, those `kept`."""

    group: RowGroup
    turn: int
    kept: Interval

    @property
    def rows(self) -> int:
        """Rows of the visit."""
        return self.kept[1] - self.kept[0]

    def chosen(self, seed: int) -> NDArray[np.int64]:
        """The rows of the group that are visited, by their numbers in it, ascending; [rows]."""
        if self.rows == self.group.rows:
            return np.arange(self.group.rows)
        rng = np.random.default_rng([seed, self.turn, self.group.shard, self.group.index])
        return np.sort(rng.permutation(self.group.rows)[self.kept[0] : self.kept[1]])


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Row groups shuffled together; they hold positions start..start+rows-1 of the epoch."""

    start: int
    visits: tuple[Visit, ...]

    @property
    def rows(self) -> int:
        """Rows in the window."""
        return sum(visit.rows for visit in self.visits)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one read task yields: the rows at these positions of one window of one epoch."""

    epoch: int
    window: Window
    positions: Interval


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of a data set; `shuffle=False` keeps file order (for evaluation)."""

    sources: tuple[Source, ...]
    window_rows: int
    seed: int
    shuffle: bool = True

    @cached_property
    def num_rows(self) -> int:
        """Rows in an epoch."""
        return sum(source.rows_an_epoch for source in self.sources)

    def windows(self, epoch: int) -> list[Window]:
        """Pack the epoch's permuted row groups into windows of at least `window_rows` rows.

        The last window may be smaller. O(row groups).
        """
        visits = [
            visit
            for number, source in enumerate(self.sources)
            for visit in source.visits(self.seed, number, epoch)
        ]
        if self.shuffle:
            rng = np.random.default_rng([self.seed, epoch])
            visits = [visits[i] for i in rng.permutation(len(visits))]
        windows: list[Window] = []
        start, pending, rows = 0, [], 0
        for visit in visits:
            pending.append(visit)
            rows += visit.rows
            if rows >= self.window_rows:
                windows.append(Window(start=start, visits=tuple(pending)))
                start, pending, rows = start + rows, [], 0
        if pending:
            windows.append(Window(start=start, visits=tuple(pending)))
        return windows

    def pieces(
        self, cursor: "Cursor", world_size: int, rank: int, epochs: range
    ) -> Iterator[Piece]:
        """Give what `rank` reads in `epochs`: its equal share of every epoch's unused positions."""
        for epoch in epochs:
            unused = complement(cursor.used.get(epoch, ()), self.num_rows)
            mine = share(unused, world_size, rank)
            if not mine:
                continue
            for window in self.windows(epoch):
                for start, end in mine:
                    low = max(start, window.start)
                    high = min(end, window.start + window.rows)
                    if low < high:
                        yield Piece(epoch=epoch, window=window, positions=(low, high))


@dataclass(kw_only=True, slots=True)
class Cursor:
    """Which positions of which epoch were used: by an optimiser step, or dropped as unusable.

    Independent of the number of workers; `merge` is associative and commutative. `digest` is the
    catalog's: a cursor is meaningless over other data.
    """

    digest: str
    used: dict[int, tuple[Interval, ...]] = field(default_factory=dict)

    def add(self, epoch: int, intervals: Iterable[Interval]) -> None:
        """Mark positions of `epoch` as used."""
        self.used[epoch] = union([*self.used.get(epoch, ()), *intervals])

    def merge(self, other: "Cursor") -> None:
        """Add everything `other` has marked."""
        for epoch, intervals in other.used.items():
            self.add(epoch, intervals)

    def count(self, epoch: int) -> int:
        """Positions of `epoch` marked as used."""
        return sum(end - start for start, end in self.used.get(epoch, ()))

    def first_open(self, num_rows: int) -> int:
        """The first epoch with unused positions."""
        epoch = 0
        while self.count(epoch) == num_rows:
            epoch += 1
        return epoch

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        used = {str(epoch): [list(pair) for pair in pairs] for epoch, pairs in self.used.items()}
        return {"digest": self.digest, "used": used}

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Cursor":
        """Read what `to_json` gave."""
        used = {
            int(epoch): union((int(start), int(end)) for start, end in pairs)
            for epoch, pairs in values["used"].items()
        }
        return Cursor(digest=values["digest"], used=used)


def permutation(seed: int, epoch: int, window: Window, shuffle: bool) -> NDArray[np.int64]:
    """Row of the window (visits concatenated) at each of its positions; shape [rows]."""
    if not shuffle:
        return np.arange(window.rows)
    return np.random.default_rng([seed, epoch, window.start]).permutation(window.rows)


def union(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """Merge intervals into sorted, disjoint, non-touching ones."""
    merged: list[Interval] = []
    for start, end in sorted(pair for pair in intervals if pair[0] < pair[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def complement(intervals: Iterable[Interval], size: int) -> tuple[Interval, ...]:
    """Give what is left of 0..size-1 outside `intervals`."""
    gaps: list[Interval] = []
    at = 0
    for start, end in union(intervals):
        if at < start:
            gaps.append((at, start))
        at = end
    if at < size:
        gaps.append((at, size))
    return tuple(gaps)


def share(intervals: Iterable[Interval], world_size: int, rank: int) -> tuple[Interval, ...]:
    """Cut `intervals` into `world_size` consecutive parts whose sizes differ by at most one."""
    intervals = tuple(intervals)
    total = sum(end - start for start, end in intervals)
    low, high = total * rank // world_size, total * (rank + 1) // world_size
    mine: list[Interval] = []
    at = 0
    for start, end in intervals:
        length = end - start
        first, last = max(low - at, 0), min(high - at, length)
        if first < last:
            mine.append((start + first, start + last))
        at += length
    return tuple(mine)


def as_intervals(positions: NDArray[np.int64]) -> tuple[Interval, ...]:
    """Give the intervals [start, end) that cover exactly `positions` (any order, no repeats)."""
    if positions.size == 0:
        return ()
    ordered = np.sort(positions)
    breaks = np.flatnonzero(np.diff(ordered) != 1)
    starts = ordered[np.concatenate(([0], breaks + 1))]
    ends = ordered[np.concatenate((breaks, [ordered.size - 1]))] + 1
    return tuple((int(start), int(end)) for start, end in zip(starts, ends, strict=True))
