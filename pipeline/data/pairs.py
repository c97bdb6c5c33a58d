"""Sentences about two scenes side by side, and scenes of which they are true or false.

Enters: a generator and the label wanted. Leaves: a sentence and a left and a right scene. The
sentence is drawn before the label is looked at, and the scenes made to fit both; so no sentence
tells its label. Must not know: files, Ray, the trainer.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.data.demo import Scene
from pipeline.data.staging import (
    MOST_THINGS,
    Look,
    Order,
    an,
    draw_count,
    draw_thing,
    exactly,
    pick,
    stage,
)
from pipeline.data.statements import counted, draw_name, draw_other, present

TwoOrders = tuple[str, tuple[Order, Order]]

_SIDES = ("left", "right")
# Whether the left and the right picture show a thing, where a sentence is true and where not.
# Those come more often in which a model has to look at both.
_ONE = ((True, False), (False, True))
_BOTH, _NEITHER = ((True, True),), ((False, False),)
_SHOWING = {
    "both pictures show {}": (_BOTH, _ONE * 2 + _NEITHER),
    "exactly one of the pictures shows {}": (_ONE, _BOTH + _NEITHER),
    "neither picture shows {}": (_NEITHER, _ONE * 2 + _BOTH),
    "at least one of the pictures shows {}": (_ONE * 2 + _BOTH, _NEITHER),
}
_COUNTS = [
    (left, right) for left in range(1, MOST_THINGS + 1) for right in range(1, MOST_THINGS + 1)
]


def pair_statement(
    rng: np.random.Generator, held_out: bool, label: str
) -> tuple[str, tuple[Scene, Scene]]:
    """A sentence and two scenes of which it is "true" or "false", as `label` says.

    Only with `held_out` are pairs of HELD_OUT named and shown.
    """
    text, (left, right) = pick(rng, _SENTENCES)(rng, held_out, label == "true")
    return text, (stage(rng, held_out, left), stage(rng, held_out, right))


def _side_shows(rng: np.random.Generator, held_out: bool, is_true: bool) -> TwoOrders:
    """Half of the other pictures show the thing, too."""
    look, side = draw_name(rng, held_out), int(rng.integers(2))
    shows = [is_true, is_true]
    shows[1 - side] = bool(rng.integers(2))
    return f"the {_SIDES[side]} picture shows {an(look)}", _show(rng, held_out, look, shows)


def _shows(rng: np.random.Generator, held_out: bool, is_true: bool) -> TwoOrders:
    look, wording = draw_name(rng, held_out), pick(rng, tuple(_SHOWING))
    shows = pick(rng, _SHOWING[wording][0 if is_true else 1])
    return wording.format(an(look)), _show(rng, held_out, look, shows)


def _one_and_other(rng: np.random.Generator, held_out: bool, is_true: bool) -> TwoOrders:
    """False where one picture shows both things or one of them, and the other picture neither."""
    thing = draw_thing(rng, held_out)
    looks = [
        seen.only(pick(rng, (("color", "shape"), ("shape",), ("color",))))
        for seen in (thing, draw_thing(rng, held_out, barred=thing.parts()))
    ]
    text = f"one picture shows {an(looks[0])} and the other shows {an(looks[1])}"
    counts = [draw_count(rng, held_out, 2) for _ in _SIDES]
    first, second = looks if rng.random() < 0.5 else looks[::-1]
    if is_true:
        return text, _with(counts, ((first,), (second,)), ((second,), (first,)))
    shown = (first, second) if rng.random() < 0.5 else (first,)
    bare = () if len(shown) == 2 else (second,)
    orders = _with(counts, (shown, ()), (bare, (first, second)))
    left, right = orders if rng.random() < 0.5 else orders[::-1]
    return text, (left, right)


def _more(rng: np.random.Generator, held_out: bool, is_true: bool) -> TwoOrders:
    side = int(rng.integers(2))
    than = pick(rng, ("", f" than in the {_SIDES[1 - side]} one"))
    text = f"there are more shapes in the {_SIDES[side]} picture{than}"
    fit = [two for two in _COUNTS if (two[side] > two[1 - side]) == is_true]
    return text, _of_counts(pick(rng, fit))


def _equal(rng: np.random.Generator, held_out: bool, is_true: bool) -> TwoOrders:
    is_equal = bool(rng.integers(2))
    text = (
        "both pictures show the same number of shapes"
        if is_equal
        else "the pictures show different numbers of shapes"
    )
    fit = [two for two in _COUNTS if (two[0] == two[1]) == (is_equal == is_true)]
    return text, _of_counts(pick(rng, fit))


def _together(rng: np.random.Generator, held_out: bool, is_true: bool) -> TwoOrders:
    """Shapes in all, or things of a shape or color."""
    name = pick(rng, ((), ("shape",), ("color",)))
    look = draw_thing(rng, held_out).only(name) if name else None
    possible = range(2, 7) if look is None else range(1, 5)
    number = pick(rng, possible)
    text = f"the two pictures together show {exactly(number, look)}"
    if not is_true:
        number = draw_other(rng, possible, number)
    least = 0 if look else 1
    splits = [(n, number - n) for n in range(least, MOST_THINGS + 1)]
    left, right = pick(rng, [two for two in splits if least <= two[1] <= MOST_THINGS])
    orders = (counted(rng, held_out, look, left), counted(rng, held_out, look, right))
    return text, orders


def _show(
    rng: np.random.Generator, held_out: bool, look: Look, shows: Sequence[bool]
) -> tuple[Order, Order]:
    left, right = (present(look, is_shown, draw_count(rng, held_out)) for is_shown in shows)
    return left, right


def _with(
    counts: Sequence[int],
    shown: tuple[tuple[Look, ...], tuple[Look, ...]],
    barred: tuple[tuple[Look, ...], tuple[Look, ...]],
) -> tuple[Order, Order]:
    left, right = (
        Order(
            count=count,
            shown=looks,
            barred=bars,
            near=tuple(part for look in looks + bars for part in look.parts()),
        )
        for count, looks, bars in zip(counts, shown, barred, strict=True)
    )
    return left, right


def _of_counts(counts: tuple[int, int]) -> tuple[Order, Order]:
    return Order(count=counts[0]), Order(count=counts[1])


_SENTENCES = (_side_shows, _shows, _one_and_other, _more, _equal, _together)
