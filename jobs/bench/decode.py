"""Decoding and resizing to 224, side by side in one run on the same JPEGs: ours against Pillow.

Pillow's way is what CLIP trainers run: decode, resize the short side by antialiased bicubic, cut
the centre. Ours is evaluation's geometry. One core: times are CPU seconds of the whole process,
all threads counted, medians of interleaved repetitions. JPEGs have quality 90 and 4:2:0 colours.

    python -m jobs.bench.decode [--quick] [--json FILE] [--figure FILE] [--photos FOLDER]

Pictures are drawn: letters, lines, checks, noise. With --photos (a folder of Parquet with a column
`image`) photographs too, in two ways: enlarged, so smoother than those a camera makes, and side by
side at their own size, so as sharp as any picture made small.

The difference is measured from Pillow's antialiased bicubic of the same centre square, the filter
that published CLIP models were trained with. How far Lanczos, another sound filter, is from it
tells what such a number means.

Goals, or exit status 1: at least 3 times Pillow's speed at 320x320 and 2.5 times at 500x400, a
mean absolute difference under 3 of 255, and at least 60 % of the speed of the JPEG decoder alone
(at the scale that is decoded).
"""

import io
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image

from jobs.bench.report import arguments, conclude, show_table
from pipeline.data.image import BadImage, Pixels, decode, decode_eval, eval_geometry

SIDE = 224
WHITE = (255, 255, 255)
# Width and height, the scale at which we decode them (1 / factor), and the goal over Pillow.
SIZES = ((320, 320, 1, 3.0), (500, 400, 1, 2.5), (1024, 768, 2, 0.0))
PARTS = ("pillow", "ours", "decoder", "resize")
LARGEST_DIFFERENCE = 3.0
LEAST_SHARE = 0.6
SMALLEST_PHOTO = 120  # smaller ones and enlarged are a blur
LETTERS = "The quick brown fox jumps over 1,234,567.89 lazy dogs"


def _pillow(data: bytes) -> Pixels:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    short = min(image.size)
    width, height = (int(SIDE * side / short) for side in image.size)
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))


def _reference(data: bytes, method: Image.Resampling) -> Pixels:
    """The centre square by Pillow; without the rounding to whole pixels that cutting after has."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return np.asarray(image.resize((SIDE, SIDE), method, box=(left, top, left + side, top + side)))


def _decoder(data: bytes, factor: int) -> Pixels:
    if factor == 1:
        return simplejpeg.decode_jpeg(data, "RGB")
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    return simplejpeg.decode_jpeg(
        data,
        "RGB",
        min_height=-(-int(height) // factor),
        min_width=-(-int(width) // factor),
        min_factor=factor,
    )


def draw_picture(width: int, height: int, rng: np.random.Generator) -> Pixels:
    """Draw letters, lines, discs, checks and patches of noise.

    A larger picture shows larger things, each with edges as sharp as its pixels allow.
    """
    unit = min(width, height) / 320
    y, x = np.mgrid[:height, :width] / unit
    slopes = rng.uniform(-0.3, 0.3, (3, 2))
    picture = np.stack([x * across + y * down for across, down in slopes], axis=-1) + 128
    picture = np.ascontiguousarray(picture.clip(0, 255).astype(np.uint8))
    for kind in rng.permutation(np.arange(80) % 5):
        colour = [int(value) for value in rng.integers(0, 256, 3)]
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        extent = round(unit * rng.integers(8, 64))
        thickness = round(unit * rng.integers(1, 4))
        patch = picture[top : top + extent, left : left + extent]
        if kind == 0:
            size = unit * float(rng.uniform(0.3, 0.8))
            stroke = max(1, round(unit))
            cv2.putText(
                picture, LETTERS, (left, top), cv2.FONT_HERSHEY_SIMPLEX, size, colour, stroke
            )
        elif kind == 1:
            end = int(rng.integers(0, width)), int(rng.integers(0, height))
            cv2.line(picture, (left, top), end, colour, thickness)
        elif kind == 2:
            cv2.circle(picture, (left, top), extent // 2, colour, -1)
        elif kind == 3:
            rows, columns = np.indices(patch.shape[:2]) // round(unit * rng.integers(2, 8))
            patch[(rows + columns) % 2 == 0] = colour
        else:
            noise = rng.normal(0, 12, patch.shape)
            patch[:] = (patch + noise).clip(0, 255).astype(np.uint8)
    return picture


def read_photos(folder: Path) -> list[Pixels]:
    """Read the folder's photographs that are not tiny; drawings only where nothing tells."""
    photos: list[Pixels] = []
    for file in sorted(folder.glob("**/*.parquet")):
        names = [name for name in ("image", "kind_guess") if name in pq.read_schema(file).names]
        for row in pq.read_table(file, columns=names).to_pylist():
            if row.get("kind_guess", "photo") != "photo":
                continue
            try:
                pixels = decode(row["image"], WHITE)
            except BadImage:
                continue
            if min(pixels.shape[:2]) >= SMALLEST_PHOTO:
                photos.append(pixels)
    return photos


