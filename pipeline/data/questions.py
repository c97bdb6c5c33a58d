"""Downstream tasks from scenes' graphs: questions, statements of one and two pictures, entailment.

Also statements about boxes, whose pictures are others (see `pipeline.data.boxes`).

Enters: split, row and seed. Leaves: the tasks' rows, by `TASKS`, each a function of those three
alone; also questions one by one. Every text is drawn before its label or answer, which is drawn
from those that the text leaves possible, each alike often; so text alone tells nothing but what
kind of answer it wants. (Where train never shows a pair of color and shape, neither text nor
answer names it: "what color is the circle?" has one color less to choose from.) Must not know:
Ray, torch, the trainer.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from pipeline.data.boxes import box_statement, boxes_json, draw_boxes, encode_png
from pipeline.data.demo import (
    COLORS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    Task,
    draw,
    encode_jpeg,
    scene_json,
)
from pipeline.data.descriptions import describe
from pipeline.data.pairs import pair_statement
from pipeline.data.staging import (
    INVERSE,
    NINE_PLACES,
    Look,
    Order,
    an,
    draw_count,
    draw_thing,
    pick,
    plural,
    stage,
)
from pipeline.data.statements import (
    ENTAILMENT,
    TRUTH,
    WORDINGS,
    beside,
    counted,
    draw_name,
    draw_side,
    elsewhere,
    hypothesis,
    placed,
    present,
    statement,
)

YES_NO = ("yes", "no")
DIGITS = ("0", "1", "2", "3")
# All that a question can be answered by.
ANSWERS = (*YES_NO, *COLORS, *SHAPES, *SIZES, *DIGITS, *NINE_PLACES)

Asked = tuple[str, str, Order]
Row = dict[str, object]

_HELD_OUT_SHARE = 0.5  # of the test rows
_FIRST_STREAM = 2  # of random numbers: demo's rows use 0 and 1


def question(rng: np.random.Generator, held_out: bool, kind: str) -> tuple[str, str, Scene]:
    """A question of this kind, one of KINDS, its answer and the scene it is asked of.

    Only with `held_out` are pairs of HELD_OUT named, asked for and shown.
    """
    text, answer, order = _KINDS[kind](rng, held_out)
    return text, answer, stage(rng, held_out, order)


def _exists(rng: np.random.Generator, held_out: bool) -> Asked:
    look, count = draw_name(rng, held_out), draw_count(rng, held_out)
    wording, answer = pick(rng, ("is there {}?", "does the picture show {}?")), pick(rng, YES_NO)
    return wording.format(an(look)), answer, present(look, answer == "yes", count)


def _relation(rng: np.random.Generator, held_out: bool) -> Asked:
    said = draw_side(rng, held_out, many=False)
    text = f"is the {said.name} {pick(rng, WORDINGS[said.word])} the {said.other}?"
    answer, count = pick(rng, YES_NO), draw_count(rng, held_out, 2)
    verdict = "true" if answer == "yes" else "false"
    return text, answer, beside(rng, said, verdict, count)


def _attribute(
    asked: str, names: Sequence[tuple[str, ...]], rng: np.random.Generator, held_out: bool
) -> Asked:
    """Ask what color, shape or size the thing has that is named by something else."""
    thing = draw_thing(rng, held_out)
    subject = thing.only(pick(rng, names))
    # Other things may be large where the subject is small, but two large ones leave no room.
    count = draw_count(rng, held_out, 1, 2 if subject.size else 3)
    order = Order(count=count, shown=(thing,), barred=(subject,), near=subject.parts())
    return f"what {asked} is the {subject}?", getattr(thing, asked), order


def _count(rng: np.random.Generator, held_out: bool) -> Asked:
    name = pick(rng, ((), ("shape",), ("color",)))
    look = draw_thing(rng, held_out).only(name) if name else None
    what = f"{look or 'shape'}{plural(2, look)}"
    text = pick(rng, ("how many {} are there?", "how many {} does the picture show?"))
    answer = pick(rng, DIGITS if look else DIGITS[1:])
    return text.format(what), answer, counted(rng, held_out, look, int(answer))


def _beside(rng: np.random.Generator, held_out: bool) -> Asked:
    """Ask for the shape of the thing on one side; a third thing is on another side."""
    anchor = draw_thing(rng, held_out).only(pick(rng, (("color",), ("color", "shape"))))
    word = pick(rng, tuple(INVERSE))
    text = f"what shape is {pick(rng, WORDINGS[word])} the {anchor}?"
    answer = pick(rng, SHAPES)
    sides = ((0, word, 1), (2, elsewhere(rng, word), 1))
    count = draw_count(rng, held_out, 2)
    shown = (Look(shape=answer), anchor)
    order = Order(count=count, shown=shown, barred=(anchor,), sides=sides[: count - 1])
    return text, answer, order


def _place(rng: np.random.Generator, held_out: bool) -> Asked:
    name = pick(rng, (("shape",), ("color",), ("color", "shape")))
    thing = draw_thing(rng, held_out)
    where, count = pick(rng, NINE_PLACES), draw_count(rng, held_out)
    text = f"where is the {thing.only(name)}?"
    return text, where, placed(rng, thing, thing.only(name), where, "true", count)


_KINDS: dict[str, Callable[[np.random.Generator, bool], Asked]] = {
    "exists": _exists,
    "relation": _relation,
    "color": partial(_attribute, "color", (("shape",), ("size", "shape"), ("size",))),
    "shape": partial(_attribute, "shape", (("color",), ("size", "color"), ("size",))),
    "size": partial(_attribute, "size", (("shape",), ("color",), ("color", "shape"))),
    "count": _count,
    "beside": _beside,
    "place": _place,
}
KINDS = tuple(_KINDS)


def _turn(stream: Sequence[int], options: Sequence[str], row: int) -> str:
    """The row's option: each occurs once in every so many rows, in an order drawn anew."""
    block, number = divmod(row, len(options))
    order = np.random.default_rng([*stream, block, 1]).permutation(len(options))
    return options[int(order[number])]


