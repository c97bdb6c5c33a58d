"""First pass: a part of the source -> its good rows, made small and sorted into buckets.

Enters: units of the source. Leaves: for each part an Arrow file, a record batch per bucket; its
dropped rows; and its tally, the mark that it is whole. Must not know: shards, Ray.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.image import BadImage
from pipeline.data.prepare.fit import Fitted, fit_first
from pipeline.data.prepare.sources import Origin, Reader
from pipeline.data.prepare.stats import Tally
from pipeline.data.prepare.store import PARTS, QUARANTINE, Store, name_part
from pipeline.data.prepare.tasks import LABEL, Task, as_plural, picture_bytes
from pipeline.data.prepare.units import SourceRow, Unit

MAX_PARTS = 4096  # parts x buckets are read in the second pass

PLACES = pa.schema(
    [
        ("order", pa.uint64()),
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("split", pa.string()),
    ]
)
DROPPED = pa.schema(
    [("key", pa.string()), ("file", pa.string()), ("row", pa.int64()), ("reason", pa.string())]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Neighbouring units that one task reads."""

    number: int
    units: tuple[Unit, ...]

    @property
    def name(self) -> str:
        """Its name in OUT, without the endings of its files."""
        return name_part(self.number)

    @property
    def weight(self) -> int:
        """Bytes to be read."""
        return sum(unit.bytes for unit in self.units)


