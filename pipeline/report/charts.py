"""Charts as SVG that stands in the page: sharp at any width, in the page's own colours.

Enters: points. Leaves: SVG text. A picture of pixels would be blurred on one screen and unreadable
on a narrow one, and white in a dark page.
"""

import io
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.report.events import Event
from pipeline.report.record import Record
from pipeline.report.spent import Window, last_moment, windows
from pipeline.tracking.artifacts import Reading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID = "#123456", "#654321"  # stand for the page's colours
PAGE = {INK: "currentColor", GRID: "var(--line)"}
COLORS = ("#3b82d6", "#d9772b", "#2f9e64", "#c2559d", "#8a6fd1", "#a38a1d")
KINDS = {
    "failed": ("X", "#d64545"),
    "stopped": ("o", "#8a8f98"),
    "resumed": (">", "#3b82d6"),
    "resizing": ("s", "#3b82d6"),
    "started": ("^", "#2f9e64"),
}
FEW = 3  # points that a line alone hardly shows
MOST = 1500  # points of a line that are drawn
SIZE = (5.2, 2.7)  # inches
WIDE = (6.4, 2.9)
LANE = 0.25  # and the height of a lane of events
ROUND = (1, 2, 5, 10)  # what numbers on an axis are multiples of
UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))


def draw_curves(lines: Mapping[str, Sequence[Reading]], *, percent: bool = False) -> str:
    """Lines of metrics over samples seen, labelled where there is more than one."""
    figure, axes = _begin(SIZE)
    for color, (label, points) in zip(_colors(), lines.items(), strict=False):
        shown = _thinned(points)
        axes.plot(
            [point.samples for point in shown],
            [point.value for point in shown],
            color=color,
            linewidth=1.5,
            marker="o" if len(shown) <= FEW else None,
            markersize=5,
            label=_plain(label),
        )
    axes.set_xlabel("samples seen")
    _count(axes)
    axes.margins(y=0.12)
    if percent:
        _percent(axes)
    if len(lines) > 1:
        _explain(figure)
    return _finish(figure)


def draw_times(record: Record, happened: Sequence[Event]) -> str:
    """Samples seen and workers over the time since the run began; above, what befell it."""
    began, end = (record.run.began or 0) / 1000, last_moment(record)
    unit, length = time_unit(end - began)
    figure, axes = _begin(WIDE)
    times, samples = _course(windows(record), began)
    axes.plot([(time - began) / length for time in times], samples, color=COLORS[0], linewidth=1.5)
    axes.set_xlabel(f"{unit} since the start")
    axes.set_ylabel("samples seen")
    last = max([end - began, *(time - began for time in times)]) / length
    axes.set_xlim(0, max([last, *((event.moment - began) / length for event in happened), 1e-9]))
    axes.set_ylim(0, 1.1 * max(samples) or 1)
    _count_y(axes)
    workers = record.curve("train/world_size")
    if len({point.value for point in workers}) > 1:
        _draw_workers(axes, workers, began, length)
    if happened:
        _draw_events(figure, axes, happened, began, length)
    return _finish(figure)


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit for spans up to so long, and its seconds."""
    for unit, length in UNITS:
        if seconds >= 3 * length:
            return unit, length
    return "seconds", 1.0


def _draw_workers(axes: "Axes", workers: Sequence[Reading], began: float, length: float) -> None:
    from matplotlib.ticker import MaxNLocator

    other = axes.twinx()
    times = [(point.ms / 1000 - began) / length for point in workers]
    other.plot(times, [point.value for point in workers], color=COLORS[1], linewidth=1.2,
               drawstyle="steps-post")  # fmt: skip
    other.set_ylabel("workers", color=COLORS[1], fontsize=9)
    other.set_ylim(0, 1.25 * max(point.value for point in workers))
    other.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    other.tick_params(colors=COLORS[1], labelsize=8.5)
    for side in other.spines.values():
        side.set_visible(False)


def _course(trained: Sequence[Window], began: float) -> tuple[list[float], list[int]]:
    """Times and samples: level from the end of a window to the first step of the next."""
    times, samples = [began], [0]
    for window in trained:
        times += [max(times[-1], window.ended - window.seconds), window.ended]
        samples += [samples[-1], window.samples]
    return times, samples


def _explain(figure: "Figure") -> None:
    """The legend, above the axes: no line runs there."""
    is_short = sum(len(str(line.get_label())) for line in figure.axes[0].lines) < 40
    figure.legend(
        fontsize=8,
        frameon=False,
        labelcolor=INK,
        loc="outside upper left",
        ncols=3 if is_short else 2,
        borderaxespad=0.2,
    )


def _draw_events(
    figure: "Figure", axes: "Axes", happened: Sequence[Event], began: float, length: float
) -> None:
    """A lane above the axes for each kind, so that none hides another."""
    kinds = list(dict.fromkeys(event.kind for event in happened))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + LANE * len(kinds))
    lanes = axes.inset_axes((0, 1.04, 1, 0.09 * len(kinds)), sharex=axes)
    for number, kind in enumerate(kinds):
        marker, color = KINDS.get(kind, ("D", COLORS[1]))
        times = [(event.moment - began) / length for event in happened if event.kind == kind]
        lanes.plot(times, [number] * len(times), linestyle="", marker=marker, markersize=7,
                   color=color, clip_on=False)  # fmt: skip
    lanes.set_yticks(range(len(kinds)), [_plain(kind) for kind in kinds])
    lanes.set_ylim(len(kinds) - 0.5, -0.5)
    _style(lanes)
    lanes.tick_params(labelbottom=False, length=0)
    for side in lanes.spines.values():
        side.set_visible(False)


def _thinned(points: Sequence[Reading]) -> Sequence[Reading]:
    """Every so manieth point, and the last."""
    every = -(-len(points) // MOST)
    return points if every == 1 else [*points[:-1:every], points[-1]]


def _colors() -> Sequence[str]:
    return [COLORS[number % len(COLORS)] for number in range(100)]


def _plain(text: str) -> str:
    """A dollar sign would begin a formula; a leading underscore hides a label."""
    return text.replace("$", r"\$").lstrip("_") or " "


def _begin(size: tuple[float, float]) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    return figure, axes


def _style(axes: "Axes") -> None:
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    for name, side in axes.spines.items():
        side.set(color=GRID, visible=name in ("left", "bottom"))


def _count(axes: "Axes") -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND))
    axes.set_xlim(left=0)


def _count_y(axes: "Axes") -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=ROUND))


def _percent(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _finish(figure: "Figure") -> str:
    """The figure as an element of a page: no header, ids of its own, the page's colours."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "report"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    own = f"c{zlib.crc32(text.encode()):08x}-"  # ids of two charts of a page must differ
    text = re.sub(r'(id="|href="#|url\(#)', lambda match: match[0] + own, text)
    for stand_in, color in PAGE.items():
        text = text.replace(stand_in, color)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", text)
    text = re.sub(r' xmlns:xlink="[^"]*"', "", text).replace("xlink:href", "href")
    return text.replace("<svg ", '<svg role="img" ', 1)
