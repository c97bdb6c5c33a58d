"""A picture or a caption changed at random, so that a row never looks the same twice.

Enters: pixels or text, a generator. Leaves: their changed copy, a function of both alone.
Must not know: rows, Ray, the model.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from string import punctuation

import numpy as np
import pyarrow as pa
from PIL import Image, ImageEnhance, ImageOps

from pipeline.data.image import Pixels
from pipeline.data.storage import explain, open_filesystem
from pipeline.errors import UserError

Colour = tuple[int, int, int]
Synonyms = Mapping[str, Sequence[str]]  # of a word in lower case: the words to say instead

# ---- pictures: RandAugment (Cubuk et al. 2019) as ALBEF has it -----------------------------------

DRAWN = 2  # operations
APPLIED = 0.5  # probability that one that was drawn is applied
MAGNITUDE = 0.7  # of the greatest
ENHANCEMENT = 0.1 + 1.8 * MAGNITUDE
SHEAR = 0.3 * MAGNITUDE
SHIFT = 10 / 256 * MAGNITUDE  # of the side
DEGREES = 30 * MAGNITUDE


def augment_image(pixels: Pixels, background: Colour, rng: np.random.Generator) -> Pixels:
    """Two operations, drawn with replacement, each applied with probability 1/2; same shape.

    What a shift, shear or rotation uncovers shows `background`.
    """
    operations = list(OPERATIONS.values())
    image = Image.fromarray(pixels)
    for index in rng.integers(len(operations), size=DRAWN):
        is_applied, is_forward = rng.random(2) < (APPLIED, 0.5)
        if is_applied:
            image = operations[index](image, 1 if is_forward else -1, background)
    return np.array(image)


def _affine(image: Image.Image, inverse: tuple[float, ...], background: Colour) -> Image.Image:
    """`inverse` gives the place in `image` of a place of the result: x, then y."""
    return image.transform(
        image.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR, fillcolor=background
    )


# Of an image, a direction (1 or -1) and the background.
OPERATIONS: dict[str, Callable[[Image.Image, int, Colour], Image.Image]] = {
    "identity": lambda image, way, ground: image,
    "auto_contrast": lambda image, way, ground: ImageOps.autocontrast(image),
    "equalize": lambda image, way, ground: ImageOps.equalize(image),
    "brightness": lambda image, way, ground: ImageEnhance.Brightness(image).enhance(ENHANCEMENT),
    "sharpness": lambda image, way, ground: ImageEnhance.Sharpness(image).enhance(ENHANCEMENT),
    "shear_x": lambda image, way, ground: _affine(image, (1, way * SHEAR, 0, 0, 1, 0), ground),
    "shear_y": lambda image, way, ground: _affine(image, (1, 0, 0, way * SHEAR, 1, 0), ground),
    "translate_x": lambda image, way, ground: _affine(
        image, (1, 0, way * round(SHIFT * image.width), 0, 1, 0), ground
    ),
    "translate_y": lambda image, way, ground: _affine(
        image, (1, 0, 0, 0, 1, way * round(SHIFT * image.height)), ground
    ),
    "rotate": lambda image, way, ground: image.rotate(
        way * DEGREES, Image.Resampling.BILINEAR, fillcolor=ground
    ),
}

# ---- captions: EDA (Wei and Zou 2019) ------------------------------------------------------------

CHANGED = 0.1  # share of a caption's words
EDGES = punctuation + "“”‘’…"  # of a word, no part of it


def augment_text(text: str, synonyms: Synonyms, rng: np.random.Generator) -> str:
    """One of EDA's operations, drawn, on a tenth of the words, at least one; never empties a text.

    Words are swapped or deleted, or, where one has synonyms, replaced by or joined by these. All
    words are alike: a swap can exchange the colours of two things, a deletion can lose a number.
    """
    words = text.split()
    if not words:
        return text
    operations = [_swap, _delete]
    if any(_bare(word) in synonyms for word in words):
        operations += [_replace, _insert]
    operation = operations[int(rng.integers(len(operations)))]
    return " ".join(operation(words, synonyms, rng))


def _swap(words: list[str], synonyms: Synonyms, rng: np.random.Generator) -> list[str]:
    for _ in range(_count(words)):
        pair = rng.permutation(len(words))[:2]  # of a single word: its place alone
        words[pair[0]], words[pair[-1]] = words[pair[-1]], words[pair[0]]
    return words


def _delete(words: list[str], synonyms: Synonyms, rng: np.random.Generator) -> list[str]:
    kept = [word for word in words if rng.random() >= CHANGED]
    return kept or [words[int(rng.integers(len(words)))]]


def _replace(words: list[str], synonyms: Synonyms, rng: np.random.Generator) -> list[str]:
    known = [place for place, word in enumerate(words) if _bare(word) in synonyms]
    for place in rng.permutation(known)[: _count(words)]:
        word = words[place]
        words[place] = word.replace(word.strip(EDGES), _synonym(word, synonyms, rng), 1)
    return words


def _insert(words: list[str], synonyms: Synonyms, rng: np.random.Generator) -> list[str]:
    known = [word for word in words if _bare(word) in synonyms]
    for _ in range(_count(words)):
        word = known[int(rng.integers(len(known)))]
        words.insert(int(rng.integers(len(words) + 1)), _synonym(word, synonyms, rng))
    return words


def _count(words: list[str]) -> int:
    return max(1, int(CHANGED * len(words)))


def _bare(word: str) -> str:
    return word.strip(EDGES).lower()


def _synonym(word: str, synonyms: Synonyms, rng: np.random.Generator) -> str:
    found = synonyms[_bare(word)]
    return found[int(rng.integers(len(found)))]


@lru_cache(maxsize=1)
def read_synonyms(path: str) -> Synonyms:
    """Read groups of synonyms, a line each, separated by commas; a word may be in several.

    Once per process. Raises `UserError` when the file cannot be read, or holds no group.
    """
    try:
        filesystem, inner = open_filesystem(path)
        with filesystem.open_input_file(inner) as file:
            lines = file.read().decode().splitlines()
    except (OSError, pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise UserError(
            f"data.synonyms: cannot read {path} as UTF-8 text ({explain(error)}); give a file that "
            "every node reaches"
        ) from error
    synonyms: dict[str, list[str]] = {}
    for line in lines:
        group = dict.fromkeys(word for part in line.split(",") if (word := part.strip()))
        for word in group:
            others = (other for other in group if other.lower() != word.lower())
            synonyms.setdefault(word.lower(), []).extend(others)
    synonyms = {word: others for word, others in synonyms.items() if others}
    if not synonyms:
        raise UserError(
            f"data.synonyms: {path} holds no synonyms; write a group a line: car, automobile"
        )
    return synonyms
