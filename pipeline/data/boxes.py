"""Sentences about three boxes of shapes, and boxes of which they are true or false.

The pictures are those of Cornell NLVR (Suhr, Lewis, Yeh and Artzi, "A corpus of natural language
for visual reasoning", ACL 2017): three gray boxes side by side, either each with a tower of one to
four blocks, or each with one to seven loose items. Its sentences were written by people; these
are drawn from a grammar of what they say, for a model to learn from before it reads them.

Enters: a generator and the label wanted. Leaves: a sentence and three boxes. The sentence is drawn
before the label is looked at, and boxes until they fit both; so no sentence tells its label. Must
not know: files, Ray, the trainer.

Coordinates are whole pixels in a box of 100 x 100, x to the right and y downwards; an item lies
within ``x`` to ``x + size`` and ``y`` to ``y + size``.
"""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from pipeline.data.staging import NUMBERS, an, pick

SHAPES = ("circle", "square", "triangle")
RGB = {"black": (0, 0, 0), "blue": (0, 153, 255), "yellow": (255, 255, 0)}
COLORS = tuple(RGB)
SIZES = (10, 20, 30)
BOX, GAP = 100, 50

_GROUND, _BETWEEN = (211, 211, 211), (128, 128, 128)
_BLOCK, _MOST_BLOCKS, _MOST_ITEMS = 20, 4, 7
_APART = 1  # pixels between the blocks of a tower, and between items that touch
_SNAPPED, _BESIDE = 0.35, 0.25  # shares of items at a wall, and at another item
_TRIES = 40
_TOWERS_SHARE = 0.6
_DIGITS = {word: str(number) for number, word in enumerate(NUMBERS) if number}
_THINGS = ("item", "item", "object")
_BLOCKS = ("block",)
_ENDS = {"base": 0, "bottom": 0, "top": -1}  # of blocks from the base up


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A shape in a box."""

    shape: str
    color: str
    size: int
    x: int
    y: int

    @property
    def walls(self) -> frozenset[str]:
        """The sides of its box that it touches."""
        touched = {
            "left": self.x == 0,
            "right": self.x + self.size == BOX,
            "top": self.y == 0,
            "bottom": self.y + self.size == BOX,
        }
        return frozenset(side for side, is_touched in touched.items() if is_touched)

    def touches(self, other: "Item") -> bool:
        """Whether no more than a line lies between the two."""
        return _overlap(self, other, _APART + 1)


Box = tuple[Item, ...]
Boxes = tuple[Box, ...]
Holds = Callable[[Boxes], bool]
Test = Callable[[int], bool]
Fits = Callable[[Item], bool]


def box_statement(rng: np.random.Generator, label: str) -> tuple[str, Boxes]:
    """A sentence and three boxes of which it is "true" or "false", as `label` says.

    A sentence that is nearly always true, or nearly never, is not drawn.
    """
    while True:
        has_towers = rng.random() < _TOWERS_SHARE
        text, holds = pick(rng, _OF_TOWERS if has_towers else _OF_ITEMS)(rng)
        found: dict[bool, Boxes] = {}
        for _ in range(_TRIES):
            boxes = tuple((_tower if has_towers else _loose)(rng) for _ in range(3))
            found.setdefault(holds(boxes), boxes)
            if len(found) == 2:
                return _varied(rng, text), found[label == "true"]


def draw_boxes(boxes: Boxes) -> Image.Image:
    """Draw them side by side as an RGB picture, 400 x 100 pixels."""
    width = len(boxes) * BOX + (len(boxes) - 1) * GAP
    image = Image.new("RGB", (width, BOX), _BETWEEN)
    pen = ImageDraw.Draw(image)
    for number, box in enumerate(boxes):
        left = number * (BOX + GAP)
        pen.rectangle((left, 0, left + BOX - 1, BOX - 1), fill=_GROUND)
        for item in box:
            x, y, last = left + item.x, item.y, item.size - 1
            fill = RGB[item.color]
            if item.shape == "circle":
                pen.ellipse((x, y, x + last, y + last), fill=fill)
            elif item.shape == "square":
                pen.rectangle((x, y, x + last, y + last), fill=fill)
            else:
                pen.polygon([(x + last / 2, y), (x + last, y + last), (x, y + last)], fill=fill)
    return image


def encode_png(image: Image.Image) -> bytes:
    """Encode a picture as PNG, as the real ones are."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def boxes_json(boxes: Boxes) -> str:
    """Write the boxes as JSON: a list of three lists of items."""
    return json.dumps([[asdict(item) for item in box] for box in boxes], separators=(",", ":"))


