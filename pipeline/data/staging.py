"""Scenes made to order: they show what is asked for, lack what is barred, and vary in the rest.

Enters: a generator and an `Order`. Leaves: a scene of `pipeline.data.demo`. Also how a thing is
named in English. Must not know: questions, labels, files, Ray, the trainer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from pipeline.data.demo import (
    COLORS,
    HELD_OUT,
    PLACES,
    SEEN,
    SHAPES,
    SIZES,
    Scene,
    compose,
    sample_layout,
    sample_place,
)

NINE_PLACES = tuple(name for names in PLACES for name in names)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MOST_THINGS = 3

_NEAR_SHARE = 0.8  # of the further things that resemble what is asked about
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What is told of a thing: its color, shape and size, each empty where left open."""

    color: str = ""
    shape: str = ""
    size: str = ""

    def fits(self, other: "Look") -> bool:
        """Whether all that this tells is told by `other` too."""
        return (
            self.color in {"", other.color}
            and self.shape in {"", other.shape}
            and self.size in {"", other.size}
        )

    def only(self, names: Sequence[str]) -> "Look":
        """Only the named ones of what this tells."""
        return Look(**{name: getattr(self, name) for name in names})

    def parts(self) -> tuple["Look", ...]:
        """Its color and its shape apart, which a thing may share that nearly fits.

        None where it tells but one thing.
        """
        if [self.color, self.shape, self.size].count("") == 2:
            return ()
        parts = (Look(color=self.color), Look(shape=self.shape))
        return tuple(part for part in parts if part != Look())

    def beyond(self, name: "Look") -> tuple["Look", ...]:
        """Of its parts those that the name does not tell: another thing may share them."""
        return tuple(part for part in self.parts() if not part.fits(name))

    def __str__(self) -> str:
        return " ".join(filter(None, (self.size, self.color, self.shape or "thing")))


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What a scene of `count` things must show.

    `shown` are its first things. None but they fits a `barred` look, and of them only those whose
    look in `shown` says so. Most further things, of which nothing is told, are like one of `near`
    where that is possible. Every side (i, word, j) holds, and thing i lies in `places[i]`.
    """

    count: int
    shown: tuple[Look, ...] = ()
    barred: tuple[Look, ...] = ()
    near: tuple[Look, ...] = ()
    sides: tuple[tuple[int, str, int], ...] = ()
    places: Mapping[int, str] = field(default_factory=dict)


def pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    """One of `options`, each alike often."""
    return options[int(rng.integers(len(options)))]


def draw_count(
    rng: np.random.Generator, held_out: bool, least: int = 1, most: int = MOST_THINGS
) -> int:
    """How many things a scene has: at least `least`, and one more where one must be held out."""
    return int(rng.integers(min(least + held_out, most), most, endpoint=True))


def draw_thing(
    rng: np.random.Generator,
    held_out: bool,
    look: Look = Look(),
    *,
    barred: Sequence[Look] = (),
) -> Look:
    """Draw a thing that fits `look` and no barred look, all it leaves open alike often.

    Pairs of HELD_OUT only where `held_out`, and then twice as often as others: in a set of which
    half the scenes may show them, every pair is as frequent as another.
    """
    sized = Look(color=look.color, shape=look.shape, size=look.size or pick(rng, SIZES))
    return _fill(rng, sized, barred, (), held_out)


def stage(rng: np.random.Generator, held_out: bool, order: Order) -> Scene:
    """Make a scene to order, with a pair of HELD_OUT if `held_out` and there is room for one."""
    looks = order.shown + (Look(),) * (order.count - len(order.shown))
    things: list[Look] = []
    for look, size in zip(looks, _draw_sizes(rng, order), strict=True):
        if look == Look():
            things.append(_draw_further(rng, order, size, things, held_out))
            continue
        sized = Look(color=look.color, shape=look.shape, size=size)
        bars = [bar for bar in order.barred if not bar.fits(look)]
        things.append(_fill(rng, sized, bars, things, held_out))
    layout = (
        sample_place(rng, things[0].size, order.places.get(0))
        if order.count == 1
        else sample_layout(
            rng, [thing.size for thing in things], sides=order.sides, places=order.places
        )
    )
    return compose(rng, [(thing.color, thing.shape, thing.size) for thing in things], layout)


def an(look: Look | str) -> str:
    """The look, or what is said of it, as a noun with its article: "an orange star"."""
    words = str(look)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def exactly(number: int, look: Look | None = None) -> str:
    """A number of things: "exactly two red things", "exactly one shape" without a look."""
    return f"exactly {NUMBERS[number]} {'shape' if look is None else look}{plural(number, look)}"


def plural(number: int, look: Look | None = None) -> str:
    """The ending of a noun of which there are so many."""
    if number == 1:
        return ""
    return "es" if look is not None and look.shape == "cross" else "s"


def _by_parts(pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """The pairs of each color and shape, either of them empty where it may be any."""
    return {
        (color, shape): [
            pair for pair in pairs if color in {"", pair[0]} and shape in {"", pair[1]}
        ]
        for color in ("", *COLORS)
        for shape in ("", *SHAPES)
    }


_SEEN = _by_parts(SEEN)
_UNSEEN = _by_parts(HELD_OUT)


def _free(
    table: Mapping[tuple[str, str], list[tuple[str, str]]],
    look: Look,
    barred: Sequence[Look],
    taken: Sequence[Look],
) -> list[tuple[str, str]]:
    """The pairs of the table that fit `look`, which tells its size, and may be shown."""
    bars = [(bar.color, bar.shape) for bar in barred if bar.size in {"", look.size}]
    bars += [(thing.color, thing.shape) for thing in taken]
    return [
        (color, shape)
        for color, shape in table[look.color, look.shape]
        if not any(hue in {"", color} and form in {"", shape} for hue, form in bars)
    ]


def _fill(
    rng: np.random.Generator,
    look: Look,
    barred: Sequence[Look],
    taken: Sequence[Look],
    held_out: bool,
) -> Look:
    """Draw color and shape where `look`, which tells its size, leaves them open."""
    seen = _free(_SEEN, look, barred, taken)
    unseen = _free(_UNSEEN, look, barred, taken) if held_out else []
    if not seen and not unseen:
        raise ValueError(
            f"{an(look)} beside {[str(thing) for thing in taken]} and barred "
            f"{[str(bar) for bar in barred]}: nothing is left to show; bar or show less"
        )
    is_unseen = rng.random() < 2 * len(unseen) / (len(unseen) + len(seen))
    color, shape = pick(rng, unseen if is_unseen else seen)
    return Look(color=color, shape=shape, size=look.size)


def _draw_further(
    rng: np.random.Generator,
    order: Order,
    size: str,
    taken: Sequence[Look],
    held_out: bool,
) -> Look:
    """Draw a thing that nothing asks for, of HELD_OUT if one is due and may be shown."""
    is_due = held_out and not any((thing.color, thing.shape) in HELD_OUT for thing in taken)
    unseen = _free(_UNSEEN, Look(size=size), order.barred, taken) if is_due else []
    if unseen:
        color, shape = pick(rng, unseen)
        return Look(color=color, shape=shape, size=size)
    near = Look(size=size)
    if order.near and rng.random() < _NEAR_SHARE:
        like = pick(rng, order.near)
        near = Look(color=like.color, shape=like.shape, size=size)
        if not _free(_SEEN, near, order.barred, taken):
            near = Look(size=size)
    return _fill(rng, near, order.barred, taken, held_out)


def _draw_sizes(rng: np.random.Generator, order: Order) -> list[str]:
    """Draw the sizes left open; small ones where large things would not leave the room."""
    told = [look.size for look in order.shown] + [""] * (order.count - len(order.shown))
    options = [size for size in SIZES if Look(size=size) not in order.barred]
    most_large = order.count if order.count < MOST_THINGS else 1
    if order.count > 1 and order.places:
        most_large = 0
    room = most_large - told.count("large")
    sizes = []
    for size in told:
        drawn = size or pick(rng, options if room > 0 else [s for s in options if s != "large"])
        room -= drawn == "large" and not size
        sizes.append(drawn)
    return sizes
