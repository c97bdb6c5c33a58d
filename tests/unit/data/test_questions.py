"""The tasks' rows: every label is judged anew, from the text and the scene's graph alone."""

import io
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline import cli
from pipeline.data import demo, questions
from pipeline.data.demo import COLORS, HELD_OUT, RGB, SHAPES, SIZES, SPLITS, write_demo
from pipeline.data.pairs import pair_statement
from pipeline.data.questions import ANSWERS, KINDS, TASKS
from pipeline.data.staging import Look, Order, stage
from pipeline.data.statements import ENTAILMENT, TRUTH, hypothesis, statement

Row = dict[str, Any]
Thing = dict[str, Any]

ROWS = 3600
TEXTS = {
    "vqa": "question", "statements": "statement", "pairs": "statement", "entailment": "hypothesis",
    "boxes": "statement", "descriptions": "caption",
}  # fmt: skip
LABELS = {"statements": TRUTH, "pairs": TRUTH, "entailment": ENTAILMENT, "boxes": TRUTH}
# Boxes are judged in test_boxes.py, and descriptions are always true: below.
OF_SCENES = [task for task in TASKS if task not in {"boxes", "descriptions"}]
NUMBERS = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NAME = rf"(?:(?:{'|'.join(SIZES)}) )?(?:(?:{'|'.join(COLORS)}) )?(?:{'|'.join(SHAPES)}|thing|shape)"
AN = rf"an? ({NAME})"
SIDE = r"(?:to the )?(left of|right of|above|below)"
# Ranges, in pixels, of a centre of which a place is surely said, and of which surely not.
LOW, MIDDLE, HIGH = (0, 24), (26, 38), (40, 64)
PLACES = {
    "top left": (LOW, LOW), "top": (MIDDLE, LOW), "top right": (HIGH, LOW),
    "left": (LOW, MIDDLE), "center": (MIDDLE, MIDDLE), "right": (HIGH, MIDDLE),
    "bottom left": (LOW, HIGH), "bottom": (MIDDLE, HIGH), "bottom right": (HIGH, HIGH),
}  # fmt: skip
EDGES = {"top": (1, LOW), "bottom": (1, HIGH), "left": (0, LOW), "right": (0, HIGH)}


@pytest.fixture(scope="module")
def rows() -> Callable[[str, str], list[Row]]:
    """Rows of a task and split, without pictures: those take most of the time."""
    known: dict[tuple[str, str], list[Row]] = {}

    def make(task: str, split: str) -> list[Row]:
        if (task, split) not in known:
            count = ROWS if split == "train" else 960
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(questions, "_picture", lambda scene: b"")
                patch.setattr(questions, "draw_boxes", lambda boxes: None)
                patch.setattr(questions, "encode_png", lambda image: b"")
                known[task, split] = [TASKS[task].make(split, row, 0) for row in range(count)]
        return known[task, split]

    return make


def scenes_of(row: Row) -> list[list[Thing]]:
    graphs = json.loads(row["scene"])
    return [graph["objects"] for graph in (graphs if isinstance(graphs, list) else [graphs])]


def fits(thing: Thing, name: str) -> bool:
    """Whether a thing is what the name says, "crosses" and "small red things" included."""
    words = {*name.split(), name.removesuffix("s").split()[-1], name.removesuffix("es").split()[-1]}
    told = {"color": words & set(COLORS), "shape": words & set(SHAPES), "size": words & set(SIZES)}
    return all(not values or values == {thing[key]} for key, values in told.items())


def fitting(things: list[Thing], name: str) -> list[Thing]:
    return [thing for thing in things if fits(thing, name)]


def is_within(thing: Thing, axis: int, span: tuple[int, int]) -> bool:
    return span[0] <= (thing["x"], thing["y"])[axis] <= span[1]


def is_in(thing: Thing, where: str) -> bool:
    return all(is_within(thing, axis, span) for axis, span in enumerate(PLACES[where]))


def is_at(thing: Thing, where: str) -> bool:
    """Judge a place by the centre; what is neither clearly there nor clearly elsewhere fails."""
    there = is_in(thing, where)
    edges = [EDGES[where]] if where in EDGES else list(enumerate(PLACES[where]))
    assert there or any(not is_within(thing, axis, span) for axis, span in edges), "unclear"
    return there


