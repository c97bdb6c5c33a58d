"""What lies at a path: Parquet shards, their row groups, and which columns hold image and caption.

Enters: a folder, file, glob or URL. Leaves: `Catalog`, or a `UserError` that says what is there
and what to do. Reads footers, and a column `split` if there is one. Must not know: Ray, decoding,
the model.
"""

import glob
import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.data.storage import explain, open_filesystem, retried
from pipeline.errors import UserError

IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes", "content")
CAPTION_NAMES = (
    "caption", "captions", "text", "txt", "TEXT", "title", "alt_text", "raw", "sentence",
    "caption_0",
)  # fmt: skip
QUESTION_NAMES = ("question", "questions", "statement", "hypothesis", "sentence")  # of a task
ANSWER_NAMES = ("answers", "answer", "label", "gold_label")
URL_NAMES = ("url", "URL", "image_url")
SPLIT_NAME = "split"
STATUS_NAME = "status"  # img2dataset's: why a row has no image
_HELD_BACK = (("val",), ("validation",), ("valid",), ("dev",))
SPLITS = {  # what rows for this are called in a column `split`; of several names the first found
    "train": (("train", "restval"),),
    "val": (*_HELD_BACK, ("test",)),
    "test": (("test",), *_HELD_BACK),
}
FEW_DIFFERENT = 0.25  # of captions, or a column's values: fewer, and they are labels
FOREIGN = {  # kinds of files that `gammaray data prepare` reads
    ".tar": "WebDataset tars", ".csv": "tables", ".tsv": "tables", ".json": "JSON",
    ".jsonl": "JSON",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One Parquet file: its path on the catalog's filesystem, bytes, rows of each row group.

    `row_groups` counts rows of the chosen split only, `num_rows` all; `group_bytes` are the row
    groups' bytes, uncompressed. `source` is the number of its source in the catalog, `modified`
    the file's date, in nanoseconds, where the filesystem knows it.
    """

    path: str
    size: int
    row_groups: tuple[int, ...]
    group_bytes: tuple[int, ...]
    num_rows: int
    source: int = 0
    modified: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """The resolved columns. `split` keeps rows whose column `split` holds one of the values.

    `image` or `caption` is empty where either is enough and the data hold no such column.

    `status` is there when the column is: it tells failed downloads from images that were null.
    Of a task `caption` is what is asked or said, `answer` what is true of it; a list of images then
    is two `pictures` of one row, and not several of which one is drawn.
    """

    image: str
    caption: str
    split: tuple[str, ...] = ()
    status: bool = False
    answer: str | None = None
    pictures: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What was given as one path: shards alike. `schema` is the first shard's.

    `weight` is how often an epoch sees each of its rows, on the average.
    """

    root: str
    columns: Columns
    schema: pa.Schema
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalog:
    """All shards of all sources, by source and path."""

    sources: tuple[Source, ...]
    shards: tuple[Shard, ...]

    @property
    def root(self) -> str:
        """Where the data lies, in words."""
        return ", ".join(source.root for source in self.sources)

    @property
    def num_rows(self) -> int:
        """Rows of the split in all shards, usable or not, each counted once."""
        return sum(self.rows_of(number) for number in range(len(self.sources)))

    @property
    def rows_an_epoch(self) -> int:
        """Rows that an epoch sees: those of each source times its weight, rounded."""
        return sum(
            round(source.weight * self.rows_of(number))
            for number, source in enumerate(self.sources)
        )

    def rows_of(self, number: int) -> int:
        """Rows of one source."""
        return sum(sum(shard.row_groups) for shard in self.shards if shard.source == number)

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
        if any(source.weight != 1 for source in self.sources) or len(self.sources) > 1:
            counts = Counter(shard.source for shard in self.shards)
            text += f"\n{[(counts[n], each.weight) for n, each in enumerate(self.sources)]}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def describe(self) -> str:
        """A sentence on each source: rows, shards, the columns in use."""
        return "; ".join(self._describe(number) for number in range(len(self.sources)))

    def _describe(self, number: int) -> str:
        source = self.sources[number]
        shards = [shard for shard in self.shards if shard.source == number]
        kept = ""
        if source.columns.split:
            whole = sum(shard.num_rows for shard in shards)
            kept = f" of {whole:,}, whose split is {' or '.join(source.columns.split)},"
        weight = "" if source.weight == 1 else f", each seen {source.weight:g} times an epoch"
        columns = source.columns
        answer = f", answer column '{columns.answer}'" if columns.answer else ""
        image = f"image column '{columns.image}'" if columns.image else "no image column"
        kind = "text" if answer else "caption"
        caption = f"{kind} column '{columns.caption}'" if columns.caption else "no caption column"
        return (
            f"{self.rows_of(number):,} rows{kept} in {len(shards)} Parquet shard(s) at "
            f"{source.root} ({sum(shard.size for shard in shards) / 1e6:,.1f} MB); {image}, "
            f"{caption}{answer}{weight}"
        )


def mix(catalogs: Sequence[Catalog], weights: Sequence[float], place: str) -> Catalog:
    """Put catalogs of one source each together; `weights` as in `Source`.

    Raises `UserError` for a weight that leaves none of a source's rows.
    """
    shards: list[Shard] = []
    sources: list[Source] = []
    for number, (catalog, weight) in enumerate(zip(catalogs, weights, strict=True)):
        if not round(weight * catalog.num_rows):
            raise UserError(
                f"{place}.{number}.weight: is {weight:g}; of the {catalog.num_rows} rows at "
                f"{catalog.root} an epoch would see none: raise it, or leave the source out"
            )
        (source,) = catalog.sources
        sources.append(replace(source, weight=weight))
        shards += [replace(shard, source=number) for shard in catalog.shards]
    return Catalog(sources=tuple(sources), shards=tuple(shards))


def read_catalog(
    path: str,
    place: str,
    image: str = "auto",
    caption: str = "auto",
    labels: Sequence[str] = (),
    split: str = "auto",
    answer: str | None = None,
    either: bool = False,
) -> Catalog:
    """List the Parquet shards at `path` and resolve their columns; `answer` only of a task.

    `place` (the config path, e.g. data.train) opens every error; its end (train, val or test) tells
    what the rows are for. `labels` are further columns that must be there. `split` keeps rows by a
    column `split`: auto (if there is one, those that fit the place), all, or a value. With `either`
    images alone, or captions alone, will do. Raises `UserError` for a missing path, no Parquet,
    unreadable files, columns that cannot be resolved.
    """
    filesystem, files = _find(path, place)
    paths = [file.path for file in files]
    with ThreadPoolExecutor(16) as pool:
        footers = list(pool.map(lambda item: _footer(filesystem, item, place), files))
        columns = resolve_columns(footers[0][1], paths[0], place, image, caption, answer, either)
        for (_, schema), item in zip(footers, paths, strict=True):
            _check_columns(schema, item, place, columns, labels)
        shards = [shard for shard, _ in footers]
        schemas = [schema for _, schema in footers]
        has_split = _with_text(schemas, SPLIT_NAME)
        if split not in ("auto", "all") and not all(has_split):
            raise UserError(
                f"{place}_split: is {split}, but {paths[has_split.index(False)]} has no column "
                f"'{SPLIT_NAME}' of text; use all, or remove the file"
            )
        if split != "all" and all(has_split):
            source = Source(root=path, columns=columns, schema=schemas[0])
            found = list(pool.map(lambda shard: _read_split(source, shard), shards))
            values = set().union(*(group for groups in found for group in groups))
            chosen = _choose_split(values, place, split)
            if chosen != values:
                columns = replace(columns, split=tuple(sorted(chosen)))
                shards = [
                    replace(
                        shard,
                        row_groups=tuple(sum(group[value] for value in chosen) for group in groups),
                    )
                    for shard, groups in zip(shards, found, strict=True)
                ]
    columns = replace(columns, status=all(_with_text(schemas, STATUS_NAME)))
    if columns.image and _is_text(schemas[0].field(columns.image).type):
        source = Source(root=path, columns=columns, schema=schemas[0])
        _check_image_file(filesystem, source, shards[0])
    source = Source(root=path, columns=columns, schema=schemas[0])
    catalog = Catalog(sources=(source,), shards=tuple(shards))
    if catalog.num_rows == 0:
        raise UserError(f"{place}: {path} holds Parquet files but no rows")
    return catalog


def _check_image_file(filesystem: pafs.FileSystem, source: Source, shard: Shard) -> None:
    """A column of text must hold paths: the first one is looked for."""
    name = source.columns.image
    values = _read_column(source, shard, name, [0]) if shard.row_groups else pa.chunked_array([[]])
    first = next((value for value in values.to_pylist() if value), None)
    if first is None or "://" in first:
        return
    file = str(PurePosixPath(shard.path).parent / first)
    if filesystem.get_file_info(file).type != pafs.FileType.File:
        raise UserError(
            f"data.image_column: '{name}' holds text, so it must be paths of image files, relative "
            f"to the shard or absolute; '{first[:80]}' of {shard.path} is none: name another column"
        )


def _with_text(schemas: Sequence[pa.Schema], name: str) -> list[bool]:
    return [
        schema.names.count(name) == 1 and _is_text(schema.field(name).type) for schema in schemas
    ]


def _read_split(source: Source, shard: Shard) -> list[Counter[str]]:
    """How many rows of each row group have which split."""
    return [
        Counter(map(str, _read_column(source, shard, SPLIT_NAME, [group]).to_pylist()))
        for group in range(len(shard.row_groups))
    ]


def _choose_split(values: set[str], place: str, split: str) -> set[str]:
    if split != "auto":
        if split not in values:
            raise UserError(
                f"{place}_split: is {split}; column '{SPLIT_NAME}' holds {sorted(values)[:8]}: "
                "choose one of them, or all"
            )
        return {split}
    for names in SPLITS.get(place.rpartition(".")[2], ()):
        if values & set(names):
            return values & set(names)
    # Neither says which rows are meant: a column of that name for another purpose, or one split.
    if len(values) == 1:
        return values
    raise UserError(
        f"{place}: column '{SPLIT_NAME}' holds {sorted(values)[:8]}, none of which is known; say "
        f"which to use with {place}_split=..., or use all"
    )


def _check_columns(
    schema: pa.Schema, path: str, place: str, columns: Columns, labels: Sequence[str]
) -> None:
    """Every shard must hold the chosen columns, once, with types that can be read."""
    wanted = {
        columns.image: lambda kind: _holds_image(kind) or _is_text(kind),
        columns.caption: _holds_caption,
    }
    answers = () if columns.answer is None else (columns.answer,)
    wanted |= dict.fromkeys(answers, _holds_answer)
    pair = [name for name in (columns.image, columns.caption) if name]
    for name in (*pair, *answers, *labels):
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


def _find(path: str, place: str) -> tuple[pafs.FileSystem, list[pafs.FileInfo]]:
    is_glob = any(character in path for character in "*?[") and not Path(path).exists()
    if "://" not in path and is_glob:
        matches = sorted(str(Path(item).absolute()) for item in glob.glob(path, recursive=True))  # noqa: PTH207  the pattern may be absolute
        found: list[pafs.FileInfo] = []
        for match in matches:
            if Path(match).name.startswith((".", "_")):
                continue
            found += _find(match, place)[1]
        if not found:
            raise UserError(f"{place}: no file matches {path}")
        return pafs.LocalFileSystem(), found
    try:
        filesystem, inner = open_filesystem(path)
        info = retried(lambda: filesystem.get_file_info(inner), inner, filesystem)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{place}: {path} cannot be reached: {explain(error)}") from error
    if info.type == pafs.FileType.NotFound:
        raise UserError(f"{place}: {path} does not exist; give a folder or file of Parquet")
    if info.type == pafs.FileType.File:
        return filesystem, [info]
    below = pafs.FileSelector(inner, recursive=True)
    listed = retried(lambda: filesystem.get_file_info(below), inner, filesystem)
    files = [item for item in listed if item.type == pafs.FileType.File]
    found = [
        item
        for item in sorted(files, key=lambda item: item.path)
        if item.path.endswith(".parquet") and not _is_hidden(item.path, inner)
    ]
    if not found:
        names = (PurePosixPath(item.path) for item in files)
        seen = sorted({name.suffix or name.name for name in names})
        advice = "Pairs are read from Parquet with the encoded image in a column"
        foreign = next((FOREIGN[suffix] for suffix in seen if suffix in FOREIGN), None)
        if foreign is not None:
            advice += f"; for {foreign} run: gammaray data prepare {path} OUT, and give OUT"
        raise UserError(
            f"{place}: no .parquet file under {path}; found {len(files)} file(s) "
            f"of kind {seen[:8]}. {advice}"
        )
    return filesystem, found


def _is_hidden(path: str, root: str) -> bool:
    return any(part[0] in "._" for part in PurePosixPath(path).relative_to(root).parts)


def _footer(
    filesystem: pafs.FileSystem, file: pafs.FileInfo, place: str
) -> tuple[Shard, pa.Schema]:
    path = file.path
    try:
        size, metadata = retried(lambda: _metadata(filesystem, path), path, filesystem)
    except pa.ArrowInvalid as error:
        raise UserError(f"{place}: {path} is not readable Parquet: {error}") from error
    except OSError as error:
        raise UserError(f"{place}: {path} cannot be read: {explain(error)}") from error
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    shard = Shard(
        path=path,
        size=size,
        row_groups=tuple(group.num_rows for group in groups),
        group_bytes=tuple(group.total_byte_size for group in groups),
        num_rows=metadata.num_rows,
        modified=file.mtime_ns or 0,
    )
    return shard, metadata.schema.to_arrow_schema()


def _metadata(filesystem: pafs.FileSystem, path: str) -> tuple[int, pq.FileMetaData]:
    with filesystem.open_input_file(path) as file:
        return file.size(), pq.read_metadata(file)


def resolve_columns(
    schema: pa.Schema,
    path: str,
    place: str,
    image: str = "auto",
    caption: str = "auto",
    answer: str | None = None,
    either: bool = False,
) -> Columns:
    """Choose the columns of `schema`; given names win over the known ones."""
    if either:
        has_image = image != "auto" or _known(schema, "image", IMAGE_NAMES) is not None
        has_caption = caption != "auto" or _known(schema, "caption", CAPTION_NAMES) is not None
        if has_image != has_caption:
            given, names = (image, IMAGE_NAMES) if has_image else (caption, CAPTION_NAMES)
            role = "image" if has_image else "caption"
            found = _resolve(schema, path, place, role, given, names)
            return Columns(image=found if has_image else "", caption="" if has_image else found)
    if answer is None:
        return Columns(
            image=_resolve(schema, path, place, "image", image, IMAGE_NAMES),
            caption=_resolve(schema, path, place, "caption", caption, CAPTION_NAMES),
        )
    known = (*QUESTION_NAMES, *CAPTION_NAMES)
    chosen = _resolve(schema, path, place, "image", image, ("images", *IMAGE_NAMES))
    kind = schema.field(chosen).type
    return Columns(
        image=chosen,
        caption=_resolve(schema, path, place, "caption", caption, known),
        answer=_resolve(schema, path, place, "answer", answer, ANSWER_NAMES),
        pictures=2 if pa.types.is_list(kind) or pa.types.is_large_list(kind) else 1,
    )


def _resolve(
    schema: pa.Schema, path: str, place: str, role: str, given: str, known: tuple[str, ...]
) -> str:
    fits, wanted = ROLES[role]
    listing = ", ".join(f"{field.name}: {field.type}" for field in schema)
    setting = "task.answer_column" if role == "answer" else f"data.{role}_column"
    if given != "auto":
        if given not in schema.names:
            raise UserError(f"{setting}: '{given}' is not in {path}; its columns are {listing}")
        kind = schema.field(given).type
        if not fits(kind) and not (role == "image" and _is_text(kind)):
            raise UserError(
                f"{setting}: '{given}' in {path} is {schema.field(given).type}; "
                f"it must be {wanted}" + (", or the path of a file" if role == "image" else "")
            )
        return given
    if (name := _known(schema, role, known)) is not None:
        return name
    urls = [name for name in URL_NAMES if name in schema.names]
    if role == "image" and _lies_by_tars(path):
        raise UserError(
            f"{place}: {path} holds no pixels: it is the index of WebDataset tars beside it; run "
            f"gammaray data prepare {PurePosixPath(path).parent} OUT, and give OUT"
        )
    if role == "image" and urls:
        raise UserError(
            f"{place}: {path} holds links (column '{urls[0]}') but no pixels; download the images "
            f"first, e.g. img2dataset --url_list {path} --input_format parquet "
            f"--url_col {urls[0]} --output_format parquet, and give its output"
        )
    raise UserError(
        f"{place}: no {role} column in {path}; its columns are {listing}. Looked for {list(known)} "
        f"of type {wanted}; name yours with {setting}=..."
    )


def _known(schema: pa.Schema, role: str, known: tuple[str, ...]) -> str | None:
    fits, _ = ROLES[role]
    for name in known:
        if schema.names.count(name) == 1 and fits(schema.field(name).type):
            return name
    return None


def _lies_by_tars(path: str) -> bool:
    return Path(path).with_suffix(".tar").exists()


def _holds_image(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_caption(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return _is_text(kind)


def _holds_answer(kind: pa.DataType) -> bool:
    """One, or several people's; of a row with several questions a list of either."""
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):  # VQA's own annotations
        return any(kind.field(i).name == "answer" for i in range(kind.num_fields))
    return _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


ROLES = {  # of a column: which types fit, in code and in words
    "image": (_holds_image, "binary, struct<bytes, path> or a list of them"),
    "caption": (_holds_caption, "string or list<string>"),
    "answer": (_holds_answer, "string, number, or a list of them"),
}


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()


def _holds_label(kind: pa.DataType) -> bool:
    return not pa.types.is_nested(kind) and not pa.types.is_binary(kind)


def are_labels(different: int, total: int) -> bool:
    """Whether so few of the captions, or values of a column, differ that they are labels."""
    return different < FEW_DIFFERENT * total


def label_columns(schema: pa.Schema, columns: Columns) -> list[str]:
    """The columns of text or whole numbers that may hold labels: all but those with another use."""
    used = {columns.image, columns.caption, columns.answer, SPLIT_NAME, STATUS_NAME}
    return [
        field.name
        for field in schema
        if field.name not in used
        and schema.names.count(field.name) == 1
        and (_is_text(field.type) or pa.types.is_integer(field.type))
    ]


def read_captions(catalog: Catalog, most: int) -> list[str]:
    """Read up to about `most` captions, spread evenly over the shards (for a tokenizer)."""
    share = max(1, most // len(catalog.shards))
    captions: list[str] = []
    for shard in catalog.shards:
        source = catalog.sources[shard.source]
        enough = len(captions) + share
        for group in range(len(shard.row_groups)):
            column = _read_column(source, shard, source.columns.caption, [group])
            captions.extend(text for item in column.to_pylist() for text in as_captions(item))
            if len(captions) >= enough:
                del captions[enough:]
                break
    return captions


def count_answers(catalog: Catalog) -> Counter[str]:
    """How often each answer is given in the column of answers, as text."""
    counts: Counter[str] = Counter()
    for shard in catalog.shards:
        source = catalog.sources[shard.source]
        assert source.columns.answer is not None, "a task's catalog has them"
        cells = _read_column(
            source, shard, source.columns.answer, range(len(shard.row_groups))
        ).to_pylist()
        for cell in cells:
            for answers in as_answers(cell, 1):
                counts.update(answers)
    return counts


def as_answers(cell: object, questions: int) -> list[list[str]]:
    """The answers to each of a row's questions, as text: to one question, or one of a list to each.

    A list of another length than the questions is given as it is.

    An answer is text, a number, a truth value, or a struct that holds one as `answer`.
    """
    items = cell if isinstance(cell, list) else [cell]
    if questions == 1 and not any(isinstance(item, list) for item in items):
        return [[text for item in items for text in _answer(item)]]
    return [
        [text for part in (item if isinstance(item, list) else [item]) for text in _answer(part)]
        for item in items
    ]


def _answer(item: object) -> list[str]:
    value = item.get("answer") if isinstance(item, dict) else item
    if isinstance(value, bool):
        return [str(value).lower()]
    return [] if value is None or not str(value).strip() else [" ".join(str(value).split())]


def read_classes(catalog: Catalog, column: str) -> list[str]:
    """Give the distinct values of a label column, sorted, as text; null and empty ones are none."""
    return sorted(count_labels(catalog, column))


def count_labels(catalog: Catalog, column: str) -> Counter[str]:
    """Count the rows of each of `read_classes`."""
    counts: Counter[str] = Counter()
    for shard in catalog.shards:
        groups = range(len(shard.row_groups))
        cells = _read_column(catalog.sources[shard.source], shard, column, groups)
        # Arrow's text of a value, as the stream gives it: 1.0 is "1", True is "true".
        found = cells.cast(pa.string()).value_counts().to_pylist()
        counts.update({each["values"]: each["counts"] for each in found if each["values"]})
    return counts


def _read_column(
    source: Source, shard: Shard, column: str, groups: Sequence[int]
) -> pa.ChunkedArray:
    """Read one column of a shard's row groups: the rows of the chosen split, if there is one."""
    filesystem, _ = open_filesystem(source.root)
    split = source.columns.split

    def read() -> pa.Table:
        with filesystem.open_input_file(shard.path) as file:
            names = [column, SPLIT_NAME] if split else [column]
            return pq.ParquetFile(file).read_row_groups(list(groups), columns=names)

    try:
        table = retried(read, shard.path, filesystem)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{shard.path}: column '{column}' cannot be read ({explain(error)}); if the file is "
            "damaged, restore or remove it"
        ) from error
    if split:
        kept = pc.is_in(table.column(SPLIT_NAME).cast(pa.string()), pa.array(split))  # pyright: ignore[reportAttributeAccessIssue]
        table = table.filter(kept)
    return table.column(column)


def as_captions(value: object) -> list[str]:
    """Give the usable captions of a cell: stripped, empty ones left out."""
    items = value if isinstance(value, list) else [value]
    return [text for item in items if isinstance(item, str) and (text := " ".join(item.split()))]
