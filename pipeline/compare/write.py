"""A comparison in words and numbers: Markdown for people, JSON for programs."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.compare.group import ABSENT, seed_of
from pipeline.compare.measure import Comparison, Measured, Member, Spread, direction

RESULTS = ("group (runs)", "final", "best", "equal samples", "equal time", "front")
PANELS = 3  # metrics that are drawn, the first ones
ACROSS = 8  # groups that have a column each; more have a row each
UNITS = (("hours", 3600.0), ("minutes", 60.0))
HOW = """\
Runs of one config, the seed apart, are a group. Of its finished runs: mean ± sample standard
deviation, and in brackets how many. *Best* is each run's best evaluation, chosen after the
fact. *Equal samples* and *equal time* is where the first of all these runs ended, between two
evaluations linearly; there is no value where a run had not been evaluated by then. Time is
that of training steps, and cost is time x workers. *Front*: no other group is both cheaper and
better."""


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit for spans up to so long, and its seconds."""
    for unit, length in UNITS:
        if seconds >= 3 * length:
            return unit, length
    return "seconds", 1.0


def is_share(metric: str) -> bool:
    """Whether a metric is between 0 and 1, and said in percent."""
    return direction(metric) == "higher"


def titled(metric: str) -> str:
    """A metric's name, with the unit in which it is said."""
    return f"{metric}, %" if is_share(metric) else metric


def headed(comparison: Comparison, metric: str) -> str:
    """A metric's name over its table, with what guessing gives where that is known."""
    chance = comparison.chance.get(metric)
    return titled(metric) + ("" if chance is None else f" (chance {100 * chance:.3g} %)")


def say_drawn(comparison: Comparison) -> str:
    """Which metrics the pictures show, if not all."""
    count = len(comparison.metrics)
    if count <= PANELS:
        return ""
    return (
        f"Pictures: the first {PANELS} of {count} metrics; others with "
        "gammaray compare --metric NAME."
    )


def say(metric: str, spread: Spread | None, runs: int) -> str:
    """A mean with its spread as a cell of a table, and of how many if not of all `runs`."""
    if spread is None:
        return ABSENT
    sd = "" if spread.sd is None else f" ± {say_value(metric, spread.sd)}"
    few = "" if spread.n == runs else f" ({spread.n})"
    return f"{say_value(metric, spread.mean)}{sd}{few}"


def say_value(metric: str, value: float) -> str:
    """A value in the unit in which its metric is said: a share in percent, a count whole."""
    if is_share(metric):
        return f"{100 * value:.1f}"
    return f"{value:,.0f}" if value.is_integer() else f"{value:.4f}"


def say_time(spread: Spread | None, of: str = "") -> str:
    """A time with its spread, in a unit that reads."""
    if spread is None:
        return ABSENT
    unit, length = time_unit(spread.mean)
    sd = "" if spread.sd is None else f" ± {spread.sd / length:.1f}"
    return f"{spread.mean / length:.1f}{sd} {of}{unit}"


def counts(each: Measured) -> str:
    """How many of a group's runs count: 3, or 2 of 3."""
    counted, all_runs = len(each.counted), len(each.members)
    return str(counted) if counted == all_runs else f"{counted} of {all_runs}"


def config_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """What differs, as titles and rows: a column for each group, or a row where they are many."""
    labels = [each.group.label for each in comparison.groups]
    by_key = [[key, *values] for key, values in _differences(comparison).items()]
    if len(labels) <= ACROSS:
        return ["what differs", *labels], by_key
    titles, *rows = zip(["group", *labels], *by_key, strict=True)
    return list(titles), [list(row) for row in rows]


def _differences(comparison: Comparison) -> dict[str, list[str]]:
    """The value of each group, by key."""
    return {
        key: [each.group.config.get(key, ABSENT) for each in comparison.groups]
        for key in comparison.differs
    }


def result_rows(comparison: Comparison, metric: str) -> list[list[str]]:
    """What came of it: a row for each group with `RESULTS`."""
    front = set(comparison.front(metric))
    return [
        [
            f"{each.group.label} ({counts(each)})",
            *(say(metric, spread, len(each.counted)) for spread in each.results[metric]),
            "yes" if each.group.label in front else "",
        ]
        for each in comparison.groups
    ]


