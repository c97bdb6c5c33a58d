"""A piece -> its embeddings, a Parquet file that appears whole or not at all.

A thread reads and decodes ahead of the model; one piece at a time has its turn at the model, while
the next reads and the last is written.

Enters: an encoder, a piece. Leaves: a file, its facts in its footer. Must not know: Ray.
"""

import contextlib
import itertools
import json
import threading
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.batches import ahead
from pipeline.data.layout import Source
from pipeline.data.memory import keep_freed_memory
from pipeline.data.prepare.gather import FOOTER
from pipeline.data.prepare.store import SHARDS, Store
from pipeline.embed.encoder import Encoder, Reasons
from pipeline.embed.pieces import Piece, Row, read_piece

WRITTEN_ROWS = 8192  # of a row group, and kept in memory at most
# Lists of any length: Arrow cannot read back from Parquet a column of fixed-size lists with nulls.
VECTOR = pa.list_(pa.float32())
TURN = threading.Lock()  # of the pieces of this process, at the model


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows, decoded. What a side lacks is None; its arrays hold the good rows alone."""

    rows: list[Row]
    pixels: NDArray[np.uint8] | None
    tokens: NDArray[np.int32] | None
    words: list[str | None]
    image_reasons: Reasons
    text_reasons: Reasons
    cut: int


def read_batches(
    encoder: Encoder, source: Source, rows: Iterator[Row], size: int
) -> Generator[Batch]:
    """Decode and tokenise rows, `size` at a time, on as many threads as the model may use."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        while some := list(itertools.islice(rows, size)):
            pixels = tokens = None
            image_reasons: Reasons = [None] * len(some)
            text_reasons, words, cut = image_reasons, image_reasons, 0
            if source.columns.image:
                pixels, found = encoder.read_pictures([row.image for row in some], pool)
                image_reasons = [
                    reason and (row.absence or reason)
                    for row, reason in zip(some, found, strict=True)
                ]
            if source.columns.caption:
                texts = encoder.read_texts([row.caption for row in some])
                tokens, words, text_reasons = texts.tokens, texts.words, texts.reasons
                cut = texts.cut
            yield Batch(
                rows=some,
                pixels=pixels,
                tokens=tokens,
                words=words,
                image_reasons=image_reasons,
                text_reasons=text_reasons,
                cut=cut,
            )


Embedded = tuple[Batch, Tensor | None, Tensor | None]  # with the features of its good rows


def embed_batches(encoder: Encoder, batches: Iterable[Batch]) -> Iterator[Embedded]:
    """Embed each batch; it is fetched from the device once that has the next one to do."""
    last: Embedded | None = None
    for batch in batches:
        image = text = None
        if batch.pixels is not None and len(batch.pixels):
            image = encoder.embed_pictures(batch.pixels)
        if batch.tokens is not None and len(batch.tokens):
            text = encoder.embed_texts(batch.tokens)
        if last is not None:
            yield _fetched(*last)
        last = batch, image, text
    if last is not None:
        yield _fetched(*last)


def _fetched(batch: Batch, image: Tensor | None, text: Tensor | None) -> Embedded:
    """Features on the CPU; of the rows only what is written, since many wait to be."""
    rows = [row._replace(image=None, caption=None) for row in batch.rows]
    batch = replace(batch, rows=rows, pixels=None, tokens=None)
    return batch, None if image is None else image.cpu(), None if text is None else text.cpu()


def make_schema(source: Source) -> pa.Schema:
    """The columns of embeddings of such rows."""
    fields = {"file": pa.string(), "row_group": pa.int32(), "row": pa.int64(), "key": pa.string()}
    fields |= {"caption": pa.string()} if source.columns.caption else {}
    fields |= {"image_embedding": VECTOR} if source.columns.image else {}
    fields |= {"text_embedding": VECTOR} if source.columns.caption else {}
    return pa.schema(list((fields | {"reason": pa.string()}).items()))


