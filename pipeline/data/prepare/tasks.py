"""What prepared rows are for, which tells their columns.

Enters: nothing. Leaves: the tasks, and what all passes must know of a row's pictures.
Must not know: the forms that tasks come in, files, Ray.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

LABEL = "label"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A kind of rows. Beside key, pictures and their sides they hold `texts`, columns of one text
    each, and `several`, a column of a list of texts. Two pictures of a row are lists: `images`.
    """

    name: str
    texts: tuple[str, ...] = ()
    several: str | None = None
    num_pictures: int = 1

    @property
    def said(self) -> str:
        """The column of what is said or asked of the pictures; no row goes without."""
        said = self.texts[0] if self.texts else self.several
        assert said is not None
        return said

    @property
    def spreads(self) -> tuple[str, ...]:
        """What is measured of its rows."""
        counted = (as_plural(self.several),) if self.several else ()
        texts = (f"{self.said}_characters", f"{self.said}_words")
        return ("source_short_side", "short_side", *counted, *texts)

    def picture_fields(self, data: pa.DataType) -> list[pa.Field]:
        """The columns of encoded pictures, as `data`, and of their sides."""
        kinds = {"image": data, "width": pa.int32(), "height": pa.int32()}
        if self.num_pictures == 1:
            return [pa.field(name, kind) for name, kind in kinds.items()]
        return [pa.field(as_plural(name), pa.list_(kind)) for name, kind in kinds.items()]


CAPTIONS = Task(name="captions", several="caption")
VQA = Task(name="vqa", texts=("question", "question_id"), several="answers")
NLVR = Task(name="nlvr", texts=("statement", LABEL))
NLVR2 = Task(name="nlvr2", texts=("statement", LABEL), num_pictures=2)
SNLI_VE = Task(name="snli_ve", texts=("hypothesis", LABEL))


def as_plural(name: str) -> str:
    """A column's name for several of what it holds."""
    return name if name.endswith("s") else f"{name}s"


def pictures_of(row: dict[str, Any]) -> list[bytes]:
    """All encoded pictures of a row that is to be written."""
    return row["images"] if "images" in row else [row["image"]]


def picture_bytes(row: dict[str, Any]) -> int:
    """The bytes of all pictures of a row."""
    return sum(map(len, pictures_of(row)))
