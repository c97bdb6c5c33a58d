"""Pairs of any form -> well-shaped Parquet shards, by an external shuffle in Ray Data tasks.

Every source row has an order, a 64-bit hash of (seed, file, row), and the shards hold the rows in
that order: a random permutation of all rows, whatever the layout of the source. Tasks of the first
pass read a part of the source each, make its images small, and write its rows by bucket (a range
of the order). Tasks of the second pass collect a run of buckets and write a shard.

What a task has written it commits by a rename, under OUT/_work; a killed job goes on with what is
missing. OUT shows shards when all are made.
Must not know: training, the model. Ray only in `OnRay`.
"""

import hashlib
import io
import itertools
import json
import logging
import os
import pickle
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray
import ray.data
import simplejpeg
from PIL import Image
from ray.exceptions import RayError

from pipeline.data import image as image_module
from pipeline.data.sources import Origin, Reader, SourceRow, Unit, find_files, open_origin
from pipeline.data.storage import open_filesystem
from pipeline.errors import UserError

FORMAT = 1  # raise it whenever the same source and options would give other shards
BACKGROUND = (255, 255, 255)  # under transparency
QUALITY = 92
JPEG_SIDE = 65_500  # the format's limit
WORK = "_work"
STATS = "stats.json"
QUARANTINE = "_quarantine.parquet"  # readers of a folder of Parquet pass over such names
PLAN = f"{WORK}/plan.json"
FOOTER = b"gammaray"
MAX_PARTS = 4096  # parts x buckets are read in the second pass
ORIENTATION = 0x0112  # EXIF tag
TASKS_PLANNED = 4096

