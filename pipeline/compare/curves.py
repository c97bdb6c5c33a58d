"""A run's metrics over samples seen and over time trained, and the mean of several runs.

Time is that of steps: their mean duration as logged, times their number. Starts, pauses,
evaluations and checkpoints are not in it. Enters: metric points of the tracker. Leaves: `Course`,
`Band`. Must not know: configs, what a metric means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Points = Sequence[tuple[int, float]]
Floats = NDArray[np.float64]
CLOCK = ("train/step", "train/step_s", "train/world_size")  # what time is made of


class Band(NamedTuple):
    """Mean and spread of several curves at the places of `x`, where all of them are."""

    x: Floats
    mean: Floats
    spread: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """How a run went. `points` are (samples, value) by metric, at least those of `CLOCK`."""

    points: Mapping[str, Points]

    @property
    def samples(self) -> int:
        """Samples seen at the last point of any metric."""
        return max((points[-1][0] for points in self.points.values() if points), default=0)

    @property
    def seconds(self) -> float | None:
        """Time trained; None where the run has not logged it."""
        return None if (clock := self._clock(1.0)) is None else float(clock[1][-1])

    @property
    def worker_seconds(self) -> float | None:
        """Time trained, times the workers that trained."""
        workers = dict(self.points["train/world_size"])
        clock = self._clock(workers) if workers else None
        return None if clock is None else float(clock[1][-1])

    def over_samples(self, metric: str) -> tuple[Floats, Floats]:
        """Samples and values of a metric."""
        points = self.points[metric]
        return (
            np.array([samples for samples, _ in points], dtype=np.float64),
            np.array([value for _, value in points], dtype=np.float64),
        )

    def over_time(self, metric: str) -> tuple[Floats, Floats]:
        """Seconds trained and values of a metric; nothing where no time was logged."""
        samples, values = self.over_samples(metric)
        clock = self._clock(1.0)
        if clock is None:
            return np.empty(0), np.empty(0)
        return np.interp(samples, *clock), values

    def _clock(self, factor: float | Mapping[int, float]) -> tuple[Floats, Floats] | None:
        """Samples, and the sum of step durations times `factor` up to them, from nothing on."""
        steps, durations = (dict(self.points[name]) for name in CLOCK[:2])
        places = sorted(steps.keys() & durations.keys())
        if isinstance(factor, Mapping):
            places = [place for place in places if place in factor]
        if not places:
            return None
        taken = np.diff([0.0, *(steps[place] for place in places)])
        scale = [factor[place] if isinstance(factor, Mapping) else factor for place in places]
        spent = taken * np.array([durations[place] for place in places]) * np.array(scale)
        return np.array([0.0, *places]), np.concatenate([[0.0], np.cumsum(spent)])


def at(curve: tuple[Floats, Floats], x: float) -> float | None:
    """The value of a curve at `x`, between its points linearly; None before and after them."""
    places, values = curve
    # What is equal but for rounding is there.
    if not len(places) or not places[0] * (1 - 1e-9) <= x <= places[-1] * (1 + 1e-9):
        return None
    return float(np.interp(x, places, values))


def common_end(curves: Sequence[tuple[Floats, Floats]]) -> float | None:
    """How far all curves reach; None where one has no point."""
    if not curves or any(not len(places) for places, _ in curves):
        return None
    return min(float(places[-1]) for places, _ in curves)


def band(curves: Sequence[tuple[Floats, Floats]]) -> Band | None:
    """Mean and sample standard deviation at each place of any curve that all of them span."""
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return None
    first = max(places[0] for places, _ in curves)
    last = min(places[-1] for places, _ in curves)
    every = np.unique(np.concatenate([places for places, _ in curves]))
    x = every[(every >= first) & (every <= last)]
    values = np.stack([np.interp(x, *curve) for curve in curves])
    spread = values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(x))
    return Band(x, values.mean(0), spread)
