"""What is read at once, and the rows that every form becomes.

Enters: nothing. Leaves: `Unit`, `SourceRow`, and what the readers of all forms share.
Must not know: any form.
"""

from dataclasses import dataclass, field

KEY_NAMES = ("uid", "key", "__key__", "id", "SAMPLE_ID", "img_id", "image_id", "sha256")


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
    """One row, named by `unit` and `row`. `absence`: why it has no image, where that is known.

    `texts` are its task's columns of one text each, None where there is nothing usable.
    """

    unit: Unit
    row: int
    key: str
    images: list[bytes | None]
    captions: list[str]
    split: str | None
    absence: str | None = None
    texts: dict[str, str | None] = field(default_factory=dict)


def damaged(unit: Unit, row: int, key: str) -> SourceRow:
    """The row that stands for what cannot be read."""
    return SourceRow(
        unit=unit, row=row, key=key, images=[], captions=[], split=None, absence="damaged_file"
    )


def as_utf8(value: str) -> str:
    """Text that can be written as UTF-8: halves of characters, which JSON allows, become '?'."""
    return value.encode("utf-8", "replace").decode()