def is_beside(one: Thing, word: str, other: Thing) -> bool:
    """Judge a side by coordinates; a diagonal pair is unclear and fails."""
    offsets = {"left of": other["x"] - one["x"], "above": other["y"] - one["y"]}
    offsets |= {INVERSE[key]: -value for key, value in offsets.items()}
    clear = max(offsets, key=offsets.__getitem__)
    across = min(abs(offsets["left of"]), abs(offsets["above"]))
    assert offsets[clear] >= 2 * across, "unclear"
    assert offsets[clear] > one["radius"] + other["radius"], "overlap"
    return clear == word


def judge_all(holds: Sequence[bool]) -> str:
    """True of one thing, false of one, or not to be decided."""
    if len(holds) == 1:
        return "true" if holds[0] else "false"
    assert len(set(holds)) != 1, "several things of one name, and all alike"
    return "open"


def read_definite(text: str, things: list[Thing]) -> str | None:
    """Judge "the circle is ..." by the rule that the module states."""
    if found := re.fullmatch(rf"the ({NAME}) is {SIDE} the ({NAME})", text):
        subjects, others = fitting(things, found[1]), fitting(things, found[3])
        if not subjects or not others:
            return "open"
        (other,) = others
        return judge_all([is_beside(subject, found[2], other) for subject in subjects])
    if found := re.fullmatch(rf"the ({NAME}) is (?:an? )?(\w+)", text):
        wanted = found[2] if found[2] in SHAPES else f"{found[2]} thing"
        assert set(wanted.split()) & {*SHAPES, *COLORS, *SIZES}
        return judge_all([fits(thing, wanted) for thing in fitting(things, found[1])])
    if found := re.fullmatch(rf"the ({NAME}) is (?:in|at|on) the ([a-z ]+?)(?: corner)?", text):
        return judge_all([is_at(thing, found[2]) for thing in fitting(things, found[1])])
    return None


def read_statement(text: str, things: list[Thing]) -> str:
    """Judge a sentence about one picture: true, false or open."""
    if verdict := read_definite(text, things):
        return verdict
    text = re.sub(r"^(there is|there are|the picture shows) ", "", text)
    text = re.sub(r" is in the picture$", "", text)
    if found := re.fullmatch(rf"exactly (\w+) ({NAME}(?:e?s)?)", text):
        holds = len(fitting(things, found[2])) == NUMBERS[found[1]]
    elif found := re.fullmatch(rf"{AN} and {AN}", text):
        holds = any(fits(a, found[1]) and fits(b, found[2]) for a, b in permutations(things, 2))
        assert holds or not all(fitting(things, name) for name in found.groups()), "unclear"
    elif found := re.fullmatch(f"no ({NAME})", text):
        holds = not fitting(things, found[1])
    else:
        found = re.fullmatch(AN, text)
        assert found, text
        holds = bool(fitting(things, found[1]))
    return "true" if holds else "false"


def read_pair(text: str, left: list[Thing], right: list[Thing]) -> str:
    """Judge a sentence about two pictures: true or false."""
    counts = len(left), len(right)
    if found := re.fullmatch(rf"one picture shows {AN} and the other shows {AN}", text):
        holds = any(
            bool(fitting(one, found[1])) and bool(fitting(other, found[2]))
            for one, other in ((left, right), (right, left))
        )
    elif found := re.fullmatch(
        rf"the two pictures together show exactly (\w+) ({NAME}(?:e?s)?)", text
    ):
        holds = len(fitting(left + right, found[2])) == NUMBERS[found[1]]
    elif found := re.match(r"there are more shapes in the (left|right) picture", text):
        holds = counts[0] > counts[1] if found[1] == "left" else counts[1] > counts[0]
    elif text.endswith("number of shapes") or text.endswith("numbers of shapes"):
        holds = (counts[0] == counts[1]) == ("the same" in text)
    else:
        found = re.fullmatch(rf"(.+?) (?:pictures?|of the pictures) shows? {AN}", text)
        assert found, text
        shows = [bool(fitting(things, found[2])) for things in (left, right)]
        holds = {
            "the left": shows[0], "the right": shows[1], "both": all(shows),
            "neither": not any(shows), "exactly one": sum(shows) == 1, "at least one": any(shows),
        }[found[1]]  # fmt: skip
    return "true" if holds else "false"


