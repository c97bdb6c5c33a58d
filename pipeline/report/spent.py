"""Where a run's time went, from the times of its metric points.

Enters: a run's record. Leaves: seconds by what they were spent on. Must not know: pages.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.report.events import events
from pipeline.report.record import Record

COMPUTE, WAIT, SAVE = "computing steps", "waiting for data", "saving checkpoints"
EVALUATE, START = "evaluating", "starting, to the first step"
PAUSE, ANEW = "paused, between two commands", "starting anew"
BETWEEN, END = "between steps, else", "after the last step"
MEANING = {
    COMPUTE: "forward, backward and update",
    WAIT: "steps that stood still until their batch came; more cluster.ingest_cpus, or smaller "
    "pictures, make it less",
    SAVE: "training stands still while a worker writes to its own disk; sending goes on beside it",
    EVALUATE: "with the last checkpoint, which is saved just before the last evaluation",
    START: "Ray, workers, the model, the first batches",
    PAUSE: "from the last step logged until the command was given again and had its data and Ray",
    ANEW: "from there, or from the last step logged before a restart, to the first one logged "
    "after it: steps done twice",
    BETWEEN: "logging, waiting for the other workers, and what is not told apart",
    END: "figures and files; of a run that failed, the starts that came to nothing",
}


class Spent(NamedTuple):
    """Seconds and their share of the whole."""

    what: str
    seconds: float
    share: float
    meaning: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The steps between two points: when it ended (s), how long they took, the share waited."""

    ended: float
    samples: int
    seconds: float
    waited: float
    saving: float
    attempt: int


def windows(record: Record) -> list[Window]:
    """The windows of training, by samples."""
    step_s = {point.samples: point.value for point in record.curve("train/step_s")}
    waited = {point.samples: point.value for point in record.curve("train/data_wait_share")}
    saving = {point.samples: point.value for point in record.curve("train/saving_seconds")}
    attempt = {point.samples: point.value for point in record.curve("train/attempt")}
    found, before = [], 0.0
    for point in record.curve("train/step"):
        at = point.samples
        found.append(
            Window(
                ended=point.ms / 1000,
                samples=at,
                seconds=(point.value - before) * step_s.get(at, 0.0),
                waited=waited.get(at, 0.0),
                saving=saving.get(at, 0.0),
                attempt=int(attempt.get(at, 1)),
            )
        )
        before = point.value
    return found


def evaluations(record: Record) -> list[float]:
    """When evaluations ended, in seconds since 1970."""
    moments: dict[int, int] = {}
    for name, points in record.points.items():
        if name.startswith("eval/"):
            for point in points:
                moments[point.samples] = max(point.ms, moments.get(point.samples, 0))
    return sorted(ms / 1000 for ms in moments.values())


def last_moment(record: Record) -> float:
    """When the run ended or, if it has not, was last heard of."""
    if record.run.ended and record.run.status != "RUNNING":
        return record.run.ended / 1000
    logged = [point.ms / 1000 for points in record.points.values() for point in points[-1:]]
    told = [event.moment for event in events(record)]
    return max([(record.run.began or 0) / 1000, *logged, *told])


def spend(record: Record) -> list[Spent]:
    """What the run's time went into, the most first; nothing where no time is known."""
    began = (record.run.began or 0) / 1000
    whole = last_moment(record) - began
    if not began or whole <= 0:
        return []
    sums = dict.fromkeys(MEANING, 0.0)
    resumed = [event.moment for event in events(record) if event.kind == "resumed"]
    pieces = _pieces(began, last_moment(record), windows(record), evaluations(record), resumed)
    for what, seconds in pieces:
        sums[what] += max(0.0, seconds)
    total = sum(sums.values())
    ordered = sorted(sums, key=lambda what: -sums[what])
    return [Spent(what, sums[what], sums[what] / total, MEANING[what])
            for what in ordered if sums[what] >= 0.05]  # fmt: skip


def _pieces(
    began: float,
    ended: float,
    trained: Sequence[Window],
    evaluated: Sequence[float],
    resumed: Sequence[float],
) -> Iterator[tuple[str, float]]:
    before, attempt = began, None
    for window in trained:
        gap = max(0.0, window.ended - before - window.seconds)
        if attempt is None:
            yield START, gap
        elif window.attempt != attempt:
            again = [moment for moment in resumed if before < moment <= before + gap]
            paused = max(again, default=before) - before
            yield PAUSE, paused
            yield ANEW, gap - paused
        else:
            saved = min(gap, window.saving)
            is_evaluated = any(before < moment <= window.ended for moment in evaluated)
            yield SAVE, saved
            yield EVALUATE if is_evaluated else BETWEEN, gap - saved
        steps = min(window.seconds, window.ended - before)
        yield WAIT, steps * window.waited
        yield COMPUTE, steps * (1 - window.waited)
        before, attempt = window.ended, window.attempt
    if attempt is None:
        yield START, ended - before
        return
    last = max([moment for moment in evaluated if moment > before], default=before)
    yield EVALUATE, last - before
    yield END, ended - last
