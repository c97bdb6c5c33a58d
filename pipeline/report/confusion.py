"""What a zero-shot classification takes for what, from the counts that a run logged.

Enters: a run's record. Leaves: `Confusion`s. Must not know: pages.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.report.record import Record

MOST_CLASSES = 40  # of a matrix that a person reads
MISTAKES = 10


class Mistake(NamedTuple):
    """So many rows, a share of all of their class, were taken for another."""

    is_class: str
    said: str
    rows: int
    share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Confusion:
    """Rows by class (first) and what they were taken for, of one column of labels."""

    column: str
    classes: tuple[str, ...]
    counts: dict[tuple[int, int], int]

    def of(self, number: int) -> int:
        """Rows of a class."""
        return sum(rows for (row, _), rows in self.counts.items() if row == number)

    @property
    def shares(self) -> list[list[float]] | None:
        """The matrix, each row over its class's rows; None where it would be too large to read."""
        if len(self.classes) > MOST_CLASSES:
            return None
        numbers = range(len(self.classes))
        return [
            [self.counts.get((row, said), 0) / max(self.of(row), 1) for said in numbers]
            for row in numbers
        ]

    @property
    def mistakes(self) -> Sequence[Mistake]:
        """The commonest mistakes, the first of most rows."""
        wrong = sorted((-rows, *pair) for pair, rows in self.counts.items() if pair[0] != pair[1])
        return [
            Mistake(self.classes[row], self.classes[said], -rows, -rows / self.of(row))
            for rows, row, said in wrong[:MISTAKES]
        ]


def confusions(record: Record) -> list[Confusion]:
    """Those of the run's last evaluation."""
    paths = [
        path for path in sorted(record.files) if path.rpartition("/")[2].startswith("confusion_")
    ]
    # The run's own come before those of a later evaluation.
    first = {
        path.rpartition("/")[2]: path for path in sorted(paths, key=lambda path: -path.count("/"))
    }
    return [_read(record.text(path)) for name, path in sorted(first.items())]


def _read(text: str) -> Confusion:
    found = json.loads(text)
    return Confusion(
        column=found["column"],
        classes=tuple(found["classes"]),
        counts={(row, said): rows for row, said, rows in found["counts"]},
    )