def only(things: list[Thing]) -> Thing:
    (thing,) = things
    return thing


def read_question(text: str, things: list[Thing]) -> str:
    """Answer a question."""
    if found := re.fullmatch(rf"(?:is there|does the picture show) {AN}\?", text):
        return "yes" if fitting(things, found[1]) else "no"
    if found := re.fullmatch(rf"is (the {NAME}) ((?:to the )?{SIDE} the {NAME})\?", text):
        return {"true": "yes", "false": "no"}[read_statement(f"{found[1]} is {found[2]}", things)]
    if found := re.fullmatch(rf"what (color|shape|size) is the ({NAME})\?", text):
        return only(fitting(things, found[2]))[found[1]]
    if found := re.fullmatch(
        rf"how many ({NAME}(?:e?s)) (?:are there|does the picture show)\?", text
    ):
        return str(len(fitting(things, found[1])))
    if found := re.fullmatch(rf"what shape is {SIDE} the ({NAME})\?", text):
        anchor = only(fitting(things, found[2]))
        others = [thing for thing in things if thing is not anchor]
        return only([one for one in others if is_beside(one, found[1], anchor)])["shape"]
    found = re.fullmatch(rf"where is the ({NAME})\?", text)
    assert found, text
    thing = only(fitting(things, found[1]))
    (where,) = [where for where in PLACES if is_in(thing, where)]
    return where


def judge(task: str, row: Row) -> str:
    """The label or answer that the row should have."""
    text, scenes = row[TEXTS[task]], scenes_of(row)
    if task == "pairs":
        return read_pair(text, *scenes)
    if task == "vqa":
        return read_question(text, *scenes)
    verdict = read_statement(text, *scenes)
    if task == "statements":
        return verdict
    return {"true": "entailment", "false": "contradiction", "open": "neutral"}[verdict]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", OF_SCENES)
def test_every_label_is_true_of_the_scene(
    rows: Callable[[str, str], list[Row]], task: str, split: str
) -> None:
    for row in rows(task, split):
        label = row["answer" if task == "vqa" else "label"]
        assert judge(task, row) == label, (row[TEXTS[task]], row["scene"])


@pytest.mark.parametrize(
    ("task", "make"),
    [("statements", statement), ("pairs", pair_statement), ("entailment", hypothesis)],
)
@pytest.mark.parametrize("held_out", [False, True])
def test_a_text_is_the_same_for_every_label(
    task: str, make: Callable[[np.random.Generator, bool, str], tuple], held_out: bool
) -> None:
    for seed in range(400):
        texts = {make(np.random.default_rng(seed), held_out, label)[0] for label in LABELS[task]}
        assert len(texts) == 1


@pytest.mark.parametrize("task", LABELS)
def test_every_label_comes_once_in_as_many_rows(
    rows: Callable[[str, str], list[Row]], task: str
) -> None:
    labels = [row["label"] for row in rows(task, "val")]
    step = len(LABELS[task])
    blocks = [tuple(labels[start : start + step]) for start in range(0, len(labels), step)]
    assert {tuple(sorted(block)) for block in blocks} == {tuple(sorted(LABELS[task]))}
    assert len(set(blocks)) > 1, "in an order drawn anew"


def test_answers_are_balanced_within_each_kind(rows: Callable[[str, str], list[Row]]) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows("vqa", "train"):
        answers[row["kind"]][row["answer"]] += 1
    expected = {
        "exists": 2, "relation": 2, "color": 8, "shape": 6, "size": 2, "count": 4, "beside": 6,
        "place": 9,
    }  # fmt: skip
    assert {kind: len(counts) for kind, counts in answers.items()} == expected
    assert tuple(expected) == KINDS
    assert {answer for counts in answers.values() for answer in counts} == set(ANSWERS)
    assert len(set(ANSWERS)) == len(ANSWERS)
    for kind, counts in answers.items():
        assert counts.total() == ROWS / len(KINDS)
        # The pairs of HELD_OUT leave six colors less often, and nothing counts 0 of all shapes.
        assert max(counts.values()) / counts.total() < 1 / expected[kind] + 0.05, (kind, counts)