def _begin(
    stream: int, options: Sequence[str], split: str, row: int, seed: int
) -> tuple[np.random.Generator, bool, str]:
    """The row's generator, whether it may show pairs of HELD_OUT, and its kind or label."""
    number = SPLITS.index(split)
    rng = np.random.default_rng([seed, number, row, stream])
    held_out = split == "test" and bool(rng.random() < _HELD_OUT_SHARE)
    return rng, held_out, _turn([seed, number, stream], options, row)


def _end(split: str, row: int, columns: Row, scene: str) -> Row:
    return {"key": f"{split}-{row:07d}", **columns, "scene": scene, "split": split}


def _picture(scene: Scene) -> bytes:
    return encode_jpeg(draw(scene))


def _make_vqa(split: str, row: int, seed: int) -> Row:
    rng, held_out, kind = _begin(_FIRST_STREAM, KINDS, split, row, seed)
    text, answer, scene = question(rng, held_out, kind)
    columns = {"image": _picture(scene), "question": text, "answer": answer, "kind": kind}
    return _end(split, row, columns, scene_json(scene))


def _make_statement(split: str, row: int, seed: int) -> Row:
    rng, held_out, label = _begin(_FIRST_STREAM + 1, TRUTH, split, row, seed)
    text, scene = statement(rng, held_out, label)
    columns = {"image": _picture(scene), "statement": text, "label": label}
    return _end(split, row, columns, scene_json(scene))


def _make_pair(split: str, row: int, seed: int) -> Row:
    rng, held_out, label = _begin(_FIRST_STREAM + 2, TRUTH, split, row, seed)
    text, scenes = pair_statement(rng, held_out, label)
    columns = {"images": [_picture(scene) for scene in scenes], "statement": text, "label": label}
    return _end(split, row, columns, f"[{','.join(map(scene_json, scenes))}]")


def _make_hypothesis(split: str, row: int, seed: int) -> Row:
    rng, held_out, label = _begin(_FIRST_STREAM + 3, ENTAILMENT, split, row, seed)
    text, scene = hypothesis(rng, held_out, label)
    columns = {"image": _picture(scene), "hypothesis": text, "label": label}
    return _end(split, row, columns, scene_json(scene))


def _make_boxes(split: str, row: int, seed: int) -> Row:
    rng, _, label = _begin(_FIRST_STREAM + 4, TRUTH, split, row, seed)
    text, boxes = box_statement(rng, label)
    columns = {"image": encode_png(draw_boxes(boxes)), "statement": text, "label": label}
    return _end(split, row, columns, boxes_json(boxes))


def _make_description(split: str, row: int, seed: int) -> Row:
    rng, held_out, count = _begin(_FIRST_STREAM + 5, DIGITS[1:], split, row, seed)
    scene = stage(rng, held_out, Order(count=int(count)))
    columns = {"image": _picture(scene), "caption": describe(rng, scene)}
    return _end(split, row, columns, scene_json(scene))


def _schema(**columns: pa.DataType) -> pa.Schema:
    """Key, the task's own columns, the scene's graph (of a pair: a list of two), and split."""
    ends = {"scene": pa.string(), "split": pa.string()}
    everything = {"key": pa.string(), **columns, **ends}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in everything.items()])


_TEXT = pa.string()
_TASKS = (
    Task(
        name="vqa",
        schema=_schema(image=pa.binary(), question=_TEXT, answer=_TEXT, kind=_TEXT),
        make=_make_vqa,
    ),
    Task(
        name="statements",
        schema=_schema(image=pa.binary(), statement=_TEXT, label=_TEXT),
        make=_make_statement,
    ),
    Task(
        name="pairs",
        schema=_schema(images=pa.list_(pa.binary()), statement=_TEXT, label=_TEXT),
        make=_make_pair,
    ),
    Task(
        name="entailment",
        schema=_schema(image=pa.binary(), hypothesis=_TEXT, label=_TEXT),
        make=_make_hypothesis,
    ),
    Task(
        name="boxes",
        schema=_schema(image=pa.binary(), statement=_TEXT, label=_TEXT),
        make=_make_boxes,
    ),
    Task(
        name="descriptions",
        schema=_schema(image=pa.binary(), caption=_TEXT),
        make=_make_description,
    ),
)
TASKS = {task.name: task for task in _TASKS}