@dataclass(kw_only=True, slots=True)
class _Filling:
    """A table under construction, and counts over all tables of its piece."""

    path: str
    schema: pa.Schema
    rows: int = 0
    cut: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    waiting: list[Embedded] = field(default_factory=list)
    num_waiting: int = 0

    def add(self, embedded: Embedded) -> None:
        """Take rows."""
        batch = embedded[0]
        self.waiting.append(embedded)
        self.num_waiting += len(batch.rows)
        self.rows += len(batch.rows)
        self.cut += batch.cut
        self.reasons.update(filter(None, batch.image_reasons))
        self.reasons.update(filter(None, batch.text_reasons))

    def take(self) -> pa.Table:
        """The rows that have come since the last call."""
        batches = [batch for batch, _, _ in self.waiting]
        rows = [row for batch in batches for row in batch.rows]
        image_reasons = [reason for batch in batches for reason in batch.image_reasons]
        text_reasons = [reason for batch in batches for reason in batch.text_reasons]
        columns: dict[str, Any] = {
            "file": [self.path] * len(rows),
            "row_group": [row.row_group for row in rows],
            "row": [row.row for row in rows],
            "key": [row.key for row in rows],
            "caption": [text for batch in batches for text in batch.words],
            "image_embedding": _vectors([image for _, image, _ in self.waiting], image_reasons),
            "text_embedding": _vectors([text for _, _, text in self.waiting], text_reasons),
            "reason": [
                ", ".join(filter(None, both)) or None
                for both in zip(image_reasons, text_reasons, strict=True)
            ],
        }
        self.waiting, self.num_waiting = [], 0
        return pa.table({name: columns[name] for name in self.schema.names}, schema=self.schema)


def _vectors(parts: list[Tensor | None], reasons: Reasons) -> pa.Array:
    """The features of the rows without a reason, null for the others."""
    found = [part.numpy() for part in parts if part is not None]
    if not found:
        return pa.nulls(len(reasons), VECTOR)
    values = np.concatenate(found)
    is_bad = np.array([reason is not None for reason in reasons])
    ends = np.cumsum(~is_bad) * values.shape[1]
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values.ravel()), mask=pa.array(is_bad))


@dataclass(frozen=True, kw_only=True, slots=True)
class Embed:
    """Embeds a piece; `origin` says of what run, and goes to the file's footer."""

    store: Store
    encoder: Encoder
    source: Source
    origin: dict[str, str]

    def __call__(self, piece: Piece) -> dict[str, Any]:
        """Write the piece's file; give its facts."""
        keep_freed_memory()
        filling = _Filling(path=piece.path, schema=make_schema(self.source))
        facts: dict[str, Any] = {"number": piece.number, "name": piece.name}
        vectors = [each.name for each in filling.schema if each.type == VECTOR]
        plain = [name for name in filling.schema.names if name not in vectors]
        # Any, since pyarrow's annotations do not know that each option can be given per column.
        options: dict[str, Any] = {
            "compression": dict.fromkeys(plain, "zstd")
            | {f"{name}.list.element": "none" for name in vectors},
            "use_dictionary": ["file", "reason"],
            "write_statistics": ["file", "row_group", "row", "key"],
        }

        def write(sink: Any) -> None:
            with pq.ParquetWriter(sink, filling.schema, **options) as writer:
                self._fill(piece, filling, writer)
                facts["rows"], facts["cut"] = filling.rows, filling.cut
                facts["reasons"] = dict(filling.reasons)
                said = json.dumps({**facts, **self.origin})
                writer.add_key_value_metadata({FOOTER.decode(): said})

        self.store.write(f"{SHARDS}/{piece.name}", write)
        return facts

    def _fill(self, piece: Piece, filling: _Filling, writer: pq.ParquetWriter) -> None:
        rows = read_piece(self.source, piece)
        reading = ahead(read_batches(self.encoder, self.source, rows, self.encoder.batch_size))
        with contextlib.closing(reading) as batches:
            first = next(batches)  # while another piece has its turn
            with TURN:
                self.encoder.settle()
                for each in embed_batches(self.encoder, itertools.chain([first], batches)):
                    filling.add(each)
                    if filling.num_waiting >= WRITTEN_ROWS:
                        writer.write_table(filling.take())
        if filling.num_waiting:
            writer.write_table(filling.take())