@pytest.mark.parametrize("split", SPLITS)
def test_descriptions_are_true_and_lists_are_whole(
    rows: Callable[[str, str], list[Row]], split: str
) -> None:
    counts: Counter[str] = Counter()
    for row in rows("descriptions", split):
        (things,) = scenes_of(row)
        listed: list[Thing] = []
        for part in re.split(r", | and ", row["caption"]):
            if found := re.fullmatch(
                rf"(?:there is )?{AN}(?: \w+ the ([a-z ]+?)(?: corner)?)?", part
            ):
                listed.append(only(fitting(things, found[1])))
                assert found[2] is None or is_at(listed[-1], found[2]), (row["caption"], things)
                counts["placed" if found[2] else "bare"] += 1
            else:
                assert read_statement(part, things) == "true", (row["caption"], things)
                counts["fact"] += 1
        counts[f"{len(things)} things"] += 1
        assert not listed or sorted(map(str, listed)) == sorted(map(str, things)), row["caption"]
        assert len(row["caption"].split()) <= 26, row["caption"]
    assert counts["1 things"] == counts["2 things"] == counts["3 things"]
    assert min(counts["placed"], counts["bare"], counts["fact"]) > 200


# --- what text alone tells


def features(texts: list[str], known: dict[str, int] | None = None) -> tuple[Any, dict[str, int]]:
    """Words, and pairs of words that stand anywhere in a text, [texts, features] of 0 and 1."""
    found = [
        {*words, *(" ".join(two) for two in combinations(words, 2))}
        for words in (re.findall(r"\w+", text) for text in texts)
    ]
    if known is None:
        common = Counter(part for parts in found for part in sorted(parts)).most_common(1000)
        known = {part: number for number, (part, _) in enumerate(common)}
    matrix = torch.zeros(len(texts), len(known))
    for row, parts in enumerate(found):
        matrix[row, [known[part] for part in parts if part in known]] = 1
    return matrix, known


def probe(texts: list[str], labels: list[str]) -> float:
    """The accuracy of logistic regression on the last third, fitted to the rest."""
    cut = len(texts) * 2 // 3
    train, known = features(texts[:cut])
    test, _ = features(texts[cut:], known)
    numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
    truth = torch.tensor([numbers[label] for label in labels])
    torch.manual_seed(0)
    linear = torch.nn.Linear(train.shape[1], len(numbers))
    solver = torch.optim.AdamW(linear.parameters(), lr=0.02, weight_decay=0.1)
    for _ in range(60):
        solver.zero_grad()
        F.cross_entropy(linear(train), truth[:cut]).backward()
        solver.step()
    return float((linear(test).argmax(1) == truth[cut:]).double().mean())


def lookup(texts: list[str], labels: list[str], kinds: list[str]) -> float:
    """The accuracy, on the last third, of each text's commonest label in the rest.

    A text that is new there gets its kind's commonest label.
    """
    cut = len(texts) * 2 // 3
    tables: dict[str, Counter[str]] = defaultdict(Counter)
    for text, label, kind in zip(texts[:cut], labels[:cut], kinds[:cut], strict=True):
        tables[f"{kind}: {text}"][label] += 1
        tables[kind][label] += 1
    guesses = [
        tables.get(f"{kind}: {text}", tables[kind]).most_common(1)[0][0]
        for text, kind in zip(texts[cut:], kinds[cut:], strict=True)
    ]
    return float(np.mean(np.array(guesses) == np.array(labels[cut:])))


def parts_of(task: str, rows: list[Row]) -> tuple[list[str], list[str], list[str]]:
    """Text, label and kind of each row."""
    return (
        [row[TEXTS[task]] for row in rows],
        [row["answer" if task == "vqa" else "label"] for row in rows],
        [row.get("kind", "") for row in rows],
    )


