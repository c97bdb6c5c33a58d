"""Rows in the forms that people have them: Parquet, WebDataset tars, CSV and TSV, JSON.

Enters: the files found, column names. Leaves: an `Origin`, which says what is read at once, and its
rows with their encoded images; or a `UserError` that says what is there and what to do.
Must not know: Ray, decoding, the shards that are written.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.data.layout import Columns
from pipeline.data.prepare.files import Form, Found
from pipeline.data.prepare.listing import LISTED, SECOND, list_tables
from pipeline.data.prepare.parquet import group_rows, parquet_units
from pipeline.data.prepare.tars import tar_rows, tar_units
from pipeline.data.prepare.tasks import CAPTIONS, Task
from pipeline.data.prepare.units import SourceRow, Unit
from pipeline.data.storage import open_filesystem
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """Reads units; small, since every task gets one. `root` opens the files' filesystem."""

    form: Form
    root: str
    columns: Columns
    task: Task = CAPTIONS

    def rows(self, unit: Unit) -> Iterator[SourceRow]:
        """Give the rows of `unit` in order. What is damaged in it is a row with that reason."""
        filesystem, _ = open_filesystem(self.root)
        if self.form == "webdataset":
            return tar_rows(filesystem, self.columns, unit)
        second = SECOND if self.task.num_pictures > 1 else None
        return group_rows(filesystem, self.columns, unit, self.task.texts, second)


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """All that is to be read. `forms`: what tables hold, in words."""

    path: str
    reader: Reader
    units: tuple[Unit, ...]
    num_files: int
    num_bytes: int
    forms: tuple[str, ...] = ()

    def describe(self) -> str:
        """One sentence: which files, and which columns."""
        size = f"{self.num_bytes / 1e6:,.1f} MB"
        if self.reader.form == "table":
            held = ", ".join(self.forms)
            return f"{self.num_files} table(s) at {self.path}: {held}; about {size} of images"
        if self.reader.form == "webdataset":
            return f"{self.num_files} WebDataset tar(s) at {self.path} ({size})"
        columns = self.reader.columns
        return (
            f"{self.num_files} Parquet file(s) at {self.path} ({size}); image column "
            f"'{columns.image}', caption column '{columns.caption}'"
        )


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
    root, columns = found.path, Columns(image=image, caption=caption)
    task, forms = CAPTIONS, ()
    if found.form == "parquet":
        columns, units = parquet_units(found, image, caption)
    elif found.form == "webdataset":
        units = tar_units(found)
    else:
        listing = list_tables(found, columns, images, scratch)
        units, task, forms = listing.units, listing.task, listing.forms
        root, columns = scratch, LISTED
    return Origin(
        path=found.path,
        reader=Reader(form=found.form, root=root, columns=columns, task=task),
        units=tuple(units),
        num_files=len(found.files),
        num_bytes=sum(unit.bytes for unit in units),
        forms=forms,
    )
