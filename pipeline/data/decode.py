"""What Ray Data's tasks do: a piece of the order -> encoded rows -> arrays.

Enters: the place of rows, a `Recipe`. Leaves: blocks of decoded, tokenised rows with their
identity. Must not know: batches, workers, Ray, torch (tasks start sooner and smaller without).
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, get_args

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data import image as image_module
from pipeline.data.answers import AnswerList
from pipeline.data.augment import augment_image, augment_text, read_synonyms
from pipeline.data.clean import clean_captions
from pipeline.data.layout import Catalog, Source, as_answers, as_captions
from pipeline.data.order import Order, Piece, Visit, permutation
from pipeline.data.rows import Absence, read_rows
from pipeline.data.storage import open_filesystem
from pipeline.data.text import Tokenizer

REASONS = (
    *get_args(image_module.Reason), *get_args(Absence), "empty_caption",
    "empty_text", "unlisted_answer", "answers_not_aligned", "too_many_answers",  # of a task
    "not_two_images",
)  # fmt: skip
GOOD = -1
ANSWERS = 10  # of one question, of as many people: what a row keeps
NO_ANSWER = -1
CHUNK_ROWS = 256  # rows decoded at once in a task
CONCURRENT_READS = 8  # of a window's row groups: remote storage answers late, but many at once


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """How a training row is varied; `augment_text` is a probability."""

    crop_scale: tuple[float, float]
    flip: float
    augment_image: Literal["none", "rand_augment"] = "none"
    augment_text: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a task asks of a row: `pictures` of it are looked at, answers are of a closed list."""

    answers: AnswerList
    pictures: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a row becomes arrays. `train`: random crop and drawn caption; else eval geometry.

    Only training varies rows (`view`), and makes a `second_view` of the same image and caption if
    there is one; `synonyms` is the path of the file for text augmentation. Of a task, `asked`, the
    caption is what is asked. `squeeze`: pictures are taken for squares, and seen whole.
    """

    tokenizer: Tokenizer
    context_length: int
    image_size: int
    view: View
    background: tuple[int, int, int]
    seed: int
    train: bool
    labels: tuple[str, ...] = ()
    clean_captions: bool = False
    second_view: View | None = None
    synonyms: str | None = None
    asked: Asked | None = None
    squeeze: bool = False

    @property
    def pictures(self) -> int:
        """Images of a row that are looked at."""
        return 1 if self.asked is None else self.asked.pictures

    @property
    def views(self) -> tuple[View, ...]:
        """The views of a row, of which evaluation has one and does not vary it."""
        return (self.view, self.second_view) if self.second_view else (self.view,)


@dataclass(frozen=True, slots=True)
class Rows:
    """Encoded rows: `facts` has all columns but `image`, `images` each row's as views of memory.

    Views, since to take rows from a window's tables would copy every picture into fresh memory.
    """

    facts: pa.Table
    images: Sequence[list[memoryview]]

    @staticmethod
    def of(table: pa.Table) -> "Rows":
        """The rows of a table as `read_rows` gives it; nothing is copied."""
        images = [view for chunk in table.column("image").chunks for view in _views(chunk)]
        return Rows(table.drop_columns("image"), images)


def _views(lists: pa.ListArray) -> Iterator[list[memoryview]]:
    """The images of each row; null images are left out, a null list is an empty one."""
    values = lists.values
    _, offsets, data = values.buffers()
    if data is None:
        yield from ([] for _ in range(len(lists)))
        return
    content = memoryview(data)
    ends = np.frombuffer(offsets, np.int64)[values.offset :].tolist()
    is_there = values.is_valid().to_pylist()
    bounds = lists.offsets.to_pylist()
    for row, is_list in enumerate(lists.is_valid().to_pylist()):
        chosen = range(bounds[row], bounds[row + 1]) if is_list else ()
        yield [content[ends[at] : ends[at + 1]] for at in chosen if is_there[at]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadPiece:
    """Reads a piece's row groups and gives its rows, encoded, in the order of their positions."""

    shards: tuple[tuple[Source, str], ...]  # of each visit of the window: its source, its path
    piece: Piece
    seed: int
    shuffle: bool
    labels: tuple[str, ...]

    @staticmethod
    def of(catalog: Catalog, order: Order, piece: Piece, labels: tuple[str, ...]) -> "ReadPiece":
        """The task that reads `piece`, with the columns `labels` beside image and caption."""
        shards = [catalog.shards[visit.group.shard] for visit in piece.window.visits]
        return ReadPiece(
            shards=tuple((catalog.sources[shard.source], shard.path) for shard in shards),
            piece=piece,
            seed=order.seed,
            shuffle=order.shuffle,
            labels=labels,
        )

    @property
    def rows(self) -> int:
        """Rows it gives."""
        return self.piece.positions[1] - self.piece.positions[0]

    def __call__(self) -> Iterator[Rows]:
        """Read the window, all row groups at once, and give its rows in chunks."""
        window = self.piece.window
        with ThreadPoolExecutor(CONCURRENT_READS) as pool:
            parts = [Rows.of(table) for table in pool.map(self._read, self.shards, window.visits)]
        facts = pa.concat_tables(part.facts for part in parts).combine_chunks()
        images = [image for part in parts for image in part.images]
        rows_of_positions = permutation(self.seed, self.piece.epoch, window, self.shuffle)
        low, high = (position - window.start for position in self.piece.positions)
        for start in range(low, high, CHUNK_ROWS):
            positions = np.arange(start, min(start + CHUNK_ROWS, high))
            rows = rows_of_positions[positions]
            chunk = facts.take(pa.array(rows))
            chunk = chunk.append_column("position", pa.array(positions + window.start))
            yield Rows(chunk, [images[row] for row in rows])

    def _read(self, shard: tuple[Source, str], visit: Visit) -> pa.Table:
        source, path = shard
        filesystem, _ = open_filesystem(source.root)
        group = visit.group
        table = read_rows(filesystem, path, group.index, source.columns, self.labels)
        if table.num_rows != group.rows:
            raise RuntimeError(
                f"{path}: row group {group.index} has {table.num_rows} rows, and had {group.rows} "
                "when the run began; restore the file, or start a run with another name"
            )
        chosen = visit.chosen(self.seed)
        if visit.rows < group.rows:
            table = table.take(pa.array(chosen))
        for name, values in (
            ("epoch", np.full(visit.rows, self.piece.epoch, np.int64)),
            ("turn", np.full(visit.rows, visit.turn, np.int64)),
            ("shard", np.full(visit.rows, group.shard, np.int64)),
            ("row_group", np.full(visit.rows, group.index, np.int64)),
            ("ordinal", chosen),
        ):
            table = table.append_column(name, pa.array(values))
        return table