@pytest.mark.parametrize("task", [*OF_SCENES, "boxes"])
def test_text_alone_is_at_chance(rows: Callable[[str, str], list[Row]], task: str) -> None:
    texts, labels, kinds = parts_of(task, rows(task, "train"))
    chance = 1 / len(LABELS[task]) if task in LABELS else lookup(kinds, labels, kinds)
    measured = probe(texts, labels), lookup(texts, labels, kinds)
    assert max(measured) < chance + 0.035, (measured, chance)


def test_the_probes_find_what_is_there(rows: Callable[[str, str], list[Row]]) -> None:
    """A label that follows a pair of words seven times in ten is found by both."""
    texts = [row["hypothesis"] for row in rows("entailment", "train")]
    rng = np.random.default_rng(0)
    labels = [str(("red" in text) != (rng.random() < 0.3)) for text in texts]
    assert probe(texts, labels) > 0.6
    assert lookup(texts, labels, [""] * len(texts)) > 0.6


# --- rows


@pytest.mark.parametrize("task", [*OF_SCENES, "descriptions"])
def test_pairs_held_out_are_shown_and_named_only_in_test(
    rows: Callable[[str, str], list[Row]], task: str
) -> None:
    for split in SPLITS:
        shown = [
            any((one["color"], one["shape"]) in HELD_OUT for things in scenes_of(row)
                for one in things)
            for row in rows(task, split)
        ]  # fmt: skip
        named = [
            any(f"{color} {shape}" in row[TEXTS[task]] for color, shape in HELD_OUT)
            for row in rows(task, split)
        ]
        if split == "test":
            assert np.mean(shown) == pytest.approx(0.5, abs=0.07)
            assert any(named)
        else:
            assert not any(shown)
            assert not any(named)


@pytest.mark.parametrize("task", ["statements", "entailment"])
def test_a_description_names_a_held_out_pair_only_in_test(
    rows: Callable[[str, str], list[Row]], task: str
) -> None:
    """ "The small circle is green" is never said in train: it would be false each time."""
    for split in SPLITS:
        said = [
            re.fullmatch(rf"the ({NAME}) is (?:an? )?(\w+)", row[TEXTS[task]])
            for row in rows(task, split)
        ]
        words = [{*found[1].split(), found[2]} for found in said if found]
        named = [any(set(pair) <= each for pair in HELD_OUT) for each in words]
        assert len(named) > 100
        assert any(named) == (split == "test")


@pytest.mark.parametrize("task", TASKS)
def test_a_row_follows_from_split_row_and_seed(task: str) -> None:
    make = TASKS[task].make
    assert [make("test", row, 3) for row in (5, 4)] == [make("test", row, 3) for row in (5, 4)]
    several = {make(split, row, seed)["scene"] for split in SPLITS for row in (0, 1)
               for seed in (0, 1)}  # fmt: skip
    assert len(several) == 12


@pytest.mark.parametrize("task", OF_SCENES)
def test_pictures_show_the_scene(task: str) -> None:
    for number in range(12):
        row: Row = TASKS[task].make("val", number, 1)
        pictures = row["images"] if task == "pairs" else [row["image"]]
        assert len(pictures) == (2 if task == "pairs" else 1)
        for picture, things in zip(pictures, scenes_of(row), strict=True):
            image = Image.open(io.BytesIO(picture))
            assert (image.format, image.size) == ("JPEG", (64, 64))
            pixels = np.asarray(image, dtype=int)
            for thing in things:
                pixel = pixels[thing["y"], thing["x"]]
                nearest = min(RGB, key=lambda color: int(np.abs(pixel - RGB[color]).sum()))
                assert nearest == thing["color"]
            assert {thing["size"] for thing in things} <= set(SIZES)


