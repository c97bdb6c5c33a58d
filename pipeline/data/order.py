"""The order of rows and the record of which were used: pure arithmetic.

An epoch is a sequence of positions 0..N-1. Row groups are permuted by (seed, epoch) and packed
into windows; inside a window all rows are permuted. So a position names one row, whatever the
number of workers. A `Cursor` is the set of positions used in each epoch, as intervals.

Enters: row-group sizes, seed. Leaves: windows, permutations, each rank's pieces, the cursor.
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
class Window:
    """Row groups shuffled together; they hold positions start..start+rows-1 of the epoch."""

    start: int
    row_groups: tuple[RowGroup, ...]

    @property
    def rows(self) -> int:
        """Rows in the window."""
        return sum(group.rows for group in self.row_groups)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one read task yields: the rows at these positions of one window of one epoch."""

    epoch: int
    window: Window
    positions: Interval


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of a data set; `shuffle=False` keeps file order (for evaluation)."""

    row_groups: tuple[RowGroup, ...]
    window_rows: int
    seed: int
    shuffle: bool = True

    @cached_property
    def num_rows(self) -> int:
        """Rows in an epoch."""
        return sum(group.rows for group in self.row_groups)

    def windows(self, epoch: int) -> list[Window]:
        """Pack the epoch's permuted row groups into windows of at least `window_rows` rows.

        The last window may be smaller. O(row groups).
        """
        groups = [group for group in self.row_groups if group.rows]
        if self.shuffle:
            rng = np.random.default_rng([self.seed, epoch])
            groups = [groups[i] for i in rng.permutation(len(groups))]
        windows: list[Window] = []
        start, pending, rows = 0, [], 0
        for group in groups:
            pending.append(group)
            rows += group.rows
            if rows >= self.window_rows:
                windows.append(Window(start=start, row_groups=tuple(pending)))
                start, pending, rows = start + rows, [], 0
        if pending:
            windows.append(Window(start=start, row_groups=tuple(pending)))
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
    """Row of the window (row groups concatenated) at each of its positions; shape [rows]."""
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
    """Give the intervals that cover exactly `positions` (any order, no repeats)."""
    if positions.size == 0:
        return ()
    ordered = np.sort(positions)
    breaks = np.flatnonzero(np.diff(ordered) != 1)
    starts = ordered[np.concatenate(([0], breaks + 1))]
    ends = ordered[np.concatenate((breaks, [ordered.size - 1]))] + 1
    return tuple((int(start), int(end)) for start, end in zip(starts, ends, strict=True))