ROWS = pa.schema(
    [
        ("order", pa.uint64()),
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("split", pa.string()),
        ("caption", pa.list_(pa.string())),
        ("image", pa.large_binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
DROPPED = pa.schema(
    [("key", pa.string()), ("file", pa.string()), ("row", pa.int64()), ("reason", pa.string())]
)

Runner = Callable[[Callable[[Any], dict[str, Any]], list[Any]], Iterable[dict[str, Any]]]


class Listener(Protocol):
    """Told what happens."""

    def say(self, text: str) -> None:
        """A sentence."""
        ...

    def show(self, what: str, done: int, total: int) -> None:
        """How much of something is done."""
        ...


class _Silent:
    def say(self, text: str) -> None:
        pass

    def show(self, what: str, done: int, total: int) -> None:
        pass


class PrepareFailed(Exception):
    """The job failed; the same command goes on with what is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the user chooses. `images`: the folder of a table's image paths; empty: the table's."""

    short_side: int = 288
    seed: int = 0
    image_column: str = "auto"
    caption_column: str = "auto"
    images: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Bytes of encoded images: of the source in a part, in a bucket on the average, in a shard (of
    whole buckets), at most in a row group, and in a task's memory before it is written.
    """

    part: int = 64 * 2**20
    bucket: int = 64 * 2**20
    shard: int = 256 * 2**20
    row_group: int = 32 * 2**20
    buffer: int = 256 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What lies in `out`: the content of stats.json; `created` is False when it was there."""

    out: str
    stats: dict[str, Any]
    created: bool


def prepare(
    path: str,
    out: str,
    options: Options,
    run: Runner,
    listener: Listener | None = None,
    sizes: Sizes | None = None,
) -> Outcome:
    """Write the pairs at `path` as shards to `out`; go on with what a killed job left there.

    `run` applies a function to items, in any order, and gives its results. Raises `UserError`.
    """
    sizes, listener = sizes or Sizes(), listener or _Silent()
    store = _Store(root=out)
    _check_places(path, out)
    record = {**asdict(options), "sizes": asdict(sizes), "format": FORMAT}
    begun = _look_at(store, record)
    found = find_files(path)
    record["source"] = found.digest
    if begun is not None and begun.get("source") != found.digest:
        raise UserError(
            f"OUT: {out} was made from other files than {path} holds now (names, sizes and dates "
            "are compared); choose another folder, or remove it"
        )
    if (finished := store.read_json(STATS)) is not None:
        _check_shards(store, finished)
        store.remove(WORK)
        return Outcome(out=out, stats=finished, created=False)
    source = open_origin(
        found,
        image=options.image_column,
        caption=options.caption_column,
        images=options.images,
        scratch=store.url(f"{WORK}/listing"),
    )
    listener.say(f"{source.describe()}.")
    for folder in ("parts", "shards"):
        store.make(f"{WORK}/{folder}")
    store.write_json(PLAN, record)

    scatter = _Scatter(
        store=store,
        reader=source.reader,
        options=options,
        sizes=sizes,
        buckets=max(1, -(-source.num_bytes // sizes.bucket)),
    )
    summaries = _scatter_all(store, scatter, _pack(source, sizes), run, listener)
    _write_quarantine(store, summaries)
    _check_any(store, summaries)
    shards = _plan_shards(summaries, sizes)
    gather = _Gather(
        store=store,
        sizes=sizes,
        has_lists=any(summary["has_lists"] for summary in summaries),
        has_split=any(summary["has_split"] for summary in summaries),
    )
    written = _gather_all(store, gather, shards, run, listener)
    stats = _stats(source, record, summaries, written)
    _publish(store, shards, stats)
    return Outcome(out=out, stats=stats, created=True)


# ---- what is already there -----------------------------------------------------------------------


def _check_places(path: str, out: str) -> None:
    if "://" in path or "://" in out:
        return
    inside = Path(out).absolute()
    if inside.is_relative_to(Path(path).absolute()):
        raise UserError(
            f"OUT: {out} lies in IN ({path}), where the next command would take it for source; "
            "choose a folder elsewhere"
        )


def _look_at(store: "_Store", record: dict[str, Any]) -> dict[str, Any] | None:
    """The record of an earlier job in the same folder, which must agree with this one."""
    stats = store.read_json(STATS)
    begun = stats.get("options") if isinstance(stats, dict) else store.read_json(PLAN)
    if begun is None:
        names = store.names("")
        if stats is not None or any(name != WORK for name in names):
            raise UserError(
                f"OUT: {store.root} holds other files ({', '.join(names[:4])}); choose another "
                "folder, or remove it"
            )
        return None
    differing = [name for name, value in record.items() if begun.get(name) != value]
    if differing:
        said = ", ".join(f"{name} {begun.get(name)}, now {record[name]}" for name in differing)
        raise UserError(
            f"OUT: {store.root} was made with other options ({said}); use those, choose another "
            "folder, or remove it"
        )
    return begun


def _check_shards(store: "_Store", stats: dict[str, Any]) -> None:
    there = set(store.names(""))
    lost = [shard["name"] for shard in stats["shards"] if shard["name"] not in there]
    if lost:
        raise UserError(
            f"OUT: {store.root} is finished, but {lost[0]} is not there; remove the folder and "
            "prepare it again"
        )


# ---- first pass: read, make small, sort into buckets ---------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    number: int
    units: tuple[Unit, ...]

    @property
    def name(self) -> str:
        return f"{WORK}/parts/{self.number:05d}"


def _pack(source: Origin, sizes: Sizes) -> list[_Part]:
    """Neighbouring units in parts of about `sizes.part` bytes, larger for a huge source."""
    most = max(sizes.part, source.num_bytes // MAX_PARTS)
    packed: list[list[Unit]] = [[]]
    total = 0
    for unit in source.units:
        if packed[-1] and total + unit.bytes > most:
            packed.append([])
            total = 0
        packed[-1].append(unit)
        total += unit.bytes
    return [_Part(number=number, units=tuple(units)) for number, units in enumerate(packed)]


def _scatter_all(
    store: "_Store", scatter: "_Scatter", parts: list[_Part], run: Runner, listener: Listener
) -> list[dict[str, Any]]:
    """Make the parts that are missing; give what is known of all, in order."""
    weight = {part.number: sum(unit.bytes for unit in part.units) for part in parts}
    there = {name for name in store.names(f"{WORK}/parts") if name.endswith(".json")}
    summaries = {
        part.number: store.read_json(f"{part.name}.json")
        for part in parts
        if f"{part.number:05d}.json" in there
    }
    total = sum(weight.values())
    done = sum(weight[number] for number in summaries)
    listener.show("reading", done, total)
    for summary in run(scatter, [part for part in parts if part.number not in summaries]):
        summaries[summary["number"]] = summary
        done += weight[summary["number"]]
        listener.show("reading", done, total)
    return [summaries[part.number] for part in parts]


@dataclass(kw_only=True, slots=True)
class _Tally:
    """What is counted of a part; its JSON is the part's commit mark."""

    number: int
    rows_in: int = 0
    rows_out: int = 0
    kept_images: int = 0
    further_images: int = 0
    has_lists: bool = False
    has_split: bool = False
    dropped: Counter[str] = field(default_factory=Counter)
    batches: list[tuple[int, int, int]] = field(default_factory=list)  # bucket, rows, bytes
    spreads: dict[str, Counter[int]] = field(
        default_factory=lambda: {name: Counter() for name in SPREADS}
    )


SPREADS = (
    "source_short_side", "short_side", "captions", "caption_characters", "caption_words",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scatter:
    """Makes a part: its good rows in one Arrow file, a record batch per bucket."""

    store: "_Store"
    reader: Reader
    options: Options
    sizes: Sizes
    buckets: int

    def __call__(self, part: _Part) -> dict[str, Any]:
        cv2.setNumThreads(1)  # one task, one CPU
        tally = _Tally(number=part.number)
        dropped: list[dict[str, Any]] = []

        def write(sink: Any) -> None:
            with pa.ipc.new_file(sink, ROWS) as writer:
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
        self, part: _Part, tally: _Tally, dropped: list[dict[str, Any]]
    ) -> Iterator[list[dict[str, Any]]]:
        """The part's good rows, as many at a time as memory allows."""
        rows: list[dict[str, Any]] = []
        size = 0
        for row in itertools.chain.from_iterable(map(self.reader.rows, part.units)):
            tally.rows_in += 1
            try:
                made = self._make(row, tally)
            except _Dropped as error:
                reason = str(error)
                tally.dropped[reason] += 1
                dropped.append(
                    {"key": row.key, "file": row.unit.name, "row": row.row, "reason": reason}
                )
                continue
            rows.append(made)
            size += len(made["image"])
            if size >= self.sizes.buffer:
                yield rows
                rows, size = [], 0
        if rows:
            yield rows

    def _make(self, row: SourceRow, tally: _Tally) -> dict[str, Any]:
        if row.absence is not None:
            raise _Dropped(row.absence)
        if not row.captions:
            raise _Dropped("empty_caption")
        fitted = _fit_first(row.images, self.options.short_side)
        tally.rows_out += 1
        tally.kept_images += fitted.is_kept
        tally.further_images += sum(bool(image) for image in row.images) - 1
        tally.has_lists |= len(row.captions) > 1
        tally.has_split |= row.split is not None
        spreads = tally.spreads
        spreads["source_short_side"][fitted.source_short_side] += 1
        spreads["short_side"][min(fitted.width, fitted.height)] += 1
        spreads["captions"][len(row.captions)] += 1
        for caption in row.captions:
            spreads["caption_characters"][len(caption)] += 1
            spreads["caption_words"][len(caption.split())] += 1
        return {
            "order": order_of(self.options.seed, row.unit.file, row.row),
            "file": row.unit.file,
            "row": row.row,
            "key": row.key,
            "split": row.split,
            "caption": row.captions,
            "image": fitted.data,
            "width": fitted.width,
            "height": fitted.height,
        }

    def _write_buckets(self, writer: Any, rows: list[dict[str, Any]], tally: _Tally) -> None:
        def bucket_of(row: dict[str, Any]) -> int:
            return row["order"] * self.buckets >> 64

        rows.sort(key=bucket_of)
        for bucket, group in itertools.groupby(rows, bucket_of):
            some = list(group)
            writer.write_batch(pa.RecordBatch.from_pylist(some, schema=ROWS))
            size = sum(len(row["image"]) for row in some)
            tally.batches.append((bucket, len(some), size))


class _Dropped(Exception):
    """A row that cannot be used; its text is the reason."""


def order_of(seed: int, file: int, row: int) -> int:
    """Where a row stands among all: 64 bits that are uniform over rows, the same in every run."""
    text = f"{seed} {file} {row}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fitted:
    data: bytes
    width: int
    height: int
    source_short_side: int
    is_kept: bool


def _fit_first(images: list[bytes | None], short_side: int) -> _Fitted:
    """The first image that can be decoded, made small; else the first one's reason."""
    first: image_module.BadImage | None = None
    for data in images:
        try:
            return _fit(data, short_side)
        except image_module.BadImage as error:
            first = first or error
    raise _Dropped("null_image" if first is None else first.reason)


def _fit(data: bytes | None, short_side: int) -> _Fitted:
    """A picture whose short side is at most `short_side`, as JPEG.

    An upright JPEG that is small enough stays as it is, byte for byte; nothing is enlarged.
    """
    pixels = image_module.decode(data, BACKGROUND)
    assert data is not None
    height, width = pixels.shape[:2]
    shortest = min(height, width)
    is_kept = shortest <= short_side and _is_plain_jpeg(data)
    if shortest > short_side:
        height, width = (round(side * short_side / shortest) for side in (height, width))
        pixels = cv2.resize(
            np.ascontiguousarray(pixels), (width, height), interpolation=cv2.INTER_AREA
        )
    if not is_kept:
        if max(height, width) > JPEG_SIDE:
            raise image_module.BadImage("huge_image")
        # Drawings and letters, which come in other formats, suffer from coarse colours.
        subsampling = "420" if data[:2] == b"\xff\xd8" else "444"
        data = simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels, dtype=np.uint8),
            quality=QUALITY,
            colorspace="RGB",
            colorsubsampling=subsampling,
        )
    return _Fitted(
        data=data, width=width, height=height, source_short_side=shortest, is_kept=is_kept
    )


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether training can use the bytes as they are: JPEG, no CMYK, no rotation to apply."""
    if data[:2] != b"\xff\xd8":
        return False
    if simplejpeg.decode_jpeg_header(data)[2] not in ("YCbCr", "RGB", "Gray"):
        return False
    with Image.open(io.BytesIO(data)) as image:
        return image.getexif().get(ORIENTATION, 1) == 1


# ---- between the passes --------------------------------------------------------------------------


def _write_quarantine(store: "_Store", summaries: list[dict[str, Any]]) -> None:
    """One Parquet of all dropped rows, in the order of the source; none when no row was dropped."""
    numbers = [summary["number"] for summary in summaries if summary["dropped"]]
    if not numbers:
        return

    def write(sink: Any) -> None:
        with pq.ParquetWriter(sink, DROPPED) as writer:
            for number in numbers:
                with store.open(f"{WORK}/parts/{number:05d}.dropped") as file:
                    writer.write_table(pq.read_table(file))

    store.write(QUARANTINE, write)


def _check_any(store: "_Store", summaries: list[dict[str, Any]]) -> None:
    if any(summary["rows_out"] for summary in summaries):
        return
    reasons = _add(summary["dropped"] for summary in summaries)
    rows = sum(summary["rows_in"] for summary in summaries)
    why = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common(3))
    raise UserError(
        f"IN: none of {rows:,} rows is usable"
        + (f" ({why}); {store.url(QUARANTINE)} lists them" if rows else "")
        + "; look at the images and captions"
        + (", and at --images" if "missing_file" in reasons else "")
        + f", and remove {store.root} before another try"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    """A run of buckets: for each, its record batches as (part, index)."""

    number: int
    rows: int
    buckets: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def name(self) -> str:
        return f"part-{self.number:05d}.parquet"


def _plan_shards(summaries: list[dict[str, Any]], sizes: Sizes) -> list[_Shard]:
    """Neighbouring buckets in shards of like size, at most `sizes.shard` bytes and a bucket."""
    batches: dict[int, list[tuple[int, int]]] = {}
    rows: Counter[int] = Counter()
    weight: Counter[int] = Counter()
    for summary in summaries:
        for index, (bucket, count, size) in enumerate(summary["batches"]):
            batches.setdefault(bucket, []).append((summary["number"], index))
            rows[bucket] += count
            weight[bucket] += size
    total = sum(weight.values())
    target = total / max(1, -(-total // sizes.shard))
    runs: list[list[int]] = [[]]
    before = 0
    for bucket in sorted(batches):
        if runs[-1] and before >= len(runs) * target:
            runs.append([])
        runs[-1].append(bucket)
        before += weight[bucket]
    return [
        _Shard(
            number=number,
            rows=sum(rows[bucket] for bucket in buckets),
            buckets=tuple(tuple(batches[bucket]) for bucket in buckets),
        )
        for number, buckets in enumerate(runs)
    ]


# ---- second pass: collect buckets, write shards --------------------------------------------------


def _gather_all(
    store: "_Store", gather: "_Gather", shards: list[_Shard], run: Runner, listener: Listener
) -> list[dict[str, Any]]:
    """Make the shards that are missing; give the facts of all, in order."""
    places = {name: f"{WORK}/shards/{name}" for name in store.names(f"{WORK}/shards")}
    places |= {name: name for name in store.names("") if name.endswith(".parquet")}
    facts = {
        shard.number: store.read_footer(places[shard.name])
        for shard in shards
        if shard.name in places
    }
    total = sum(shard.rows for shard in shards)
    done = sum(shard.rows for shard in shards if shard.number in facts)
    listener.show("writing", done, total)
    for fact in run(gather, [shard for shard in shards if shard.number not in facts]):
        facts[fact["number"]] = fact
        done += fact["rows"]
        listener.show("writing", done, total)
    return [facts[shard.number] for shard in shards]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Gather:
    """Makes a shard; its facts are in its footer, under FOOTER."""

    store: "_Store"
    sizes: Sizes
    has_lists: bool
    has_split: bool

    def __call__(self, shard: _Shard) -> dict[str, Any]:
        schema = self._schema()
        text = [name for name in schema.names if name not in ("image", "width", "height")]
        # Any, since pyarrow's annotations do not know that each option can be given per column.
        options: dict[str, Any] = {
            "compression": {"image": "none"}
            | {name: "zstd" for name in schema.names if name != "image"},
            "use_dictionary": ["split"],
            "write_statistics": [name for name in text if name != "caption"],
        }
        content = hashlib.sha256()
        facts = {"number": shard.number, "name": shard.name, "rows": 0, "image_bytes": 0}

        def write(sink: Any) -> None:
            with pq.ParquetWriter(sink, schema, **options) as writer:
                for rows in self._row_groups(shard):
                    for row in rows:
                        _hash_row(content, row)
                        facts["image_bytes"] += len(row["image"])
                    facts["rows"] += len(rows)
                    writer.write_table(self._table(rows, schema))
                facts["digest"] = content.hexdigest()
                writer.add_key_value_metadata({FOOTER.decode(): json.dumps(facts)})

        self.store.write(f"{WORK}/shards/{shard.name}", write)
        return facts

    def _schema(self) -> pa.Schema:
        text = pa.string()
        fields = [
            pa.field("key", text, nullable=False),
            pa.field("image", pa.binary(), nullable=False),
            pa.field("caption", pa.list_(text) if self.has_lists else text, nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
        ]
        return pa.schema([*fields, pa.field("split", text)] if self.has_split else fields)

    def _row_groups(self, shard: _Shard) -> Iterator[list[dict[str, Any]]]:
        """All rows in order, cut so that no group passes the limit (but a single larger row)."""
        rows: list[dict[str, Any]] = []
        size = 0
        for batches in shard.buckets:
            for row in self._sorted(batches):
                if rows and size + len(row["image"]) > self.sizes.row_group:
                    yield rows
                    rows, size = [], 0
                rows.append(row)
                size += len(row["image"])
        if rows:
            yield rows

    def _sorted(self, batches: tuple[tuple[int, int], ...]) -> Iterator[dict[str, Any]]:
        """The rows of one bucket."""
        found: list[pa.RecordBatch] = []
        for part, group in itertools.groupby(batches, lambda batch: batch[0]):
            with (
                self.store.open(f"{WORK}/parts/{part:05d}.arrow") as file,
                pa.ipc.open_file(file) as reader,
            ):
                found += [reader.get_batch(index) for _, index in group]
        table = pa.Table.from_batches(found).combine_chunks()
        # The order decides; file and row only where two rows have the same hash.
        columns = [table.column(name).to_numpy() for name in ("row", "file", "order")]
        for index in np.lexsort(columns):
            yield table.slice(int(index), 1).to_pylist()[0]

    def _table(self, rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
        columns = {name: [row[name] for row in rows] for name in schema.names}
        if not self.has_lists:
            columns["caption"] = [captions[0] for captions in columns["caption"]]
        return pa.table(columns, schema=schema)


def _hash_row(content: Any, row: dict[str, Any]) -> None:
    texts = [row["key"], row["split"] or "", *row["caption"]]
    fields = [*(text.encode() for text in texts), row["image"]]
    # Lengths first, so that no two rows give the same bytes.
    content.update(" ".join(str(len(item)) for item in fields).encode() + b"\n")
    for item in fields:
        content.update(item)


# ---- the end -------------------------------------------------------------------------------------


def _stats(
    source: Origin,
    record: dict[str, Any],
    summaries: list[dict[str, Any]],
    written: list[dict[str, Any]],
) -> dict[str, Any]:
    dropped = _add(summary["dropped"] for summary in summaries)
    content = hashlib.sha256("\n".join(fact["digest"] for fact in written).encode())
    rows_out = sum(fact["rows"] for fact in written)
    kept = sum(summary["kept_images"] for summary in summaries)
    return {
        "content_hash": content.hexdigest(),
        "rows_in": sum(summary["rows_in"] for summary in summaries),
        "rows_out": rows_out,
        "dropped": dict(sorted(dropped.items())),
        "quarantine": QUARANTINE if dropped else "empty",
        "images_kept": kept,
        "images_encoded": rows_out - kept,
        "further_images_left_out": sum(summary["further_images"] for summary in summaries),
        "image_bytes": sum(fact["image_bytes"] for fact in written),
        **{
            name: _spread(_add(summary["spreads"][name] for summary in summaries))
            for name in SPREADS
        },
        "shards": [
            {name: fact[name] for name in ("name", "rows", "image_bytes", "digest")}
            for fact in written
        ],
        "source": {
            "path": source.path,
            "form": source.reader.form,
            "files": source.num_files,
            "bytes": source.num_bytes,
        },
        "options": record,
        "version": version("gammaray"),
    }


def _spread(counts: Counter[Any]) -> dict[str, float]:
    """Smallest, largest, mean and some quantiles of counted values."""
    values = sorted((int(value), count) for value, count in counts.items())
    total = sum(count for _, count in values)
    ends = list(itertools.accumulate(count for _, count in values))

    def quantile(share: float) -> int:
        return next(
            value for (value, _), end in zip(values, ends, strict=True) if end >= share * total
        )

    return {
        "min": values[0][0],
        "p05": quantile(0.05),
        "median": quantile(0.5),
        "mean": round(sum(value * count for value, count in values) / total, 2),
        "p95": quantile(0.95),
        "max": values[-1][0],
    }


def _add(counters: Iterable[dict[Any, int]]) -> Counter[Any]:
    total: Counter[Any] = Counter()
    for counter in counters:
        for value, count in counter.items():
            total[str(value)] += count
    return total


def _publish(store: "_Store", shards: list[_Shard], stats: dict[str, Any]) -> None:
    """Show the shards, then the mark that all are there, then forget the work."""
    waiting = set(store.names(f"{WORK}/shards"))
    for shard in shards:
        if shard.name in waiting:
            store.move(f"{WORK}/shards/{shard.name}", shard.name)
    store.write_json(STATS, stats)
    store.remove(WORK)


# ---- where it is written -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Store:
    """OUT: a local folder or URL. What is written appears whole or not at all."""

    root: str

    def _at(self, name: str) -> tuple[pafs.FileSystem, str]:
        filesystem, inner = open_filesystem(self.root)
        return filesystem, f"{inner.rstrip('/')}/{name}" if name else inner

    def url(self, name: str) -> str:
        """The place of `name` for other readers."""
        head, mark, query = self.root.partition("?")
        return f"{head.rstrip('/')}/{name}{mark}{query}"

    def names(self, folder: str) -> list[str]:
        """What lies in `folder`, sorted; nothing when it is absent."""
        filesystem, path = self._at(folder)
        try:
            selector = pafs.FileSelector(path, allow_not_found=True)
            return sorted(info.base_name for info in filesystem.get_file_info(selector))
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"OUT: {self.root} cannot be used: {error}") from error

    def make(self, folder: str) -> None:
        """Make a folder and those above it."""
        filesystem, path = self._at(folder)
        try:
            filesystem.create_dir(path, recursive=True)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"OUT: {self.root} cannot be written: {error}") from error

    def open(self, name: str) -> pa.NativeFile:
        """Open a file for reading."""
        filesystem, path = self._at(name)
        return filesystem.open_input_file(path)

    def read_json(self, name: str) -> Any:
        """The JSON at `name`; None when it is absent."""
        filesystem, path = self._at(name)
        if filesystem.get_file_info(path).type != pafs.FileType.File:
            return None
        with filesystem.open_input_file(path) as file:
            return json.loads(file.read())

    def read_footer(self, name: str) -> dict[str, Any]:
        """The facts in a shard's footer."""
        with self.open(name) as file:
            metadata = pq.read_metadata(file).metadata
        assert metadata is not None
        return json.loads(metadata[FOOTER])

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON."""
        content = (json.dumps(value, indent=1) + "\n").encode()
        self.write(name, lambda sink: sink.write(content))

    def write(self, name: str, fill: Callable[[Any], Any]) -> None:
        """Let `fill` write to a temporary file, and rename it."""
        filesystem, path = self._at(name)
        _, temporary = self._at(f"{WORK}/{uuid.uuid4().hex}.tmp")
        with filesystem.open_output_stream(temporary) as sink:
            fill(sink)
        filesystem.move(temporary, path)

    def move(self, name: str, target: str) -> None:
        """Rename a file."""
        filesystem, path = self._at(name)
        filesystem.move(path, self._at(target)[1])

    def remove(self, folder: str) -> None:
        """Remove a folder, if it is there."""
        filesystem, path = self._at(folder)
        if filesystem.get_file_info(path).type == pafs.FileType.Directory:
            filesystem.delete_dir(path)


# ---- Ray -----------------------------------------------------------------------------------------


class OnRay:
    """Runs a function over items as Ray Data tasks, one each, and gives results as they come.

    Uses the Ray of this process; else joins the cluster a job was submitted to (RAY_ADDRESS), else
    starts one on this machine. Leaving the context ends what it began.
    """

    def __init__(self) -> None:
        self._is_mine = False

    def __enter__(self) -> "OnRay":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_mine:
            ray.shutdown()

    def __call__(  # noqa: D102  as Runner
        self, function: Callable[[Any], dict[str, Any]], items: list[Any]
    ) -> Iterator[dict[str, Any]]:
        if not items:
            return
        self._start()
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # they would tear the command's own
        context.execution_options.preserve_order = False
        if hasattr(context, "execution_no_progress_timeout_s"):
            context.execution_no_progress_timeout_s = -1  # a part may be one huge tar

        def call(row: dict[str, Any]) -> dict[str, Any]:
            # An error is a result like others: Ray would bury it in its own frames.
            try:
                return {"result": json.dumps(function(pickle.loads(row["item"]))), "error": ""}
            except RuntimeError as error:
                return {"result": "", "error": str(error)}
            except Exception as error:  # noqa: BLE001  whatever it is, it stops the job
                where = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(where.filename).name}:{where.lineno}"
                return {"result": "", "error": f"{type(error).__name__} at {place}: {error}"}

        try:
            for start in range(0, len(items), TASKS_PLANNED):
                some = [{"item": pickle.dumps(item)} for item in items[start:][:TASKS_PLANNED]]
                dataset = ray.data.from_items(some, override_num_blocks=len(some)).map(call)
                for row in dataset.iter_rows():
                    if row["error"]:
                        raise PrepareFailed(row["error"])
                    yield json.loads(row["result"])
        except RayError as error:
            raise PrepareFailed(f"Ray: {str(error).strip().splitlines()[0]}") from error

    def _start(self) -> None:
        if ray.is_initialized():
            return
        self._is_mine = True
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            if "RAY_ADDRESS" in os.environ:
                ray.init(**quiet)
            else:
                ray.init("local", num_cpus=os.cpu_count(), include_dashboard=False, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"RAY_ADDRESS: no Ray cluster to work on ({error}); unset it to use this machine, "
                "or start one with `ray start --head`"
            ) from error
