"""Figures of a comparison: learning curves on samples and on time, quality against cost."""

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compare.curves import Course, Floats, band
from pipeline.compare.measure import LOSS, Comparison, Measured, direction
from pipeline.compare.write import PANELS, counts, is_share, time_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW = 3  # points of a curve that show little of the way
WIDE = 70  # characters of a line of a legend,
WIDTH = 5.3  # the inches that these take,
LINE = 0.17  # and the height of a line
MOST = 24  # groups that are told apart


def draw_curves(comparison: Comparison, path: Path) -> bool:
    """Draw metrics over samples and over time trained; give whether there was any point.

    A line for each run, pale, and dashed where it is in no mean; the mean of each group with its
    spread. The loss too, where evaluations say little of the way. Of many groups the best ones.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    names = _drawn(comparison)
    if not names:
        return False
    shown = _shown(comparison)
    figure = Figure(figsize=(11, 3.2 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 2, squeeze=False, sharey="row")
    unit, length = time_unit(_longest(shown))
    has_chance = False
    for row, name in zip(panels, names, strict=True):
        for axes, way, scale, label in (
            (row[0], Course.over_samples, 1.0, "samples seen"),
            (row[1], Course.over_time, length, f"{unit} of training"),
        ):
            for number, each in enumerate(shown):
                _draw_group(axes, each, name, way, scale, number)
            axes.set_xlabel(label, fontsize=9)
            axes.grid(alpha=0.3)
            axes.set_xlim(left=0)
        if is_share(name):
            _as_share(row[0])  # both have one y axis
        for axes in row:
            has_chance |= _draw_chance(axes, comparison.chance.get(name))
        row[0].xaxis.set_major_formatter(EngFormatter())
        row[0].set_title(_title(comparison, name), fontsize=10, loc="left")
    left_out = any(member.why_not for each in shown for member in each.members)
    marks = [("-", "pale: a run; thick: the mean of a group, and one standard deviation")]
    marks += [("--", "a run that is in no mean")] if left_out else []
    marks += [(":", "chance")] if has_chance else []
    _add_legend(figure, _legend(comparison, shown, *marks))
    figure.savefig(path, dpi=110)
    return True


def draw_pareto(comparison: Comparison, path: Path) -> bool:
    """Draw metrics against cost; give whether any group has both.

    Small: runs. Large: the mean of each group, with its spread; of many groups the best ones, the
    others are gray. The line joins the groups that no other beats.
    """
    from matplotlib.figure import Figure

    names = [
        name
        for name in comparison.metrics
        if any(each.cost and each.results[name].final for each in comparison.groups)
    ][:PANELS]
    if not names:
        return False
    shown = _shown(comparison)
    labels = {each.group.label for each in shown}
    others = [each for each in comparison.groups if each.group.label not in labels]
    figure = Figure(figsize=(max(6.5, 4.6 * len(names)), 4.2), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    has_chance = False
    unit, length = time_unit(max(each.cost.mean for each in comparison.groups if each.cost))
    for axes, name in zip(panels, names, strict=True):
        axes.plot(*_places(others, name, length), ".", color="lightgray", zorder=0)
        for number, each in enumerate(shown):
            _draw_cost(axes, each, name, length, number)
        _draw_front(axes, comparison, name, length)
        axes.set_title("\n".join(textwrap.wrap(name, 44)), fontsize=10, loc="left")
        axes.set_xlabel(f"worker-{unit} of training", fontsize=9)
        axes.grid(alpha=0.3)
        axes.margins(0.12)
        if is_share(name):
            _as_share(axes)
        has_chance |= _draw_chance(axes, comparison.chance.get(name))
    is_line = any(len(comparison.front(name)) > 1 for name in names)
    marks = [("--", "the front: no other group is both cheaper and better")] if is_line else []
    marks += [(":", "chance")] if has_chance else []
    _add_legend(figure, _legend(comparison, shown, *marks))
    figure.savefig(path, dpi=110)
    return True


def _shown(comparison: Comparison) -> list[Measured]:
    """The groups that are told apart: all, or of many the best in the first metric."""
    found = list(comparison.groups)
    if len(found) > MOST and comparison.metrics:
        name = comparison.metrics[0]
        sign = 1 if direction(name) == "lower" else -1
        values = [each.results[name].final for each in found]
        ranks = [math.inf if value is None else sign * value.mean for value in values]
        found = [found[place] for place in np.argsort(ranks, kind="stable")]
    return found[:MOST]


def _drawn(comparison: Comparison) -> list[str]:
    members = [member for each in comparison.groups for member in each.members]
    names = [
        name
        for name in comparison.metrics
        if any(member.course.points.get(name) for member in members)
    ][:PANELS]
    most = max((len(m.course.points[name]) for name in names for m in members), default=0)
    if most <= FEW and LOSS not in names and any(member.course.points[LOSS] for member in members):
        names.append(LOSS)
    return names


def _longest(groups: Sequence[Measured]) -> float:
    return max(
        (member.course.seconds or 0.0 for each in groups for member in each.members),
        default=0.0,
    )


def _title(comparison: Comparison, name: str) -> str:
    losses = {each.group.config.get("loss.kind") for each in comparison.groups}
    return f"{name} (of losses that are not alike)" if name == LOSS and len(losses) > 1 else name


def _draw_group(
    axes: "Axes",
    each: Measured,
    name: str,
    way: Callable[[Course, str], tuple[Floats, Floats]],
    scale: float,
    number: int,
) -> None:
    counted = []
    for member in each.members:
        x, y = way(member.course, name)
        if not len(x):
            continue
        axes.plot(
            x / scale,
            y,
            color=_color(number),
            linewidth=0.9,
            alpha=0.45,
            linestyle="-" if member.why_not is None else (0, (4, 3)),
            marker="." if len(x) <= FEW else None,
        )
        if member.why_not is None:
            counted.append((x / scale, y))
    mean = band(counted)
    if mean is None or not len(mean.x):
        return
    axes.plot(
        mean.x,
        mean.mean,
        color=_color(number),
        linewidth=2,
        marker="o" if len(mean.x) <= FEW else None,
    )
    axes.fill_between(
        mean.x,
        mean.mean - mean.spread,
        mean.mean + mean.spread,
        color=_color(number),
        alpha=0.18,
        linewidth=0,
    )


def _draw_cost(axes: "Axes", each: Measured, name: str, length: float, number: int) -> None:
    final = each.results[name].final
    if each.cost is None or final is None:
        return
    for member in each.counted:
        cost, value = member.course.worker_seconds, member.final(name)
        if cost is not None and value is not None:
            axes.plot(cost / length, value, ".", color=_color(number), alpha=0.5, markersize=6)
    axes.errorbar(
        each.cost.mean / length,
        final.mean,
        xerr=(each.cost.sd or 0.0) / length,
        yerr=final.sd or 0.0,
        fmt="o",
        color=_color(number),
        markersize=8,
        capsize=3,
        linewidth=1.2,
    )


def _draw_front(axes: "Axes", comparison: Comparison, name: str, length: float) -> None:
    labels = set(comparison.front(name))
    front = [each for each in comparison.groups if each.group.label in labels]
    costs, values = _places(front, name, length)
    if len(costs) > 1:
        order = np.argsort(costs)
        axes.plot(costs[order], values[order], color="gray", linewidth=1, linestyle="--", zorder=0)


def _draw_chance(axes: "Axes", chance: float | None) -> bool:
    """Draw a line at chance; not where all lies so far above that it would press that together."""
    bottom, top = axes.get_ylim()
    if chance is None or chance < bottom:
        return False
    axes.axhline(chance, color="gray", linewidth=0.9, linestyle=":", zorder=0)
    axes.set_ylim(bottom, max(top, 1.05 * chance))
    return True


def _places(groups: Sequence[Measured], name: str, length: float) -> tuple[Floats, Floats]:
    """Costs and values of the groups that have both."""
    found = [
        (each.cost.mean / length, final.mean)
        for each in groups
        if each.cost is not None and (final := each.results[name].final) is not None
    ]
    costs, values = np.array(found).reshape(-1, 2).T
    return costs, values


def _legend(
    comparison: Comparison, shown: Sequence[Measured], *more: tuple[Any, str]
) -> list[tuple[dict[str, Any], str]]:
    """Style and meaning of a line for each group that is shown, and of `more` gray ones."""
    groups = [
        ({"color": _color(number), "linewidth": 2, "marker": "o", "markersize": 5}, _told(each))
        for number, each in enumerate(shown)
    ]
    if len(shown) < len(comparison.groups):
        best = f"the best {len(shown)} of {len(comparison.groups):,} groups"
        of = f" in {comparison.metrics[0]}" if comparison.metrics else ""
        groups.append(({"linewidth": 0}, f"{best}{of}; comparison.md has all"))
    return groups + [
        ({"color": "gray", "linewidth": 1, "linestyle": style}, meaning) for style, meaning in more
    ]


def _add_legend(figure: "Figure", legend: Sequence[tuple[dict[str, Any], str]]) -> None:
    """Put the legend below the panels, and make the figure as much higher."""
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches()
    columns = max(1, int(width // WIDTH)) if len(legend) > 4 else 1
    lines = sum(meaning.count("\n") + 1 for _, meaning in legend)
    figure.set_size_inches(width, height + 0.2 + LINE * -(-lines // columns))
    figure.legend(
        [Line2D([], [], **style) for style, _ in legend],
        [meaning for _, meaning in legend],
        loc="outside lower center",
        fontsize=8,
        ncols=columns,
    )


def _told(each: Measured) -> str:
    runs = counts(each)
    line = f"{each.group.title} ({runs} run{'' if runs == '1' else 's'})"
    # A dollar sign would begin a formula.
    return "\n".join(textwrap.wrap(line, WIDE)).replace("$", r"\$")


def _color(number: int) -> str:
    return f"C{number % 10}"


def _as_share(axes: "Axes") -> None:
    """Label in percent, from zero on where a spread would reach below it."""
    from matplotlib.ticker import FuncFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
