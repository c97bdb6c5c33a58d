"""Second pass: a run of buckets, collected from all parts -> a shard.

Enters: the parts of the first pass. Leaves: for each shard a Parquet file in the rows' order, its
facts in its footer. Must not know: the source, decoding, Ray.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.prepare.store import SHARDS, Store, name_part
from pipeline.data.prepare.tasks import CAPTIONS, LABEL, Task, picture_bytes, pictures_of

FOOTER = b"gammaray"
FOOTERS_AT_ONCE = 32  # an object store answers each after tens of milliseconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A run of buckets: for each, its record batches as (part, index)."""

    number: int
    rows: int
    buckets: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def name(self) -> str:
        """Its name in OUT."""
        return f"part-{self.number:05d}.parquet"

    @property
    def weight(self) -> int:
        """Rows to be written."""
        return self.rows


def plan_shards(summaries: list[dict[str, Any]], size: int) -> list[Shard]:
    """Neighbouring buckets in shards of like size, at most `size` bytes and a bucket."""
    batches: dict[int, list[tuple[int, int]]] = {}
    rows: Counter[int] = Counter()
    weight: Counter[int] = Counter()
    for summary in summaries:
        for index, (bucket, count, num_bytes) in enumerate(summary["batches"]):
            batches.setdefault(bucket, []).append((summary["number"], index))
            rows[bucket] += count
            weight[bucket] += num_bytes
    total = sum(weight.values())
    target = total / max(1, -(-total // size))
    runs: list[list[int]] = [[]]
    before = 0
    for bucket in sorted(batches):
        if runs[-1] and before >= len(runs) * target:
            runs.append([])
        runs[-1].append(bucket)
        before += weight[bucket]
    return [
        Shard(
            number=number,
            rows=sum(rows[bucket] for bucket in buckets),
            buckets=tuple(tuple(batches[bucket]) for bucket in buckets),
        )
        for number, buckets in enumerate(runs)
    ]


class Named(Protocol):
    """What becomes a file of its own in OUT."""

    @property
    def number(self) -> int:
        """Its number among all."""
        ...

    @property
    def name(self) -> str:
        """The file's name."""
        ...


def read_shards(store: Store, shards: Sequence[Named]) -> dict[int, dict[str, Any]]:
    """The facts of the shards that are made, shown already or not, by number."""
    places = {name: f"{SHARDS}/{name}" for name in store.names(SHARDS)}
    places |= {name: name for name in store.names("") if name.endswith(".parquet")}
    there = [shard for shard in shards if shard.name in places]
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        found = list(pool.map(lambda shard: _read_footer(store, places[shard.name]), there))
    return {shard.number: facts for shard, facts in zip(there, found, strict=True)}


def _read_footer(store: Store, name: str) -> dict[str, Any]:
    with store.open(name) as file:
        metadata = pq.read_metadata(file).metadata
    assert metadata is not None
    return json.loads(metadata[FOOTER])


@dataclass(frozen=True, kw_only=True, slots=True)
class Gather:
    """Makes a shard; its facts are in its footer, under FOOTER."""

    store: Store
    row_group: int  # bytes of images, at most
    has_lists: bool  # whether a pair has several captions
    has_split: bool
    task: Task = CAPTIONS

    def __call__(self, shard: Shard) -> dict[str, Any]:
        """Write the shard; give its facts."""
        schema = self._schema()
        text = [field.name for field in schema if field.type == pa.string()]
        # Any, since pyarrow's annotations do not know that each option can be given per column.
        options: dict[str, Any] = {
            "compression": {
                _leaf(field): "none" if field.name in ("image", "images") else "zstd"
                for field in schema
            },
            "use_dictionary": ["split", LABEL],
            "write_statistics": [name for name in text if name != self.task.said],
        }
        content = hashlib.sha256()
        facts = {"number": shard.number, "name": shard.name, "rows": 0, "image_bytes": 0}

        def write(sink: Any) -> None:
            with pq.ParquetWriter(sink, schema, **options) as writer:
                for rows in self._row_groups(shard):
                    for row in rows:
                        _hash_row(content, row, self.task)
                        facts["image_bytes"] += picture_bytes(row)
                    facts["rows"] += len(rows)
                    writer.write_table(self._table(rows, schema))
                facts["digest"] = content.hexdigest()
                writer.add_key_value_metadata({FOOTER.decode(): json.dumps(facts)})

        self.store.write(f"{SHARDS}/{shard.name}", write)
        return facts

    def _schema(self) -> pa.Schema:
        text, task = pa.string(), self.task
        pictures, *sides = task.picture_fields(pa.binary())
        fields = [
            pa.field("key", text),
            pictures,
            *(pa.field(name, text) for name in task.texts),
            *([pa.field(task.several, self._several_type())] if task.several else []),
            *sides,
        ]
        fields = [field.with_nullable(field.name == "question_id") for field in fields]
        return pa.schema([*fields, pa.field("split", text)] if self.has_split else fields)

    def _several_type(self) -> pa.DataType:
        return pa.string() if self._is_single else pa.list_(pa.string())

    @property
    def _is_single(self) -> bool:
        """Whether every pair has one caption, which then is no list."""
        return self.task == CAPTIONS and not self.has_lists

    def _row_groups(self, shard: Shard) -> Iterator[list[dict[str, Any]]]:
        """All rows in order, cut so that no group passes the limit (but a single larger row)."""
        rows: list[dict[str, Any]] = []
        size = 0
        for batches in shard.buckets:
            for row in self._sorted(batches):
                if rows and size + picture_bytes(row) > self.row_group:
                    yield rows
                    rows, size = [], 0
                rows.append(row)
                size += picture_bytes(row)
        if rows:
            yield rows

    def _sorted(self, batches: tuple[tuple[int, int], ...]) -> Iterator[dict[str, Any]]:
        """The rows of one bucket."""
        found: list[pa.RecordBatch] = []
        for part, group in itertools.groupby(batches, lambda batch: batch[0]):
            with (
                self.store.open(f"{name_part(part)}.arrow") as file,
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
        if self._is_single:
            columns["caption"] = [captions[0] for captions in columns["caption"]]
        return pa.table(columns, schema=schema)


def _leaf(field: pa.Field) -> str:
    """The name that Parquet gives the column of values."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name


def _hash_row(content: Any, row: dict[str, Any], task: Task) -> None:
    texts = [row["key"], row["split"] or "", *(row[name] or "" for name in task.texts)]
    texts += row[task.several] if task.several else []
    fields = [*(text.encode() for text in texts), *pictures_of(row)]
    # Lengths first, so that no two rows give the same bytes.
    content.update(" ".join(str(len(item)) for item in fields).encode() + b"\n")
    for item in fields:
        content.update(item)