def enlarge(photo: Pixels, width: int, height: int) -> Pixels:
    """Enlarge by bicubic interpolation until it covers the size; cut the centre."""
    image = Image.fromarray(photo)
    by = max(width / image.width, height / image.height)
    image = image.resize(
        (max(width, round(image.width * by)), max(height, round(image.height * by)))
    )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def lay_side_by_side(photos: list[Pixels], width: int, height: int, first: int) -> Pixels:
    """Cover the size with rows of photographs as they are, from number `first` on."""
    chosen = itertools.islice(itertools.cycle(photos), first, None)
    picture = np.zeros((height, width, 3), np.uint8)
    top = 0
    while top < height:
        left, lowest = 0, height
        while left < width:
            photo = next(chosen)
            space = picture[top : top + photo.shape[0], left : left + photo.shape[1]]
            space[:] = photo[: space.shape[0], : space.shape[1]]
            left, lowest = left + photo.shape[1], min(lowest, photo.shape[0])
        top += lowest
    return picture


def make_pictures(
    width: int, height: int, photos: list[Pixels], number: int
) -> dict[str, list[bytes]]:
    """Make JPEGs of a size, by kind of picture."""
    rng = np.random.default_rng(0)
    pictures = {"drawn": [draw_picture(width, height, rng) for _ in range(number)]}
    if photos:
        step = max(1, len(photos) // number)
        pictures["photographs, enlarged"] = [
            enlarge(photos[step * index % len(photos)], width, height) for index in range(number)
        ]
        pictures["photographs, side by side"] = [
            lay_side_by_side(photos, width, height, step * index) for index in range(number)
        ]
    return {
        kind: [simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=90,
                                      colorsubsampling="420") for picture in made]
        for kind, made in pictures.items()
    }  # fmt: skip


def measure(files: list[bytes], factor: int, repetitions: int) -> dict[str, Any]:
    """Median milliseconds per picture of each part, their ratios, and the differences."""
    decoded = [_decoder(data, factor) for data in files]
    parts: dict[str, Callable[[], Any]] = {
        "pillow": lambda: [_pillow(data) for data in files],
        "ours": lambda: [decode_eval(data, WHITE, SIDE) for data in files],
        "decoder": lambda: [_decoder(data, factor) for data in files],
        "resize": lambda: [eval_geometry(pixels, SIDE) for pixels in decoded],
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repetitions + 1):
        # All files by one way, then by the next: decoded twice in a row, a file is no news to the
        # processor, whose branch prediction then makes the second way faster than in real life.
        for name, part in parts.items():
            started = time.process_time()
            part()
            times[name].append(1000 * (time.process_time() - started) / len(files))

    def ratio(name: str) -> float:
        pairs = zip(times[name][1:], times["ours"][1:], strict=True)  # the first warms up
        return statistics.median(other / ours for other, ours in pairs)

    references = [_reference(data, Image.Resampling.BICUBIC) for data in files]
    lanczos = [_reference(data, Image.Resampling.LANCZOS) for data in files]
    ours = [decode_eval(data, WHITE, SIDE) for data in files]
    return {
        "milliseconds": {name: statistics.median(values[1:]) for name, values in times.items()},
        "over_pillow": ratio("pillow"),
        "share_of_decoder": ratio("decoder"),
        "difference": _difference(ours, references),
        "difference_lanczos": _difference(lanczos, references),
        "bytes_per_pixel": statistics.mean(
            len(data) / (pixels.size / 3 * factor**2)
            for data, pixels in zip(files, decoded, strict=True)
        ),
    }


