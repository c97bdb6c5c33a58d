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
from pipeline.data.augment import augment_image, augment_text, read_synonyms
from pipeline.data.clean import clean_captions
from pipeline.data.layout import Catalog, Source, as_captions
from pipeline.data.order import Order, Piece, Visit, permutation
from pipeline.data.rows import Absence, read_rows
from pipeline.data.storage import open_filesystem
from pipeline.data.text import Tokenizer

REASONS = (*get_args(image_module.Reason), *get_args(Absence), "empty_caption")
GOOD = -1
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
class Recipe:
    """How a row becomes arrays. `train`: random crop and drawn caption; else eval geometry.

    Only training varies rows (`view`), and makes a `second_view` of the same image and caption if
    there is one; `synonyms` is the path of the file for text augmentation.
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


class Decode:
    """Encoded rows -> arrays. A bad row stays, as zeros with its reason, until it is counted."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe

    def __call__(self, encoded: Rows) -> dict[str, Any]:
        """Give the columns of a block; images [rows, size, size, 3] uint8."""
        cv2.setNumThreads(1)  # one task, one CPU
        recipe = self._recipe
        table = encoded.facts
        rows = table.num_rows
        identity = {
            name: table.column(name).to_numpy()
            for name in ("epoch", "turn", "position", "shard", "row_group", "row", "ordinal")
        }
        size, views = recipe.image_size, recipe.views
        images = [np.empty((rows, size, size, 3), dtype=np.uint8) for _ in views]
        reasons = np.full(rows, GOOD, dtype=np.int8)
        cleaned = np.zeros(rows, dtype=np.bool_)
        texts: list[list[str]] = [[] for _ in views]
        more: list[list[str]] = []
        captions_of = table.column("caption").to_pylist()
        absences = table.column("absence").to_pylist()
        # A row that comes twice in an epoch comes in two turns.
        names = ("turn", "shard", "row_group", "row")
        places = zip(*(identity[name].tolist() for name in names), strict=True)
        for row, place in enumerate(places):
            # One generator a view: the first one's crop and caption are the same with a second view
            # or without. (Its pixels may be a shade different, where for the second view the
            # picture is decoded larger.)
            rngs = [
                np.random.default_rng([recipe.seed, *place, *([index] if index else [])])
                for index in range(len(views))
            ]
            captions = as_captions(captions_of[row])
            if recipe.clean_captions:
                found, captions = captions, clean_captions(captions)
                cleaned[row] = captions != found
            image = self._draw(encoded.images[row], rngs[0])
            reason: str | None = absences[row] or (None if captions else "empty_caption")
            pixels: list[image_module.Pixels] = []
            if reason is None:
                try:
                    pixels = self._pixels(image, rngs)
                except image_module.BadImage as error:
                    reason = error.reason
            if reason is not None:
                reasons[row] = REASONS.index(reason)
            captions = captions or [""]
            drawn = int(rngs[0].integers(len(captions))) if recipe.train else 0
            for index, view in enumerate(views):
                images[index][row] = pixels[index] if pixels else 0
                text = captions[drawn]
                if recipe.train and reason is None:
                    # Drawn last: crops and captions are the same with augmentation or without.
                    text = self._augment(images[index][row], text, view, rngs[index])
                texts[index].append(text)
            more.append(captions[1:])
        tokens, cut = recipe.tokenizer.encode(texts[0], recipe.context_length)
        columns = {
            **identity,
            "image": images[0],
            "tokens": tokens,
            "cut": cut,
            "cleaned": cleaned,
            "reason": reasons,
        }
        if recipe.second_view:
            columns["view_image"] = images[1]
            columns["view_tokens"], _ = recipe.tokenizer.encode(texts[1], recipe.context_length)
        if not recipe.train:
            columns["more_tokens"] = self._encode_more(more)
            for label in recipe.labels:
                values = table.column(f"label/{label}").to_pylist()
                columns[f"label/{label}"] = np.array(
                    [value or "" for value in values], dtype=object
                )
        return columns

    def _draw(self, images: list[memoryview], rng: np.random.Generator) -> bytes | None:
        """One of a row's images: any in training, else the first."""
        there = [image for image in images if image]
        if not there:
            return None
        is_drawn = len(there) > 1 and self._recipe.train
        # Bytes: the JPEG decoder refuses views of Arrow's memory, and Pillow would take over.
        return bytes(there[int(rng.integers(len(there))) if is_drawn else 0])

    def _pixels(
        self, data: bytes | None, rngs: Sequence[np.random.Generator]
    ) -> list[image_module.Pixels]:
        """The picture of each view."""
        recipe = self._recipe
        if not recipe.train:
            return [image_module.decode_eval(data, recipe.background, recipe.image_size)]
        crops = [
            image_module.RandomCrop(view.crop_scale, view.flip, rng)
            for view, rng in zip(recipe.views, rngs, strict=True)
        ]
        return image_module.decode_train(data, recipe.background, recipe.image_size, crops)

    def _augment(
        self, pixels: image_module.Pixels, text: str, view: View, rng: np.random.Generator
    ) -> str:
        """Change `pixels` in place; give the text, changed or not."""
        recipe = self._recipe
        if view.augment_image == "rand_augment":
            pixels[:] = augment_image(pixels, recipe.background, rng)
        if view.augment_text and rng.random() < view.augment_text:
            synonyms = read_synonyms(recipe.synonyms) if recipe.synonyms else {}
            return augment_text(text, synonyms, rng)
        return text

    def _encode_more(self, more: list[list[str]]) -> NDArray[Any]:
        """The further captions of each row, as the bytes of an int32 [captions, length] array."""
        cells = np.empty(len(more), dtype=object)
        for row, captions in enumerate(more):
            cells[row] = self._recipe.tokenizer.encode(captions, self._recipe.context_length)[
                0
            ].tobytes()
        return cells
