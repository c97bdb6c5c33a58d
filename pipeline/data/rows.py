"""A row group as a table of one form, whatever its file looks like.

Enters: a Parquet file, the resolved columns. Leaves: images as encoded bytes, captions as text,
the reason why a row has no image. Must not know: Ray, decoding, the order.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.data.layout import SPLIT_NAME, STATUS_NAME, Columns
from pipeline.data.storage import explain, open_filesystem, retried

Absence = Literal["failed_download", "missing_file"]
IMAGES = pa.list_(pa.large_binary())  # large offsets: a window of big pictures passes 2 GiB
CAPTIONS = pa.list_(pa.string())
FILES_AT_ONCE = 16  # images read from paths of their own


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A dropped row: which it is, and why."""

    path: str
    row_group: int
    row: int
    reason: str


def read_rows(
    filesystem: pafs.FileSystem,
    path: str,
    row_group: int,
    columns: Columns,
    labels: Sequence[str] = (),
) -> pa.Table:
    """Read the rows of the chosen split of one row group.

    Columns: `row` (its number in the row group), `image` (list of encoded images, of which one is
    to be drawn), `caption` (list, likewise), `absence` (why there is no image, where the file says
    so), `label/NAME`; of a task `answer`, as the file has it. Those of a column that `columns` does
    not name are missing. Raises RuntimeError that names file and row group when it cannot be read.
    """
    names = [name for name in (columns.image, columns.caption) if name] + [*labels]
    names += [SPLIT_NAME] * bool(columns.split) + [STATUS_NAME] * columns.status
    names += [] if columns.answer is None else [columns.answer]

    def read() -> pa.Table:
        with filesystem.open_input_file(path) as file:
            wanted = list(dict.fromkeys(names))
            return pq.ParquetFile(file).read_row_group(row_group, columns=wanted)

    try:
        table = retried(read, f"{path}: row group {row_group}", filesystem)
    except (OSError, pa.ArrowException) as error:
        message = f"{path}: row group {row_group} cannot be read: {explain(error)}"
        raise RuntimeError(message) from error
    rows = np.arange(table.num_rows)
    if columns.split:
        kept = pc.is_in(table.column(SPLIT_NAME).cast(pa.string()), pa.array(columns.split))  # pyright: ignore[reportAttributeAccessIssue]
        table = table.filter(kept)
        rows = rows[kept.to_numpy(zero_copy_only=False).astype(bool)]
    result: dict[str, pa.Array | pa.ChunkedArray] = {"row": pa.array(rows)}
    if columns.image:
        result["image"], result["absence"] = _images(filesystem, path, table, columns)
    if columns.caption:
        result["caption"] = _captions(table.column(columns.caption))
    if columns.answer is not None:
        result["answer"] = table.column(columns.answer)
    for label in labels:
        result[f"label/{label}"] = table.column(label).cast(pa.string())
    return pa.table(result)


def _captions(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """One type for captions given as text or as a list of texts, so that shards may differ."""
    if _is_list(column.type):
        return column.cast(CAPTIONS)
    return _as_lists(column.cast(pa.string()), CAPTIONS)


def _images(
    filesystem: pafs.FileSystem, path: str, table: pa.Table, columns: Columns
) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    column = table.column(columns.image)
    absence: list[Absence | None] = [None] * len(column)
    paths = _paths(column)
    if any(paths):
        column, missing = _fetch(filesystem, path, column, paths)
        for row in missing:
            absence[row] = "missing_file"
    if _is_list(column.type):
        kind = column.type.value_type
        if pa.types.is_struct(kind):
            chunks = [_bytes_of_lists(chunk) for chunk in column.chunks]
            column = pa.chunked_array(chunks, type=IMAGES)
        images = column.cast(IMAGES)
    else:
        if pa.types.is_struct(column.type):
            column = pc.struct_field(column, "bytes")  # pyright: ignore[reportAttributeAccessIssue]
        images = _as_lists(column.cast(pa.large_binary()), IMAGES)
    if columns.status:
        status = table.column(STATUS_NAME).cast(pa.string()).to_pylist()
        nulls = column.is_null().to_pylist()
        for row, (said, is_null) in enumerate(zip(status, nulls, strict=True)):
            if is_null and said is not None and said.startswith("failed"):
                absence[row] = "failed_download"
    return images, pa.chunked_array([pa.array(absence, pa.string())])


def _bytes_of_lists(chunk: pa.Array) -> pa.Array:
    flat = pc.struct_field(chunk.flatten(), "bytes")  # pyright: ignore[reportAttributeAccessIssue]
    lengths = pc.fill_null(pc.list_value_length(chunk), 0)  # pyright: ignore[reportAttributeAccessIssue]
    offsets = np.concatenate([[0], np.cumsum(lengths.to_numpy(zero_copy_only=False))])
    return pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), flat.cast(pa.large_binary())
    )


def _paths(column: pa.ChunkedArray) -> list[str | None]:
    """The path of each row whose bytes are not in the table; None where they are, or nothing is."""
    kind = column.type
    if pa.types.is_struct(kind) and any(field.name == "path" for field in kind):
        has_bytes = pc.struct_field(column, "bytes").is_valid()  # pyright: ignore[reportAttributeAccessIssue]
        paths = pc.struct_field(column, "path").cast(pa.string())  # pyright: ignore[reportAttributeAccessIssue]
        return [
            None if inside else path
            for inside, path in zip(has_bytes.to_pylist(), paths.to_pylist(), strict=True)
        ]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_nested(kind):
        return [None] * len(column)
    return column.cast(pa.string()).to_pylist()


def _fetch(
    filesystem: pafs.FileSystem, shard: str, column: pa.ChunkedArray, paths: list[str | None]
) -> tuple[pa.ChunkedArray, list[int]]:
    """Read the files at `paths`, which are relative to the shard's folder, absolute, or URLs.

    Gives the column with their bytes, and the rows whose file is not there.
    """
    folder = PurePosixPath(shard).parent

    def read(path: str | None) -> bytes | None:
        if path is None:
            return None
        if "://" in path:
            where, inner = open_filesystem(path)
        else:
            where, inner = filesystem, str(folder / path)

        def content() -> bytes:
            with where.open_input_file(inner) as file:
                return file.read()

        try:
            return retried(content, inner, where)
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException) as error:
            # Not the row's fault: to drop it would lose a good one to a bad moment.
            raise RuntimeError(f"{inner}: cannot be read: {explain(error)}") from error

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        fetched = list(pool.map(read, paths))
    if pa.types.is_struct(column.type):
        inside = pc.struct_field(column, "bytes").to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
        fetched = [own if path is None else found
                   for own, path, found in zip(inside, paths, fetched, strict=True)]  # fmt: skip
    missing = [row for row, path in enumerate(paths) if path is not None and fetched[row] is None]
    return pa.chunked_array([pa.array(fetched, pa.large_binary())]), missing


def _as_lists(column: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray:
    """Lists of one element."""
    chunks = [
        pa.ListArray.from_arrays(pa.array(np.arange(len(chunk) + 1, dtype=np.int32)), chunk)
        for chunk in column.chunks
    ]
    return pa.chunked_array(chunks, type=target)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)
