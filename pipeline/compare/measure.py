"""What came of runs: which metrics count, final and best values, their mean and spread, the front.

Enters: groups of runs and their courses. Leaves: `Comparison`. Must not know: MLflow, files.
"""

import difflib
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline.compare.curves import CLOCK, Course, at, common_end
from pipeline.compare.group import Group, differing
from pipeline.errors import UserError
from pipeline.tracking.search import Tracked

Better = Literal["higher", "lower"]
LOSS = "train/loss"
HIGHER = {"accuracy", "recall", "precision", "auc", "map", "ndcg", "f1"}
LOWER = {"loss", "error", "perplexity"}
FIRST = re.compile(r"recall_at_1$|/accuracy$")  # what a person looks at first
MOST = 8  # metrics that are chosen unasked


class Spread(NamedTuple):
    """Mean of `n` runs and their sample standard deviation, which one run has not."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The best value of a run, and the samples it had seen."""

    value: float
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A run of a group. `why_not` says why it is in no mean; a metric it lacks may be one more."""

    run: Tracked
    course: Course
    why_not: str | None

    def final(self, metric: str) -> float | None:
        """The last value; None where there is none that is finite."""
        value = self.run.metrics.get(metric)
        return value if value is not None and math.isfinite(value) else None

    def best(self, metric: str) -> Best | None:
        """The best value on the way, the first of equals."""
        better, points = direction(metric), self.course.points.get(metric)
        if better is None or not points:
            return None
        choose = max if better == "higher" else min
        samples, value = choose(points, key=lambda point: point[1])
        return Best(value=value, samples=samples)


class Result(NamedTuple):
    """A metric in a group: over its runs at their ends, at their best, and where all groups are."""

    final: Spread | None
    best: Spread | None
    at_samples: Spread | None
    at_seconds: Spread | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A group with what came of it. `cost` is in seconds of training times workers."""

    group: Group
    members: tuple[Member, ...]
    results: Mapping[str, Result]
    seconds: Spread | None
    cost: Spread | None

    @property
    def counted(self) -> list[Member]:
        """The members that are in the means."""
        return [member for member in self.members if member.why_not is None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All that is to be told. `differs` are the keys of configs that are not the same everywhere.

    `samples` and `seconds` are, by metric, how far all counted runs reach; `chance` is what
    guessing gives, where all of them say the same.
    """

    groups: tuple[Measured, ...]
    differs: tuple[str, ...]
    metrics: tuple[str, ...]
    samples: Mapping[str, float | None]
    seconds: Mapping[str, float | None]
    chance: Mapping[str, float]
    warnings: tuple[str, ...]

    def front(self, metric: str) -> list[str]:
        """Labels of the groups that no other beats in both the metric and its cost."""
        places = {
            each.group.label: (each.cost.mean, result.final.mean)
            for each in self.groups
            if each.cost is not None and (result := each.results[metric]).final is not None
        }
        better = direction(metric)
        return [] if better is None else pareto_front(places, better)


def direction(metric: str) -> Better | None:
    """Whether more of a metric is better, as its name says; None where it does not."""
    words = set(re.split(r"[/_\W]+", metric))
    if words & {"chance", "spread"}:
        return None
    if words & HIGHER:
        return "higher"
    return "lower" if words & LOWER else None


def chance_of(metric: str) -> str | None:
    """The metric that says what guessing gives in `metric`; None where no run would have it."""
    name = re.sub(r"recall(_at_\d+)$", r"chance\1", metric)
    name = re.sub(r"/(\d+_shots/|mean_class_)?accuracy$", "/chance", name)
    return None if name == metric else name


def choose_metrics(groups: Sequence[Group], wanted: Sequence[str]) -> list[str]:
    """The metrics to compare: the wanted ones, else evaluations that all groups end with.

    Recall at 1 and accuracies if there are any; without an evaluation the loss. Raises `UserError`
    for a wanted one that no run has.
    """
    known = sorted({name for group in groups for run in group.runs for name in run.metrics})
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
            raise UserError(
                f"--metric: no run has {name!r}; did you mean one of {near or known[:5]}?"
            )
    if wanted:
        return list(dict.fromkeys(wanted))
    has_ended = [names for group in groups if (names := _names(group))]
    shared = set.intersection(*has_ended) if has_ended else set()
    measured = sorted(name for name in shared if name.startswith("eval/") and direction(name))
    # Of two ways of retrieval that from text is what most papers give first.
    first = sorted(
        (name for name in measured if FIRST.search(name)),
        key=lambda name: ("retrieval" not in name, "image_to_text" in name, name),
    )
    return (first or measured or [name for name in [LOSS] if name in shared])[:MOST]


def _names(group: Group) -> set[str]:
    """Metrics of a group's runs that have ended as planned; of all, if none has."""
    ended = [run for run in group.runs if run.status == "FINISHED"] or group.runs
    return {name for run in ended for name in run.metrics}


def needed(metrics: Sequence[str]) -> list[str]:
    """The metrics whose points a comparison takes."""
    return list(dict.fromkeys([*metrics, LOSS, *CLOCK]))


def compare(
    groups: Sequence[Group], metrics: Sequence[str], courses: Mapping[str, Course]
) -> Comparison:
    """Measure every group; `courses` by the run's id, with the points of `needed(metrics)`."""
    members = {
        group.label: tuple(_judge(run, courses[run.ref.run_id], metrics) for run in group.runs)
        for group in groups
    }
    every = [member for each in members.values() for member in each]
    samples = {name: _common(every, name, Course.over_samples) for name in metrics}
    seconds = {name: _common(every, name, Course.over_time) for name in metrics}
    measured = tuple(
        _measure(group, members[group.label], metrics, samples, seconds) for group in groups
    )
    return Comparison(
        groups=measured,
        differs=tuple(differing([group.config for group in groups])),
        metrics=tuple(metrics),
        samples=samples,
        seconds=seconds,
        chance={name: value for name in metrics if (value := _chance(every, name)) is not None},
        warnings=tuple(_warn(measured, metrics)),
    )


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """Mean and sample standard deviation of the values that are there."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    sd = statistics.stdev(there) if len(there) > 1 else None
    return Spread(statistics.fmean(there), sd, len(there))


def pareto_front(places: Mapping[str, tuple[float, float]], better: Better) -> list[str]:
    """The names of (cost, quality) that no other beats: cheaper or better, and in nothing worse."""
    sign = 1 if better == "higher" else -1
    scored = {name: (cost, -sign * quality) for name, (cost, quality) in places.items()}
    front, best = set(), math.inf
    for place in sorted(set(scored.values())):  # from the cheapest on, the best first
        if place[1] < best:
            front.add(place)
            best = place[1]
    return [name for name, place in scored.items() if place in front]


def _judge(run: Tracked, course: Course, metrics: Sequence[str]) -> Member:
    """Only runs that have ended as planned are measured alike."""
    why_not = None
    if run.status != "FINISHED":
        how = {"RUNNING": "not finished", "KILLED": "stopped", "FAILED": "failed"}
        why_not = f"{how.get(run.status, run.status.lower())}, at {course.samples:,} samples"
    elif metrics and not any(name in run.metrics for name in metrics):
        why_not = "has none of the metrics"
    return Member(run=run, course=course, why_not=why_not)


Way = Callable[[Course, str], tuple]


def _common(members: Sequence[Member], metric: str, way: Way) -> float | None:
    curves = [way(member.course, metric) for member in members if member.why_not is None]
    return common_end([curve for curve in curves if len(curve[0])])


def _chance(members: Sequence[Member], metric: str) -> float | None:
    counted = [m for m in members if m.why_not is None and m.final(metric) is not None]
    name = chance_of(metric)
    values = {None if name is None else member.final(name) for member in counted}
    return values.pop() if len(values) == 1 else None


def _measure(
    group: Group,
    members: tuple[Member, ...],
    metrics: Sequence[str],
    samples: Mapping[str, float | None],
    seconds: Mapping[str, float | None],
) -> Measured:
    counted = [member for member in members if member.why_not is None]

    def where(metric: str, way: Way, end: float | None) -> Spread | None:
        curves = [way(member.course, metric) for member in counted]
        values = [] if end is None else [at(curve, end) for curve in curves if len(curve[0])]
        # A mean of those that happen to have a point that early would not be the group's.
        return None if None in values else spread_of(values)

    def best(metric: str) -> Spread | None:
        found = [member.best(metric) for member in counted]
        return spread_of(each.value for each in found if each is not None)

    results = {
        metric: Result(
            final=spread_of(member.final(metric) for member in counted),
            best=best(metric),
            at_samples=where(metric, Course.over_samples, samples[metric]),
            at_seconds=where(metric, Course.over_time, seconds[metric]),
        )
        for metric in metrics
    }
    return Measured(
        group=group,
        members=members,
        results=results,
        seconds=spread_of(member.course.seconds for member in counted),
        cost=spread_of(member.course.worker_seconds for member in counted),
    )


def _warn(groups: Sequence[Measured], metrics: Sequence[str]) -> Iterable[str]:
    """What makes the numbers less than they seem."""
    if not metrics:
        yield "The groups have no evaluation metric in common; choose metrics with --metric."
    members = [member for each in groups for member in each.members]
    left_out = [f"{m.run.name} {m.why_not}" for m in members if m.why_not is not None]
    if left_out:
        more = "" if len(left_out) <= 3 else f", and {len(left_out) - 3} more (comparison.md)"
        yield (
            f"{len(left_out)} of {len(members)} runs are in no mean: "
            f"{'; '.join(left_out[:3])}{more}."
        )
    for name, tag in (("commits", "mlflow.source.git.commit"), ("versions", "gammaray.version")):
        values = {value[:10] for m in members if (value := m.run.tags.get(tag))}
        if len(values) > 1:
            yield f"The runs are of {len(values)} {name} of the code: {', '.join(sorted(values))}."
    for each in groups:
        lacking = [name for name in metrics if each.results[name].final is None]
        if lacking and each.counted:
            yield f"{each.group.label} has no {', '.join(lacking)}."
        if len(each.counted) == 1:
            yield f"{each.group.label} has one run that counts: its spread is not known."
