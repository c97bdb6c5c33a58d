"""Pairs in WebDataset tars: a unit is a tar.

Enters: the files found; then a unit. Leaves: units; then rows. Must not know: Ray, decoding, the
other forms.
"""

import json
import tarfile
from collections.abc import Iterator
from typing import Any

import pyarrow.fs as pafs

from pipeline.data.layout import CAPTION_NAMES, SPLIT_NAME, Columns, as_captions
from pipeline.data.prepare.files import TAR_IMAGES, Found
from pipeline.data.prepare.units import SourceRow, Unit, as_utf8, damaged

TAR_CHUNK = 2**20
TAR_PADDING = 2**16  # zeros that may follow the last member


def tar_units(found: Found) -> list[Unit]:
    """Each tar as a unit."""
    return [
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


def tar_rows(filesystem: pafs.FileSystem, columns: Columns, unit: Unit) -> Iterator[SourceRow]:
    """Read a tar from front to back; neighbours with the same name up to the first dot are a row.

    What follows a break, or a header that makes no sense, is one damaged row.
    """
    row, key = 0, ""
    sample: dict[str, bytes] = {}
    is_whole = True
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
                        yield _tar_row(columns, unit, row, key, sample)
                        row, sample = row + 1, {}
                    key = here
                    sample[extension.lower()] = file.read()
                # At a header without sense it ends as at its end.
                is_compressed = not unit.name.endswith(".tar")
                is_whole = is_compressed or unit.bytes - tar.offset <= TAR_PADDING
        except (tarfile.TarError, EOFError):
            yield damaged(unit, row, as_utf8(key) or f"{unit.name}:{row}")
            return
    if sample:
        yield _tar_row(columns, unit, row, key, sample)
        row += 1
    if not is_whole:
        yield damaged(unit, row, f"{unit.name}:{row}")


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
        key=as_utf8(key),
        images=[image],
        captions=[as_utf8(caption) for caption in captions],
        split=as_utf8(split) if isinstance(split, str) else None,
        absence="failed_download" if has_failed else None,
    )
