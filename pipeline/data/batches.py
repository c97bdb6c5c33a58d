"""Batches of one worker, of the blocks that its stream gives.

What a worker sees is a pure function of (seed, epoch, cursor, world size). The worker only copies
rows into batches. Must not know: the model, the loss, the trainer.
"""

import contextlib
import itertools
import queue
import threading
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.decode import ANSWERS, GOOD, NO_ANSWER, REASONS, Recipe
from pipeline.data.layout import Catalog
from pipeline.data.order import Cursor, Order, Piece, RowGroup
from pipeline.data.order import Source as OrderedSource
from pipeline.data.rows import BadRow
from pipeline.data.stream import decoded_blocks

STOP_SECONDS = 5.0  # for an execution to end; it may be waiting for a block
T = TypeVar("T")


@dataclass(kw_only=True, slots=True)
class Batch:
    """Rows of one worker. The first `rows` entries are real; an eval batch may be padded.

    images [b, size, size, 3] uint8; tokens [b, length] int32; `view_images` and `view_tokens` are
    the rows' second view, alike, if the recipe has one; keys [b] int64, the rows' numbers in
    the catalog (shards in path order), whatever the epoch. `used` holds the positions of each
    epoch that this batch settles: its rows, and the bad rows met on the way. `cut` counts captions
    cut to the length, `cleaned` rows whose captions were not clean.

    Of a task images may be [b, 2, size, size, 3]; answers [b, ANSWERS] int32 are padded with
    NO_ANSWER, `more_answers` those of the further texts, alike; `skipped` counts questions of no
    use beside others of their row.
    """

    images: torch.Tensor
    tokens: torch.Tensor
    keys: torch.Tensor
    rows: int
    used: dict[int, NDArray[np.int64]]
    bad: list[BadRow]
    cut: int
    cleaned: int
    labels: dict[str, list[str]]
    more_tokens: list[NDArray[np.int32]]
    view_images: torch.Tensor | None = None
    view_tokens: torch.Tensor | None = None
    answers: torch.Tensor | None = None
    more_answers: list[NDArray[np.int32]] = field(default_factory=list)
    skipped: int = 0


@dataclass(kw_only=True, slots=True)
class Tally:
    """Running counts of one worker's stream, as in `Batch`; `bad` by reason."""

    rows: int = 0
    cut: int = 0
    cleaned: int = 0
    skipped: int = 0
    bad: Counter[str] = field(default_factory=Counter)

    def add(self, batch: Batch) -> None:
        """Count a batch."""
        self.rows += batch.rows
        self.cut += batch.cut
        self.cleaned += batch.cleaned
        self.skipped += batch.skipped
        self.bad.update(row.reason for row in batch.bad)


def make_order(catalog: Catalog, window_rows: int, seed: int, shuffle: bool = True) -> Order:
    """Give the order of a catalog's rows."""
    groups: list[list[RowGroup]] = [[] for _ in catalog.sources]
    for shard, item in enumerate(catalog.shards):
        groups[item.source] += [
            RowGroup(shard=shard, index=index, rows=rows)
            for index, rows in enumerate(item.row_groups)
        ]
    sources = tuple(
        OrderedSource(row_groups=tuple(mine), weight=source.weight)
        for mine, source in zip(groups, catalog.sources, strict=True)
    )
    return Order(sources=sources, window_rows=window_rows, seed=seed, shuffle=shuffle)


def train_batches(
    catalog: Catalog,
    order: Order,
    recipe: Recipe,
    cursor: Cursor,
    *,
    world_size: int,
    rank: int,
    batch_size: int,
    ingest_cpus: float,
) -> Iterator[Batch]:
    """Give an endless stream of full batches: what `cursor` leaves of its epochs, then the next.

    Epochs follow one another without a gap; a batch may hold the end of one and the start of the
    next. Raises `RuntimeError` when the worker's share of an epoch has no usable row at all.
    """

    def pieces() -> Iterator[Piece]:
        for epoch in itertools.count(cursor.first_open(order.num_rows)):
            yield from order.pieces(cursor, world_size, rank, range(epoch, epoch + 1))

    blocks = decoded_blocks(catalog, order, recipe, pieces(), world_size, ingest_cpus)
    return ahead(_rebatch(_guard_empty(blocks, order.num_rows), catalog, recipe, batch_size))


