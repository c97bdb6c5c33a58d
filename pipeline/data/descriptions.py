"""Descriptions of scenes: all their things, most with their places, or two facts.

Enters: a scene and a generator. Leaves: a caption that tells more of the scene than the demo's, in
the words of the tasks' sentences. A thing is only called "the circle" where the picture has one
circle. Must not know: tasks, labels, files, Ray, the trainer.
"""

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.data.demo import COLORS, SEEN, SHAPES, Scene, place, relations
from pipeline.data.staging import Look, an, exactly, pick
from pipeline.data.statements import PLACE_PHRASES, WORDINGS

_LISTED_SHARE = 0.75  # of the captions
_SIZED_SHARE = 0.5  # of the listed things
_PLACED_SHARE = 0.75  # of the listed things that are clearly in one place
_MOST_PLACED = 2  # longer texts cost time
_FACTS = 2  # where there is no list; one alone is true of too many pictures
_NAMES = (("shape",), ("color",), ("color", "shape"), ("size", "shape"), ("size", "color"))
_LOOKS = [
    *(Look(color=color) for color in COLORS),
    *(Look(shape=shape) for shape in SHAPES),
    *(Look(color=color, shape=shape) for color, shape in SEEN),
]

_Fact = Callable[[np.random.Generator, Scene, Sequence[Look]], str | None]


def describe(rng: np.random.Generator, scene: Scene) -> str:
    """List the scene's things, most with their places, or tell two facts."""
    things = [Look(color=it.color, shape=it.shape, size=it.size) for it in scene.objects]
    if rng.random() < _LISTED_SHARE:
        return _list(rng, scene, things)
    facts: list[str] = []
    while len(facts) < _FACTS:
        fact = pick(rng, _KINDS)(rng, scene, things)
        if fact is not None and fact not in facts:
            facts.append(fact)
    return ", ".join(facts)


def _list(rng: np.random.Generator, scene: Scene, things: Sequence[Look]) -> str:
    told = []
    for number, i in enumerate(rng.permutation(len(things))):
        is_sized = rng.random() < _SIZED_SHARE
        where = place(scene.objects[i]) if number < _MOST_PLACED else None
        name = an(things[i] if is_sized else things[i].only(("color", "shape")))
        if where is not None and rng.random() < _PLACED_SHARE:
            name = f"{name} {PLACE_PHRASES[where]}"
        told.append(name)
    *others, last = [told[i] for i in rng.permutation(len(told))]
    listed = f"{', '.join(others)} and {last}" if others else last
    return pick(rng, ("{}", "there is {}")).format(listed)


def _name(
    rng: np.random.Generator, things: Sequence[Look], i: int, hidden: str = ""
) -> Look | None:
    """A name that only thing `i` has, which does not tell what is `hidden`; None without one."""
    names = [things[i].only(parts) for parts in _NAMES if hidden not in parts]
    clear = [name for name in names if sum(name.fits(thing) for thing in things) == 1]
    return pick(rng, clear) if clear else None


def _side(rng: np.random.Generator, scene: Scene, things: Sequence[Look]) -> str | None:
    clear = relations(scene)
    if not clear:
        return None
    i, word, j = pick(rng, clear)
    name, other = _name(rng, things, i), _name(rng, things, j)
    if name is None or other is None:
        return None
    return f"the {name} is {pick(rng, WORDINGS[word])} the {other}"


def _attribute(rng: np.random.Generator, scene: Scene, things: Sequence[Look]) -> str | None:
    told, i = pick(rng, ("color", "shape", "size")), int(rng.integers(len(things)))
    name, value = _name(rng, things, i, told), getattr(things[i], told)
    if name is None:
        return None
    return f"the {name} is {an(value) if told == 'shape' else value}"


def _place(rng: np.random.Generator, scene: Scene, things: Sequence[Look]) -> str | None:
    i = int(rng.integers(len(things)))
    name, where = _name(rng, things, i), place(scene.objects[i])
    if name is None or where is None:
        return None
    return f"the {name} is {PLACE_PHRASES[where]}"


def _count(rng: np.random.Generator, scene: Scene, things: Sequence[Look]) -> str | None:
    look = pick(rng, things).only(pick(rng, ((), ("shape",), ("color",))))
    counted = None if look == Look() else look
    number = sum(look.fits(thing) for thing in things)
    return f"there {'is' if number == 1 else 'are'} {exactly(number, counted)}"


def _absence(rng: np.random.Generator, scene: Scene, things: Sequence[Look]) -> str | None:
    look = pick(rng, _LOOKS)
    if any(look.fits(thing) for thing in things):
        return None
    return pick(rng, ("there is no {}", "the picture shows no {}")).format(look)


_KINDS: tuple[_Fact, ...] = (_side, _side, _attribute, _place, _place, _count, _absence)
