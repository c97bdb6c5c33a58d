"""A task's rows: their columns, the numbers of their answers, which are of no use and why."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.answers import UNLISTED, AnswerList, write_plainly
from pipeline.data.batches import Batch, _rebatch
from pipeline.data.decode import (
    ANSWERS,
    GOOD,
    NO_ANSWER,
    REASONS,
    Asked,
    Decode,
    Recipe,
    Rows,
    View,
)
from pipeline.data.layout import as_answers, count_answers, read_catalog
from pipeline.data.rows import read_rows
from pipeline.data.storage import open_filesystem
from pipeline.data.text import train_tokenizer
from pipeline.errors import UserError

TOKENIZER = train_tokenizer(["is it a red cat", "what shape is it", "how many"], 300)
YES_NO = AnswerList(names=("no", "yes"), is_open=False)
OPEN = AnswerList(names=("red", "2", "top left"), is_open=True)


def _png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def _write(folder: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), folder / "part.parquet")
    return folder


def _decoded(folder: Path, answers: AnswerList, **changes: Any) -> dict[str, Any]:
    """The block of a one-group file, decoded."""
    catalog = read_catalog(str(folder), "data.train", answer="auto")
    columns, shard = catalog.sources[0].columns, catalog.shards[0]
    filesystem, _ = open_filesystem(str(folder))
    table = read_rows(filesystem, shard.path, 0, columns)
    for name in ("epoch", "turn", "position", "shard", "row_group", "ordinal"):
        table = table.append_column(name, pa.array(np.arange(table.num_rows)))
    values = {
        "tokenizer": TOKENIZER, "context_length": 8, "image_size": 16, "background": (0, 0, 0),
        "view": View(crop_scale=(1.0, 1.0), flip=0.0), "seed": 1, "train": True,
        "asked": Asked(answers=answers, pictures=columns.pictures),
    }  # fmt: skip
    return Decode(Recipe(**{**values, **changes}))(Rows.of(table))  # pyright: ignore[reportArgumentType]


def _reasons(block: dict[str, Any]) -> list[str]:
    return ["" if code == GOOD else REASONS[code] for code in block["reason"]]


def _numbers(block: dict[str, Any]) -> list[list[int]]:
    assert block["answers"].shape[1] == ANSWERS
    return [[n for n in row if n != NO_ANSWER] for row in block["answers"].tolist()]


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("Yes.", "yes"), ("two", "2"), ("a red cat", "red cat"), ("The  Top-Left!", "top left"),
        ("1,000", "1000"), ("3.5", "3.5"), ("it's 10:30", "it's 10:30"), ("none", "0"),
        ("what?", "what"), ("the", ""), ("5.", "5"), ("0.5 m.", "0.5 m"),
    ],
)  # fmt: skip
def test_answers_are_compared_in_a_plain_form(given: str, plain: str) -> None:
    assert write_plainly(given) == plain


def test_numbers_of_answers() -> None:
    assert OPEN.numbers(["Red", "the red", "two", "TOP LEFT", "blue"]) == [0, 0, 1, 2, UNLISTED]
    assert YES_NO.numbers(["Yes", "yes.", " no "]) == [1, UNLISTED, 0]


def test_the_commonest_answers_are_listed() -> None:
    counts = Counter({"Two": 3, "2": 2, "cat": 4, "dog": 4, "a": 9, "owl": 1})
    assert AnswerList.of(counts, 3, is_open=True).names == ("2", "cat", "dog")
    assert AnswerList.of(Counter({"true": 1, "False": 5}), 9, is_open=False).names == (
        "false",
        "true",
    )


@pytest.mark.parametrize(
    ("cell", "questions", "expected"),
    [
        ("yes", 1, [["yes"]]),
        (1, 1, [["1"]]),
        (True, 1, [["true"]]),
        (None, 1, [[]]),
        (["a", "b", "a"], 1, [["a", "b", "a"]]),
        (["a", None], 2, [["a"], []]),
        ([["a", "b"], ["c"]], 2, [["a", "b"], ["c"]]),
        ([{"answer": "a", "answer_id": 1}, {"answer": " ", "answer_id": 2}], 1, [["a"]]),
    ],
)
def test_a_cell_of_answers(cell: object, questions: int, expected: list[list[str]]) -> None:
    assert as_answers(cell, questions) == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"image": [b"x"], "question": ["q"], "answer": ["a"]}, ("image", "question", "answer", 1)),
        (
            {"image": [b"x"], "questions": [["q"]], "answers": [["a"]], "caption": ["c"]},
            ("image", "questions", "answers", 1),
        ),
        (
            {"images": [[b"x", b"y"]], "statement": ["s"], "label": ["true"]},
            ("images", "statement", "label", 2),
        ),
        ({"image": [b"x"], "hypothesis": ["h"], "label": [1]}, ("image", "hypothesis", "label", 1)),
        (
            {"image": [b"x"], "caption": ["s"], "label": [1], "answer": ["true"]},
            ("image", "caption", "answer", 1),
        ),
    ],
)
def test_a_tasks_columns_are_found(
    tmp_path: Path, columns: dict[str, Any], expected: tuple[str, str, str, int]
) -> None:
    folder = _write(tmp_path, **columns)
    found = read_catalog(str(folder), "data.train", answer="auto").sources[0].columns
    assert (found.image, found.caption, found.answer, found.pictures) == expected


def test_a_missing_answer_column_is_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path, image=[b"x"], question=["q"], word=["a"], size=[0.5])
    with pytest.raises(UserError, match=r"no answer column in .*task.answer_column=\.\.\."):
        read_catalog(str(folder), "data.train", answer="auto")
    with pytest.raises(UserError, match=r"task.answer_column: 'size' .* is double; it must be"):
        read_catalog(str(folder), "data.train", answer="size")
    assert read_catalog(str(folder), "data.train", answer="word").sources[0].columns.answer


def test_answers_are_counted(tmp_path: Path) -> None:
    folder = _write(
        tmp_path, image=[b"x", b"y"], questions=[["q", "r"], ["s"]], answers=[["a", "b"], ["a"]]
    )
    catalog = read_catalog(str(folder), "data.train", answer="auto")
    assert count_answers(catalog) == {"a": 2, "b": 1}


def test_rows_with_labels(tmp_path: Path) -> None:
    """Each that is of no use has its reason; in evaluation too, where labels are closed."""
    folder = _write(
        tmp_path,
        image=[_png(1), _png(2), _png(3), b"broken", _png(5), None],
        statement=["it is red", " ", "a cat", "a cat", "a cat", "a cat"],
        label=["yes", "yes", "maybe", "no", None, "no"],
    )
    for train in (True, False):
        block = _decoded(folder, YES_NO, train=train)
        assert _reasons(block) == [
            "", "empty_text", "unlisted_answer", "corrupt_image", "unlisted_answer", "null_image",
        ]  # fmt: skip
        assert _numbers(block)[0] == [1]


def test_answers_of_several_people(tmp_path: Path) -> None:
    """An answer beyond an open list is no answer to learn; evaluation keeps it, and it is wrong."""
    folder = _write(
        tmp_path,
        image=[_png(1), _png(2)],
        question=["what", "what"],
        answers=[["red", "Red.", "blue"], ["blue", "green"]],
    )
    block = _decoded(folder, OPEN)
    assert _reasons(block) == ["", "unlisted_answer"]
    assert _numbers(block)[0] == [0, 0, UNLISTED]
    kept = _decoded(folder, OPEN, train=False)
    assert _reasons(kept) == ["", ""]
    assert _numbers(kept)[1] == [UNLISTED, UNLISTED]


def _several(folder: Path) -> Path:
    return _write(
        folder,
        image=[_png(1)],
        questions=[["is it red", "", "how many", "what shape"]],
        answers=[["red", "red", "two", "blue"]],
    )


def test_several_questions_of_a_row_are_drawn_by_epoch_and_all_evaluated(tmp_path: Path) -> None:
    folder = _several(tmp_path)
    block = _decoded(folder, OPEN, train=False)
    assert block["skipped"].tolist() == [1], "the empty one"
    assert _numbers(block) == [[0]]
    more = np.frombuffer(block["more_answers"][0], np.int32).reshape(-1, ANSWERS)
    assert [[n for n in row if n != NO_ANSWER] for row in more.tolist()] == [[1], [UNLISTED]]
    tokens = np.frombuffer(block["more_tokens"][0], np.int32).reshape(-1, 8)
    expected, _ = TOKENIZER.encode(["how many", "what shape"], 8)
    assert np.array_equal(tokens, expected)
    drawn = {}
    for seed in range(30):
        block = _decoded(folder, OPEN, seed=seed)
        assert block["skipped"].tolist() == [2]
        drawn[TOKENIZER.decode(block["tokens"][0].tolist())] = _numbers(block)[0]
    assert drawn == {"is it red": [0], "how many": [1]}, "each with its own answer"


def test_answers_that_are_not_as_many_as_the_questions_are_not_guessed(tmp_path: Path) -> None:
    folder = _write(
        tmp_path,
        image=[_png(1), _png(2)],
        questions=[["is it red", "how many"], ["what shape"]],
        answers=[["red", "two", "red"], ["red", "two"]],
    )
    block = _decoded(folder, OPEN)
    assert _reasons(block) == ["answers_not_aligned", ""], "one question may have many answers"


@pytest.mark.parametrize("train", [True, False])
def test_more_answers_than_are_kept_are_not_cut_unseen(tmp_path: Path, train: bool) -> None:
    answers = [["red"] * ANSWERS, ["two"] * ANSWERS + ["red"]]
    question = ["is it red"] * 2
    folder = _write(tmp_path, image=[_png(1), _png(2)], question=question, answers=answers)
    assert _reasons(_decoded(folder, OPEN, train=train)) == ["", "too_many_answers"]


def test_two_pictures_are_two_and_no_fewer(tmp_path: Path) -> None:
    images = [[_png(10), _png(200)], [_png(10)], [_png(1), _png(2), _png(3)], [_png(1), None]]
    folder = _write(tmp_path, images=images, statement=["a cat"] * 4, label=["no"] * 4)
    block = _decoded(folder, YES_NO)
    assert block["image"].shape == (4, 2, 16, 16, 3)
    assert _reasons(block) == ["", *["not_two_images"] * 3]
    assert [int(picture.mean()) for picture in block["image"][0]] == [10, 200]


def test_answers_reach_the_batches(tmp_path: Path) -> None:
    catalog = read_catalog(str(_several(tmp_path)), "data.train", answer="auto")
    block = _decoded(tmp_path, OPEN, train=False)
    block |= {name: np.zeros(1, np.int64) for name in ("shard", "row_group", "ordinal", "epoch")}
    recipe = Recipe(
        tokenizer=TOKENIZER, context_length=8, image_size=16, background=(0, 0, 0), seed=1,
        view=View(crop_scale=(1.0, 1.0), flip=0.0), train=False, asked=Asked(answers=OPEN),
    )  # fmt: skip
    (batch,) = _rebatch([block], catalog, recipe, 2, pad_last=True)
    assert isinstance(batch, Batch)
    assert batch.answers is not None
    assert batch.answers.tolist() == [[0] + [NO_ANSWER] * 9, [NO_ANSWER] * 10]
    assert len(batch.more_answers[0]) == len(batch.more_tokens[0]) == 2
    assert batch.skipped == 1