def _difference(some: list[Pixels], others: list[Pixels]) -> float:
    """Mean absolute difference, of 255."""
    return statistics.mean(
        float(np.abs(one.astype(np.int16) - other).mean())
        for one, other in zip(some, others, strict=True)
    )


def _missed(cells: list[dict[str, Any]]) -> list[str]:
    missed = []
    for cell in cells:
        place = f"at {cell['width']}x{cell['height']}, {cell['pictures']}"
        if cell["over_pillow"] < cell["goal"]:
            missed.append(
                f"{cell['over_pillow']:.2f} times Pillow's speed {place}; {cell['goal']} are asked"
            )
        if cell["difference"] >= LARGEST_DIFFERENCE:
            missed.append(
                f"mean absolute difference {cell['difference']:.2f} of 255 {place}; less than "
                f"{LARGEST_DIFFERENCE} is asked"
            )
        if cell["share_of_decoder"] < LEAST_SHARE:
            missed.append(
                f"{cell['share_of_decoder']:.0%} of the decoder's own speed {place}; "
                f"{LEAST_SHARE:.0%} is asked"
            )
    return missed


def main() -> None:
    """Measure, print, draw."""
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="Parquet with `image`")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    photos = read_photos(options.photos) if options.photos else []
    if options.photos and not photos:
        parser.error(f"--photos: no photograph in the Parquet files of {options.photos}")
    number, repetitions = (24, 5) if options.quick else (64, 15)
    cells: list[dict[str, Any]] = []
    for width, height, factor, goal in SIZES:
        for kind, files in make_pictures(width, height, photos, number).items():
            found = measure(files, factor, repetitions)
            cells.append({"pictures": kind, "width": width, "height": height, "goal": goal} | found)
    rows = [
        [
            cell["pictures"],
            f"{cell['width']}x{cell['height']}",
            f"{cell['bytes_per_pixel']:.2f}",
            *(f"{cell['milliseconds'][part]:.3f}" for part in PARTS),
            f"{cell['over_pillow']:.2f}",
            f"{cell['share_of_decoder']:.0%}",
            f"{cell['difference']:.2f}",
            f"{cell['difference_lanczos']:.2f}",
        ]
        for cell in cells
    ]
    show_table(
        f"JPEG to {SIDE}x{SIDE}, one core: milliseconds per picture",
        ["pictures", "size", "B/pixel", "Pillow", "ours", "decoder", "resize", "over Pillow",
         "of decoder", "difference", "Lanczos's"],
        rows,
    )  # fmt: skip
    if options.figure is not None:
        draw(cells, options.figure)
    conclude({"cells": cells, "size": SIDE}, _missed(cells), options.json)


def draw(cells: list[dict[str, Any]], file: Path) -> None:
    """Draw pictures per second and the difference from the reference, by kind and size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    speed, quality = figure.subplots(1, 2, width_ratios=(3, 2))
    places = np.arange(len(cells))
    names = [f"{cell['width']}x{cell['height']}\n{cell['pictures']}" for cell in cells]
    for index, (name, label) in enumerate(
        (("pillow", "Pillow, bicubic"), ("ours", "ours"), ("decoder", "decoder alone"))
    ):
        heights = [1000 / cell["milliseconds"][name] for cell in cells]
        speed.bar(places + 0.27 * (index - 1), heights, 0.27, label=label)
    speed.set(ylabel="pictures per second, one core", yscale="log", title="Speed")
    for index, (key, label) in enumerate(
        (("difference", "ours"), ("difference_lanczos", "Lanczos"))
    ):
        quality.bar(places + 0.4 * (index - 0.5), [cell[key] for cell in cells], 0.4, label=label)
    quality.axhline(LARGEST_DIFFERENCE, color="black", linewidth=0.8)
    quality.set(
        ylabel="mean absolute difference (of 255)", title="Difference from Pillow's bicubic"
    )
    for panel in (speed, quality):
        panel.set_xticks(places, names, rotation=60, ha="right", fontsize=7)
        panel.grid(alpha=0.3, axis="y")
        panel.legend(fontsize=7)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
