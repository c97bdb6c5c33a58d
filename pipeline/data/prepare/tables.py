"""Lists of image paths and captions, as people keep them: CSV, TSV, JSON.

Enters: the text of one file, column names. Leaves: its entries in order, or a `UserError` that says
what is there and what to do. Must not know: where images lie, how entries are kept.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pipeline.data.layout import (
    CAPTION_NAMES,
    IMAGE_NAMES,
    SPLIT_NAME,
    URL_NAMES,
    Columns,
    as_captions,
)
from pipeline.data.prepare.files import PLACE
from pipeline.data.prepare.units import KEY_NAMES
from pipeline.errors import UserError

PATH_NAMES = (
    *IMAGE_NAMES, "image_path", "filepath", "file_path", "file_name", "filename", "path",
)  # fmt: skip
ENTAILMENT = {"entailment", "neutral", "contradiction"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A line of a table: the path of an image as it is written there, and what belongs to it."""

    image: str | None
    captions: list[str]
    key: str | None = None
    split: str | None = None


def read_entries(name: str, text: io.TextIOWrapper, columns: Columns) -> Iterator[Entry]:
    """The entries of the table `name`, whose ending tells its form."""
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


def _json_entries(name: str, value: Any, columns: Columns) -> Iterator[Entry]:
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


def _coco_entries(value: dict[str, Any]) -> Iterator[Entry]:
    """One row an image, with all its captions; captions of no image are a row without image."""
    captions: dict[Any, list[str]] = {}
    for item in value["annotations"]:
        captions.setdefault(item.get("image_id"), []).extend(as_captions(item.get("caption")))
    for item in value["images"]:
        number = item.get("id")
        texts = captions.pop(number, [])
        yield Entry(image=item.get("file_name"), captions=texts, key=str(number))
    for number, texts in captions.items():
        yield Entry(image=None, captions=texts, key=str(number))


def _karpathy_entries(value: dict[str, Any]) -> Iterator[Entry]:
    for item in value["images"]:
        folder, file = item.get("filepath"), item.get("filename")
        key = next((item[name] for name in ("cocoid", "imgid") if name in item), None)
        texts = [sentence.get("raw") for sentence in item.get("sentences", [])]
        yield Entry(
            image=f"{folder}/{file}" if folder and file else file,
            captions=as_captions(texts),
            key=None if key is None else str(key),
            split=item.get("split"),
        )


def _records(name: str, records: Iterable[Any], columns: Columns) -> Iterator[Entry]:
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
        yield Entry(
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
