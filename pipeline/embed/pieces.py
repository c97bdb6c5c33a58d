"""What is embedded at once, and becomes one file: neighbouring row groups of a Parquet file.

Enters: a catalog; then a piece. Leaves: pieces; then rows, encoded. Must not know: the model, Ray.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.data.decode import Rows
from pipeline.data.layout import Catalog, Source
from pipeline.data.prepare.parquet import key_columns
from pipeline.data.rows import read_rows
from pipeline.data.storage import open_filesystem


class Row(NamedTuple):
    """A row as the file has it. `absence`: why it has no image, where the file says so."""

    row_group: int
    row: int
    key: str | None
    image: bytes | None
    absence: str | None
    caption: object


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Row groups of one file, as (number, rows)."""

    number: int
    path: str
    row_groups: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        """The name of its embeddings in OUT."""
        return f"part-{self.number:07d}.parquet"

    @property
    def rows(self) -> int:
        """Rows it has."""
        return sum(rows for _, rows in self.row_groups)

    @property
    def weight(self) -> int:
        """Its share of the work."""
        return self.rows


def cut_pieces(catalog: Catalog, most: int) -> list[Piece]:
    """All row groups that have rows, by file, in pieces of at most `most` rows or one row group."""
    pieces: list[Piece] = []
    for shard in catalog.shards:
        runs: list[list[tuple[int, int]]] = []
        rows = most
        for group in enumerate(shard.row_groups):
            if not group[1]:
                continue
            if rows + group[1] > most:
                runs.append([])
                rows = 0
            runs[-1].append(group)
            rows += group[1]
        pieces += [
            Piece(number=len(pieces) + index, path=shard.path, row_groups=tuple(run))
            for index, run in enumerate(runs)
        ]
    return pieces


def read_piece(source: Source, piece: Piece) -> Iterator[Row]:
    """Its rows in order, of several images the first; one row group in memory at a time.

    Raises RuntimeError when the file cannot be read, or is not what it was.
    """
    filesystem, _ = open_filesystem(source.root)
    keys = key_columns(filesystem, piece.path)
    for group, rows in piece.row_groups:
        table = read_rows(filesystem, piece.path, group, source.columns, keys)
        if table.num_rows != rows:
            raise RuntimeError(
                f"{piece.path}: row group {group} has {table.num_rows} rows, and had {rows} when "
                "the job began; restore the file, or choose another OUT"
            )
        blank = [None] * rows
        images: list[list[memoryview]] = [[]] * rows
        if source.columns.image:
            found = Rows.of(table)
            table, images = found.facts, list(found.images)
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        for number, key, image, absence, caption in zip(
            columns["row"],
            columns[f"label/{keys[0]}"] if keys else blank,
            images,
            columns.get("absence", blank),
            columns.get("caption", blank),
            strict=True,
        ):
            first = next((bytes(each) for each in image if each), None)
            yield Row(group, number, key, first, absence, caption)