def eval_batches(
    catalog: Catalog,
    recipe: Recipe,
    *,
    max_rows: int,
    world_size: int,
    rank: int,
    batch_size: int,
    ingest_cpus: float,
) -> Iterator[Batch]:
    """Give this rank's share of the first `max_rows` rows, in order; the last batch is padded."""
    order = make_order(catalog, window_rows=1024, seed=0, shuffle=False)
    rows = min(max_rows, order.num_rows)
    beyond = Cursor(digest=catalog.digest, used={0: ((rows, order.num_rows),)})
    pieces = order.pieces(beyond, world_size, rank, range(1))
    blocks = decoded_blocks(catalog, order, recipe, pieces, world_size, ingest_cpus)
    return _rebatch(blocks, catalog, recipe, batch_size, pad_last=True)


def _guard_empty(blocks: Iterable[dict[str, Any]], num_rows: int) -> Iterator[dict[str, Any]]:
    """Fail instead of reading forever when a whole epoch's worth of rows is bad."""
    bad_in_a_row = 0
    reasons: Counter[str] = Counter()
    for block in blocks:
        bad = block["reason"] != GOOD
        reasons.update(REASONS[code] for code in block["reason"][bad])
        bad_in_a_row = bad_in_a_row + int(bad.sum()) if bad.all() else 0
        if bad_in_a_row >= num_rows:
            raise RuntimeError(
                f"data.train: none of {bad_in_a_row:,} rows in a row is usable "
                f"({dict(reasons.most_common(3))}); look at the images and captions"
            )
        yield block


class _Filling:
    """A batch under construction; owns fresh arrays, since blocks are read-only shared memory."""

    def __init__(self, recipe: Recipe, size: int, first_keys: list[NDArray[np.int64]]):
        self._first_keys = first_keys  # of each shard's row groups
        self.keys = np.full(size, -1, dtype=np.int64)
        side, length = recipe.image_size, recipe.context_length
        pad = recipe.tokenizer.pad
        two = (recipe.pictures,) if recipe.pictures > 1 else ()
        self.images = np.empty((size, *two, side, side, 3), dtype=np.uint8)
        self.tokens = np.full((size, length), pad, dtype=np.int32)
        self.view: tuple[NDArray[np.uint8], NDArray[np.int32]] | None = None
        if recipe.second_view:
            self.view = np.empty_like(self.images), np.full_like(self.tokens, pad)
        self.answers: NDArray[np.int32] | None = None
        if recipe.asked:
            self.answers = np.full((size, ANSWERS), NO_ANSWER, dtype=np.int32)
        self.more_answers: list[NDArray[np.int32]] = []
        self.skipped = 0
        self.rows = 0
        self.cut = 0
        self.cleaned = 0
        self.used: dict[int, list[NDArray[np.int64]]] = {}
        self.bad: list[BadRow] = []
        self.labels: dict[str, list[str]] = {name: [] for name in recipe.labels}
        self.more_tokens: list[NDArray[np.int32]] = []
        self._length = recipe.context_length

    def take(self, block: dict[str, Any], start: int, catalog: Catalog) -> int:
        """Copy rows of `block` from `start` on until full; give the row after the last taken."""
        reasons = block["reason"]
        free = len(self.images) - self.rows
        good = np.flatnonzero(reasons[start:] == GOOD)
        end = len(reasons) if len(good) < free else start + int(good[free - 1]) + 1
        chosen = start + good[:free]
        slot = slice(self.rows, self.rows + len(chosen))
        self.images[slot] = _rows_of(block["image"], start, end, chosen)
        self.tokens[slot] = block["tokens"][chosen]
        if self.view is not None:
            self.view[0][slot] = _rows_of(block["view_image"], start, end, chosen)
            self.view[1][slot] = block["view_tokens"][chosen]
        if self.answers is not None:
            self.answers[slot] = block["answers"][chosen]
            self.skipped += int(block["skipped"][chosen].sum())
        self.keys[slot] = [
            self._first_keys[shard][group] + ordinal
            for shard, group, ordinal in zip(
                *(block[name][chosen] for name in ("shard", "row_group", "ordinal")), strict=True
            )
        ]
        self.rows += len(chosen)
        self.cut += int(block["cut"][chosen].sum())
        self.cleaned += int(block["cleaned"][chosen].sum())
        epochs, positions = block["epoch"][start:end], block["position"][start:end]
        for epoch in np.unique(epochs):
            self.used.setdefault(int(epoch), []).append(positions[epochs == epoch].copy())
        for row in start + np.flatnonzero(reasons[start:end] != GOOD):
            shard = catalog.shards[int(block["shard"][row])]
            self.bad.append(
                BadRow(
                    path=shard.path,
                    row_group=int(block["row_group"][row]),
                    row=int(block["row"][row]),
                    reason=REASONS[int(reasons[row])],
                )
            )
        for name, values in self.labels.items():
            values.extend(block[f"label/{name}"][row] for row in chosen)
        if "more_tokens" in block:
            cells = (np.frombuffer(block["more_tokens"][row], np.int32) for row in chosen)
            self.more_tokens.extend(cell.reshape(-1, self._length) for cell in cells)
        if "more_answers" in block:
            cells = (np.frombuffer(block["more_answers"][row], np.int32) for row in chosen)
            self.more_answers.extend(cell.reshape(-1, ANSWERS) for cell in cells)
        return end

    def finish(self) -> Batch:
        self.images[self.rows :] = 0
        return Batch(
            images=torch.from_numpy(self.images),
            tokens=torch.from_numpy(self.tokens),
            keys=torch.from_numpy(self.keys),
            rows=self.rows,
            used={epoch: np.concatenate(parts) for epoch, parts in self.used.items()},
            bad=self.bad,
            cut=self.cut,
            cleaned=self.cleaned,
            labels=self.labels,
            more_tokens=self.more_tokens,
            view_images=None if self.view is None else torch.from_numpy(self.view[0]),
            view_tokens=None if self.view is None else torch.from_numpy(self.view[1]),
            answers=None if self.answers is None else torch.from_numpy(self.answers),
            more_answers=self.more_answers,
            skipped=self.skipped,
        )