def pack(source: Origin, size: int) -> list[Part]:
    """Neighbouring units in parts of about `size` bytes, larger for a huge source."""
    most = max(size, source.num_bytes // MAX_PARTS)
    packed: list[list[Unit]] = [[]]
    total = 0
    for unit in source.units:
        if packed[-1] and total + unit.bytes > most:
            packed.append([])
            total = 0
        packed[-1].append(unit)
        total += unit.bytes
    return [Part(number=number, units=tuple(units)) for number, units in enumerate(packed)]


def read_parts(store: Store, parts: list[Part]) -> dict[int, dict[str, Any]]:
    """The tallies of the parts that are made, by number."""
    there = {f"{PARTS}/{name}" for name in store.names(PARTS)}
    return {
        part.number: store.read_json(f"{part.name}.json")
        for part in parts
        if f"{part.name}.json" in there
    }


class _Dropped(Exception):
    """A row that cannot be used, whatever its image; its text is the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scatter:
    """Makes a part: its good rows in one Arrow file, a record batch per bucket."""

    store: Store
    reader: Reader
    short_side: int
    seed: int
    buckets: int
    buffer: int  # bytes of images in memory before they are written

    def __call__(self, part: Part) -> dict[str, Any]:
        """Write the part; give its tally."""
        cv2.setNumThreads(1)  # one task, one CPU
        tally = Tally(number=part.number)
        dropped: list[dict[str, Any]] = []
        schema = _rows_schema(self.reader.task)

        def write(sink: Any) -> None:
            with pa.ipc.new_file(sink, schema) as writer:
                for rows in self._buffers(part, tally, dropped):
                    self._write_buckets(writer, rows, tally)

        self.store.write(f"{part.name}.arrow", write)
        if dropped:
            table = pa.Table.from_pylist(dropped, schema=DROPPED)
            self.store.write(f"{part.name}.dropped", lambda sink: pq.write_table(table, sink))
        summary = {each.name: getattr(tally, each.name) for each in fields(tally)}
        self.store.write_json(f"{part.name}.json", summary)
        return summary

    def _buffers(
        self, part: Part, tally: Tally, dropped: list[dict[str, Any]]
    ) -> Iterator[list[dict[str, Any]]]:
        """The part's good rows, as many at a time as memory allows."""
        rows: list[dict[str, Any]] = []
        size = 0
        for row in itertools.chain.from_iterable(map(self.reader.rows, part.units)):
            tally.rows_in += 1
            try:
                made = self._make(row, tally)
            except (_Dropped, BadImage) as error:
                reason = str(error)
                tally.dropped[reason] += 1
                dropped.append(
                    {"key": row.key, "file": row.unit.name, "row": row.row, "reason": reason}
                )
                continue
            rows.append(made)
            size += picture_bytes(made)
            if size >= self.buffer:
                yield rows
                rows, size = [], 0
        if rows:
            yield rows

    def _make(self, row: SourceRow, tally: Tally) -> dict[str, Any]:
        task = self.reader.task
        if (fault := _fault(task, row)) is not None:
            raise _Dropped(fault)
        groups = [row.images] if task.num_pictures == 1 else [[image] for image in row.images]
        fitted = [fit_first(images, self.short_side) for images in groups]
        _count(tally, task, row, fitted)
        made = {
            "order": order_of(self.seed, row.unit.file, row.row),
            "file": row.unit.file,
            "row": row.row,
            "key": row.key,
            "split": row.split,
            **row.texts,
            **_place(fitted),
        }
        return made | ({task.several: row.captions} if task.several else {})

    def _write_buckets(self, writer: Any, rows: list[dict[str, Any]], tally: Tally) -> None:
        def bucket_of(row: dict[str, Any]) -> int:
            return row["order"] * self.buckets >> 64

        rows.sort(key=bucket_of)
        for bucket, group in itertools.groupby(rows, bucket_of):
            some = list(group)
            schema = _rows_schema(self.reader.task)
            writer.write_batch(pa.RecordBatch.from_pylist(some, schema=schema))
            size = sum(map(picture_bytes, some))
            tally.batches.append((bucket, len(some), size))


def _rows_schema(task: Task) -> pa.Schema:
    several = [pa.field(task.several, pa.list_(pa.string()))] if task.several else []
    texts = [pa.field(name, pa.string()) for name in task.texts]
    return pa.schema([*PLACES, *several, *texts, *task.picture_fields(pa.large_binary())])


def _fault(task: Task, row: SourceRow) -> str | None:
    """Why the row cannot be used, as far as that shows without decoding."""
    if row.absence is not None:
        return row.absence
    if task.texts and not row.texts[task.said]:
        return f"empty_{task.said}"
    if task.several and not row.captions:
        return f"empty_{task.several}"
    if LABEL in task.texts and row.texts[LABEL] is None:
        return "unknown_label"
    return None


def _place(fitted: list[Fitted]) -> dict[str, Any]:
    """The columns of a row's pictures: of one picture its own, of several their lists."""
    columns: dict[str, list[Any]] = {
        "image": [picture.data for picture in fitted],
        "width": [picture.width for picture in fitted],
        "height": [picture.height for picture in fitted],
    }
    if len(fitted) == 1:
        return {name: values[0] for name, values in columns.items()}
    return {as_plural(name): values for name, values in columns.items()}


def _count(tally: Tally, task: Task, row: SourceRow, fitted: list[Fitted]) -> None:
    """A good row among the others of its part."""
    tally.rows_out += 1
    tally.kept_images += sum(picture.is_kept for picture in fitted)
    tally.further_images += sum(bool(image) for image in row.images) - len(fitted)
    tally.has_lists |= len(row.captions) > 1
    tally.has_split |= row.split is not None
    spreads = tally.spreads
    for picture in fitted:
        spreads["source_short_side"][picture.source_short_side] += 1
        spreads["short_side"][min(picture.width, picture.height)] += 1
    if task.several:
        spreads[as_plural(task.several)][len(row.captions)] += 1
    if label := row.texts.get(LABEL):
        tally.labels[label] += 1
    for text in [row.texts[task.said] or ""] if task.texts else row.captions:
        spreads[f"{task.said}_characters"][len(text)] += 1
        spreads[f"{task.said}_words"][len(text.split())] += 1


def order_of(seed: int, file: int, row: int) -> int:
    """Where a row stands among all: 64 bits that are uniform over rows, the same in every run."""
    text = f"{seed} {file} {row}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def write_quarantine(store: Store, summaries: list[dict[str, Any]]) -> None:
    """One Parquet of all dropped rows, in the order of the source; none when no row was dropped."""
    numbers = [summary["number"] for summary in summaries if summary["dropped"]]
    if not numbers:
        return

    def write(sink: Any) -> None:
        with pq.ParquetWriter(sink, DROPPED) as writer:
            for number in numbers:
                with store.open(f"{name_part(number)}.dropped") as file:
                    writer.write_table(pq.read_table(file))

    store.write(QUARANTINE, write)
