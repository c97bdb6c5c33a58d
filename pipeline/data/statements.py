"""Sentences about one scene, and scenes of which they are true, false, or neither.

Enters: a generator and the label wanted. Leaves: a sentence and a scene. The sentence is drawn
before the label is looked at, and the scene made to fit both; so no sentence tells its label. Must
not know: files, Ray, the trainer.

A sentence about "the circle" presupposes one circle. It is true if the picture has one and what is
said holds of it, false if that is not so. It is neither, which the picture cannot decide, if there
is no circle, or if there are two of which one is as said and the other not. What is said of a place
or a side is meant as `pipeline.data.demo` tells them: a thing at the top is neither in a corner
nor in the center, and one that is left of another is so by at least twice as much as it is higher
or lower.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.data.demo import PLACES, SIZES, Scene
from pipeline.data.staging import (
    INVERSE,
    NINE_PLACES,
    Look,
    Order,
    an,
    draw_count,
    draw_thing,
    exactly,
    pick,
    stage,
)

Verdict = Literal["true", "false", "open"]
Told = tuple[str, Order]

TRUTH = ("true", "false")
VERDICTS: dict[str, Verdict] = {
    "entailment": "true",
    "neutral": "open",
    "contradiction": "false",
}
ENTAILMENT = tuple(VERDICTS)

WORDINGS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
NAMES = (("color", "shape"), ("color", "shape"), ("shape",), ("color",), ("size", "shape"))

# What is told of a thing, and how the thing is named then.
_DESCRIPTIONS = {
    "color": (("shape",), ("size", "shape")),
    "shape": (("color",), ("size", "color")),
    "size": (("shape",), ("color",)),
}
_PAIR = ("color", "shape")
_SIDE_NAMES = (("shape",), ("color",), ("color", "shape"))
PLACE_PHRASES = {
    "top left": "in the top left corner",
    "top": "at the top",
    "top right": "in the top right corner",
    "left": "on the left",
    "center": "in the center",
    "right": "on the right",
    "bottom left": "in the bottom left corner",
    "bottom": "at the bottom",
    "bottom right": "in the bottom right corner",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """That "the (name) is (word) the (other)" is said, with `thing` in mind for the name."""

    thing: Look
    name: Look
    word: str
    other: Look


def statement(rng: np.random.Generator, held_out: bool, label: str) -> tuple[str, Scene]:
    """A sentence and a scene of which it is "true" or "false", as `label` says.

    Only with `held_out` are pairs of HELD_OUT named and shown.
    """
    verdict = "true" if label == "true" else "false"
    text, order = pick(rng, _STATEMENTS)(rng, held_out, verdict)
    return text, stage(rng, held_out, order)


def hypothesis(rng: np.random.Generator, held_out: bool, label: str) -> tuple[str, Scene]:
    """A sentence and a scene that leaves it in the relation `label`, one of ENTAILMENT.

    The module's docstring says what the picture cannot decide. Half of the neutral scenes lack
    what the sentence is about, half show two things that it may be about. Pairs of HELD_OUT as
    in `statement`.
    """
    text, order = pick(rng, _HYPOTHESES)(rng, held_out, VERDICTS[label])
    return text, stage(rng, held_out, order)


def draw_name(rng: np.random.Generator, held_out: bool) -> Look:
    """Draw how a thing is named: by its color, shape or size, or two of them."""
    return draw_thing(rng, held_out).only(pick(rng, NAMES))


def present(look: Look, is_present: bool, count: int) -> Order:
    """A scene of `count` things with a thing of this look, or with none but some that are near."""
    return Order(
        count=count,
        shown=(look,) if is_present else (),
        barred=() if is_present else (look,),
        near=look.parts(),
    )


def counted(rng: np.random.Generator, held_out: bool, look: Look | None, number: int) -> Order:
    """A scene with so many things of this look, or in all where there is no look."""
    if look is None:
        return Order(count=number)
    count = draw_count(rng, held_out, number) if number else draw_count(rng, held_out)
    return Order(count=count, shown=(look,) * number, barred=(look,))


def draw_other(rng: np.random.Generator, options: range, number: int) -> int:
    """One of the numbers that is another."""
    return pick(rng, [option for option in options if option != number])


def draw_side(rng: np.random.Generator, held_out: bool, *, many: bool) -> Side:
    """Draw two things that share nothing, and what is said of their sides.

    With `many` there can be two things of the first name.
    """
    thing = draw_thing(rng, held_out).only(_PAIR)
    other = draw_thing(rng, held_out, barred=thing.parts())
    names = _SIDE_NAMES[:2] if many else _SIDE_NAMES
    return Side(
        thing=thing,
        name=thing.only(pick(rng, names)),
        word=pick(rng, tuple(INVERSE)),
        other=other.only(pick(rng, _SIDE_NAMES)),
    )


def beside(rng: np.random.Generator, said: Side, verdict: Verdict, count: int) -> Order:
    """A scene where what is said is true, false or open; an open one has three things.

    It is false where the two have changed places. It is open where something else has the place of
    one of them, and where there are two things of the name, of which one is on another side.
    """
    shown, sides = (said.thing, said.other), [(0, said.word, 1)]
    if verdict == "false":
        sides = [(0, INVERSE[said.word], 1)]
    elif verdict == "open" and rng.random() < 0.5:
        shown = (said.other, said.name, said.name)
        sides = [(1, said.word, 0), (2, elsewhere(rng, said.word), 0)]
    elif verdict == "open":
        shown = pick(rng, ((said.name, Look()), (Look(), said.other)))
    return Order(
        count=count,
        shown=shown,
        barred=(said.name, said.other),
        near=said.thing.beyond(said.name),
        sides=tuple(sides),
    )


def elsewhere(rng: np.random.Generator, word: str) -> str:
    """Another side, but not the opposite one: three in a row leave no room for a large thing."""
    return pick(rng, [side for side in INVERSE if side not in {word, INVERSE[word]}])


def placed(
    rng: np.random.Generator, thing: Look, name: Look, where: str, verdict: Verdict, count: int
) -> Order:
    """A scene where "the (name) is (where)" is true, false or open, with a thing in mind for it.

    Where there are several things, one lies there and another elsewhere; in a true scene the
    thing of the name is the one, in a false scene the other, in an open scene both or neither.
    """
    places = [where, pick(rng, _FAR[where])]
    shown = (thing.only(_PAIR), Look())
    if verdict == "false":
        places.reverse()
    elif verdict == "open":
        shown = pick(rng, ((name, name), (Look(), Look())))
    return Order(
        count=count,
        shown=shown[:count],
        barred=(name,),
        near=thing.beyond(name),
        places=dict(enumerate(places[:count])),
    )


def _exists(rng: np.random.Generator, held_out: bool, verdict: Verdict) -> Told:
    look, count = draw_name(rng, held_out), draw_count(rng, held_out)
    wording = pick(rng, ("there is {}", "the picture shows {}", "{} is in the picture"))
    return wording.format(an(look)), present(look, verdict == "true", count)


def _lacks(rng: np.random.Generator, held_out: bool, verdict: Verdict) -> Told:
    look, count = draw_name(rng, held_out), draw_count(rng, held_out)
    wording = pick(rng, ("there is no {}", "the picture shows no {}", "no {} is in the picture"))
    return wording.format(look), present(look, verdict == "false", count)


def _counts(rng: np.random.Generator, held_out: bool, verdict: Verdict) -> Told:
    name = pick(rng, ((), ("shape",), ("color",)))
    look = draw_thing(rng, held_out).only(name) if name else None
    number, start = int(rng.integers(1, 4)), pick(rng, ("there {}", "the picture shows"))
    text = f"{start.format('is' if number == 1 else 'are')} {exactly(number, look)}"
    if verdict == "false":
        number = draw_other(rng, range(1 if look is None else 0, 4), number)
    return text, counted(rng, held_out, look, number)


def _shows_both(rng: np.random.Generator, held_out: bool, verdict: Verdict) -> Told:
    thing = draw_thing(rng, held_out)
    looks = [
        thing.only(pick(rng, _SIDE_NAMES)),
        draw_thing(rng, held_out, barred=thing.parts()).only(pick(rng, _SIDE_NAMES)),
    ]
    count = draw_count(rng, held_out, 2)
    text = f"{pick(rng, ('there is', 'the picture shows'))} {an(looks[0])} and {an(looks[1])}"
    near = looks[0].parts() + looks[1].parts()
    if verdict == "true":
        return text, Order(count=count, shown=tuple(looks), near=near)
    kept, missing = (looks[i] for i in rng.permutation(2))
    return text, Order(count=count, shown=(kept,), barred=(missing,), near=near)


def _describes(rng: np.random.Generator, held_out: bool, verdict: Verdict, least: int = 1) -> Told:
    """Tell color, shape or size of the thing that is named by something else."""
    told = pick(rng, tuple(_DESCRIPTIONS))
    name = pick(rng, _DESCRIPTIONS[told])
    thing = draw_thing(rng, held_out)
    subject, value = thing.only(name), thing.only((told,))
    said = thing.only((*name, told))
    # Two large things and a third do not fit into a picture.
    count = draw_count(rng, held_out, least, 2 if subject.size else 3)
    text = f"the {subject} is {an(value) if told == 'shape' else getattr(value, told)}"
    if told == "size":
        size = next(size for size in SIZES if size != said.size)
        other = Look(color=said.color, shape=said.shape, size=size)
        near = thing.beyond(subject)
    else:
        other = draw_thing(rng, held_out, subject, barred=(value,)).only((*name, told))
        near = (value, other.only((told,)))
    shown = {"true": (said,), "false": (other,)}.get(verdict)
    if shown is None:
        shown = pick(rng, ((said, other), ()))
    return text, Order(count=count, shown=shown, barred=(subject,), near=near)


def _places(rng: np.random.Generator, held_out: bool, verdict: Verdict, least: int = 1) -> Told:
    thing = draw_thing(rng, held_out)
    name = thing.only(pick(rng, _SIDE_NAMES[:2]))
    where, count = pick(rng, NINE_PLACES), draw_count(rng, held_out, least)
    text = f"the {name} is {PLACE_PHRASES[where]}"
    return text, placed(rng, thing, name, where, verdict, count)


def _relates(rng: np.random.Generator, held_out: bool, verdict: Verdict, least: int = 2) -> Told:
    said = draw_side(rng, held_out, many=least > 2)
    count = draw_count(rng, held_out, least)
    text = f"the {said.name} is {pick(rng, WORDINGS[said.word])} the {said.other}"
    return text, beside(rng, said, verdict, count)


def _far(where: str) -> tuple[str, ...]:
    """The places of which nobody would say `where`: of an edge, those that are not on it."""
    row = next(names for names in PLACES if where in names)
    column = next(names for names in zip(*PLACES, strict=True) if where in names)
    edges = {"top": row, "bottom": row, "left": column, "right": column}
    return tuple(place for place in NINE_PLACES if place not in edges.get(where, (where,)))


_FAR = {where: _far(where) for where in NINE_PLACES}
_Sentence = Callable[[np.random.Generator, bool, Verdict], Told]
_STATEMENTS: tuple[_Sentence, ...] = (
    _exists,
    _lacks,
    _counts,
    _shows_both,
    _describes,
    _places,
    _relates,
)
# In an undecided scene there are two things of a name, and what else the sentence names.
_HYPOTHESES: tuple[_Sentence, ...] = (
    lambda rng, held_out, verdict: _describes(rng, held_out, verdict, least=2),
    lambda rng, held_out, verdict: _places(rng, held_out, verdict, least=2),
    lambda rng, held_out, verdict: _relates(rng, held_out, verdict, least=3),
)
