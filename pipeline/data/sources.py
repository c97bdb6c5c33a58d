"""Pairs in the forms that people have them: Parquet, WebDataset tars, CSV and TSV, JSON.

Enters: a folder, file, glob or URL. Leaves: an `Origin`, which says what is read at once, and its
rows with their encoded images; or a `UserError` that says what is there and what to do.
Must not know: Ray, decoding, the shards that are written.
"""

import csv
import glob
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.data.layout import (
    CAPTION_NAMES,
    IMAGE_NAMES,
    SPLIT_NAME,
    SPLITS,
    URL_NAMES,
    Columns,
    as_captions,
    read_catalog,
)
from pipeline.data.rows import read_rows
from pipeline.data.storage import open_filesystem, retried
from pipeline.errors import UserError

Form = Literal["parquet", "webdataset", "table"]
Reason = Literal["damaged_file"]

PLACE = "IN"
KEY_NAMES = ("uid", "key", "__key__", "id", "SAMPLE_ID", "img_id", "image_id", "sha256")
PATH_NAMES = (
    *IMAGE_NAMES, "image_path", "filepath", "file_path", "file_name", "filename", "path",
)  # fmt: skip
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
TAR_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
ENTAILMENT = {"entailment", "neutral", "contradiction"}
LISTING_ROWS = 128  # images read at once, each from a file of its own
LISTING_FILE_ROWS = 65_536
SIZES_SAMPLED = 64  # image files of a table whose size is asked, to estimate that of all
TAR_CHUNK = 2**20
TAR_PADDING = 2**16  # zeros that may follow the last member


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """What is read at once: one row group, or one tar.

    `name` is the file as it is reported, `file` its number among the source's; `first_row` its
    first row's number there. `rows` is 0 for a tar: only reading it tells.
    """

    path: str
    name: str
    file: int
    group: int
    first_row: int
    rows: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """One row, named by `unit` and `row`. `absence`: why it has no image, where that is known."""

    unit: Unit
    row: int
    key: str
    images: list[bytes | None]
    captions: list[str]
    split: str | None
    absence: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """Reads units; small, since every task gets one. `root` opens the files' filesystem."""

    form: Form
    root: str
    columns: Columns

    def rows(self, unit: Unit) -> Iterator[SourceRow]:
        """Give the rows of `unit` in order. What is damaged in it is a row with that reason."""
        return _tar_rows(self, unit) if self.form == "webdataset" else _group_rows(self, unit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """All that is to be read. `digest` changes when a file appears, vanishes or changes."""

    path: str
    reader: Reader
    units: tuple[Unit, ...]
    digest: str
    num_files: int
    num_bytes: int

    def describe(self) -> str:
        """One sentence: which files, and which columns."""
        size = f"{self.num_bytes / 1e6:,.1f} MB"
        if self.reader.form == "table":
            return f"{self.num_files} table(s) at {self.path}, of about {size} of images"
        if self.reader.form == "webdataset":
            return f"{self.num_files} WebDataset tar(s) at {self.path} ({size})"
        columns = self.reader.columns
        return (
            f"{self.num_files} Parquet file(s) at {self.path} ({size}); image column "
            f"'{columns.image}', caption column '{columns.caption}'"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """One file: its path on its filesystem, its name below the source's folder, bytes, date."""

    path: str
    name: str
    size: int
    changed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The files at `path` that hold pairs, all of one form, below the folder `root`."""

    path: str
    root: str
    form: Form
    files: tuple[File, ...]

    @property
    def digest(self) -> str:
        """Changes when a file appears, vanishes, or changes its size or date."""
        lines = (f"{file.name} {file.size} {file.changed}" for file in self.files)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def find_files(path: str) -> Found:
    """Find out which files at `path` hold pairs. Raises `UserError`."""
    root, files = _list_files(path)
    form, files = _choose_form(path, files)
    _refuse_mixed_splits(path, files)
    return Found(path=path, root=root, form=form, files=tuple(files))


def open_origin(found: Found, *, image: str, caption: str, images: str, scratch: str) -> Origin:
    """Resolve the columns, and cut what was found into units.

    `image` and `caption` name columns, or are auto; `images` is the folder that a table's paths are
    relative to, or empty: the table's own. Tables are written to folder `scratch` as Parquet, so
    that tasks can read a few rows of them. Raises `UserError`.
    """
    if images and found.form != "table":
        raise UserError(
            f"--images: is {images}, but {found.path} holds {found.form}, whose images are inside; "
            "leave it out"
        )
    columns = Columns(image=image, caption=caption)
    if found.form == "parquet":
        columns, units = _parquet_units(found, image, caption)
        root = found.path
    elif found.form == "webdataset":
        root = found.path
        units = [
            Unit(
                path=file.path,
                name=file.name,
                file=number,
                group=0,
                first_row=0,
                rows=0,
                bytes=file.size,
            )
            for number, file in enumerate(found.files)
        ]
    else:
        root = scratch
        units = _list_tables(found, columns, images, scratch)
        columns = LISTED
    return Origin(
        path=found.path,
        reader=Reader(form=found.form, root=root, columns=columns),
        units=tuple(units),
        digest=found.digest,
        num_files=len(found.files),
        num_bytes=sum(unit.bytes for unit in units),
    )


# ---- what is there -------------------------------------------------------------------------------


def _list_files(path: str) -> tuple[str, list[File]]:
    """The folder at or above `path`, as given, and all files under it."""
    is_glob = any(character in path for character in "*?[") and not Path(path).exists()
    try:
        if "://" not in path and is_glob:
            found = sorted(Path(item).absolute() for item in glob.glob(path, recursive=True))  # noqa: PTH207  the pattern may be absolute
            paths = [item for item in found if item.is_file()]
            if not paths:
                raise UserError(f"{PLACE}: no file matches {path}")
            root = os.path.commonpath([item.parent for item in paths])
            infos = pafs.LocalFileSystem().get_file_info([str(item) for item in paths])
            return root, [_as_file(info, root) for info in infos]
        filesystem, inner = open_filesystem(path)
        info = filesystem.get_file_info(inner)
        if info.type == pafs.FileType.NotFound:
            raise UserError(f"{PLACE}: {path} does not exist")
        if info.type == pafs.FileType.File:
            parent = _above(path)
            return parent, [_as_file(info, str(PurePosixPath(inner).parent))]
        listed = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{PLACE}: {path} cannot be reached: {error}") from error
    files = [_as_file(item, inner) for item in listed if item.type == pafs.FileType.File]
    shown = [file for file in files if not _is_hidden(file.name)]
    return path, sorted(shown, key=lambda file: file.name)


def _as_file(info: pafs.FileInfo, root: str) -> File:
    name = PurePosixPath(info.path).relative_to(root).as_posix()
    return File(path=info.path, name=name, size=info.size or 0, changed=info.mtime_ns or 0)


def _is_hidden(name: str) -> bool:
    return any(part[0] in "._" for part in PurePosixPath(name).parts)


def _above(path: str) -> str:
    """The folder of a file, as a path or URL."""
    if "://" not in path:
        return str(Path(path).absolute().parent)
    parts = urlsplit(path)
    return parts._replace(path=parts.path.rpartition("/")[0]).geturl()


def _join(folder: str, path: str) -> str:
    """`path` seen from `folder`, which may be a URL with a query."""
    if "://" in path or path.startswith("/"):
        return path
    if "://" not in folder:
        return str(Path(folder).absolute() / path)
    parts = urlsplit(folder)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{path}").geturl()


def _choose_form(path: str, files: list[File]) -> tuple[Form, list[File]]:
    tars = [file for file in files if file.name.endswith(TAR_SUFFIXES)]
    parquet = [file for file in files if file.name.endswith(".parquet")]
    tables = [
        file
        for file in files
        if file.name.lower().endswith(TABLE_SUFFIXES) and not file.name.endswith("_stats.json")
    ]
    if tars:
        # img2dataset writes an index of each tar beside it, without pixels.
        stems = {file.name.partition(".")[0] for file in tars}
        others = [file.name for file in parquet if file.name.partition(".")[0] not in stems]
        if others:
            raise UserError(
                f"{PLACE}: {path} holds tars and also Parquet ({others[0]}); give one kind, with a "
                "pattern such as 'FOLDER/*.tar'"
            )
        return "webdataset", tars
    if parquet:
        return "parquet", parquet
    if len(tables) > 1 and not any(character in path for character in "*?["):
        raise UserError(
            f"{PLACE}: {path} holds {len(tables)} tables ({', '.join(t.name for t in tables[:4])}"
            f"{', ...' if len(tables) > 4 else ''}); give one, or a pattern of those that belong "
            "together, such as 'FOLDER/*.csv'"
        )
    if tables:
        return "table", tables
    kinds = sorted({PurePosixPath(file.name).suffix or file.name for file in files})
    pictures = {f".{name}" for name in TAR_IMAGES} & set(kinds)
    raise UserError(
        f"{PLACE}: {path} holds {len(files)} file(s) of kind {kinds[:8]}, and no Parquet, tar, "
        "CSV, TSV, JSON or JSONL"
        + ("; write a CSV with the columns image and caption" if pictures else "")
    )


def _refuse_mixed_splits(path: str, files: list[File]) -> None:
    """Folders or files named for splits must not end in one set unseen."""
    names = sorted({name for group in SPLITS.values() for names in group for name in names})
    pattern = re.compile(rf"(?:^|/)({'|'.join(names)})(?=[-_./0-9])")
    found = {match[1]: file.name for file in files if (match := pattern.search(file.name))}
    if len(found) > 1:
        example = next(iter(found.values()))
        raise UserError(
            f"{PLACE}: {path} holds the splits {sorted(found)} (e.g. {example}), which would "
            "become one set; prepare each by itself, giving its folder or a pattern such as "
            "'FOLDER/train-*'"
        )


# ---- Parquet -------------------------------------------------------------------------------------


def _parquet_units(found: Found, image: str, caption: str) -> tuple[Columns, list[Unit]]:
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


def _group_rows(reader: Reader, unit: Unit) -> Iterator[SourceRow]:
    filesystem, _ = open_filesystem(reader.root)
    labels = _labels(filesystem, unit.path)
    try:
        table = read_rows(filesystem, unit.path, unit.group, reader.columns, labels)
    except RuntimeError as error:
        # A bad moment of the storage must not drop rows: only a whole local file is surely damaged.
        cause = error.__cause__
        is_local = isinstance(filesystem, pafs.LocalFileSystem)
        if not is_local or (isinstance(cause, OSError) and cause.errno is not None):
            raise
        for row in range(unit.first_row, unit.first_row + unit.rows):
            yield _damaged(unit, row, f"{unit.name}:{row}")
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
        yield SourceRow(
            unit=unit,
            row=row,
            key=f"{unit.name}:{row}" if key is None else key,
            images=images[index].as_py() or [],
            captions=as_captions(captions[index].as_py()),
            split=splits[index].as_py(),
            absence=absences[index].as_py(),
        )


def _labels(filesystem: pafs.FileSystem, path: str) -> list[str]:
    """The column that identifies rows of this file, and a column `split` of text."""

    def read() -> pa.Schema:
        with filesystem.open_input_file(path) as file:
            return pq.read_schema(file)

    schema = retried(read, path, filesystem)
    kinds = {
        name: schema.field(name).type for name in schema.names if schema.names.count(name) == 1
    }
    keys = [
        name
        for name in KEY_NAMES
        if name in kinds and not (pa.types.is_nested(kinds[name]) or _is_bytes(kinds[name]))
    ]
    has_split = SPLIT_NAME in kinds and not pa.types.is_nested(kinds[SPLIT_NAME])
    return [*keys[:1], *([SPLIT_NAME] if has_split else [])]


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _damaged(unit: Unit, row: int, key: str) -> SourceRow:
    return SourceRow(
        unit=unit, row=row, key=key, images=[], captions=[], split=None, absence="damaged_file"
    )


# ---- WebDataset ----------------------------------------------------------------------------------


def _tar_rows(reader: Reader, unit: Unit) -> Iterator[SourceRow]:
    """Read a tar from front to back; neighbours with the same name up to the first dot are a row.

    What follows a break, or a header that makes no sense, is one damaged row.
    """
    row, key = 0, ""
    sample: dict[str, bytes] = {}
    is_whole = True
    filesystem, _ = open_filesystem(reader.root)
    with filesystem.open_input_stream(unit.path) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r|*", bufsize=TAR_CHUNK) as tar:
                for member in tar:
                    # Or it would remember every member of a huge tar.
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                    folder, _, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    file = tar.extractfile(member) if stem and member.isfile() else None
                    if file is None:
                        continue
                    here = f"{folder}/{stem}" if folder else stem
                    if here != key and sample:
                        yield _tar_row(reader.columns, unit, row, key, sample)
                        row, sample = row + 1, {}
                    key = here
                    sample[extension.lower()] = file.read()
                # At a header without sense it ends as at its end.
                is_compressed = not unit.name.endswith(".tar")
                is_whole = is_compressed or unit.bytes - tar.offset <= TAR_PADDING
        except (tarfile.TarError, EOFError):
            yield _damaged(unit, row, _text(key) or f"{unit.name}:{row}")
            return
    if sample:
        yield _tar_row(reader.columns, unit, row, key, sample)
        row += 1
    if not is_whole:
        yield _damaged(unit, row, f"{unit.name}:{row}")


def _tar_row(
    columns: Columns, unit: Unit, row: int, key: str, sample: dict[str, bytes]
) -> SourceRow:
    names = TAR_IMAGES if columns.image == "auto" else (columns.image.lower(),)
    image = next((sample[name] for name in names if name in sample), None)
    facts: dict[str, Any] = {}
    if "json" in sample:
        try:
            loaded = json.loads(sample["json"])
        except ValueError:
            loaded = None
        facts = loaded if isinstance(loaded, dict) else {}
    if columns.caption == "auto":
        wanted = ("txt", "text", "caption")
        text = next((sample[name] for name in wanted if name in sample), None)
        found = next((facts[name] for name in CAPTION_NAMES if facts.get(name)), None)
    else:
        text = sample.get(columns.caption.lower())
        found = facts.get(columns.caption)
    captions = as_captions(found if text is None else text.decode("utf-8", errors="replace"))
    split = facts.get(SPLIT_NAME)
    status = facts.get("status")
    has_failed = image is None and isinstance(status, str) and status.startswith("failed")
    return SourceRow(
        unit=unit,
        row=row,
        key=_text(key),
        images=[image],
        captions=[_text(caption) for caption in captions],
        split=_text(split) if isinstance(split, str) else None,
        absence="failed_download" if has_failed else None,
    )


def _text(value: str) -> str:
    """Text that can be written as UTF-8: halves of characters, which JSON allows, become '?'."""
    return value.encode("utf-8", "replace").decode()


# ---- tables: CSV, TSV, JSON ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    image: str | None
    captions: list[str]
    key: str | None = None
    split: str | None = None


def _list_tables(found: Found, columns: Columns, images: str, scratch: str) -> list[Unit]:
    """Write every table to `scratch`, as Parquet of image paths and captions; give its units."""
    source, _ = open_filesystem(found.root)
    target, folder = open_filesystem(scratch)
    target.create_dir(folder, recursive=True)
    units: list[Unit] = []
    for number, file in enumerate(found.files):
        base = images or _above(_join(found.root, file.name))
        try:
            with source.open_input_stream(file.path) as stream:
                text = io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8-sig", newline="")
                entries = _entries(file.name, text, columns)
                units += _write_listing(entries, base, number, file.name, target, folder)
        except UnicodeDecodeError as error:
            raise UserError(f"{PLACE}: {file.name} is not UTF-8 text ({error})") from error
    if not units:
        raise UserError(f"{PLACE}: {found.files[0].name} lists no pairs")
    average = _average_size(target, units)
    return [replace(unit, bytes=unit.rows * average) for unit in units]


LISTED = Columns(image="image", caption="caption")
LISTING = pa.schema(
    [("key", pa.string()), ("image", pa.string()), ("caption", pa.list_(pa.string())),
     (SPLIT_NAME, pa.string())]
)  # fmt: skip


def _write_listing(
    entries: Iterable[_Entry],
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
                "key": _text(entry.key or entry.image or "") or None,
                "image": _text(_join(base, entry.image)) if entry.image else None,
                "caption": [_text(caption) for caption in entry.captions],
                SPLIT_NAME: _text(entry.split or "") or None,
            }
            for entry in some
        ]
        with (
            filesystem.open_output_stream(path) as sink,
            pq.ParquetWriter(sink, LISTING) as writer,
        ):
            for group, start in enumerate(range(0, len(listed), LISTING_ROWS)):
                chunk = listed[start : start + LISTING_ROWS]
                writer.write_table(pa.Table.from_pylist(chunk, schema=LISTING))
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


def _entries(name: str, text: io.TextIOWrapper, columns: Columns) -> Iterator[_Entry]:
    if name.lower().endswith((".csv", ".tsv")):
        yield from _records(name, _csv_records(name, text), columns)
    elif name.lower().endswith(".jsonl"):
        yield from _records(name, _line_records(name, text), columns)
    else:
        content = text.read()
        try:
            value = json.loads(content)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                raise UserError(f"{PLACE}: {name} is not JSON: {error}") from error
            # One object a line, as other trainers' .json files are.
            yield from _records(name, _line_records(name, io.StringIO(content)), columns)
            return
        del content
        yield from _json_entries(name, value, columns)


def _csv_records(name: str, text: io.TextIOWrapper) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    head = text.readline()
    # Some trainers' .csv has tabs: the header tells, not the name.
    delimiter = max("\t,;", key=head.count)
    header = next(csv.reader([head], delimiter=delimiter), [])
    if any(cell.strip().startswith(("http://", "https://")) for cell in header):
        raise UserError(
            f"{PLACE}: {name} is a list of links without a header; download the images first: add "
            "a first line that names the columns url and caption, in their order, then run "
            f"img2dataset --url_list {name} --input_format "
            f"{'tsv' if delimiter == chr(9) else 'csv'} --url_col url --caption_col caption "
            "--output_format parquet, and give its output"
        )
    reader = csv.DictReader(text, fieldnames=[cell.strip() for cell in header], delimiter=delimiter)
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(f"{PLACE}: {name} line {reader.line_num + 1}: {error}") from error


def _line_records(name: str, lines: Iterable[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{PLACE}: {name} line {number} is not JSON: {error}") from error


def _json_entries(name: str, value: Any, columns: Columns) -> Iterator[_Entry]:
    if isinstance(value, dict) and isinstance(value.get("images"), list):
        if isinstance(value.get("annotations"), list):
            yield from _coco_entries(value)
            return
        yield from _karpathy_entries(value)
    elif isinstance(value, list):
        yield from _records(name, value, columns)
    else:
        found = sorted(value)[:8] if isinstance(value, dict) else type(value).__name__
        raise UserError(
            f"{PLACE}: {name} holds {found}; known are a list of objects with image and caption, "
            "COCO captions (images, annotations) and Karpathy splits (images with sentences)"
        )


def _coco_entries(value: dict[str, Any]) -> Iterator[_Entry]:
    """One row an image, with all its captions; captions of no image are a row without image."""
    captions: dict[Any, list[str]] = {}
    for item in value["annotations"]:
        captions.setdefault(item.get("image_id"), []).extend(as_captions(item.get("caption")))
    for item in value["images"]:
        number = item.get("id")
        texts = captions.pop(number, [])
        yield _Entry(image=item.get("file_name"), captions=texts, key=str(number))
    for number, texts in captions.items():
        yield _Entry(image=None, captions=texts, key=str(number))


def _karpathy_entries(value: dict[str, Any]) -> Iterator[_Entry]:
    for item in value["images"]:
        folder, file = item.get("filepath"), item.get("filename")
        key = next((item[name] for name in ("cocoid", "imgid") if name in item), None)
        texts = [sentence.get("raw") for sentence in item.get("sentences", [])]
        yield _Entry(
            image=f"{folder}/{file}" if folder and file else file,
            captions=as_captions(texts),
            key=None if key is None else str(key),
            split=item.get("split"),
        )


def _records(name: str, records: Iterable[Any], columns: Columns) -> Iterator[_Entry]:
    """Objects with a path and captions; the first tells which keys hold them."""
    chosen: tuple[str, str, str | None] | None = None
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(
                f"{PLACE}: entry {number} of {name} is {str(record)[:60]}; every entry must be an "
                "object with an image and a caption"
            )
        if chosen is None:
            chosen = _record_columns(name, record, columns)
        image, caption, key = chosen
        path, split = record.get(image), record.get(SPLIT_NAME)
        if isinstance(path, str) and path.startswith(("http://", "https://")):
            _refuse_links(name, image)
        identity = record.get(key) if key else None
        yield _Entry(
            image=path if isinstance(path, str) and path else None,
            captions=as_captions(record.get(caption)),
            key=None if identity in (None, "") else str(identity),
            split=split if isinstance(split, str) and split else None,
        )


def _record_columns(
    name: str, record: dict[str, Any], columns: Columns
) -> tuple[str, str, str | None]:
    _refuse_other_tasks(name, record)
    image = _pick(name, record, "image", columns.image, PATH_NAMES)
    caption = _pick(name, record, "caption", columns.caption, CAPTION_NAMES)
    key = next((item for item in KEY_NAMES if item in record and item != image), None)
    return image, caption, key


def _refuse_other_tasks(name: str, record: dict[str, Any]) -> None:
    """Entries that are no pairs: their texts do not describe their images."""
    labels = {str(record.get("label", "")), str(record.get("gold_label", ""))}
    task = None
    if "question" in record:
        task = "questions about images (VQA)"
    elif isinstance(record.get("images"), list) or "left_url" in record:
        task = "sentences about two images each (NLVR2)"
    elif labels & ENTAILMENT:
        task = "sentences that may contradict their images (visual entailment)"
    if task is not None:
        raise UserError(
            f"{PLACE}: {name} holds {task}, not images with captions; pretraining needs pairs: "
            "give a list of images and captions"
        )


def _pick(name: str, record: dict[str, Any], role: str, given: str, known: tuple[str, ...]) -> str:
    if given != "auto":
        if given not in record:
            raise UserError(
                f"--{role}-column: '{given}' is not in {name}; its columns are {list(record)}"
            )
        return given
    for candidate in known:
        if candidate in record:
            return candidate
    urls = [item for item in URL_NAMES if item in record]
    if role == "image" and urls:
        _refuse_links(name, urls[0])
    raise UserError(
        f"{PLACE}: no {role} column in {name}; its columns are {list(record)}. Looked for "
        f"{list(known)}; name yours with --{role}-column"
    )


def _refuse_links(name: str, column: str) -> None:
    raise UserError(
        f"{PLACE}: {name} holds links (column '{column}') but no images; download them first, e.g. "
        f"img2dataset --url_list {name} --input_format {PurePosixPath(name).suffix[1:]} --url_col "
        f"{column} --output_format parquet, and give its output"
    )
