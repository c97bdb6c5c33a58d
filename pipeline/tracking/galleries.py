"""Galleries: right and wrong cases with their pictures, as a person looks at them."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

RIGHT, WRONG = "forestgreen", "firebrick"
COLUMNS = 4  # of answers
Pictures = NDArray[np.uint8]


class Answer(Protocol):
    """An answer to be drawn: its pictures [pictures, size, size, 3] and texts."""

    @property
    def pictures(self) -> Pictures:
        """What was looked at, side by side."""
        ...

    @property
    def text(self) -> str:
        """What was asked or stated, if anything."""
        ...

    @property
    def said(self) -> str:
        """The model's answer."""
        ...

    @property
    def answers(self) -> Sequence[str]:
        """The right ones."""
        ...


class Images(Protocol):
    """A caption, and images [n, size, size, 3] that were found for it."""

    @property
    def text(self) -> str:
        """The caption."""
        ...

    @property
    def pictures(self) -> Pictures:
        """The best first; the right one last where it is not among the best."""
        ...

    @property
    def right(self) -> int:
        """The place of the right one."""
        ...

    @property
    def rank(self) -> int:
        """How many stood before the right one."""
        ...


class Captions(Protocol):
    """An image [size, size, 3], and captions that were found for it."""

    @property
    def picture(self) -> Pictures:
        """The image."""
        ...

    @property
    def texts(self) -> Sequence[str]:
        """The best first; a right one last where none is among the best."""
        ...

    @property
    def is_right(self) -> Sequence[bool]:
        """Which of the captions are right."""
        ...

    @property
    def rank(self) -> int:
        """How many stood before the best of the right ones."""
        ...


def plot_answers(shown: Sequence[Answer], path: Path) -> None:
    """Draw answers with their pictures: right ones on top, below wrong ones and what is right."""
    from matplotlib.figure import Figure

    ordered = sorted(shown, key=lambda each: each.said not in each.answers)
    rows = -(-len(ordered) // COLUMNS)
    figure = Figure(figsize=(2.6 * COLUMNS, 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axes in panels:
        axes.axis("off")
    for axes, each in zip(panels, ordered, strict=False):
        edge = np.full((each.pictures.shape[1], 3, 3), 0, dtype=np.uint8)
        parts = [part for picture in each.pictures for part in (edge, picture)][1:]
        axes.imshow(np.concatenate(parts, axis=1), interpolation="nearest")
        is_right = each.said in each.answers
        said = [f"→ {each.said}"] if is_right else [f"→ {each.said}", f"(right: {each.answers[0]})"]
        if sum(map(len, said)) < 40:
            said = [" ".join(said)]
        lines = [line for part in said for line in _lines(part, 40, 1)]
        axes.set_title(
            "\n".join([*_lines(each.text, 34, 3), *lines]),
            fontsize=7,
            color="black" if is_right else WRONG,
        )
    figure.savefig(path, dpi=110)


def plot_found_images(shown: Sequence[Images], path: Path) -> None:
    """Draw captions, each with its best images, the right one framed; right cases on top."""
    from matplotlib.figure import Figure

    ordered = sorted(shown, key=lambda each: each.rank)
    columns = 1 + max(len(each.pictures) for each in ordered)
    figure = Figure(figsize=(1.5 * (columns + 0.4), 1.75 * len(ordered)), layout="constrained")
    panels = figure.subplots(
        len(ordered), columns, squeeze=False, width_ratios=[1.4, *[1] * (columns - 1)]
    )
    for line, each in zip(panels, ordered, strict=True):
        for axes in line:
            axes.axis("off")
        _write(line[0], [("\n".join(_lines(each.text, 30, 6)), _colour(each.rank == 0))])
        for place, (axes, picture) in enumerate(zip(line[1:], each.pictures, strict=False)):
            is_right = place == each.right
            _show(axes, picture, RIGHT if is_right else None)
            number = each.rank + 1 if is_right else place + 1
            axes.set_title(
                f"{number:,}, right" if is_right else f"{number}",
                fontsize=8,
                color=RIGHT if is_right else "black",
            )
    figure.savefig(path, dpi=110)


def plot_found_captions(shown: Sequence[Captions], path: Path) -> None:
    """Draw images, each with its best captions, the right ones coloured; right cases on top."""
    from matplotlib.figure import Figure

    ordered = sorted(shown, key=lambda each: each.rank)
    figure = Figure(figsize=(8.5, 1.75 * len(ordered)), layout="constrained")
    panels = figure.subplots(len(ordered), 2, squeeze=False, width_ratios=[1, 4])
    for line, each in zip(panels, ordered, strict=True):
        for axes in line:
            axes.axis("off")
        _show(line[0], each.picture, _colour(each.rank == 0))
        numbers = [*range(1, len(each.texts) + 1)]
        if not any(each.is_right[:-1]):
            numbers[-1] = each.rank + 1
        said = [
            (" ".join(_lines(f"{number:,}. {text}", 105, 1)), RIGHT if is_right else "black")
            for number, text, is_right in zip(numbers, each.texts, each.is_right, strict=True)
        ]
        _write(line[1], said)
    figure.savefig(path, dpi=110)


def _colour(is_right: bool) -> str:
    return RIGHT if is_right else WRONG


def _lines(text: str, width: int, most: int) -> list[str]:
    """The text in lines, cut with an ellipsis; a dollar sign would begin a formula."""
    lines = textwrap.wrap(text, width, max_lines=most, placeholder=" ...")
    return [line.replace("$", r"\$") for line in lines]


def _show(axes: Any, picture: Pictures, frame: str | None) -> None:
    axes.imshow(picture, interpolation="nearest")
    if frame is not None:
        axes.axis("on")
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set(color=frame, linewidth=3)


def _write(axes: Any, said: Sequence[tuple[str, str]]) -> None:
    """Texts below each other, each in its colour, around the middle."""
    axes.set(xlim=(0, 1), ylim=(0, 1))
    for place, (text, colour) in enumerate(said):
        height = 1 - (place + 0.5) / len(said)
        axes.text(0, height, text, fontsize=8, color=colour, va="center", ha="left")
