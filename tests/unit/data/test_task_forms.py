"""The forms of a fusion model's tasks, built as their authors publish them, through `prepare`."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.prepare.job import Options, Sizes, prepare
from pipeline.data.prepare.scatter import order_of
from pipeline.errors import UserError
from tests.tiny_data import jpeg

RED, GREEN, BLUE = jpeg((250, 0, 0)), jpeg((0, 250, 0)), jpeg((0, 0, 250))
SMALL = Sizes(part=4_000, bucket=3_000, shard=12_000, row_group=4_000, buffer=3_000)


class _Words:
    """A listener that remembers what was said."""

    def __init__(self) -> None:
        self.said = ""

    def say(self, text: str) -> None:
        self.said += text

    def show(self, what: str, done: int, total: int) -> None: ...


def _png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (20, 40, 200)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    _put(folder, {"a.jpg": RED, "deep/b.jpg": GREEN, "deep/c.jpg": BLUE})
    return folder


def _put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _list(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text(json.dumps(list(records)))
    return path


def _lines(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def _read(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob("part-*")) for row in pq.read_table(path).to_pylist()]


def _rows(path: Path, tmp_path: Path, **options: Any) -> list[dict[str, Any]]:
    """The rows written, by key, without the sides of their pictures."""
    prepare(str(path), str(tmp_path / "out"), Options(**options), map)
    sides = ("width", "height", "widths", "heights")
    rows = sorted(_read(tmp_path / "out"), key=lambda row: row["key"])
    return [{name: row[name] for name in row if name not in sides} for row in rows]


def _dropped(tmp_path: Path) -> dict[str, str]:
    table = pq.read_table(tmp_path / "out" / "_quarantine.parquet").to_pylist()
    return {row["key"]: row["reason"] for row in table}


def _schema(tmp_path: Path) -> dict[str, str]:
    schema = pq.read_schema(tmp_path / "out" / "part-00000.parquet")
    return {field.name: str(field.type) for field in schema}


# ---- questions -----------------------------------------------------------------------------------


def test_albef_questions_keep_every_answer(data: Path, tmp_path: Path) -> None:
    answers = ["net"] * 7 + ["netting", "a net", "mesh"]
    path = _list(
        data / "vqa_train.json",
        {"question_id": 7, "question": "What is\n it?", "image": "a.jpg", "dataset": "vqa",
         "answer": answers},
        {"question_id": "vg_8", "question": "Where?", "image": "deep/b.jpg", "dataset": "vg",
         "answer": "on the table"},
        {"question": "Who?", "image": "deep/c.jpg", "answer": ["he"], "split": "val"},
    )  # fmt: skip
    assert _rows(path, tmp_path) == [
        {"key": "7", "image": RED, "question": "What is it?", "question_id": "7",
         "answers": answers, "split": None},
        {"key": "deep/c.jpg", "image": BLUE, "question": "Who?", "question_id": None,
         "answers": ["he"], "split": "val"},
        {"key": "vg_8", "image": GREEN, "question": "Where?", "question_id": "vg_8",
         "answers": ["on the table"], "split": None},
    ]  # fmt: skip
    assert _schema(tmp_path) == {
        "key": "string", "image": "binary", "question": "string", "question_id": "string",
        "answers": "list<element: string>", "width": "int32", "height": "int32", "split": "string",
    }  # fmt: skip
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["source"]["task"] == "vqa"
    assert (stats["answers"]["min"], stats["answers"]["max"]) == (1, 10)
    assert stats["question_words"]["max"] == 3


@pytest.mark.parametrize("is_folder", [True, False])
def test_the_list_of_answers_is_copied(data: Path, tmp_path: Path, is_folder: bool) -> None:
    path = _list(data / "x.json", {"question": "q", "image": "a.jpg", "answer": "yes"})
    (data / "answer_list.json").write_text('["yes", "no"]')
    _rows(data if is_folder else path, tmp_path)
    assert (tmp_path / "out" / "answer_list.json").read_text() == '["yes", "no"]'
    assert prepare(str(data if is_folder else path), str(tmp_path / "out"), Options(), map)


def test_no_list_of_answers_lies_beside_pairs(data: Path, tmp_path: Path) -> None:
    _list(data / "x.json", {"image": "a.jpg", "caption": "one"})
    (data / "answer_list.json").write_text("[]")
    assert [row["caption"] for row in _rows(data, tmp_path)] == ["one"]
    assert not (tmp_path / "out" / "answer_list.json").exists()


QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "v2_mscoco_train2014_annotations.json"


def _vqa(folder: Path, **more: Any) -> None:
    questions = [
        {"image_id": 9, "question": "What?", "question_id": 9000},
        {"image_id": 9, "question": "Which?", "question_id": 9001},
        {"image_id": 25, "question": "Who?", "question_id": 25000},
        {"image_id": 25, "question": "Never asked?", "question_id": 25001},
        {"image_id": 30, "question": "Where?", "question_id": 30000},
    ]
    annotations = [
        {
            "question_id": identity,
            "image_id": 9,
            "question_type": "what",
            "answer_type": "other",
            "multiple_choice_answer": answers[0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": number}
                for number, answer in enumerate(answers, 1)
            ],
        }
        for identity, answers in {
            25000: ["he", "he"], 9000: ["net", "mesh"], 9001: ["left"], 30000: ["here"],
            1: ["to nothing"],
        }.items()
    ]  # fmt: skip
    (folder / QUESTIONS).write_text(json.dumps({"questions": questions, **more}))
    (folder / ANNOTATIONS).write_text(json.dumps({"annotations": annotations, **more}))


@pytest.mark.parametrize("more", [{}, {"data_subtype": "train2014"}])
@pytest.mark.parametrize("name", ["train2014/COCO_train2014_%012d.jpg", "%012d.jpg", "x/%d.png"])
def test_the_two_files_of_vqa(tmp_path: Path, name: str, more: dict[str, str]) -> None:
    data = tmp_path / "in"
    _put(data, {name % 9: RED, name % 25: GREEN})
    _vqa(data, **more)
    words = _Words()
    prepare(str(data), str(tmp_path / "out"), Options(), map, words)
    assert "2 table(s)" in words.said
    assert "VQA v2's questions and annotations" in words.said
    rows = {row["key"]: row for row in _read(tmp_path / "out")}
    assert {key: (row["image"], row["question"], row["answers"]) for key, row in rows.items()} == {
        "9000": (RED, "What?", ["net", "mesh"]),
        "9001": (RED, "Which?", ["left"]),
        "25000": (GREEN, "Who?", ["he", "he"]),
    }
    assert all(row["question_id"] == key for key, row in rows.items())
    assert _dropped(tmp_path) == {
        "25001": "empty_answers", "30000": "missing_file", "1": "empty_question",
    }  # fmt: skip


def test_pictures_of_vqa_may_lie_elsewhere(tmp_path: Path) -> None:
    _put(tmp_path / "coco", {"000000000009.jpg": RED})
    (tmp_path / "in").mkdir()
    _vqa(tmp_path / "in")
    rows = _rows(tmp_path / "in" / "*2014*.json", tmp_path, images=str(tmp_path / "coco"))
    assert [row["key"] for row in rows] == ["9000", "9001"]


# ---- statements ----------------------------------------------------------------------------------


def test_albef_statements_about_two_images(data: Path, tmp_path: Path) -> None:
    path = _list(
        data / "nlvr.json",
        {"sentence": "One is red.", "label": "True", "images": ["a.jpg", "deep/b.jpg"]},
        {"sentence": "None is.", "label": False, "images": ["deep/b.jpg", "deep/c.jpg"]},
    )
    assert _rows(path, tmp_path) == [
        {"key": "a.jpg", "images": [RED, GREEN], "statement": "One is red.", "label": "true"},
        {"key": "deep/b.jpg", "images": [GREEN, BLUE], "statement": "None is.", "label": "false"},
    ]
    assert _schema(tmp_path) == {
        "key": "string", "images": "list<element: binary>", "statement": "string",
        "label": "string", "widths": "list<element: int32>", "heights": "list<element: int32>",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["dev.jsonl", "dev.json"])
def test_nlvr2_lines_find_their_pictures(tmp_path: Path, name: str) -> None:
    data = tmp_path / "in"
    _put(data, {"dev-850-0-img0.png": _png((90, 60)), "images/3/dev-850-0-img1.png": RED,
                "images/4/dev-850-0-img0.json": b"{}"})  # fmt: skip
    links = {"left_url": "https://x/l.jpg", "right_url": "https://x/r.jpg", "synset": "dog"}
    _lines(
        data / name,
        {"sentence": "A", "label": "True", "identifier": "dev-850-0-0", "directory": 3, **links},
        {"sentence": "B", "label": "False", "identifier": "dev-850-0-1", "directory": 3, **links},
        {"sentence": "C", "label": "False", "identifier": "dev-851-0-0", "directory": 3, **links},
    )
    stats = prepare(str(data / name), str(tmp_path / "out"), Options(short_side=30), map).stats
    rows = sorted(_read(tmp_path / "out"), key=lambda row: row["key"])
    assert [(row["key"], row["statement"], row["label"]) for row in rows] == [
        ("dev-850-0-0", "A", "true"), ("dev-850-0-1", "B", "false"),
    ]  # fmt: skip
    for row in rows:
        assert row["images"][1] == RED  # small enough: its bytes are kept
        assert (row["widths"], row["heights"]) == ([45, 24], [30, 20])
        with Image.open(io.BytesIO(row["images"][0])) as image:
            assert (image.format, image.size) == ("JPEG", (45, 30))
    assert _dropped(tmp_path) == {"dev-851-0-0": "missing_file"}
    assert (stats["images_kept"], stats["images_encoded"]) == (2, 2)
    assert stats["image_bytes"] == sum(len(image) for row in rows for image in row["images"])
    assert stats["labels"] == {"false": 1, "true": 1}
    assert stats["source_short_side"]["max"] == 60
    assert stats["further_images_left_out"] == 0


@pytest.mark.parametrize("prefix", ["", "train-"])
def test_nlvr_is_a_row_for_each_picture(tmp_path: Path, prefix: str) -> None:
    data = tmp_path / "in"
    _put(data, {"images/72/train-916-1-0.png": RED, "images/72/train-916-1-5.png": GREEN,
                "images/7/train-9-1-0.png": BLUE})  # fmt: skip
    record = {"sentence": "s", "directory": "72", "structured_rep": [], "evals": {"r0": "true"}}
    path = _lines(
        data / "train.json",
        {**record, "label": "true", "identifier": f"{prefix}916-1"},
        {**record, "label": "false", "identifier": f"{prefix}916-2"},
    )
    assert _rows(path, tmp_path) == [
        {"key": f"{prefix}916-1-0", "image": RED, "statement": "s", "label": "true"},
        {"key": f"{prefix}916-1-5", "image": GREEN, "statement": "s", "label": "true"},
    ]
    assert _dropped(tmp_path) == {f"{prefix}916-2-0": "missing_file"}


# ---- hypotheses ----------------------------------------------------------------------------------


def test_albef_hypotheses_name_images_without_ending(data: Path, tmp_path: Path) -> None:
    path = _list(
        data / "ve_dev.json",
        {"image": "a", "sentence": "It is red.", "label": "entailment"},
        {"image": "b", "sentence": "It is red.", "label": "contradiction"},
        {"image": "deep/c.jpg", "sentence": "It is new.", "label": "neutral"},
    )
    rows = _rows(path, tmp_path)
    assert [(row["image"], row["hypothesis"], row["label"]) for row in rows] == [
        (RED, "It is red.", "entailment"), (GREEN, "It is red.", "contradiction"),
        (BLUE, "It is new.", "neutral"),
    ]  # fmt: skip
    assert _schema(tmp_path) == {
        "key": "string", "image": "binary", "hypothesis": "string", "label": "string",
        "width": "int32", "height": "int32",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("column", "ending"), [("Flickr30K_ID", ""), ("Flikr30kID", ""), ("Flikr30kID", ".jpg")]
)
def test_snli_ve_lines(tmp_path: Path, column: str, ending: str) -> None:
    data = tmp_path / "in"
    _put(data, {"flickr30k-images/4705552913.jpg": RED})
    record = {column: f"4705552913{ending}", "sentence1": "a premise", "sentence2": "A dog."}
    path = _lines(
        data / "snli_ve_dev.jsonl",
        {**record, "gold_label": "-", "pairID": "4705552913.jpg#2r1x"},
        {**record, "gold_label": "neutral", "pairID": "4705552913.jpg#2r1n"},
    )
    assert _rows(path, tmp_path) == [
        {"key": "4705552913.jpg#2r1n", "image": RED, "hypothesis": "A dog.", "label": "neutral"}
    ]
    assert _dropped(tmp_path) == {"4705552913.jpg#2r1x": "unknown_label"}


def test_who_names_the_caption_wants_pairs(data: Path, tmp_path: Path) -> None:
    path = _list(data / "x.json", {"image": "a.jpg", "sentence": "s", "label": "neutral"})
    assert _rows(path, tmp_path, caption_column="sentence") == [
        {"key": "a.jpg", "image": RED, "caption": "s"}
    ]


def test_a_class_of_number_zero_is_no_hypothesis(data: Path, tmp_path: Path) -> None:
    path = _list(data / "x.json", {"image": "a.jpg", "sentence": "s", "label": 0})
    assert [row["caption"] for row in _rows(path, tmp_path)] == ["s"]


def test_pairs_for_pretraining_and_retrieval_stay_pairs(data: Path, tmp_path: Path) -> None:
    words = _Words()
    path = _list(
        data / "flickr30k_test.json",
        {"image": "a.jpg", "caption": ["one", "two"], "image_id": 4},
        {"image": "deep/b.jpg", "caption": "three", "image_id": 5, "label": "dog"},
    )
    prepare(str(path), str(tmp_path / "out"), Options(), map, words)
    assert f"1 table(s) at {path}: images with captions; about" in words.said
    rows = {row["key"]: row["caption"] for row in _read(tmp_path / "out")}
    assert rows == {"5": ["three"], "4": ["one", "two"]}


# ---- bad rows ------------------------------------------------------------------------------------

QUESTION = {"question_id": 1, "question": "q", "image": "a.jpg", "answer": ["x"]}
STATEMENT = {"sentence": "s", "label": "True", "images": ["a.jpg", "deep/b.jpg"]}
HYPOTHESIS = {"image": "a", "sentence": "s", "label": "neutral"}
BAD = {
    "no file": (QUESTION, {"image": "lost.jpg"}, "missing_file"),
    "no name": (HYPOTHESIS, {"image": "lost"}, "missing_file"),
    "no path": (QUESTION, {"image": ""}, "null_image"),
    "no question": (QUESTION, {"question": " \n"}, "empty_question"),
    "question of null": (QUESTION, {"question": None}, "empty_question"),
    "no answers": (QUESTION, {"answer": []}, "empty_answers"),
    "empty answers": (QUESTION, {"answer": ["", " "]}, "empty_answers"),
    "broken": (QUESTION, {"image": "broken.jpg"}, "corrupt_image"),
    "no second": (STATEMENT, {"images": ["a.jpg"]}, "not_two_images"),
    "no images": (STATEMENT, {"images": []}, "not_two_images"),
    "three images": (STATEMENT, {"images": ["a.jpg"] * 3}, "not_two_images"),
    "second of null": (STATEMENT, {"images": ["a.jpg", None]}, "not_two_images"),
    "second lost": (STATEMENT, {"images": ["a.jpg", "lost.jpg"]}, "missing_file"),
    "second broken": (STATEMENT, {"images": ["a.jpg", "broken.jpg"]}, "corrupt_image"),
    "first broken": (STATEMENT, {"images": ["broken.jpg", "a.jpg"]}, "corrupt_image"),
    "no statement": (STATEMENT, {"sentence": ""}, "empty_statement"),
    "no truth": (STATEMENT, {"label": "maybe"}, "unknown_label"),
    "no hypothesis": (HYPOTHESIS, {"sentence": ""}, "empty_hypothesis"),
    "no agreement": (HYPOTHESIS, {"label": "-"}, "unknown_label"),
    "no label": (HYPOTHESIS, {"label": None}, "unknown_label"),
}


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_counted_and_listed(
    data: Path, tmp_path: Path, case: str, is_first: bool
) -> None:
    good, change, reason = BAD[case]
    (data / "broken.jpg").write_bytes(RED[:-200])
    bad = {**good, **change, "split": "bad"}
    path = _list(data / "x.json", *([bad, good] if is_first else [good, bad]))
    stats = prepare(str(path), str(tmp_path / "out"), Options(), map).stats
    assert (stats["rows_in"], stats["rows_out"], stats["dropped"]) == (2, 1, {reason: 1})
    (row,) = pq.read_table(tmp_path / "out" / "_quarantine.parquet").to_pylist()
    assert (row["file"], row["row"], row["reason"]) == ("x.json", 1 - is_first, reason)
    assert "maybe" not in str(_read(tmp_path / "out"))


def test_nothing_usable_is_an_error_that_says_why(data: Path, tmp_path: Path) -> None:
    path = _list(data / "x.json", HYPOTHESIS | {"label": "-"}, HYPOTHESIS | {"image": "lost"})
    message = r"IN: none of 2 rows is usable \(.*unknown_label 1.*texts, and at --images"
    with pytest.raises(UserError, match=message):
        _rows(path, tmp_path)


# ---- refusals ------------------------------------------------------------------------------------

NLVR2 = {"sentence": "s", "label": "True", "left_url": "https://x/l", "right_url": "https://x/r"}
LINK = "https://x/1.jpg"
REFUSED = {
    "links": (NLVR2, r"entry 0 of x.json names its two pictures by links .*download_images.py"),
    "identifiers": ({**NLVR2, "identifier": "dev-1-0-0"}, r"no picture of NLVR2 lies in .*in;"),
    "no image": ({"question": "q", "image_id": 3}, r"entry 0 of x.json is a question without"),
    "question of a link": (QUESTION | {"image": LINK}, "entry 0 of x.json: .* is a link, https"),
    "statement of a link": (STATEMENT | {"images": [LINK] * 2}, "entry 0 of x.json: .* is a link"),
    "hypothesis of a link": (HYPOTHESIS | {"image": LINK}, "entry 0 of x.json: .* is a link"),
    "two of a name": (
        HYPOTHESIS | {"image": "twin"},
        "entry 0 of x.json: other/twin.jpg and twin.png have .*--images",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_table_that_cannot_be_used_is_refused(data: Path, tmp_path: Path, case: str) -> None:
    record, message = REFUSED[case]
    _put(data, {"twin.png": RED, "other/twin.jpg": GREEN})
    with pytest.raises(UserError, match=message):
        _rows(_list(data / "x.json", record), tmp_path)


def test_a_folder_that_cannot_be_listed_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--images: nosuch://x cannot be listed: "):
        _rows(_list(data / "x.json", HYPOTHESIS), tmp_path, images="nosuch://x")


def test_an_entry_that_is_no_object_is_named(data: Path, tmp_path: Path) -> None:
    (data / "x.json").write_text(json.dumps([QUESTION, "a.jpg"]))
    with pytest.raises(UserError, match=r"entry 1 of x\.json is a\.jpg; every entry must be"):
        _rows(data / "x.json", tmp_path)


@pytest.mark.parametrize("name", [QUESTIONS, ANNOTATIONS])
def test_half_of_vqa_is_refused(data: Path, tmp_path: Path, name: str) -> None:
    _vqa(data)
    with pytest.raises(UserError, match=rf"{name} is one half of VQA's .* give both files"):
        _rows(data / name, tmp_path)
    (data / "v2_mscoco_val2014_annotations.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds 3 tables .*; give one, or a pattern"):
        _rows(data, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "annotations.json lies beside questions, but holds no annotations"),
     ('{"annotations": [3]}', r"entry 0 of v2_mscoco_train2014_annotations.json is 3"),
     ('{"annotations": ', "annotations.json is not JSON")],
)  # fmt: skip
def test_odd_annotations_are_refused(data: Path, tmp_path: Path, text: str, message: str) -> None:
    _vqa(data)
    (data / ANNOTATIONS).write_text(text)
    with pytest.raises(UserError, match=message):
        _rows(data, tmp_path)


def test_tables_of_two_tasks_do_not_melt_into_one(data: Path, tmp_path: Path) -> None:
    _list(data / "x1.json", QUESTION)
    _list(data / "x2.json", {"image": "a.jpg", "caption": "c"})
    message = r"x1.json holds ALBEF's questions .* but x2.json holds images with captions; prepare"
    with pytest.raises(UserError, match=message):
        _rows(data / "x*.json", tmp_path)


# ---- what prepare promises -----------------------------------------------------------------------


class _Killed(Exception):
    pass


def _dying(function: Any, items: list[Any]) -> Iterator[dict[str, Any]]:
    """Three results, then the end."""
    for number, item in enumerate(items):
        if number == 3:
            raise _Killed
        yield function(item)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """120 statements about two pictures of 120, in a few columns of their own."""
    data = tmp_path / "in"
    _put(data, {f"{number}.jpg": jpeg((number, 60, 30)) for number in range(120)})
    records = [
        {"sentence": f"s {row}", "label": str(row % 3 == 0), "identifier": f"n{row}",
         "images": [f"{row}.jpg", f"{119 - row}.jpg"]}
        for row in range(120)
    ]  # fmt: skip
    return _list(data / "x.json", *records)


def test_the_rows_of_a_task_are_shuffled_bounded_and_the_same_again(
    many: Path, tmp_path: Path
) -> None:
    first, again = (
        prepare(str(many), str(tmp_path / name), Options(), map, sizes=SMALL).stats
        for name in ("first", "again")
    )
    assert first == again
    rows = _read(tmp_path / "first")
    numbers = [int(row["statement"][2:]) for row in rows]
    assert numbers == sorted(range(120), key=lambda row: order_of(0, 0, row))
    for number, row in zip(numbers, rows, strict=True):
        pictures = [jpeg((each, 60, 30)) for each in (number, 119 - number)]
        assert (row["images"], row["label"]) == (pictures, str(number % 3 == 0).lower())
    paths = sorted((tmp_path / "first").glob("part-*"))
    assert len(paths) > 1
    for path in paths:
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            cells = file.read_row_group(group, columns=["images"]).column("images").to_pylist()
            assert sum(len(image) for images in cells for image in images) <= SMALL.row_group
        column = file.metadata.row_group(0).column(1)
        assert (column.path_in_schema, column.compression) == (
            "images.list.element", "UNCOMPRESSED",
        )  # fmt: skip


def test_a_killed_job_of_a_task_goes_on_to_the_same_content(many: Path, tmp_path: Path) -> None:
    whole = prepare(str(many), str(tmp_path / "whole"), Options(), map, sizes=SMALL).stats
    out, kills = tmp_path / "out", 0
    while not (out / "stats.json").exists():
        try:
            prepare(str(many), str(out), Options(), _dying, sizes=SMALL)
        except _Killed:
            kills += 1
            assert kills < 50, "it does not get on"
    assert kills >= 2
    assert json.loads((out / "stats.json").read_text())["content_hash"] == whole["content_hash"]
    assert _read(out) == _read(tmp_path / "whole")
    assert not prepare(str(many), str(out), Options(), map, sizes=SMALL).created


@pytest.mark.parametrize("change", [{"question": "p"}, {"answer": ["x", "x"]}, {"question_id": 2}])
def test_the_content_hash_covers_every_column(
    data: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    hashes = set()
    for number, record in enumerate((QUESTION, QUESTION | change)):
        path = _list(data / f"x{number}.json", record)
        out = str(tmp_path / str(number))
        hashes.add(prepare(str(path), out, Options(), map).stats["content_hash"])
    assert len(hashes) == 2


def test_the_types_of_a_task_are_those_of_every_shard(many: Path, tmp_path: Path) -> None:
    prepare(str(many), str(tmp_path / "out"), Options(), map, sizes=SMALL)
    schemas = [pq.read_schema(path) for path in (tmp_path / "out").glob("part-*")]
    assert len(schemas) > 1
    assert all(schema.equals(schemas[0]) for schema in schemas)
    assert schemas[0].field("images").type.value_type == pa.binary()