@pytest.mark.parametrize("task", TASKS)
def test_a_set_is_written_as_the_pretraining_set_is(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SHARD_ROWS", 32)
    monkeypatch.setattr(demo, "ROW_GROUP_ROWS", 8)
    write_demo(tmp_path / "set", 40, seed=2, task=TASKS[task])
    paths = sorted((tmp_path / "set" / "train").iterdir())
    assert [path.name for path in paths] == ["part-00000.parquet", "part-00001.parquet"]
    file = pq.ParquetFile(paths[0])
    group = file.metadata.row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    codecs = {column.path_in_schema.split(".")[0]: column.compression for column in columns}
    picture = "images" if task == "pairs" else "image"
    assert {name for name, codec in codecs.items() if codec == "UNCOMPRESSED"} == {picture}
    assert (group.num_rows, file.num_row_groups) == (8, 4)
    told = {"vqa": ["answer", "kind"], "descriptions": []}.get(task, ["label"])
    kinds = {name: pa.string() for name in ("key", TEXTS[task], *told, "scene", "split")}
    kinds |= {picture: pa.list_(pa.binary()) if task == "pairs" else pa.binary()}
    schema = pq.read_schema(paths[0])
    assert {
        name: kind if name != "images" else pa.list_(kind.value_type)
        for name, kind in zip(schema.names, schema.types, strict=True)
    } == kinds
    read = pq.read_table(tmp_path / "set" / "train", schema=TASKS[task].schema).to_pylist()
    assert read == [TASKS[task].make("train", row, 2) for row in range(40)]
    assert read[7]["key"] == "train-0000007"


def test_one_set_is_either_private_or_of_a_task(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task is vqa and private is set; .*: drop one"):
        write_demo(tmp_path / "set", 2, private=True, task=TASKS["vqa"])
    assert list(tmp_path.iterdir()) == []


def gammaray(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gammaray", "data", "demo", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_the_command_writes_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    assert gammaray(monkeypatch, str(out), "--rows", "9", "--task", "vqa") == 0
    record = {"rows": 9, "seed": 0, "version": demo.VERSION, "task": "vqa"}
    assert json.loads((out / "demo.json").read_text()) == record
    assert "train 9, val 9, test 9" in capfd.readouterr().out
    assert gammaray(monkeypatch, str(out), "--rows", "9", "--task", "vqa") == 0
    assert "already there" in capfd.readouterr().out
    assert gammaray(monkeypatch, str(out), "--rows", "9", "--task", "pairs") == 0
    assert "already there" not in capfd.readouterr().out
    assert "images" in pq.read_schema(out / "val" / "part-00000.parquet").names
    assert gammaray(monkeypatch, str(out), "--rows", "9") == 0
    assert "caption" in pq.read_schema(out / "val" / "part-00000.parquet").names


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--task", "vqr"],
            "--task is vqr; there is vqa, statements, pairs, entailment, boxes, desc",
        ),
        (["--task", "vqa", "--private"], "task is vqa and private is set"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    assert gammaray(monkeypatch, str(tmp_path / "set"), "--rows", "2", *options) == 2
    assert said in capfd.readouterr().out
    assert not (tmp_path / "set").exists()


# --- scenes to order


def test_an_order_that_leaves_nothing_to_show_is_refused() -> None:
    order = Order(
        count=1, shown=(Look(color="red"),), barred=(Look(color="red"), Look(size="small"))
    )
    rng = np.random.default_rng(0)
    bare = Order(count=2, barred=tuple(Look(shape=shape) for shape in SHAPES))
    assert stage(rng, False, order).objects[0].color == "red"
    with pytest.raises(ValueError, match=r"beside .* and barred .*: nothing is left to show; bar"):
        stage(rng, False, bare)


def test_a_layout_that_nothing_fits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_LAYOUT_ROUNDS", 2)
    sides = ((0, "left of", 1), (0, "right of", 1))
    with pytest.raises(ValueError, match="leave no layout: objects may not overlap; make them"):
        demo.sample_layout(np.random.default_rng(0), ["small", "small"], sides=sides)


def test_every_size_and_place_can_be_asked_for() -> None:
    for where in PLACES:
        for count in (1, 2, 3):
            order = Order(count=count, shown=(Look(shape="star"),), places={0: where})
            for seed in range(5):
                scene = stage(np.random.default_rng(seed), False, order)
                assert len(scene.objects) == count
                assert demo.place(scene.objects[0]) == where