def _overlap(a: Item, b: Item, margin: int) -> bool:
    return (
        a.x < b.x + b.size + margin
        and b.x < a.x + a.size + margin
        and a.y < b.y + b.size + margin
        and b.y < a.y + a.size + margin
    )


def _tower(rng: np.random.Generator) -> Box:
    """Blocks from the base up."""
    return tuple(
        Item(
            shape="square",
            color=pick(rng, COLORS),
            size=_BLOCK,
            x=(BOX - _BLOCK) // 2,
            y=BOX - _BLOCK - level * (_BLOCK + _APART),
        )
        for level in range(rng.integers(1, _MOST_BLOCKS, endpoint=True))
    )


def _loose(rng: np.random.Generator) -> Box:
    """Items that do not overlap, some at a wall or in a corner, some beside another."""
    items: list[Item] = []
    count = int(rng.integers(1, _MOST_ITEMS, endpoint=True))
    while len(items) < count:
        size = pick(rng, SIZES)
        x, y = (int(at) for at in rng.integers(3, BOX - size - 2, size=2))
        if items and rng.random() < _BESIDE:
            near = pick(rng, items)
            x, y = pick(rng, (
                (near.x + near.size + _APART, near.y), (near.x - size - _APART, near.y),
                (near.x, near.y + near.size + _APART), (near.x, near.y - size - _APART),
            ))  # fmt: skip
        elif rng.random() < _SNAPPED:
            side = rng.integers(6)
            x = (0, BOX - size)[side % 2] if side in {0, 1, 4, 5} else x
            y = (0, BOX - size)[rng.integers(2)] if side in {2, 3, 4, 5} else y
        item = Item(shape=pick(rng, SHAPES), color=pick(rng, COLORS), size=size, x=x, y=y)
        inside = 0 <= x <= BOX - size and 0 <= y <= BOX - size
        if inside and not any(_overlap(item, other, _APART) for other in items):
            items.append(item)
    return tuple(items)


def _varied(rng: np.random.Generator, text: str) -> str:
    """With digits instead of words, or a capital and a full stop, as people write."""
    if rng.random() < 0.3:
        text = " ".join(_DIGITS.get(word, word) for word in text.split())
    text = text[0].upper() + text[1:] if rng.random() < 0.7 else text
    return text + "." if rng.random() < 0.6 else text


def _some(noun: str, is_one: bool) -> str:
    return noun if is_one else f"{noun}s"


def _all(count: int) -> bool:
    return count == 3


def _count(boxes: Boxes, fits: Fits) -> int:
    return sum(fits(item) for box in boxes for item in box)


def _number(rng: np.random.Generator, low: int, high: int) -> tuple[str, Test, bool]:
    """A wording of a number, what fits it, and whether a noun behind it is singular."""
    number = int(rng.integers(low, high, endpoint=True))
    word = NUMBERS[number]
    kinds: list[tuple[str, Test]] = [
        (word, lambda count: count == number),
        (word, lambda count: count == number),
        (word, lambda count: count == number),
        (f"exactly {word}", lambda count: count == number),
        (f"exactly {word}", lambda count: count == number),
        (f"only {word}", lambda count: count == number),
        (f"at least {word}", lambda count: count >= number),
        (f"at most {word}", lambda count: count <= number),
        (f"more than {word}", lambda count: count > number),
    ]
    text, test = pick(rng, kinds)
    return text, test, number == 1


def _there(
    rng: np.random.Generator, noun: Callable[[bool], str], high: int = 3
) -> tuple[str, Test]:
    """ "There is a ..." or "there are exactly two ...", of a noun, singular or not."""
    choice = rng.random()
    if choice < 0.4:
        text = noun(True)
        return pick(rng, (f"there is {an(text)}", f"there is at least one {text}")), bool
    if choice < 0.5:
        return f"there is no {noun(True)}", lambda count: count == 0
    words, test, is_one = _number(rng, 1, high)
    return f"there {'is' if is_one else 'are'} {words} {noun(is_one)}", test


def _draw_look(
    rng: np.random.Generator, nouns: Sequence[str]
) -> tuple[Callable[[bool], str], Fits]:
    """How items are named, by color, shape or both, and which are meant."""
    color = pick(rng, (*COLORS, ""))
    shape = pick(rng, SHAPES) if "item" in nouns and rng.random() < 0.6 else ""
    kind = shape or pick(rng, nouns)

    def noun(is_one: bool) -> str:
        return _some(f"{color} {kind}".strip(), is_one)

    return noun, lambda item: color in {"", item.color} and shape in {"", item.shape}


