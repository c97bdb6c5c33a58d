"""What befell a run, in order: failures, restarts, resizes, and workers that stood still.

Enters: a run's record. Leaves: `Event`s. Must not know: pages.
"""

import re
from datetime import UTC, datetime
from typing import NamedTuple

from pipeline.report.record import Record

TAG = re.compile(r"gammaray\.event\.(\d{8}T\d{6})Z\.(\w+)")
STALL = re.compile(r"stalls/step-0*(\d+)-rank-0*(\d+)\.txt")
SHOWN = 4000  # characters of a stack


class Event(NamedTuple):
    """Something that happened, in seconds since 1970."""

    moment: float
    kind: str
    text: str


class Stall(NamedTuple):
    """A worker that did nothing: in words, and the stacks of its threads."""

    what: str
    stacks: str


def events(record: Record) -> list[Event]:
    """All that the run's tags tell, the first first."""
    found = []
    for name, text in record.run.tags.items():
        if match := TAG.fullmatch(name):
            moment = datetime.strptime(match[1], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
            found.append(Event(moment.timestamp(), match[2], text))
    return sorted(found)


def stalls(record: Record) -> list[Stall]:
    """Workers that stood still, by their files."""
    found = []
    for path in sorted(record.files):
        if STALL.fullmatch(path):
            what, _, stacks = record.text(path).partition("\n\n")
            found.append(Stall(what, stacks[:SHOWN] + (" ..." if len(stacks) > SHOWN else "")))
    return found
