"""What a sweep varies: `loss.kind=gamma,infonce_local` and the like -> variants of one config.

Enters: the axes as they were typed. Leaves: `Variant`: a name that reads, and overrides.
Must not know: whether a variant is a valid config.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.errors import Problem, raise_problems

# Where runs lie and what they are called: a sweep's runs are found by both.
FIXED = ("name", "tracking.", "cluster.storage", "cluster.address")


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A key of the config and the values that it takes."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One point of the grid: a name for its run, and what it changes in the config."""

    name: str
    overrides: tuple[str, ...]


def read_axes(asked: Sequence[str]) -> list[Axis]:
    """Read `a.b=value,value` of each axis, the values in YAML. Raises `UserError` of all problems.

    A comma within brackets parts nothing: `[1, 2],[3, 4]` is two values.
    """
    axes: list[Axis] = []
    problems: list[Problem] = []
    for text in asked:
        key, values = _read(text)
        message = _refuse(key, values, [axis.key for axis in axes])
        if message is not None:
            problems.append(Problem(place=f"--over {text!r}", message=message))
        else:
            axes.append(Axis(key=key, values=tuple(values or ())))
    if not asked:
        problems.append(
            Problem(place="--over", message="missing; say what to vary: --over train.seed=0,1,2")
        )
    raise_problems(problems, "This sweep cannot start")
    return axes


def make_variants(name: str, axes: Sequence[Axis]) -> list[Variant]:
    """All combinations, the last axis fastest. Raises `UserError` when two get the same name."""
    labels = _labels([axis.key for axis in axes])
    variants: dict[str, Variant] = {}
    problems: list[Problem] = []
    for values in itertools.product(*(axis.values for axis in axes)):
        told = [f"{label}_{_slug(value)}" for label, value in zip(labels, values, strict=True)]
        # JSON is YAML: each value is read back as what it was.
        overrides = tuple(
            f"{axis.key}={json.dumps(value)}" for axis, value in zip(axes, values, strict=True)
        )
        variant = Variant(name="-".join([name, *told]), overrides=overrides)
        other = variants.setdefault(variant.name, variant)
        if other is not variant:
            problems.append(
                Problem(
                    place="--over",
                    message=f"{' '.join(other.overrides)} and {' '.join(overrides)} would both be "
                    f"called {variant.name}; sweep one of them by another --over or name=...",
                )
            )
    raise_problems(problems, "This sweep cannot start")
    return list(variants.values())


def _read(text: str) -> tuple[str, list[Any] | None]:
    key, _, listing = text.partition("=")
    try:
        values = yaml.safe_load(f"[{listing}]")
    except yaml.YAMLError:
        return key.strip(), None
    return key.strip(), values if isinstance(values, list) else None


def _refuse(key: str, values: list[Any] | None, known: Sequence[str]) -> str | None:
    """What is wrong with an axis."""
    if not key or not values:
        return "has no values to take; write it as section.key=value,value"
    if key.startswith(FIXED[1:]) or key == FIXED[0]:
        return f"{key} is one for all runs of a sweep; give it as {key}=..., without --over"
    if key in known:
        return f"{key} is varied twice; give all its values to one --over"
    if len({json.dumps(value, default=str) for value in values}) < len(values):
        return "has a value twice; give each once"
    try:
        json.dumps(values)
    except TypeError:
        return "has a value that no config takes, such as a date; put text into quotes"
    return None


def _labels(keys: Sequence[str]) -> list[str]:
    """The last part of each key, or all of it where another ends alike."""
    lasts = [key.rpartition(".")[2] for key in keys]
    return [last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)]


def _slug(value: Any) -> str:
    """A value with only what a run's name may hold: -1 is minus1, for dashes part and may fall."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = re.sub(r"(?<![A-Za-z0-9.])-(?=[0-9.])", "minus", text)
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")