def _end(rng: np.random.Generator) -> tuple[str, int]:
    word = pick(rng, ("base", "base", "bottom", "top", "top", "top"))
    return word, _ENDS[word]


def _block_at_end(rng: np.random.Generator) -> tuple[str, Holds]:
    color, (word, at) = pick(rng, COLORS), _end(rng)
    form = pick(rng, range(5))
    if form == 0:
        words, test = _there(
            rng,
            lambda is_one: (
                f"{_some('tower', is_one)} with a {color} block "
                f"{pick(rng, ('at', 'as', 'on'))} the {word}"
            ),
        )
    elif form == 1:
        words, test = _there(
            rng,
            lambda is_one: (
                f"{_some('tower', is_one)} {pick(rng, ('with', 'has'))} a {color} {word}"
            ),
        )
    elif form == 2:
        words, test = _there(
            rng, lambda is_one: f"{color} {_some('block', is_one)} as the {word} of a tower"
        )
    elif form == 3:
        words, test = _there(
            rng, lambda is_one: f"{_some('tower', is_one)} that the {word} is {color}"
        )
    else:
        count, test, is_one = _number(rng, 1, 3)
        words = f"{count} of the towers {'has' if is_one else 'have'} a {color} {word}"
    return words, lambda boxes: test(sum(box[at].color == color for box in boxes))


def _height(rng: np.random.Generator) -> tuple[str, Test]:
    """So many blocks, and what fits them."""
    words, is_so_high, is_one = _number(rng, 1, _MOST_BLOCKS)
    return f"{words} {_some('block', is_one)}", is_so_high


def _tower_of(rng: np.random.Generator) -> tuple[str, Holds]:
    """Of a height, with or without what lies at an end."""
    height, is_so_high = _height(rng)
    color, (end, at) = pick(rng, COLORS), _end(rng)
    said = pick(rng, ("", "", f"with a {color} block at the {end}", f"and the {end} is {color}"))
    text, test = _there(
        rng, lambda is_one: f"{_some('tower', is_one)} with {height} {said}".strip(), 2
    )
    return text, lambda boxes: test(
        sum(is_so_high(len(box)) and (not said or box[at].color == color) for box in boxes)
    )


def _the_tower(rng: np.random.Generator) -> tuple[str, Holds]:
    """The one of so many blocks, or one of those."""
    number, (end, at) = pick(rng, (2, 3, 4)), _end(rng)
    upper, lower = pick(rng, COLORS), pick(rng, COLORS)
    start = f"the tower with {pick(rng, ('', 'exactly '))}{NUMBERS[number]} blocks has a {upper}"
    if rng.random() < 0.6:
        text = f"{start} {pick(rng, ('', 'color '))}block at the {end}"
        return text, lambda boxes: any(
            box[at].color == upper for box in boxes if len(box) == number
        )
    return f"{start} block over a {lower} block", lambda boxes: any(
        _is_stacked(box, lower, upper) for box in boxes if len(box) == number
    )


def _is_stacked(box: Box, lower: str, upper: str) -> bool:
    return any((low.color, high.color) == (lower, upper) for low, high in pairwise(box))


def _end_of(rng: np.random.Generator) -> tuple[str, Holds]:
    """A block at an end of a tower of a height."""
    height, is_so_high = _height(rng)
    color, (end, at) = pick(rng, COLORS), _end(rng)
    text, test = _there(
        rng, lambda one: f"{color} {_some('block', one)} as the {end} of a tower with {height}", 2
    )
    return text, lambda boxes: test(
        sum(is_so_high(len(box)) and box[at].color == color for box in boxes)
    )


def _above(rng: np.random.Generator) -> tuple[str, Holds]:
    upper, lower = pick(rng, COLORS), pick(rng, COLORS)
    word = pick(rng, ("on", "over", "above", "on top of", "below", "under"))
    text = pick(rng, (
        f"there is a {upper} block {word} a {lower} block",
        f"there is a tower with a {upper} block {word} a {lower} block",
        f"one of the towers has a {upper} block {word} a {lower} block",
    ))  # fmt: skip
    if word in {"below", "under"}:
        upper, lower = lower, upper
    return text, lambda boxes: any(_is_stacked(box, lower, upper) for box in boxes)


def _blocks(rng: np.random.Generator) -> tuple[str, Holds]:
    noun, fits = _draw_look(rng, _BLOCKS)
    text, test = _there(rng, noun, 5)
    return text, lambda boxes: test(_count(boxes, fits))


