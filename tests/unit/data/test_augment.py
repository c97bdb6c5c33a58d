"""RandAugment and EDA: what each operation gives, and both as functions of a generator."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import augment
from pipeline.data.augment import OPERATIONS, augment_image, augment_text, read_synonyms
from pipeline.data.image import Pixels
from pipeline.errors import UserError

PINK = (250, 120, 180)


def _apply(name: str, pixels: np.ndarray, way: int = 1) -> np.ndarray:
    return np.array(OPERATIONS[name](Image.fromarray(pixels.astype(np.uint8)), way, PINK))


def _gray(values: Any) -> np.ndarray:
    return np.repeat(np.asarray(values)[..., None], 3, axis=-1)


def _slope(size: int) -> np.ndarray:
    """4 a pixel from left to right: what a linear interpolation gives is known everywhere."""
    return _gray(np.tile(4 * np.arange(size), (size, 1)))


def test_the_operations_are_those_of_albef() -> None:
    assert list(OPERATIONS) == [
        "identity", "auto_contrast", "equalize", "brightness", "sharpness",
        "shear_x", "shear_y", "translate_x", "translate_y", "rotate",
    ]  # fmt: skip


def test_identity() -> None:
    assert (_apply("identity", _slope(8)) == _slope(8)).all()


def test_auto_contrast_spreads_each_channel_over_its_range() -> None:
    pixels = np.stack([[[50, 60, 101]], [[0, 0, 255]], [[7, 7, 7]]], axis=-1)
    expected = np.stack([[[0, 50, 255]], [[0, 0, 255]], [[7, 7, 7]]], axis=-1)
    assert (_apply("auto_contrast", pixels) == expected).all()


def test_equalize_gives_equal_counts_equal_distances() -> None:
    pixels = _gray(np.repeat([[10], [20], [30]], 255, axis=1))
    assert _apply("equalize", pixels)[:, 0, 0].tolist() == [0, 128, 255]


def test_brightness_is_multiplied() -> None:
    assert _apply("brightness", _gray([[0, 100, 200]]))[0, :, 0].tolist() == [0, 136, 255]


def test_sharpness_moves_away_from_the_mean_around() -> None:
    """The smooth picture is 125 in the centre and 105 beside it; 0.36 of the way back is added."""
    pixels = np.full((5, 5), 100)
    pixels[2, 2] = 165
    expected = np.full((5, 5), 100)
    expected[1:4, 1:4] = 98
    expected[2, 2] = 179
    assert (_apply("sharpness", _gray(pixels)) == _gray(expected)).all()


@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize("way", [1, -1])
def test_translate_shifts_by_7_pixels_of_256(axis: str, way: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (128, 256, 3), np.uint8)
    if axis == "y":
        pixels = pixels.swapaxes(0, 1)
    got = _apply(f"translate_{axis}", pixels, way)
    if axis == "y":
        got, pixels = got.swapaxes(0, 1), pixels.swapaxes(0, 1)
    if way < 0:
        got, pixels = got[:, ::-1], pixels[:, ::-1]
    assert (got[:, :-7] == pixels[:, 7:]).all()
    assert (got[:, -7:] == PINK).all()


@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize("way", [1, -1])
def test_shear_shifts_each_line_by_its_place(axis: str, way: int) -> None:
    pixels = _slope(32) if axis == "x" else _slope(32).swapaxes(0, 1)
    got = _apply(f"shear_{axis}", pixels, way)
    got = got if axis == "x" else got.swapaxes(0, 1)
    x, y = np.meshgrid(np.arange(32), np.arange(32))
    source = x + way * 0.21 * (y + 0.5)
    inside = (source >= 0) & (source <= 31)
    assert np.abs(got[inside] - 4 * source[inside][:, None]).max() <= 1
    outside = (source < -0.5) | (source > 31.5)
    assert outside.any()
    assert (got[outside] == PINK).all()


@pytest.mark.parametrize("way", [1, -1])
def test_rotate_turns_by_21_degrees_about_the_centre(way: int) -> None:
    got = _apply("rotate", _slope(33), way)
    x, y = np.meshgrid(np.arange(33) - 16, np.arange(33) - 16)
    turn = np.deg2rad(way * 21)
    source_x = np.cos(turn) * x - np.sin(turn) * y
    source_y = np.sin(turn) * x + np.cos(turn) * y
    farthest = np.maximum(np.abs(source_x), np.abs(source_y))
    inside = farthest <= 16
    assert np.abs(got[inside] - 4 * (16 + source_x[inside])[:, None]).max() <= 1
    assert (got[farthest > 16.5] == PINK).all()


pictures = st.tuples(st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**32 - 1)).map(
    lambda drawn: np.random.default_rng(drawn[2]).integers(0, 256, (*drawn[:2], 3), np.uint8)
)
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=100)
@given(pictures, seeds)
def test_an_augmented_picture_follows_from_the_generator_and_keeps_its_shape(
    pixels: Pixels, seed: int
) -> None:
    before = pixels.copy()
    one, other = (augment_image(pixels, PINK, np.random.default_rng(seed)) for _ in range(2))
    assert (one == other).all()
    assert (one.shape, one.dtype) == (pixels.shape, np.uint8)
    assert one.flags.writeable
    assert (pixels == before).all()


def test_two_operations_are_drawn_each_is_applied_half_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    applied: Counter[tuple[str, int]] = Counter()

    def noted(name: str) -> Any:
        def operation(image: Image.Image, way: int, background: object) -> Image.Image:
            assert background == PINK
            applied[name, way] += 1
            return image

        return operation

    monkeypatch.setattr(augment, "OPERATIONS", {name: noted(name) for name in OPERATIONS})
    rng = np.random.default_rng(0)
    for _ in range(2000):
        augment_image(np.zeros((2, 2, 3), np.uint8), PINK, rng)
    assert set(applied) == {(name, way) for name in OPERATIONS for way in (1, -1)}
    assert all(70 <= count <= 130 for count in applied.values()), "100 of each, on the average"


# ---- captions ------------------------------------------------------------------------------------

SYNONYMS = {"car": ("automobile",), "red": ("scarlet", "crimson")}
words = st.sampled_from(["a", "red", "Car,", "car", "2", "dogs", "日本語", "<3", "--"])
captions = st.lists(words, min_size=1, max_size=30).map(" ".join)


def _results(text: str, synonyms: augment.Synonyms) -> set[str]:
    return {augment_text(text, synonyms, np.random.default_rng(seed)) for seed in range(300)}


@settings(max_examples=200)
@given(captions, seeds, st.sampled_from([SYNONYMS, {}]))
def test_an_augmented_caption_follows_from_the_generator_and_is_never_empty(
    text: str, seed: int, synonyms: augment.Synonyms
) -> None:
    one, other = (augment_text(text, synonyms, np.random.default_rng(seed)) for _ in range(2))
    assert one == other
    assert one
    if not synonyms:
        assert not Counter(one.split()) - Counter(text.split()), "no word that was not there"


def test_swap_and_deletion_of_a_short_caption() -> None:
    assert _results("one two", {}) == {"two one", "one two", "one", "two"}
    assert _results("one", SYNONYMS) == {"one"}
    assert _results("", SYNONYMS) == {""}


def test_synonyms_replace_or_join_a_word_and_leave_what_surrounds_it() -> None:
    only_these = _results("my “Car”!", {"car": ("automobile",)}) - _results("my “Car”!", {})
    assert only_these == {
        "my “automobile”!", "automobile my “Car”!", "my automobile “Car”!", "my “Car”! automobile",
    }  # fmt: skip
    assert _results("red", {"red": ("scarlet", "crimson")}) == {
        "red", "scarlet", "crimson",
        "red scarlet", "scarlet red", "red crimson", "crimson red",
    }  # fmt: skip


def test_a_tenth_of_the_words_changes() -> None:
    text = " ".join(f"w{number}" for number in range(40))
    synonyms = {f"w{number}": ("new",) for number in range(40)}
    lengths: Counter[int] = Counter()
    for seed in range(400):
        result = augment_text(text, synonyms, np.random.default_rng(seed)).split()
        lengths[len(result)] += 1
        if len(result) == 40 and "new" in result:
            assert result.count("new") == 4
        elif len(result) == 40:
            moved = sum(now != before for now, before in zip(result, text.split(), strict=True))
            assert moved <= 8
    assert 60 <= lengths[44] <= 140, "insertion of four, drawn one time in four"
    deleted = {length: count for length, count in lengths.items() if length < 40}
    mean = sum((40 - length) * count for length, count in deleted.items()) / sum(deleted.values())
    assert 3 < mean < 5


def test_synonyms_are_read_from_groups(tmp_path: Path) -> None:
    file = tmp_path / "groups.txt"
    file.write_text("Car, automobile , motor car\n\ncar,coach\nalone\nred, Red\n", encoding="utf-8")
    assert read_synonyms(str(file)) == {
        "car": ["automobile", "motor car", "coach"],
        "automobile": ["Car", "motor car"],
        "motor car": ["Car", "automobile"],
        "coach": ["car"],
    }


def test_a_file_without_synonyms_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data.synonyms: cannot read .*none\.txt as UTF-8 text"):
        read_synonyms(str(tmp_path / "none.txt"))
    (tmp_path / "latin").write_bytes(b"sch\xf6n, h\xfcbsch")
    with pytest.raises(UserError, match=r"^data.synonyms: cannot read .*latin as UTF-8 text"):
        read_synonyms(str(tmp_path / "latin"))
    (tmp_path / "alone").write_text("car\nred\n")
    with pytest.raises(UserError, match=r"alone holds no synonyms; write a group a line: car, "):
        read_synonyms(str(tmp_path / "alone"))