class _Bad(Exception):
    """A row that cannot be used, and why."""


Text = tuple[str, list[int]]  # what is said or asked, and the numbers of its answers


@dataclass(kw_only=True, slots=True)
class _Row:
    """A row's pictures and texts, of each view; in evaluation its further texts."""

    pixels: list[list[image_module.Pixels]]
    texts: list[str]
    answers: list[int]
    more: list[Text]


class Decode:
    """Encoded rows -> arrays. A bad row stays, as zeros with its reason, until it is counted."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe

    def __call__(self, encoded: Rows) -> dict[str, Any]:
        """Give the columns of a block; images [rows, size, size, 3] uint8.

        Of a task with two pictures images are [rows, 2, size, size, 3]; `answers` [rows, ANSWERS],
        each number as often as it was given, are padded with NO_ANSWER.
        """
        cv2.setNumThreads(1)  # one task, one CPU
        recipe = self._recipe
        table = encoded.facts
        rows = table.num_rows
        identity = {
            name: table.column(name).to_numpy()
            for name in ("epoch", "turn", "position", "shard", "row_group", "row", "ordinal")
        }
        shape = (rows, recipe.pictures, recipe.image_size, recipe.image_size, 3)
        images = [np.empty(shape, dtype=np.uint8) for _ in recipe.views]
        reasons = np.full(rows, GOOD, dtype=np.int8)
        cleaned = np.zeros(rows, dtype=np.bool_)
        skipped = np.zeros(rows, dtype=np.int32)
        texts: list[list[str]] = [[] for _ in recipe.views]
        answers: list[list[int]] = []
        more: list[list[Text]] = []
        captions_of = table.column("caption").to_pylist()
        absences = table.column("absence").to_pylist()
        answers_of = table.column("answer").to_pylist() if recipe.asked else [None] * rows
        # A row that comes twice in an epoch comes in two turns.
        names = ("turn", "shard", "row_group", "row")
        places = zip(*(identity[name].tolist() for name in names), strict=True)
        for row, place in enumerate(places):
            said, cleaned[row], skipped[row] = self._said(captions_of[row], answers_of[row])
            try:
                found = self._row(place, encoded.images[row], absences[row], said)
            except (_Bad, image_module.BadImage) as error:
                reasons[row] = REASONS.index(str(error.args[0]))
                found = _Row(pixels=[], texts=[""] * len(texts), answers=[], more=[])
            for view, (image, text) in enumerate(zip(images, found.texts, strict=True)):
                for picture in range(recipe.pictures):
                    image[row, picture] = found.pixels[view][picture] if found.pixels else 0
                texts[view].append(text)
            answers.append(found.answers)
            more.append(found.more)
        return {
            **identity,
            **self._text_columns(texts, answers, more),
            **self._image_columns(images),
            **self._label_columns(table),
            "cleaned": cleaned,
            "skipped": skipped,
            "reason": reasons,
        }

    def _said(self, cell: object, answers: object) -> tuple[list[str | Text], bool, int]:
        """A row's texts, whether they had to be cleaned, and how many it has that are of no use.

        Of a task each with its answers; a text that is of no use is there as the reason.
        """
        recipe = self._recipe
        if recipe.asked is None:
            captions = as_captions(cell)
            found = clean_captions(captions) if recipe.clean_captions else captions
            return [(text, []) for text in found], found != captions, 0
        questions = cell if isinstance(cell, list) else [cell]
        plain = [next(iter(as_captions(each)), "") for each in questions]
        clean = [
            next(iter(clean_captions([text])), "") if recipe.clean_captions else text
            for text in plain
        ]
        given = as_answers(answers, len(questions))
        if len(given) != len(questions):
            return ["answers_not_aligned"], clean != plain, 0
        said: list[str | Text] = []
        for text, own in zip(clean, given, strict=True):
            numbers = recipe.asked.answers.numbers(own)
            # Evaluation keeps what people answered beyond an open list: it counts as wrong.
            is_kept = any(number >= 0 for number in numbers) or (
                own and not recipe.train and recipe.asked.answers.is_open
            )
            said.append("empty_text" if not text else
                        "too_many_answers" if len(own) > ANSWERS else
                        (text, numbers) if is_kept else "unlisted_answer")  # fmt: skip
        useless = sum(isinstance(each, str) for each in said)
        return said, clean != plain, useless if useless < len(said) else 0

    def _row(
        self,
        place: tuple[int, ...],
        encoded: list[memoryview],
        absence: str | None,
        said: list[str | Text],
    ) -> _Row:
        """Decode a row. Raises _Bad or BadImage."""
        recipe = self._recipe
        # One generator a view: the first one's crop and caption are the same with a second view or
        # without. (Its pixels may be a shade different, where for the second view the picture is
        # decoded larger.)
        rngs = [
            np.random.default_rng([recipe.seed, *place, *([index] if index else [])])
            for index in range(len(recipe.views))
        ]
        there = [image for image in encoded if image]
        if absence is None and recipe.pictures > 1 and len(there) != recipe.pictures:
            raise _Bad("not_two_images")
        chosen = there if recipe.pictures > 1 else [self._draw(there, rngs[0])]
        usable = [text for text in said if not isinstance(text, str)]
        if absence is not None or not usable:
            raise _Bad(absence or next(iter(said), "empty_caption"))
        pictures = [
            # Bytes: the JPEG decoder refuses views of Arrow's memory, and Pillow would take over.
            self._pixels(None if image is None else bytes(image), rngs)
            for image in chosen
        ]
        pixels = [list(view) for view in zip(*pictures, strict=True)]
        drawn = int(rngs[0].integers(len(usable))) if recipe.train else 0
        text, answers = usable[drawn]
        texts = [text] * len(recipe.views)
        if recipe.train:
            # Drawn last: crops and captions are the same with augmentation or without.
            texts = [
                self._augment(own, text, view, rng)
                for own, view, rng in zip(pixels, recipe.views, rngs, strict=True)
            ]
        return _Row(
            pixels=pixels, texts=texts, answers=answers, more=[] if recipe.train else usable[1:]
        )

    def _draw(self, there: list[memoryview], rng: np.random.Generator) -> memoryview | None:
        """One of a row's images: any in training, else the first."""
        if not there:
            return None
        is_drawn = len(there) > 1 and self._recipe.train
        return there[int(rng.integers(len(there))) if is_drawn else 0]

    def _pixels(
        self, data: bytes | None, rngs: Sequence[np.random.Generator]
    ) -> list[image_module.Pixels]:
        """The picture of each view."""
        recipe = self._recipe
        if not recipe.train:
            return [
                image_module.decode_eval(
                    data, recipe.background, recipe.image_size, squeeze=recipe.squeeze
                )
            ]
        crops = [
            image_module.RandomCrop(view.crop_scale, view.flip, rng, recipe.squeeze)
            for view, rng in zip(recipe.views, rngs, strict=True)
        ]
        return image_module.decode_train(data, recipe.background, recipe.image_size, crops)

    def _augment(
        self, pictures: list[image_module.Pixels], text: str, view: View, rng: np.random.Generator
    ) -> str:
        """Change `pictures` in place; give the text, changed or not."""
        recipe = self._recipe
        if view.augment_image == "rand_augment":
            pictures[:] = [augment_image(pixels, recipe.background, rng) for pixels in pictures]
        if view.augment_text and rng.random() < view.augment_text:
            synonyms = read_synonyms(recipe.synonyms) if recipe.synonyms else {}
            return augment_text(text, synonyms, rng)
        return text

    def _image_columns(self, images: list[NDArray[np.uint8]]) -> dict[str, Any]:
        names = ("image", "view_image")
        if self._recipe.pictures == 1:
            images = [each[:, 0] for each in images]
        return dict(zip(names, images, strict=False))

    def _text_columns(
        self, texts: list[list[str]], answers: list[list[int]], more: list[list[Text]]
    ) -> dict[str, Any]:
        recipe = self._recipe
        columns: dict[str, Any] = {}
        columns["tokens"], columns["cut"] = recipe.tokenizer.encode(texts[0], recipe.context_length)
        if recipe.second_view:
            columns["view_tokens"], _ = recipe.tokenizer.encode(texts[1], recipe.context_length)
        if not recipe.train:
            columns["more_tokens"] = self._encode_more(more)
        if recipe.asked:
            columns["answers"] = _padded(answers)
            if not recipe.train:
                cells = [_padded([own for _, own in each]).tobytes() for each in more]
                columns["more_answers"] = _objects(cells)
        return columns

    def _label_columns(self, table: pa.Table) -> dict[str, Any]:
        if self._recipe.train:
            return {}
        return {
            f"label/{label}": _objects(
                [value or "" for value in table.column(f"label/{label}").to_pylist()]
            )
            for label in self._recipe.labels
        }

    def _encode_more(self, more: list[list[Text]]) -> NDArray[Any]:
        """The further texts of each row, as the bytes of an int32 [texts, length] array."""
        recipe = self._recipe
        return _objects(
            [
                recipe.tokenizer.encode([text for text, _ in each], recipe.context_length)[
                    0
                ].tobytes()
                for each in more
            ]
        )


def _padded(answers: list[list[int]]) -> NDArray[np.int32]:
    """Numbers of answers, [rows, ANSWERS]."""
    padded = np.full((len(answers), ANSWERS), NO_ANSWER, dtype=np.int32)
    for row, own in enumerate(answers):
        padded[row, : len(own)] = own
    return padded


def _objects(cells: list[Any]) -> NDArray[Any]:
    column = np.empty(len(cells), dtype=object)
    column[:] = cells
    return column