def _tower_has(rng: np.random.Generator) -> tuple[str, Holds]:
    """A number of blocks of a color in one tower, or in so many."""
    color, (count, of_blocks, is_one) = pick(rng, COLORS), _number(rng, 1, 3)
    block = f"{color} {_some('block', is_one)}"
    block += pick(rng, ("", "", " stacked together"))
    form = pick(rng, range(4))
    if form < 2:
        text, test = _there(rng, lambda one: f"{_some('tower', one)} with {count} {block}")
    elif form == 2:
        text, test = f"one of the towers has {count} {block}", bool
    else:
        text, test = (
            f"all {pick(rng, ('three ', '3 ', 'the ', ''))}towers have {count} {block}",
            _all,
        )
    return text, lambda boxes: test(
        sum(of_blocks(sum(item.color == color for item in box)) for box in boxes)
    )


def _colors_of_tower(rng: np.random.Generator) -> tuple[str, Holds]:
    if rng.random() < 0.5:
        color = pick(rng, COLORS)
        text, test = _there(
            rng,
            lambda one: pick(rng, (
                f"{color} {_some('tower', one)}",
                f"{_some('tower', one)} with only {color} blocks",
            )),
        )  # fmt: skip
        return text, lambda boxes: test(
            sum(all(item.color == color for item in box) for box in boxes)
        )
    number = pick(rng, (1, 2, 3))
    colors = (
        "blocks of all three colors"
        if number == 3
        else f"{pick(rng, ('exactly', 'only'))} {NUMBERS[number]} {_some('color', number == 1)}"
    )
    text, test = _there(rng, lambda one: f"{_some('tower', one)} with {colors}", 2)
    return text, lambda boxes: test(
        sum(len({item.color for item in box}) == number for box in boxes)
    )


def _ends_alike(rng: np.random.Generator) -> tuple[str, Holds]:
    end, at = _end(rng)
    if rng.random() < 0.4:
        text = pick(rng, (
            f"all the {end}s of the towers are the same color",
            f"all towers have the same {end} color",
        ))  # fmt: skip
        return text, lambda boxes: len({box[at].color for box in boxes}) == 1
    color = pick(rng, COLORS)
    text, test = pick(rng, (
        (f"all towers have a {color} {end}", _all),
        (f"none of the towers has a {color} {end}", lambda count: count == 0),
    ))  # fmt: skip
    return text, lambda boxes: test(sum(box[at].color == color for box in boxes))


def _items(rng: np.random.Generator) -> tuple[str, Holds]:
    noun, fits = _draw_look(rng, _THINGS)
    text, test = _there(rng, noun, 5)
    if rng.random() < 0.7:
        return text, lambda boxes: test(_count(boxes, fits))
    words, also, is_one = _number(rng, 1, 4)
    other, fits_other = _draw_look(rng, _THINGS)
    return (
        f"{text} and {words} {other(is_one)}",
        lambda boxes: test(_count(boxes, fits)) and also(_count(boxes, fits_other)),
    )


def _box_colors(rng: np.random.Generator) -> tuple[str, Holds]:
    """A box of so many items and colors."""
    words, high, is_one = _number(rng, 2, 5)
    thing = _some(pick(rng, _THINGS), is_one)
    one, other = (COLORS[at] for at in rng.permutation(len(COLORS))[:2])
    number, few = pick(rng, (1, 2, 3)), pick(rng, (1, 2, 3))
    colors = "the same color" if number == 1 else f"{NUMBERS[number]} different colors"
    start = f"there is a {pick(rng, ('box', 'grey box'))} with"
    tests: tuple[tuple[str, Callable[[Box], bool]], ...] = (
        (
            f"{words} {thing} of {colors}",
            lambda box: high(len(box)) and len({item.color for item in box}) == number,
        ),
        (
            f"only {one} and {other} {thing}",
            lambda box: {item.color for item in box} == {one, other},
        ),
        (
            f"{words} {thing} of only {one} and {other} color",
            lambda box: high(len(box)) and {item.color for item in box} == {one, other},
        ),
        (
            f"{words} {thing} of which {NUMBERS[few]} {'is' if few == 1 else 'are'} {one}",
            lambda box: high(len(box)) and sum(item.color == one for item in box) == few,
        ),
        (
            f"{words} {thing} of the same shape",
            lambda box: high(len(box)) and len({item.shape for item in box}) == 1,
        ),
    )
    said, is_so = pick(rng, tests)
    return f"{start} {said}", lambda boxes: any(is_so(box) for box in boxes)


