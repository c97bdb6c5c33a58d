"""What lies at a path: Parquet shards, their row groups, and which columns hold image and caption.

Enters: a folder, file, glob or URL. Leaves: `Catalog`, or a `UserError` that says what is there
and what to do. Reads footers only. Must not know: Ray, decoding, the model.
"""

import glob
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.errors import UserError

IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes", "content")
CAPTION_NAMES = (
    "caption", "captions", "text", "txt", "TEXT", "title", "alt_text", "raw", "sentence",
    "caption_0",
)  # fmt: skip
URL_NAMES = ("url", "URL", "image_url")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One Parquet file: its path on the catalog's filesystem, bytes, rows of each row group."""

    path: str
    size: int
    row_groups: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """The resolved columns: names, and whether they were found or given."""

    image: str
    caption: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalog:
    """All shards at `root` in path order, with the resolved columns."""

    root: str
    shards: tuple[Shard, ...]
    columns: Columns
    names: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Rows in all shards, usable or not."""
        return sum(sum(shard.row_groups) for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)

    @property
    def digest(self) -> str:
        """Twelve hex digits that change when a shard appears, vanishes, or changes its shape."""
        text = "\n".join(
            f"{PurePosixPath(shard.path).name} {shard.size} {shard.row_groups}"
            for shard in self.shards
        )
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def describe(self) -> str:
        """One sentence: rows, shards, and the columns in use."""
        return (
            f"{self.num_rows:,} rows in {len(self.shards)} Parquet shard(s) at {self.root} "
            f"({self.num_bytes / 1e6:,.1f} MB); image column '{self.columns.image}', "
            f"caption column '{self.columns.caption}'"
        )


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """Give the filesystem of `path` (local or URL) and the path on it."""
    if "://" in path:
        return pafs.FileSystem.from_uri(path)
    return pafs.LocalFileSystem(), str(Path(path).absolute())


def read_catalog(
    path: str, place: str, image: str = "auto", caption: str = "auto", labels: Sequence[str] = ()
) -> Catalog:
    """List the Parquet shards at `path` and resolve their columns.

    `place` (the config path, e.g. data.train) opens every error. `labels` are further columns that
    must be there. Raises `UserError` for a missing path, no Parquet, unreadable files, or columns
    that cannot be resolved.
    """
    filesystem, paths = _find(path, place)
    with ThreadPoolExecutor(16) as pool:
        footers = list(pool.map(lambda item: _footer(filesystem, item, place), paths))
    columns = resolve_columns(footers[0][1], paths[0], place, image, caption)
    for (_, schema), item in zip(footers, paths, strict=True):
        _check_columns(schema, item, place, columns, labels)
    shards = tuple(shard for shard, _ in footers)
    catalog = Catalog(root=path, shards=shards, columns=columns, names=tuple(footers[0][1].names))
    if catalog.num_rows == 0:
        raise UserError(f"{place}: {path} holds Parquet files but no rows")
    return catalog


def _check_columns(
    schema: pa.Schema, path: str, place: str, columns: Columns, labels: Sequence[str]
) -> None:
    """Every shard must hold the chosen columns, once, with types that can be read."""
    wanted = {columns.image: _holds_image, columns.caption: _holds_caption}
    for name in (columns.image, columns.caption, *labels):
        count = schema.names.count(name)
        if count != 1:
            raise UserError(
                f"{place}: {path} has {'no column' if not count else f'{count} columns'} '{name}' "
                f"(it has {schema.names}); every shard needs it once: set the column in the "
                "config, or remove the file"
            )
        kind = schema.field(name).type
        if not wanted.get(name, _holds_label)(kind):
            raise UserError(
                f"{place}: column '{name}' of {path} is {kind}, which cannot be used here; "
                "name another column, or remove the file"
            )


def _find(path: str, place: str) -> tuple[pafs.FileSystem, list[str]]:
    is_glob = any(character in path for character in "*?[") and not Path(path).exists()
    if "://" not in path and is_glob:
        matches = sorted(str(Path(item).absolute()) for item in glob.glob(path, recursive=True))  # noqa: PTH207  the pattern may be absolute
        found: list[str] = []
        for match in matches:
            if Path(match).name.startswith((".", "_")):
                continue
            found += _find(match, place)[1] if Path(match).is_dir() else [match]
        if not found:
            raise UserError(f"{place}: no file matches {path}")
        return pafs.LocalFileSystem(), found
    try:
        filesystem, inner = open_filesystem(path)
        info = filesystem.get_file_info(inner)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{place}: {path} cannot be reached: {error}") from error
    if info.type == pafs.FileType.NotFound:
        raise UserError(f"{place}: {path} does not exist; give a folder or file of Parquet")
    if info.type == pafs.FileType.File:
        return filesystem, [inner]
    listed = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
    files = sorted(item.path for item in listed if item.type == pafs.FileType.File)
    found = [item for item in files if item.endswith(".parquet") and not _is_hidden(item, inner)]
    if not found:
        seen = sorted({PurePosixPath(item).suffix or PurePosixPath(item).name for item in files})
        raise UserError(
            f"{place}: no .parquet file under {path}; found {len(files)} file(s) "
            f"of kind {seen[:8]}. Pairs are read from Parquet with the encoded image in a column"
        )
    return filesystem, found


def _is_hidden(path: str, root: str) -> bool:
    return any(part[0] in "._" for part in PurePosixPath(path).relative_to(root).parts)


def _footer(filesystem: pafs.FileSystem, path: str, place: str) -> tuple[Shard, pa.Schema]:
    try:
        with filesystem.open_input_file(path) as file:
            size = file.size()
            metadata = pq.read_metadata(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{place}: {path} is not readable Parquet: {error}") from error
    groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    return Shard(path=path, size=size, row_groups=groups), metadata.schema.to_arrow_schema()


def resolve_columns(
    schema: pa.Schema, path: str, place: str, image: str = "auto", caption: str = "auto"
) -> Columns:
    """Choose the image and the caption column of `schema`; given names win over the known ones."""
    return Columns(
        image=_resolve(schema, path, place, "image", image, IMAGE_NAMES),
        caption=_resolve(schema, path, place, "caption", caption, CAPTION_NAMES),
    )


def _resolve(
    schema: pa.Schema, path: str, place: str, role: str, given: str, known: tuple[str, ...]
) -> str:
    fits = _holds_image if role == "image" else _holds_caption
    wanted = "binary or struct<bytes, path>" if role == "image" else "string or list<string>"
    listing = ", ".join(f"{field.name}: {field.type}" for field in schema)
    if given != "auto":
        if given not in schema.names:
            raise UserError(
                f"data.{role}_column: '{given}' is not in {path}; its columns are {listing}"
            )
        if not fits(schema.field(given).type):
            raise UserError(
                f"data.{role}_column: '{given}' in {path} is {schema.field(given).type}; "
                f"it must be {wanted}"
            )
        return given
    for name in known:
        if schema.names.count(name) == 1 and fits(schema.field(name).type):
            return name
    urls = [name for name in URL_NAMES if name in schema.names]
    if role == "image" and urls:
        raise UserError(
            f"{place}: {path} holds links (column '{urls[0]}') but no pixels; download the images "
            f"first, e.g. img2dataset --url_list {path} --input_format parquet "
            f"--url_col {urls[0]} --output_format parquet, and give its output"
        )
    raise UserError(
        f"{place}: no {role} column in {path}; its columns are {listing}. Looked for {list(known)} "
        f"of type {wanted}; name yours with data.{role}_column=..."
    )


def _holds_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_caption(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()


def _holds_label(kind: pa.DataType) -> bool:
    return not pa.types.is_nested(kind) and not pa.types.is_binary(kind)


def read_captions(catalog: Catalog, most: int) -> list[str]:
    """Read up to about `most` captions, spread evenly over the shards (for a tokenizer)."""
    filesystem, _ = open_filesystem(catalog.root)
    share = max(1, most // len(catalog.shards))
    captions: list[str] = []
    for shard in catalog.shards:
        enough = len(captions) + share
        for group in range(len(shard.row_groups)):
            column = _read_column(filesystem, shard, catalog.columns.caption, group)
            captions.extend(text for item in column.to_pylist() for text in as_captions(item))
            if len(captions) >= enough:
                del captions[enough:]
                break
    return captions


def read_classes(catalog: Catalog, column: str) -> list[str]:
    """Give the distinct non-null values of a label column, sorted, as text."""
    filesystem, _ = open_filesystem(catalog.root)
    values: set[str] = set()
    for shard in catalog.shards:
        # Arrow's text of a value, as the stream gives it: 1.0 is "1", True is "true".
        found = _read_column(filesystem, shard, column).unique().cast(pa.string()).to_pylist()
        values.update(value for value in found if value is not None)
    return sorted(values)


def _read_column(
    filesystem: pafs.FileSystem, shard: Shard, column: str, group: int | None = None
) -> pa.ChunkedArray:
    """Read one column of a shard, or of one of its row groups."""
    try:
        with filesystem.open_input_file(shard.path) as file:
            parquet = pq.ParquetFile(file)
            groups = range(parquet.num_row_groups) if group is None else [group]
            return parquet.read_row_groups(list(groups), columns=[column]).column(0)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{shard.path}: column '{column}' cannot be read ({error}); the file is damaged: "
            "restore or remove it"
        ) from error


def as_captions(value: object) -> list[str]:
    """Give the usable captions of a cell: stripped, empty ones left out."""
    items = value if isinstance(value, list) else [value]
    return [text for item in items if isinstance(item, str) and (text := " ".join(item.split()))]
