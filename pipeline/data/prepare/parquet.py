"""Pairs in Parquet of any layout, and listings of tables: a unit is a row group.

Enters: the files found, column names; then a unit. Leaves: the resolved columns and units; then
rows. Must not know: Ray, decoding, the other forms.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.data.layout import SPLIT_NAME, Columns, as_captions, read_catalog
from pipeline.data.prepare.files import PLACE, Found
from pipeline.data.prepare.units import KEY_NAMES, SourceRow, Unit, damaged
from pipeline.data.rows import read_rows
from pipeline.data.storage import retried
from pipeline.errors import UserError


def parquet_units(found: Found, image: str, caption: str) -> tuple[Columns, list[Unit]]:
    """The columns that hold image and caption, and every row group as a unit."""
    try:
        catalog = read_catalog(found.path, PLACE, image, caption, split="all")
    except UserError as error:
        text = str(error).replace("data.image_column", "--image-column")
        raise UserError(text.replace("data.caption_column", "--caption-column")) from error
    names = {file.path: file.name for file in found.files}
    units: list[Unit] = []
    for number, shard in enumerate(catalog.shards):
        starts = itertools.accumulate(shard.row_groups, initial=0)
        for group, (rows, start) in enumerate(zip(shard.row_groups, starts, strict=False)):
            units.append(
                Unit(
                    path=shard.path,
                    name=names.get(shard.path, shard.path),
                    file=number,
                    group=group,
                    first_row=start,
                    rows=rows,
                    bytes=shard.group_bytes[group],
                )
            )
    return catalog.sources[0].columns, units


def group_rows(
    filesystem: pafs.FileSystem,
    columns: Columns,
    unit: Unit,
    texts: tuple[str, ...] = (),
    second: str | None = None,
) -> Iterator[SourceRow]:
    """The rows of a row group; each is damaged where the group is.

    `texts` are further columns to be read; `second` is that of the second image of every row.
    """
    labels = _labels(filesystem, unit.path)
    try:
        table = read_rows(filesystem, unit.path, unit.group, columns, [*labels, *texts])
        other = None
        if second is not None:
            there = replace(columns, image=second)
            other = read_rows(filesystem, unit.path, unit.group, there)
    except RuntimeError as error:
        # A bad moment of the storage must not drop rows: only a whole local file is surely damaged.
        cause = error.__cause__
        is_local = isinstance(filesystem, pafs.LocalFileSystem)
        if not is_local or (isinstance(cause, OSError) and cause.errno is not None):
            raise
        for row in range(unit.first_row, unit.first_row + unit.rows):
            yield damaged(unit, row, f"{unit.name}:{row}")
        return
    blank = pa.nulls(table.num_rows, pa.string())
    keys = [table.column(f"label/{name}") for name in labels if name != SPLIT_NAME]
    splits = table.column(f"label/{SPLIT_NAME}") if SPLIT_NAME in labels else blank
    images, captions, absences = (
        table.column(name) for name in ("image", "caption", "absence")
    )  # fmt: skip
    for index, number in enumerate(table.column("row").to_pylist()):
        row = unit.first_row + number
        key = keys[0][index].as_py() if keys else None
        found = SourceRow(
            unit=unit,
            row=row,
            key=f"{unit.name}:{row}" if key is None else key,
            images=images[index].as_py() or [],
            captions=as_captions(captions[index].as_py()),
            split=splits[index].as_py(),
            absence=absences[index].as_py(),
            texts={name: table.column(f"label/{name}")[index].as_py() for name in texts},
        )
        yield found if other is None else _with_second(found, other, index)


def _with_second(row: SourceRow, other: pa.Table, index: int) -> SourceRow:
    """The row with its second image; where one was not even named, that is why it has none."""
    images = [*row.images, *(other.column("image")[index].as_py() or [])]
    absence = row.absence or other.column("absence")[index].as_py()
    if absence is None and None in images:
        absence = "not_two_images"
    return replace(row, images=images, absence=absence)


def _labels(filesystem: pafs.FileSystem, path: str) -> list[str]:
    """The column that identifies rows of this file, and a column `split` of text."""
    kinds = _read_kinds(filesystem, path)
    has_split = SPLIT_NAME in kinds and not pa.types.is_nested(kinds[SPLIT_NAME])
    return [*_keys(kinds), *([SPLIT_NAME] if has_split else [])]


def key_columns(filesystem: pafs.FileSystem, path: str) -> list[str]:
    """The column that identifies rows of this file, or none."""
    return _keys(_read_kinds(filesystem, path))


def _read_kinds(filesystem: pafs.FileSystem, path: str) -> dict[str, pa.DataType]:
    """The type of each column whose name is its alone."""

    def read() -> pa.Schema:
        with filesystem.open_input_file(path) as file:
            return pq.read_schema(file)

    schema = retried(read, path, filesystem)
    return {name: schema.field(name).type for name in schema.names if schema.names.count(name) == 1}


def _keys(kinds: dict[str, pa.DataType]) -> list[str]:
    keys = [
        name
        for name in KEY_NAMES
        if name in kinds and not (pa.types.is_nested(kinds[name]) or _is_bytes(kinds[name]))
    ]
    return keys[:1]


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
