"""Tables as Parquet of image paths and captions, of which a task can read a few rows.

Enters: the tables found, column names. Leaves: one listing of all, and its units, whose bytes are
estimated from some images. Must not know: Ray, decoding, how a table is written.
"""

import io
import itertools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.data.layout import SPLIT_NAME, Columns
from pipeline.data.prepare.files import PLACE, Found, above, join
from pipeline.data.prepare.tables import Entry, read_entries
from pipeline.data.prepare.units import Unit, as_utf8
from pipeline.data.storage import open_filesystem
from pipeline.errors import UserError

LISTING_ROWS = 128  # images read at once, each from a file of its own
LISTING_FILE_ROWS = 65_536
SIZES_SAMPLED = 64  # image files of a table whose size is asked, to estimate that of all
LISTED = Columns(image="image", caption="caption")
SCHEMA = pa.schema(
    [("key", pa.string()), ("image", pa.string()), ("caption", pa.list_(pa.string())),
     (SPLIT_NAME, pa.string())]
)  # fmt: skip


def list_tables(found: Found, columns: Columns, images: str, scratch: str) -> list[Unit]:
    """Write every table to `scratch`, as Parquet of image paths and captions; give its units."""
    source, _ = open_filesystem(found.root)
    target, folder = open_filesystem(scratch)
    target.create_dir(folder, recursive=True)
    units: list[Unit] = []
    for number, file in enumerate(found.files):
        base = images or above(join(found.root, file.name))
        try:
            with source.open_input_stream(file.path) as stream:
                text = io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8-sig", newline="")
                entries = read_entries(file.name, text, columns)
                units += _write_listing(entries, base, number, file.name, target, folder)
        except UnicodeDecodeError as error:
            raise UserError(f"{PLACE}: {file.name} is not UTF-8 text ({error})") from error
    if not units:
        raise UserError(f"{PLACE}: {found.files[0].name} lists no pairs")
    average = _average_size(target, units)
    return [replace(unit, bytes=unit.rows * average) for unit in units]


def _write_listing(
    entries: Iterable[Entry],
    base: str,
    number: int,
    name: str,
    filesystem: pafs.FileSystem,
    folder: str,
) -> list[Unit]:
    units: list[Unit] = []
    rows = iter(entries)
    for part in itertools.count():
        some = list(itertools.islice(rows, LISTING_FILE_ROWS))
        if not some:
            return units
        path = f"{folder}/{number:05d}-{part:05d}.parquet"
        listed = [
            {
                "key": as_utf8(entry.key or entry.image or "") or None,
                "image": as_utf8(join(base, entry.image)) if entry.image else None,
                "caption": [as_utf8(caption) for caption in entry.captions],
                SPLIT_NAME: as_utf8(entry.split or "") or None,
            }
            for entry in some
        ]
        with (
            filesystem.open_output_stream(path) as sink,
            pq.ParquetWriter(sink, SCHEMA) as writer,
        ):
            for group, start in enumerate(range(0, len(listed), LISTING_ROWS)):
                chunk = listed[start : start + LISTING_ROWS]
                writer.write_table(pa.Table.from_pylist(chunk, schema=SCHEMA))
                first_row = part * LISTING_FILE_ROWS + start
                units.append(
                    Unit(path=path, name=name, file=number, group=group, first_row=first_row,
                         rows=len(chunk), bytes=0)
                )  # fmt: skip
    raise AssertionError("unreachable")


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