def _rows_of(
    images: NDArray[np.uint8], start: int, end: int, chosen: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """The chosen of the rows start .. end - 1. Mostly all: a slice is copied once, not twice."""
    part = images[start:end]
    return part if len(chosen) == len(part) else part[chosen - start]


def _first_keys(catalog: Catalog) -> list[NDArray[np.int64]]:
    """The key of the first row of every row group, by shard."""
    keys, first = [], 0
    for shard in catalog.shards:
        ends = first + np.cumsum(shard.row_groups, dtype=np.int64)
        keys.append(ends - np.array(shard.row_groups, dtype=np.int64))
        first = int(ends[-1]) if len(ends) else first
    return keys


def _rebatch(
    blocks: Iterable[dict[str, Any]],
    catalog: Catalog,
    recipe: Recipe,
    size: int,
    pad_last: bool = False,
) -> Generator[Batch]:
    """Blocks of any size -> batches of `size` good rows; a padded last one only if asked for."""
    first_keys = _first_keys(catalog)
    filling = _Filling(recipe, size, first_keys)
    for block in blocks:
        at = 0
        while at < len(block["reason"]):
            at = filling.take(block, at, catalog)
            if filling.rows == size:
                yield filling.finish()
                filling = _Filling(recipe, size, first_keys)
    if pad_last and (filling.rows or filling.bad):
        yield filling.finish()


def ahead(items: Generator[T], depth: int = 2) -> Generator[T]:
    """Run `items` in a thread, `depth` ahead of the consumer; an error in it is raised here.

    When the consumer stops, `items` is closed in that thread, and Ray's execution with it.
    """
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        with contextlib.closing(items):
            try:
                for item in items:
                    if not put((True, item)):
                        return
                put((False, None))
            except BaseException as error:  # noqa: BLE001  it is raised in the consumer's thread
                put((False, error))

    thread = threading.Thread(target=work, name="batches-ahead", daemon=True)
    thread.start()
    try:
        while True:
            is_item, value = ready.get()
            if is_item:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stopped.set()
        thread.join(STOP_SECONDS)
