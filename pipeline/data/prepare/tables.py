"""Lists of image paths and texts, as people keep them: CSV, TSV, JSON.

Enters: the text of one file, column names. Leaves: its form and its entries in order, or a
`UserError` that says what is there and what to do. Must not know: how entries are kept.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from pipeline.data.layout import (
    CAPTION_NAMES,
    URL_NAMES,
    Columns,
    as_captions,
)
from pipeline.data.prepare.files import PLACE
from pipeline.data.prepare.forms import (
    PATH_NAMES,
    Around,
    Entry,
    check_object,
    choose_form,
    read_each,
    read_questions,
)
from pipeline.data.prepare.tasks import CAPTIONS, VQA, Task
from pipeline.data.prepare.units import KEY_NAMES
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One file: its form in words, what its rows are for, and its entries."""

    form: str
    task: Task
    entries: Iterator[Entry]


def read_table(name: str, text: io.TextIOWrapper, columns: Columns, around: Around) -> Table:
    """Read the table `name`: its ending tells how it is written, its first entry its form."""
    if name.lower().endswith((".csv", ".tsv")):
        return _from_records(name, _csv_records(name, text), columns, around)
    if name.lower().endswith(".jsonl"):
        return _from_records(name, _line_records(name, text), columns, around)
    content = text.read()
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise UserError(f"{PLACE}: {name} is not JSON: {error}") from error
        # One object a line, as other trainers' .json files are.
        lines = _line_records(name, io.StringIO(content))
        return _from_records(name, lines, columns, around)
    return _from_json(name, value, columns, around)


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


def _from_json(name: str, value: Any, columns: Columns, around: Around) -> Table:
    if isinstance(value, list):
        return _from_records(name, iter(value), columns, around)
    found = value if isinstance(value, dict) else {}
    lists = {key for key, items in found.items() if isinstance(items, list)}
    if {"images", "annotations"} <= lists:
        return Table(form="COCO captions", task=CAPTIONS, entries=_coco_entries(found))
    if "images" in lists:
        return Table(form="Karpathy splits", task=CAPTIONS, entries=_karpathy_entries(found))
    if "questions" in lists and around.answers is not None:
        entries = read_questions(name, found, around)
        return Table(form="VQA v2's questions and annotations", task=VQA, entries=entries)
    if lists & {"questions", "annotations"}:
        raise UserError(
            f"{PLACE}: {name} is one half of VQA's questions and annotations; give both files and "
            "no other table: the folder of ..._questions.json and ..._annotations.json, or a "
            "pattern such as 'FOLDER/*train2014*.json'"
        )
    raise UserError(
        f"{PLACE}: {name} holds {sorted(found)[:8] if found else type(value).__name__}; known are "
        "a list of objects with image and caption, COCO captions (images, annotations), Karpathy "
        "splits (images with sentences) and VQA's questions with their annotations beside them"
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


def _from_records(name: str, records: Iterator[Any], columns: Columns, around: Around) -> Table:
    """Objects; the first tells their form, and which keys hold path and captions of pairs."""
    first = next(records, None)
    if first is None:
        return Table(form="no entries", task=CAPTIONS, entries=iter(()))
    record = check_object(name, 0, first)
    # Who names the caption wants pairs, whatever else is there.
    form = choose_form(name, record, around) if columns.caption == "auto" else None
    read = form.read if form else partial(_read_pair, name, *_pair_keys(name, record, columns))
    return Table(
        form=form.name if form else "images with captions",
        task=form.task if form else CAPTIONS,
        entries=read_each(name, itertools.chain([first], records), read),
    )


def _pair_keys(name: str, record: dict[str, Any], columns: Columns) -> tuple[str, str, str | None]:
    image = _pick(name, record, "image", columns.image, PATH_NAMES)
    caption = _pick(name, record, "caption", columns.caption, CAPTION_NAMES)
    key = next((item for item in KEY_NAMES if item in record and item != image), None)
    return image, caption, key


def _read_pair(
    name: str, image: str, caption: str, key: str | None, record: dict[str, Any]
) -> list[Entry]:
    path = record.get(image)
    if isinstance(path, str) and path.startswith(("http://", "https://")):
        _refuse_links(name, image)
    identity = record.get(key) if key else None
    return [
        Entry(
            image=path if isinstance(path, str) and path else None,
            captions=as_captions(record.get(caption)),
            key=None if identity in (None, "") else str(identity),
        )
    ]


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
