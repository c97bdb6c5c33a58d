"""What galleries say of each case, and that any text fits."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from pipeline.tracking.galleries import (
    RIGHT,
    WRONG,
    plot_answers,
    plot_found_captions,
    plot_found_images,
)

LONG = "a $5 cup of " + "very " * 60 + "hot tea"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures, each after it was saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def spy(self: Figure, *args: Any, **options: Any) -> None:
        save(self, *args, **options)
        figures.append(self)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


def _pictures(count: int) -> np.ndarray:
    return np.full((count, 8, 8, 3), 90, dtype=np.uint8)


def _titles(figure: Figure) -> list[tuple[str, Any]]:
    return [(axes.get_title(), axes.title.get_color()) for axes in figure.axes if axes.get_title()]


def _texts(figure: Figure) -> list[tuple[str, Any]]:
    return [(text.get_text(), text.get_color()) for axes in figure.axes for text in axes.texts]


def _fit(figure: Figure) -> None:
    """Every text lies within the figure."""
    for axes in figure.axes:
        for text in (*axes.texts, axes.title):
            box = text.get_window_extent()
            assert text.get_text() == "" or (box.x0 >= 0 and box.x1 <= figure.bbox.x1)


def test_answers_say_what_was_right(tmp_path: Path, drawn: list[Figure]) -> None:
    wrong = SimpleNamespace(pictures=_pictures(2), text="is it?", said="no", answers=["yes", "y"])
    right = SimpleNamespace(pictures=_pictures(1), text="", said="cat", answers=["cat"])
    long = SimpleNamespace(pictures=_pictures(1), text=LONG, said=LONG, answers=["cat"])
    plot_answers([wrong, right, long], tmp_path / "answers.png")
    (figure,) = drawn
    titles = _titles(figure)
    assert titles[:2] == [("→ cat", "black"), ("is it?\n→ no (right: yes)", WRONG)]
    assert titles[2][0].count("\n") == 4
    assert titles[2][0].endswith("\n(right: cat)")
    _fit(figure)


def test_the_right_image_is_named_with_its_place(tmp_path: Path, drawn: list[Figure]) -> None:
    late = SimpleNamespace(text=LONG, pictures=_pictures(6), right=5, rank=1233)
    first = SimpleNamespace(text="a cat", pictures=_pictures(5), right=0, rank=0)
    third = SimpleNamespace(text="a dog", pictures=_pictures(5), right=2, rank=2)
    plot_found_images([late, first, third], tmp_path / "images.png")
    (figure,) = drawn
    titles = [title for title, colour in _titles(figure) if colour == RIGHT]
    assert titles == ["1, right", "3, right", "1,234, right"]
    (cat, dog, long) = _texts(figure)
    assert (cat, dog) == (("a cat", RIGHT), ("a dog", WRONG))
    assert long[0].startswith(r"a \$5 cup")
    assert long[0].endswith(" ...")
    _fit(figure)


def test_the_right_captions_are_coloured(tmp_path: Path, drawn: list[Figure]) -> None:
    picture = _pictures(1)[0]
    late = SimpleNamespace(
        picture=picture, texts=[*"abcde", LONG], is_right=[False] * 5 + [True], rank=40
    )  # fmt: skip
    fifth = SimpleNamespace(
        picture=picture, texts=["a", "b", "c", "d", "e"], is_right=[False] * 4 + [True], rank=4
    )
    both = SimpleNamespace(
        picture=picture, texts=["a", "b", "c"], is_right=[True, False, True], rank=0
    )
    plot_found_captions([late, fifth, both], tmp_path / "captions.png")
    (figure,) = drawn
    right = [text for text, colour in _texts(figure) if colour == RIGHT]
    assert right[:3] == ["1. a", "3. c", "5. e"]
    assert right[3].startswith(r"41. a \$5 cup")
    _fit(figure)


def test_one_case_is_a_gallery(tmp_path: Path, drawn: list[Figure]) -> None:
    picture = _pictures(1)
    plot_found_images(
        [SimpleNamespace(text="a", pictures=picture, right=0, rank=0)], tmp_path / "i.png"
    )
    plot_found_captions(
        [SimpleNamespace(picture=picture[0], texts=["a"], is_right=[True], rank=0)],
        tmp_path / "c.png",
    )
    assert len(drawn) == 2
