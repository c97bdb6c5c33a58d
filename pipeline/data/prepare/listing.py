"""Tables as Parquet of image paths and texts, of which a task can read a few rows.

Enters: the tables found, column names. Leaves: one listing of all, and its units, whose bytes are
estimated from some images. Must not know: Ray, decoding, how a table is written.
"""

import io
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.data.layout import SPLIT_NAME, Columns
from pipeline.data.prepare.files import PLACE, File, Found, above, join, question_pair
from pipeline.data.prepare.forms import Around, Entry, Pictures, read_answers
from pipeline.data.prepare.tables import Table, read_table
from pipeline.data.prepare.tasks import Task
from pipeline.data.prepare.units import Unit, as_utf8
from pipeline.data.storage import open_filesystem
from pipeline.errors import UserError

LISTING_ROWS = 128  # images read at once, each from a file of its own
LISTING_FILE_ROWS = 65_536
SIZES_SAMPLED = 64  # image files of a table whose size is asked, to estimate that of all
SECOND = "second"  # the column of second images
LISTED = Columns(image="image", caption="caption")
SCHEMA = pa.schema(
    [("key", pa.string()), ("image", pa.string()), ("caption", pa.list_(pa.string())),
     (SPLIT_NAME, pa.string())]
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """What the tables hold: their forms in words, what their rows are for, and units."""

    forms: tuple[str, ...]
    task: Task
    units: tuple[Unit, ...]


def list_tables(found: Found, columns: Columns, images: str, scratch: str) -> Listing:
    """Write every table to `scratch`, as Parquet of image paths and texts."""
    source, _ = open_filesystem(found.root)
    target, folder = open_filesystem(scratch)
    target.create_dir(folder, recursive=True)
    pair = question_pair(found.files)
    answers = _read_answers(source, pair[1]) if pair else None
    tables: dict[str, Table] = {}
    units: list[Unit] = []
    for number, file in enumerate(found.files):
        if pair and file == pair[1]:
            continue
        base = images or above(join(found.root, file.name))
        around = Around(pictures=Pictures(folder=base), answers=answers)
        with _open_text(source, file) as text:
            table = read_table(file.name, text, columns, around)
            made = _write_listing(table, base, number, file.name, target, folder)
        if made:
            tables[file.name] = table
        units += made
    if not units:
        raise UserError(f"{PLACE}: {found.files[0].name} lists no pairs")
    task = _common_task(tables)
    average = task.num_pictures * _average_size(target, units)
    return Listing(
        forms=tuple(sorted({table.form for table in tables.values()})),
        task=task,
        units=tuple(replace(unit, bytes=unit.rows * average) for unit in units),
    )


@contextmanager
def _open_text(filesystem: pafs.FileSystem, file: File) -> Iterator[io.TextIOWrapper]:
    try:
        with filesystem.open_input_stream(file.path) as stream:
            yield io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8-sig", newline="")
    except UnicodeDecodeError as error:
        raise UserError(f"{PLACE}: {file.name} is not UTF-8 text ({error})") from error


def _read_answers(filesystem: pafs.FileSystem, file: File) -> dict[str, list[str]]:
    with _open_text(filesystem, file) as text:
        try:
            value = json.load(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{PLACE}: {file.name} is not JSON: {error}") from error
    return read_answers(file.name, value)


def _common_task(tables: dict[str, Table]) -> Task:
    (first, table), *others = tables.items()
    for name, other in others:
        if other.task != table.task:
            raise UserError(
                f"{PLACE}: {first} holds {table.form}, but {name} holds {other.form}; prepare each "
                "by itself"
            )
    return table.task


def _write_listing(
    table: Table,
    base: str,
    number: int,
    name: str,
    filesystem: pafs.FileSystem,
    folder: str,
) -> list[Unit]:
    units: list[Unit] = []
    schema = _listing_schema(table.task)
    for part in itertools.count():
        some = list(itertools.islice(table.entries, LISTING_FILE_ROWS))
        if not some:
            return units
        path = f"{folder}/{number:05d}-{part:05d}.parquet"
        listed = [_list_entry(entry, base) for entry in some]
        with (
            filesystem.open_output_stream(path) as sink,
            pq.ParquetWriter(sink, schema) as writer,
        ):
            for group, start in enumerate(range(0, len(listed), LISTING_ROWS)):
                chunk = listed[start : start + LISTING_ROWS]
                writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
                first_row = part * LISTING_FILE_ROWS + start
                units.append(
                    Unit(path=path, name=name, file=number, group=group, first_row=first_row,
                         rows=len(chunk), bytes=0)
                )  # fmt: skip
    raise AssertionError("unreachable")


def _listing_schema(task: Task) -> pa.Schema:
    names = [*task.texts, *([SECOND] if task.num_pictures > 1 else [])]
    return pa.schema([*SCHEMA, *(pa.field(name, pa.string()) for name in names)])


def _list_entry(entry: Entry, base: str) -> dict[str, Any]:
    texts = {name: as_utf8(text) if text else None for name, text in entry.texts.items()}
    return {
        "key": as_utf8(entry.key or entry.image or "") or None,
        "image": as_utf8(join(base, entry.image)) if entry.image else None,
        "caption": [as_utf8(caption) for caption in entry.captions],
        SPLIT_NAME: as_utf8(entry.split or "") or None,
        SECOND: as_utf8(join(base, entry.second)) if entry.second else None,
        **texts,
    }


def _average_size(filesystem: pafs.FileSystem, units: list[Unit]) -> int:
    """Mean bytes of the image files, from some of them; 1 where none is there."""

    def size_of(unit: Unit) -> int | None:
        with filesystem.open_input_file(unit.path) as file:
            table = pq.ParquetFile(file).read_row_group(unit.group, columns=["image"])
        path = next((item for item in table.column("image").to_pylist() if item), None)
        if path is None:
            return None
        where, inner = open_filesystem(path)
        return where.get_file_info(inner).size

    step = -(-len(units) // SIZES_SAMPLED)
    with ThreadPoolExecutor(16) as pool:
        sizes = [size for size in pool.map(size_of, units[::step]) if size]
    return max(1, sum(sizes) // len(sizes)) if sizes else 1
