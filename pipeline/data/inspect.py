"""A first look at a data set: its shards, and a sample of its rows decoded.

Enters: a catalog. Leaves: facts, a contact sheet. Must not know: Ray, the model, a config.
"""

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.clean import clean_caption
from pipeline.data.image import BadImage, Pixels, decode, eval_geometry
from pipeline.data.layout import Catalog, are_labels, as_captions, label_columns
from pipeline.data.rows import read_rows
from pipeline.data.storage import open_filesystem, retried

SAMPLE = 512  # rows looked at
SAMPLED_GROUPS = 16  # row groups they come from
LARGE_GROUP = 256 * 2**20  # bytes of a row group that a reader has to hold at once
SHEET_COLUMNS, SHEET_ROWS, THUMB = 5, 4, 192
NAMED = 10  # bad rows that are listed
QUANTILES = (0.0, 0.5, 0.95, 1.0)


@dataclass(kw_only=True)
class Inspection:
    """What was seen. Quantiles are the least, median, 95th percentile and greatest of the sample.

    `bad` counts reasons, `named` are the first bad rows as (path:row-group:row, reason). `values`
    counts, by column, the values of those that may hold labels.
    """

    catalog: Catalog
    rows_read: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    named: list[tuple[str, str]] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    captions_a_row: list[int] = field(default_factory=list)
    captions: Counter[str] = field(default_factory=Counter)
    values: dict[str, Counter[str]] = field(default_factory=dict)
    words: list[int] = field(default_factory=list)  # of each caption
    unclean_captions: int = 0  # those that cleaning would change
    sides: list[tuple[int, int]] = field(default_factory=list)  # width, height
    image_bytes: list[int] = field(default_factory=list)
    pairs: list[tuple[Pixels, str]] = field(default_factory=list)

    @property
    def largest_group(self) -> int:
        """Bytes of the largest row group, uncompressed."""
        return max(size for shard in self.catalog.shards for size in shard.group_bytes)

    @property
    def labels(self) -> dict[str, int]:
        """How many different values have the columns that look like labels."""
        return {
            name: len(counts)
            for name, counts in self.values.items()
            if len(counts) > 1 and are_labels(len(counts), counts.total())
        }

    def quantiles(self) -> dict[str, list[float]]:
        """By what is measured: the quantiles above; what was not seen is left out."""
        groups = [rows for shard in self.catalog.shards for rows in shard.row_groups]
        sizes = [size for shard in self.catalog.shards for size in shard.group_bytes]
        measured: dict[str, Sequence[float]] = {
            "rows a row group": groups,
            "MB a row group": [size / 1e6 for size in sizes],
            "captions a row": self.captions_a_row,
            "words a caption": self.words,
            "image width": [width for width, _ in self.sides],
            "image height": [height for _, height in self.sides],
            "kB an image": [size / 1e3 for size in self.image_bytes],
        }
        return {
            name: [float(value) for value in np.quantile(values, QUANTILES)]
            for name, values in measured.items()
            if len(values)
        }

    def advice(self) -> list[str]:
        """Sentences on what to mend, worst first."""
        found = []
        bad, catalog = sum(self.bad.values()), self.catalog
        if self.rows_read and bad > self.rows_read / 2:
            found.append(
                f"{bad} of {self.rows_read} sampled rows are unusable: more than the default "
                "data.max_bad_fraction 0.5 allows"
            )
        if are_labels(len(self.captions), self.captions.total()):
            found.append(
                f"the captions are labels, {len(self.captions):,} different of "
                f"{self.captions.total():,} sampled: retrieval will say little, since another row "
                "with the same caption counts as a wrong answer; train with "
                "evaluate.retrieval=false, and name a column in evaluate.zero_shot or linear_probe"
            )
        if self.unclean_captions:
            found.append(
                f"{self.unclean_captions:,} of {len(self.words):,} sampled captions hold broken "
                "encoding, HTML entities or markup: train with data.clean_captions=true"
            )
        if self.largest_group > LARGE_GROUP:
            found.append(
                f"the largest row group holds {self.largest_group / 2**20:,.0f} MB, and a reader "
                f"holds a whole one: rewrite with `gammaray data prepare {catalog.root} OUT`"
            )
        if self.sides and np.median([min(pair) for pair in self.sides]) > 2 * 288:
            found.append(
                "half of the images have a short side above 576 pixels, and most of the time goes "
                f"into decoding what is thrown away: `gammaray data prepare {catalog.root} OUT` "
                "makes them smaller once"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """All but the pictures, as plain values."""
        return {
            "root": self.catalog.root,
            "rows": self.catalog.num_rows,
            "shards": len(self.catalog.shards),
            "bytes": self.catalog.num_bytes,
            "image_column": self.catalog.sources[0].columns.image,
            "caption_column": self.catalog.sources[0].columns.caption,
            "split": list(self.catalog.sources[0].columns.split),
            "schema": {column.name: str(column.type) for column in self.catalog.sources[0].schema},
            "rows_read": self.rows_read,
            "bad": dict(self.bad),
            "bad_rows": [{"row": row, "reason": reason} for row, reason in self.named],
            "formats": dict(self.formats),
            "captions": self.captions.total(),
            "different_captions": len(self.captions),
            "labels": self.labels,
            "unclean_captions": self.unclean_captions,
            "quantiles": self.quantiles(),
            "advice": self.advice(),
        }


def inspect(catalog: Catalog, *, rows: int = SAMPLE, groups: int = SAMPLED_GROUPS) -> Inspection:
    """Read and decode about so many rows, from row groups spread over all shards."""
    found = Inspection(catalog=catalog)
    rng = np.random.default_rng(0)
    for path, group, table, chosen in _sampled(catalog, rng, rows, groups):
        for index in chosen:
            row = {name: table.column(name)[int(index)].as_py() for name in table.column_names}
            reason = _look(found, row)
            found.rows_read += 1
            if reason is not None:
                found.bad[reason] += 1
                if len(found.named) < NAMED:
                    found.named.append((f"{path}:{group}:{row['row']}", reason))
    return found


def _sampled(
    catalog: Catalog, rng: np.random.Generator, most_rows: int, most_groups: int
) -> Iterator[tuple[str, int, pa.Table, NDArray[np.int64]]]:
    groups = [
        (shard, group)
        for shard in catalog.shards
        for group, rows in enumerate(shard.row_groups)
        if rows
    ]
    spread = np.linspace(0, len(groups) - 1, min(most_groups, len(groups)))
    chosen = [groups[int(index)] for index in spread.round()]
    for shard, group in chosen:
        source = catalog.sources[shard.source]
        filesystem, _ = open_filesystem(source.root)
        # Of each shard: but for the columns in use they may differ.
        labels = label_columns(_read_schema(filesystem, shard.path), source.columns)
        table = read_rows(filesystem, shard.path, group, source.columns, labels)
        most = min(table.num_rows, -(-most_rows // len(chosen)))
        yield shard.path, group, table, np.sort(rng.permutation(table.num_rows)[:most])


def _read_schema(filesystem: pafs.FileSystem, path: str) -> pa.Schema:
    def read() -> pa.Schema:
        with filesystem.open_input_file(path) as file:
            return pq.read_schema(file)

    return retried(read, path, filesystem)


def _look(found: Inspection, row: dict[str, Any]) -> str | None:
    """Take a row into the facts; give the reason why it is unusable, if it is."""
    captions = as_captions(row["caption"])
    found.captions_a_row.append(len(captions))
    found.captions.update(captions)
    for name, value in row.items():
        if name.startswith("label/") and value:
            found.values.setdefault(name.removeprefix("label/"), Counter())[value] += 1
    found.words.extend(len(caption.split()) for caption in captions)
    found.unclean_captions += sum(clean_caption(caption) != caption for caption in captions)
    if row["absence"] is not None:
        return row["absence"]
    encoded = next((image for image in row["image"] or () if image), None)
    try:
        pixels = decode(encoded, (255, 255, 255))
    except BadImage as error:
        return error.reason
    assert encoded is not None
    height, width = pixels.shape[:2]
    found.sides.append((width, height))
    found.image_bytes.append(len(encoded))
    found.formats[_format(encoded)] += 1
    if not captions:
        return "empty_caption"
    if len(found.pairs) < SHEET_COLUMNS * SHEET_ROWS:
        found.pairs.append((eval_geometry(pixels, THUMB), captions[0]))
    return None


def _format(encoded: bytes) -> str:
    starts = {b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP", b"II*": "TIFF"}
    for start, name in starts.items():
        if encoded.startswith(start):
            return name
    return "WebP" if encoded[8:12] == b"WEBP" else "other"


def draw_sheet(found: Inspection, file: Path) -> None:
    """Draw the sampled pairs, as the model's eye sees them (centre square), to a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * SHEET_COLUMNS, 3.0 * SHEET_ROWS), layout="constrained")
    panels = figure.subplots(SHEET_ROWS, SHEET_COLUMNS)
    for panel in panels.flat:
        panel.axis("off")
    for panel, (pixels, caption) in zip(panels.flat, found.pairs, strict=False):
        panel.imshow(pixels)
        text = textwrap.shorten(caption.replace("$", r"\$"), 110, placeholder=" ...")
        panel.set_title(textwrap.fill(text, 34), fontsize=7, loc="left")
    figure.savefig(file, dpi=110)
