"""A procedural image-text set: coloured shapes on a light background, with true captions.

Enters: a number of rows and a seed. Leaves: Parquet shards per split; also scenes, pictures and
captions one by one. Every row follows from ``(seed, split, row)`` alone, so a smaller set is a
prefix of a larger one. A private set tells in each modality something that the other does not know
(see ``pipeline.data.private``); its scenes are the same. Another ``Task`` writes its own rows in
the same way. Must not know: Ray, the trainer, the model, what the tasks ask.

Coordinates are whole pixels in a 64 x 64 frame, x to the right and y downwards, measured along
pixel edges: (0, 0) is the top left corner of the picture and (32, 32) its centre.
"""

import io
import json
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from pipeline.data.private import Private, ground, sample_private, signed

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "gray")
SIZES = ("small", "large")
SPLITS = ("train", "val", "test")

# (color, shape) pairs that train and val never show: one per shape, no color twice, so that
# every color and every shape keeps at least five sixths of its pairs in train.
HELD_OUT = (
    ("green", "circle"),
    ("yellow", "square"),
    ("orange", "triangle"),
    ("red", "star"),
    ("purple", "cross"),
    ("blue", "diamond"),
)
SEEN = tuple(
    (color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT
)

IMAGE_SIZE = 64
RGB = {
    "red": (215, 40, 45),
    "green": (40, 155, 60),
    "blue": (40, 75, 220),
    "yellow": (240, 212, 35),
    "purple": (145, 45, 175),
    "orange": (243, 132, 25),
    "cyan": (40, 200, 215),
    "gray": (118, 118, 118),
}

# Raise it whenever the same (rows, seed) would give other rows: write_demo then replaces old sets.
VERSION = 2
SHARD_ROWS = 4096
ROW_GROUP_ROWS = 256
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("shape", pa.string()),
        pa.field("color", pa.string()),
        pa.field("size", pa.string()),
        pa.field("num_objects", pa.int32(), nullable=False),
        pa.field("held_out", pa.bool_(), nullable=False),
        pa.field("scene", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)
PRIVATE_SCHEMA = SCHEMA.append(pa.field("texture", pa.string(), nullable=False)).append(
    pa.field("owner", pa.string(), nullable=False)
)

_RECORD_NAME = "demo.json"
_SUPERSAMPLING = 3
_COLOR_JITTER = 10
_NOISE = 4
_RADII = {"small": (8, 10), "large": (14, 16)}
# A lone object is drawn a little larger, near one of nine points. Those lie by the corners of
# 16-pixel patches, which therefore cut a shape alike at every place: the demo's small model then
# learns shapes in 20,000 samples; with points 3 pixels off the corners 50,000 did not suffice.
_LONE_RADII = {"small": (10, 11), "large": (15, 16)}
_LONE_CENTERS = (17, 32, 47)
_LONE_JITTER = 1
_EDGE_MARGIN = 1
_GAP = 2
_DOMINANCE = 2
_LAYOUT_TRIES = 256
_LAYOUT_ROUNDS = 2000  # so many tries fail only where nothing fits
_MAX_EVAL_ROWS = 1000
_T = TypeVar("_T")

# Ranges of an object's centre that count as low, middle and high on one axis. The gaps between
# them keep a named place clear of its neighbours.
_BANDS = ((0, 22), (28, 36), (42, IMAGE_SIZE))
PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
_PLACE_PHRASES = {
    "top left": ("in the top left", "in the upper left corner"),
    "top": ("at the top", "in the top middle"),
    "top right": ("in the top right", "in the upper right corner"),
    "left": ("on the left", "on the left side"),
    "center": ("in the center", "in the middle"),
    "right": ("on the right", "on the right side"),
    "bottom left": ("in the bottom left", "in the lower left corner"),
    "bottom": ("at the bottom", "in the bottom middle"),
    "bottom right": ("in the bottom right", "in the lower right corner"),
}
_RELATION_PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
# The axis, 0 for x, along which a relation is told, and the sign of a's offset from b in "a w b".
_DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
# Without a place only size, color and shape tell scenes apart, so most captions leave it out.
_PLACED_SHARE = 0.375
_PLACED_TEMPLATES = (
    "{a} {place}",
    "{place} there is {a}",
    "there is {a} {place}",
    "a picture of {a} {place}",
    "{a} is {place} of the picture",
    "{place} of the image, {a}",
)
_PLAIN_TEMPLATES = (
    "{a}",
    "{a}",
    "{a}",
    "there is {a}",
    "there is {a}",
    "a picture of {a}",
    "a picture of {a}",
    "an image of {a}",
    "{a} on a plain background",
    "only {a}",
)
# People name what strikes them: a lone object is seldom named in full. Colors are learned long
# before shapes, and would hide them if every caption told the color.
_LONE_NAMES = (
    "a {size} {color} {shape}",
    "a {color} {shape}",
    "a {color} {shape}",
    "a {color} {shape}",
    "a {size} {shape}",
    "a {shape}",
    "a {shape}",
    "a {shape}",
)
_TWO_TEMPLATES = (
    "{a} {relation} {b}",
    "{a} is {relation} {b}",
    "there is {a} {relation} {b}",
    "a picture of {a} {relation} {b}",
    "{relation} {b} there is {a}",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneObject:
    """One shape. It lies within ``x`` +- ``radius`` and ``y`` +- ``radius`` (pixels)."""

    shape: str
    color: str
    size: str
    x: int
    y: int
    radius: int
    rgb: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """All that a picture shows: 1 to 3 objects, and the background's RGB tint and noise seed."""

    objects: tuple[SceneObject, ...]
    background: tuple[int, int, int]
    noise_seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSummary:
    """What ``write_demo`` left in ``out``: rows per split and bytes of Parquet, in ``seconds``.

    ``created`` is False when the set was there already.
    """

    out: Path
    rows: dict[str, int]
    bytes: int
    seconds: float
    created: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Another set of rows about such scenes: its columns, and ``make(split, row, seed)`` of a row.

    ``name`` goes into the set's record, so rows that change need another name or VERSION. ``make``
    is sent to other processes: a module's function.
    """

    name: str
    schema: pa.Schema
    make: Callable[[str, int, int], dict[str, object]]


def sample_scene(rng: np.random.Generator, allow_held_out: bool) -> Scene:
    """Sample 1 to 3 objects that do not overlap and differ pairwise in color or shape.

    With ``allow_held_out`` every second scene, on average, has one object from HELD_OUT; without
    it no scene has. One object always has a place (see ``place``), two always have a relation,
    and among three at least two pairs have one (see ``relations``).
    """
    draw_count = rng.random()
    count = 1 if draw_count < 0.60 else 2 if draw_count < 0.90 else 3
    pairs = [SEEN[i] for i in rng.choice(len(SEEN), size=count, replace=False)]
    if allow_held_out and rng.random() < 0.5:
        pairs[rng.integers(count)] = HELD_OUT[rng.integers(len(HELD_OUT))]
    sizes = [SIZES[i] for i in rng.integers(len(SIZES), size=count)]
    if count == 3:
        sizes[1:] = ["small", "small"]  # more than one large object leaves no room for three
    layout = sample_place(rng, sizes[0]) if count == 1 else sample_layout(rng, sizes)
    looks = [(*pair, size) for pair, size in zip(pairs, sizes, strict=True)]
    return compose(rng, looks, layout)


def compose(
    rng: np.random.Generator,
    looks: Sequence[tuple[str, str, str]],
    layout: Sequence[tuple[int, int, int]],
) -> Scene:
    """Make the scene of objects that look so (color, shape, size) and lie there (x, y, radius).

    ``rng`` draws each object's exact color, the background and its noise.
    """
    jitter = rng.integers(-_COLOR_JITTER, _COLOR_JITTER + 1, size=(len(looks), 3))
    objects = tuple(
        SceneObject(
            shape=shape,
            color=color,
            size=size,
            x=x,
            y=y,
            radius=radius,
            rgb=_rgb(np.add(RGB[color], offset)),
        )
        for (color, shape, size), (x, y, radius), offset in zip(looks, layout, jitter, strict=True)
    )
    return Scene(
        objects=objects,
        background=_rgb(rng.integers(232, 251, size=3)),
        noise_seed=int(rng.integers(2**31)),
    )


def sample_place(
    rng: np.random.Generator, size: str, where: str | None = None
) -> list[tuple[int, int, int]]:
    """Sample (x, y, radius) of a lone object, in each of the nine places alike often.

    With ``where`` it lies in that place.
    """
    radius = int(rng.integers(*_LONE_RADII[size], endpoint=True))
    cell = rng.integers(len(_LONE_CENTERS), size=2) if where is None else np.array(_cell(where))
    point = np.array(_LONE_CENTERS)[cell]
    x, y = (point + rng.integers(-_LONE_JITTER, _LONE_JITTER, size=2, endpoint=True)).tolist()
    return [(x, y, radius)]


def sample_layout(
    rng: np.random.Generator,
    sizes: Sequence[str],
    *,
    sides: Sequence[tuple[int, str, int]] = (),
    places: Mapping[int, str] | None = None,
) -> list[tuple[int, int, int]]:
    """Sample (x, y, radius) of two or three objects with disjoint boxes and clear relations.

    Every relation (i, word, j) of ``sides`` holds, and object i lies in ``places[i]``. Layouts are
    drawn many at a time because most of those with large objects do not fit. Raises ValueError
    when none fits.
    """
    count = len(sizes)
    low, high = np.array([_RADII[size] for size in sizes]).T
    first, second = np.array(list(combinations(range(count), 2))).T
    for _ in range(_LAYOUT_ROUNDS):
        radii = rng.integers(low, high, endpoint=True)
        nearest, farthest = _reach(radii, places or {})
        centers = rng.integers(nearest, farthest, size=(_LAYOUT_TRIES, count, 2), endpoint=True)
        offsets = np.abs(centers[:, first] - centers[:, second])
        longer, shorter = offsets.max(axis=2), offsets.min(axis=2)
        apart = longer >= radii[first] + radii[second] + _GAP
        clear = longer >= _DOMINANCE * shorter
        fits = apart.all(axis=1) & (clear.sum(axis=1) >= count - 1)
        for i, word, j in sides:
            axis, sign = _DIRECTIONS[word]
            offset = centers[:, i] - centers[:, j]
            fits &= sign * offset[:, axis] >= _DOMINANCE * np.abs(offset[:, 1 - axis])
        if fits.any():
            chosen = centers[fits.argmax()].tolist()
            return [(x, y, r) for (x, y), r in zip(chosen, radii.tolist(), strict=True)]
    raise ValueError(
        f"sizes {sizes}, sides {sides} and places {places} leave no layout: objects may not "
        "overlap; make them small or ask for less"
    )


def place(thing: SceneObject) -> str | None:
    """Name the ninth of the picture that clearly holds the object's centre, None if none does."""
    row, column = _band(thing.y), _band(thing.x)
    return None if row is None or column is None else PLACES[row][column]


def relation(a: SceneObject, b: SceneObject) -> str | None:
    """Say where ``a`` is seen from ``b``: the word w such that "a w b" is clearly true.

    It is None for a diagonal pair, where the longer offset is less than twice the shorter one.
    """
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= _DOMINANCE * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) >= _DOMINANCE * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def relations(scene: Scene) -> list[tuple[int, str, int]]:
    """List every clear relation (i, word, j), hence both (i, word, j) and (j, inverse, i)."""
    count = len(scene.objects)
    words = (
        (i, relation(scene.objects[i], scene.objects[j]), j)
        for i in range(count)
        for j in range(count)
        if i != j
    )
    return [(i, word, j) for i, word, j in words if word is not None]


def is_held_out(scene: Scene) -> bool:
    """Tell whether any object is of a color and shape from HELD_OUT."""
    return any((thing.color, thing.shape) in HELD_OUT for thing in scene.objects)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Word one true caption: size, color and shape of each of several objects.

    A lone object's caption names its shape, and its size, color and place by chance. ``rng`` picks
    the wording, and for several objects which of the clear relations to tell.
    """
    if len(scene.objects) == 1:
        return _caption_one(scene, rng)
    if len(scene.objects) == 2:
        return _caption_two(scene, rng)
    return _caption_three(scene, rng)


def draw(scene: Scene, private: Private | None = None) -> Image.Image:
    """Draw the scene as an RGB picture of 64 x 64 pixels, on a texture where there is one."""
    side = IMAGE_SIZE * _SUPERSAMPLING
    empty = Image.fromarray(ground(scene.background, IMAGE_SIZE, private))
    canvas = empty.resize((side, side), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    for thing in scene.objects:
        _draw_object(pen, thing)
    pixels = np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.int16)
    noise = np.random.default_rng(scene.noise_seed).integers(
        -_NOISE, _NOISE + 1, size=(IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.int16
    )
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def encode_jpeg(image: Image.Image) -> bytes:
    """Encode a picture as JPEG at quality 92 without chroma subsampling."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def scene_json(scene: Scene) -> str:
    """Write the scene graph as JSON: ``{"objects": [...], "relations": [[i, word, j], ...]}``.

    Each object has shape, color, size, x, y and radius; i and j index ``objects``.
    """
    objects = [
        {
            "shape": thing.shape,
            "color": thing.color,
            "size": thing.size,
            "x": thing.x,
            "y": thing.y,
            "radius": thing.radius,
        }
        for thing in scene.objects
    ]
    return json.dumps({"objects": objects, "relations": relations(scene)}, separators=(",", ":"))


def split_rows(rows: int) -> dict[str, int]:
    """Rows of each split: ``rows`` in train, and a twentieth, 500 to 1000, in val and in test.

    Below 500 rows all splits have the same size.
    """
    held_back = min(_MAX_EVAL_ROWS, max(rows // 20, min(rows, 500)))
    return {"train": rows, "val": held_back, "test": held_back}


def make_row(split: str, row: int, seed: int, *, private: bool = False) -> dict[str, object]:
    """Make one row, a value for each column of its schema, from nothing but its arguments."""
    rng = np.random.default_rng([seed, SPLITS.index(split), row])
    scene = sample_scene(rng, allow_held_out=split == "test")
    text = caption(scene, rng)
    only = scene.objects[0] if len(scene.objects) == 1 else None
    own: Private | None = None
    if private:
        own = sample_private(np.random.default_rng([seed, SPLITS.index(split), row, 1]))
        text = signed(text, own)
    return {
        "key": f"{split}-{row:07d}",
        "image": encode_jpeg(draw(scene, own)),
        "caption": text,
        "shape": only.shape if only else None,
        "color": only.color if only else None,
        "size": only.size if only else None,
        "num_objects": len(scene.objects),
        "held_out": is_held_out(scene),
        "scene": scene_json(scene),
        "split": split,
        **({"texture": own.texture, "owner": own.owner} if own else {}),
    }


def write_demo(
    out: Path,
    rows: int,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    private: bool = False,
    task: Task | None = None,
) -> DemoSummary:
    """Write ``rows`` training rows, and val and test, to ``OUT/<split>/part-<number>.parquet``.

    They are captioned scenes, textured and signed if ``private``, or the rows of ``task``.
    The folder appears whole or not at all. One that already holds this very set is left alone;
    one that holds another demo set is replaced. ``on_progress`` receives (rows done, rows in
    all) after every shard. Several shards are written at once, by processes that import the program
    which calls this: a script does so under ``if __name__ == "__main__"``.

    Raises ValueError when ``rows`` or ``seed`` is out of range, when both ``private`` and ``task``
    are given, or when ``out`` holds anything but a demo set; BrokenProcessPool when a process was
    killed meanwhile.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if private and task is not None:
        raise ValueError(f"task is {task.name} and private is set; a set is one of them: drop one")
    start = time.perf_counter()
    record: dict[str, int | str] = {"rows": rows, "seed": seed, "version": VERSION}
    record |= {"private": 1} if private else {"task": task.name} if task else {}
    kind = task or (_PRIVATE if private else _PLAIN)
    created = _read_record(out) != record
    if created:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
            staging = Path(name)
            _write_set(staging / "new", kind, rows, seed, on_progress)
            (staging / "new" / _RECORD_NAME).write_text(json.dumps(record) + "\n")
            # Another process may have written the same set meanwhile, and be reading it.
            created = _read_record(out) != record
            if created:
                if out.exists():
                    out.rename(staging / "old")
                (staging / "new").rename(out)
    return DemoSummary(
        out=out,
        rows=split_rows(rows),
        bytes=sum(path.stat().st_size for path in out.glob("*/*.parquet")),
        seconds=time.perf_counter() - start,
        created=created,
    )


def _rgb(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = np.clip(values, 0, 255).tolist()
    return red, green, blue


def _band(center: int) -> int | None:
    return next((i for i, (low, high) in enumerate(_BANDS) if low <= center <= high), None)


def _cell(where: str) -> tuple[int, int]:
    """Column and row of a place among the nine."""
    row = next(row for row, names in enumerate(PLACES) if where in names)
    return PLACES[row].index(where), row


def _reach(radii: np.ndarray, places: Mapping[int, str]) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest centers, each [objects, 2], that keep objects in the frame and place."""
    nearest = np.repeat((radii + _EDGE_MARGIN)[:, None], 2, axis=1)
    farthest = IMAGE_SIZE - nearest
    for i, where in places.items():
        low, high = np.array([_BANDS[index] for index in _cell(where)]).T
        nearest[i] = np.maximum(nearest[i], low)
        farthest[i] = np.minimum(farthest[i], high)
    return nearest, farthest


def _pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    return options[int(rng.integers(len(options)))]


def _name(thing: SceneObject) -> str:
    return f"a {thing.size} {thing.color} {thing.shape}"


def _caption_one(scene: Scene, rng: np.random.Generator) -> str:
    thing = scene.objects[0]
    where = place(thing)
    if where is None:
        return _name(thing)
    phrase = _pick(rng, _PLACE_PHRASES[where])
    name = _pick(rng, _LONE_NAMES).format(size=thing.size, color=thing.color, shape=thing.shape)
    templates = _PLACED_TEMPLATES if rng.random() < _PLACED_SHARE else _PLAIN_TEMPLATES
    return _pick(rng, templates).format(a=name, place=phrase)


def _caption_two(scene: Scene, rng: np.random.Generator) -> str:
    names = [_name(thing) for thing in scene.objects]
    clear = relations(scene)
    if not clear:
        return f"{names[0]} and {names[1]}"
    i, word, j = _pick(rng, clear)
    phrase = _pick(rng, _RELATION_PHRASES[word])
    return _pick(rng, _TWO_TEMPLATES).format(a=names[i], relation=phrase, b=names[j])


def _caption_three(scene: Scene, rng: np.random.Generator) -> str:
    """Tell two relations that share one object, the hub, so that all three are tied together."""
    names = [_name(thing) for thing in scene.objects]
    clear = relations(scene)
    hubs = [hub for hub in range(3) if sum(i == hub for i, _, _ in clear) == 2]
    if not hubs:
        return f"{names[0]}, {names[1]} and {names[2]}"
    hub = _pick(rng, hubs)
    words = {(i, j): _pick(rng, _RELATION_PHRASES[word]) for i, word, j in clear}
    others = [j for j in range(3) if j != hub]
    j, k = others if rng.random() < 0.5 else others[::-1]
    middle, left, right = names[hub], names[j], names[k]
    wordings = [
        f"{left} {words[j, hub]} {middle}, which is {words[hub, k]} {right}",
        f"{middle} {words[hub, j]} {left} and {words[hub, k]} {right}",
    ]
    if relation(scene.objects[hub], scene.objects[j]) == relation(
        scene.objects[hub], scene.objects[k]
    ):
        wordings = [
            f"{middle} {words[hub, j]} {left} and {right}",
            f"{left} and {right} {words[j, hub]} {middle}",
        ]
    return _pick(rng, wordings)


def _draw_object(pen: ImageDraw.ImageDraw, thing: SceneObject) -> None:
    """Draw one object on the supersampled canvas."""
    x, y, radius = (_SUPERSAMPLING * value for value in (thing.x, thing.y, thing.radius))
    # PIL includes the last pixel of a box, hence the -1.
    box = (x - radius, y - radius, x + radius - 1, y + radius - 1)
    if thing.shape == "circle":
        pen.ellipse(box, fill=thing.rgb)
    elif thing.shape == "square":
        pen.rectangle(box, fill=thing.rgb)
    else:
        # PIL fills the pixels under the vertices too, so the outline runs half a pixel inside.
        points = [
            (round(x - 0.5 + (radius - 0.5) * u), round(y - 0.5 + (radius - 0.5) * v))
            for u, v in _OUTLINES[thing.shape]
        ]
        pen.polygon(points, fill=thing.rgb)


def _star_outline() -> tuple[tuple[float, float], ...]:
    """Outline of a five-pointed star, first point up, in units of its radius."""
    corners = ((1.0 if i % 2 == 0 else 0.42, math.pi * (i / 5 - 0.5)) for i in range(10))
    return tuple((length * math.cos(angle), length * math.sin(angle)) for length, angle in corners)


def _cross_outline(arm: float) -> tuple[tuple[float, float], ...]:
    """Outline of an upright cross whose arms are 2 * ``arm`` wide, in units of its radius."""
    quarter = ((arm, -1.0), (arm, -arm), (1.0, -arm))
    return (
        *quarter,
        *((-v, u) for u, v in quarter),
        *((-u, -v) for u, v in quarter),
        *((v, -u) for u, v in quarter),
    )


_OUTLINES = {
    "triangle": ((0.0, -1.0), (1.0, 1.0), (-1.0, 1.0)),
    "star": _star_outline(),
    "cross": _cross_outline(0.34),
    "diamond": ((0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)),
}


def _read_record(out: Path) -> dict[str, int | str] | None:
    """Read what ``out`` was made from, None when it is absent or empty.

    Raises ValueError when it holds anything but a demo set, since that would be lost.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    problem = ValueError(
        f"{out} exists and is not a demo set; choose another folder or remove this one"
    )
    if not out.is_dir() or {path.name for path in out.iterdir()} != {_RECORD_NAME, *SPLITS}:
        raise problem
    try:
        record = json.loads((out / _RECORD_NAME).read_text())
    except ValueError:
        raise problem from None
    if not isinstance(record, dict) or record.keys() - {"private", "task"} != {
        "rows",
        "seed",
        "version",
    }:
        raise problem
    return record


_PLAIN = Task(name="captions", schema=SCHEMA, make=make_row)
_PRIVATE = Task(name="private", schema=PRIVATE_SCHEMA, make=partial(make_row, private=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    """A file and the rows that go into it, ``start`` up to ``stop`` of a split."""

    path: Path
    split: str
    start: int
    stop: int


def _write_set(
    folder: Path,
    task: Task,
    rows: int,
    seed: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Write all splits into a new folder, several shards at once."""
    counts = split_rows(rows)
    shards = [
        _Shard(
            path=folder / split / f"part-{number:05d}.parquet",
            split=split,
            start=start,
            stop=min(start + SHARD_ROWS, count),
        )
        for split, count in counts.items()
        for number, start in enumerate(range(0, count, SHARD_ROWS))
    ]
    for split in counts:
        (folder / split).mkdir(parents=True)
    total, done = sum(counts.values()), 0
    for written in _write_shards(shards, partial(_write_shard, task, seed, ROW_GROUP_ROWS)):
        done += written
        if on_progress is not None:
            on_progress(done, total)


def _write_shards(shards: Sequence[_Shard], write: Callable[[_Shard], int]) -> Iterator[int]:
    """Write each shard, yielding its number of rows once written."""
    if sum(shard.stop - shard.start for shard in shards) <= SHARD_ROWS:
        yield from map(write, shards)  # in less time than processes take to start
        return
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _begin_process)
    try:
        for future in as_completed([pool.submit(write, shard) for shard in shards]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_process() -> None:
    """Let a terminal's Ctrl-C end this process at once, and so the end of the one it works for."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "this process was started by another"
    parent.join()
    os._exit(1)


def _write_shard(task: Task, seed: int, group_rows: int, shard: _Shard) -> int:
    # JPEG bytes do not compress, and no two are alike: neither zstd nor a dictionary would help.
    text_columns = [name for name in task.schema.names if name not in {"image", "images"}]
    # Any, since pyarrow's annotations do not know that each option can be given per column.
    options: dict[str, Any] = {
        "compression": {"image": "none"} | dict.fromkeys(text_columns, "zstd"),
        "use_dictionary": text_columns,
        "write_statistics": text_columns,
    }
    with pq.ParquetWriter(shard.path, task.schema, **options) as writer:
        for start in range(shard.start, shard.stop, group_rows):
            stop = min(start + group_rows, shard.stop)
            batch = [task.make(shard.split, row, seed) for row in range(start, stop)]
            writer.write_table(pa.Table.from_pylist(batch, schema=task.schema))
    return shard.stop - shard.start