def to_markdown(comparison: Comparison, figures: Sequence[str]) -> str:
    """The whole comparison; `figures` are files beside it."""
    count = sum(len(each.members) for each in comparison.groups)
    return (
        "\n\n".join(
            [
                f"# {count} run(s) of {len(comparison.groups)} config(s)",
                HOW,
                *(f"**Mind:** {warning}" for warning in comparison.warnings),
                "## What differs",
                _differs(comparison),
                "## What came of it",
                _results(comparison),
                *([drawn] if figures and (drawn := say_drawn(comparison)) else []),
                *(f"![{Path(name).stem}]({name})" for name in figures),
                "## Runs",
                _runs(comparison),
            ]
        )
        + "\n"
    )


def to_json(comparison: Comparison) -> dict[str, Any]:
    """All numbers as they are, in plain values."""
    return {
        "metrics": {
            name: {
                "better": direction(name),
                "chance": comparison.chance.get(name),
                "equal_samples": comparison.samples[name],
                "equal_seconds": comparison.seconds[name],
                "pareto_front": comparison.front(name),
            }
            for name in comparison.metrics
        },
        "differs": _differences(comparison),
        "groups": [_group(each) for each in comparison.groups],
        "warnings": list(comparison.warnings),
    }


def write_files(comparison: Comparison, figures: Sequence[str], folder: Path) -> None:
    """Write comparison.md and comparison.json into the folder."""
    (folder / "comparison.md").write_text(to_markdown(comparison, figures), encoding="utf-8")
    text = json.dumps(to_json(comparison), indent=1, allow_nan=False)
    (folder / "comparison.json").write_text(text + "\n", encoding="utf-8")


def _differs(comparison: Comparison) -> str:
    if not comparison.differs:
        return "Nothing but the seed."
    return _table(*config_table(comparison))


def _results(comparison: Comparison) -> str:
    costs = [
        [each.group.title, counts(each), say_time(each.seconds), say_time(each.cost, "worker-")]
        for each in comparison.groups
    ]
    tables = [_table(["group", "runs", "training time", "cost"], costs)]
    for metric in comparison.metrics:
        tables += [
            f"**{headed(comparison, metric)}**",
            _table(RESULTS, result_rows(comparison, metric)),
        ]
    return "\n\n".join(tables)


def _runs(comparison: Comparison) -> str:
    rows = [
        [
            each.group.label,
            member.run.name,
            seed_of(member.run),
            member.why_not or "counts",
            f"{member.course.samples:,}",
            *(_value(name, member) for name in comparison.metrics),
            member.run.ref.run_id,
        ]
        for each in comparison.groups
        for member in each.members
    ]
    titles = [
        "group",
        "run",
        "seed",
        "state",
        "samples",
        *map(titled, comparison.metrics),
        "MLflow run",
    ]
    return _table(titles, rows)


def _value(metric: str, member: Member) -> str:
    value = member.final(metric)
    return ABSENT if value is None else say_value(metric, value)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def _group(each: Measured) -> dict[str, Any]:
    return {
        "label": each.group.label,
        "what": each.group.what,
        "config": dict(each.group.config),
        "training_seconds": _spread(each.seconds),
        "worker_seconds": _spread(each.cost),
        "metrics": {
            name: {
                "final": _spread(result.final),
                "best": _spread(result.best),
                "at_equal_samples": _spread(result.at_samples),
                "at_equal_seconds": _spread(result.at_seconds),
            }
            for name, result in each.results.items()
        },
        "runs": [_member(member, list(each.results)) for member in each.members],
    }


def _member(member: Member, metrics: Sequence[str]) -> dict[str, Any]:
    run = member.run
    return {
        "name": run.name,
        "run_id": run.ref.run_id,
        "tracking_uri": run.ref.uri,
        "experiment": run.experiment,
        "seed": seed_of(run),
        "status": run.status,
        "why_not": member.why_not,
        "samples": member.course.samples,
        "training_seconds": member.course.seconds,
        "worker_seconds": member.course.worker_seconds,
        "metrics": {
            name: {
                "final": member.final(name),
                "best": None if (best := member.best(name)) is None else asdict(best),
            }
            for name in metrics
        },
    }


def _spread(spread: Spread | None) -> dict[str, float | int | None] | None:
    return None if spread is None else spread._asdict()