def _box_with(rng: np.random.Generator) -> tuple[str, Holds]:
    """So many of one look, and often so many of another, in one box."""
    parts: list[tuple[str, Test, Fits]] = []
    for _ in range(pick(rng, (1, 1, 2))):
        noun, fits = _draw_look(rng, _THINGS)
        if rng.random() < 0.3:
            parts.append((an(noun(True)), bool, fits))
            continue
        words, test, is_one = _number(rng, 1, 5 if not parts and rng.random() < 0.5 else 3)
        parts.append((f"{words} {noun(is_one)}", test, fits))
    said = " and ".join(text for text, _, _ in parts)
    box, several = pick(rng, (
        ("box", "boxes"), ("box", "boxes"), ("grey box", "grey boxes"),
        ("grey square", "grey squares"),
    ))  # fmt: skip
    text, test = pick(rng, (
        (f"there is a {box} with {said}", bool),
        (f"there is a {box} with {said}", bool),
        (f"one of the {several} contains {said}", bool),
        (f"there is exactly one {box} with {said}", lambda count: count == 1),
        (f"there are two {several} with {said}", lambda count: count >= 2),
        (f"each {box} has {said}", _all),
    ))  # fmt: skip
    return text, lambda boxes: test(
        sum(all(one(sum(fits(item) for item in box)) for _, one, fits in parts) for box in boxes)
    )


def _box_of(rng: np.random.Generator) -> tuple[str, Holds]:
    """Of one look alone."""
    noun, fits = _draw_look(rng, _THINGS)
    box = pick(rng, ("box", "grey box"))
    text, is_of_it = pick(rng, (
        (f"there is a {box} with only {noun(False)}", True),
        (f"one of the {box}es has only {noun(False)}", True),
        (f"there is a {box} with no {noun(False)}", False),
    ))  # fmt: skip
    return text, lambda boxes: any(all(fits(item) == is_of_it for item in box) for box in boxes)


_WALLS: dict[str, Callable[[frozenset[str]], bool]] = {
    "the edge": bool,
    "an edge": bool,
    "the wall": bool,
    "the side of the box": bool,
    "the edge of the box": bool,
    "the base": lambda walls: "bottom" in walls,
    "the bottom": lambda walls: "bottom" in walls,
    "the bottom of a box": lambda walls: "bottom" in walls,
    "the bottom edge": lambda walls: "bottom" in walls,
    "the top": lambda walls: "top" in walls,
    "the roof of a box": lambda walls: "top" in walls,
    "right wall of a box": lambda walls: "right" in walls,
    "left wall of a box": lambda walls: "left" in walls,
    "a corner": lambda walls: len(walls) == 2,
    "the corner": lambda walls: len(walls) == 2,
    "a corner of a box": lambda walls: len(walls) == 2,
}


def _at_wall(rng: np.random.Generator) -> tuple[str, Holds]:
    noun, fits = _draw_look(rng, _THINGS)
    where = pick(rng, tuple(_WALLS))
    is_at = _WALLS[where]
    verb = pick(rng, ("touching", "touching", "closely touching"))
    is_denied = rng.random() < 0.2

    def is_meant(item: Item) -> bool:
        return fits(item) and is_at(item.walls) != is_denied

    if is_denied:
        verb, where = "not touching", where.replace("the edge", pick(rng, ("the edge", "any edge")))
    if rng.random() < 0.15:
        text = f"all {noun(False)} are {verb} {where}"
        return text, lambda boxes: all(
            is_meant(item) for box in boxes for item in box if fits(item)
        )
    text, test = _there(rng, lambda is_one: f"{noun(is_one)} {verb} {where}", 4)
    return text, lambda boxes: test(_count(boxes, is_meant))


def _touching(rng: np.random.Generator) -> tuple[str, Holds]:
    """Two items that touch each other."""
    first, is_first = _draw_look(rng, _THINGS)
    second, is_second = _draw_look(rng, _THINGS)
    a, b = an(first(True)), an(second(True))
    text = pick(rng, (
        f"there is a box with {a} {pick(rng, ('closely ', ''))}touching {b}",
        f"there is {a} touching {b}",
    ))  # fmt: skip
    return text, lambda boxes: any(
        one is not other and is_first(one) and is_second(other) and one.touches(other)
        for box in boxes
        for one in box
        for other in box
    )


_Sentence = Callable[[np.random.Generator], tuple[str, Holds]]
_OF_TOWERS: tuple[_Sentence, ...] = (
    _block_at_end, _block_at_end, _block_at_end, _tower_of, _tower_of, _end_of, _the_tower, _above,
    _above, _blocks, _tower_has, _tower_has, _colors_of_tower, _ends_alike,
)  # fmt: skip
_OF_ITEMS: tuple[_Sentence, ...] = (
    _items, _items, _box_with, _box_with, _box_with, _box_of, _box_colors, _at_wall, _at_wall,
    _at_wall, _touching,
)  # fmt: skip
