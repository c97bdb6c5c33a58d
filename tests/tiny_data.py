"""Small Parquet data with real JPEG bytes: what tests of files and plans share."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

LABELS = ("circle", "star", "cross")


def jpeg(color: tuple[int, int, int] = (200, 60, 30), size: tuple[int, int] = (24, 20)) -> bytes:
    """The bytes of a plain picture of (width, height) `size`."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "JPEG")
    return buffer.getvalue()


def write_pairs(folder: Path, count: int, shards: int = 1, **columns: object) -> Path:
    """Write `count` rows of image, caption and shape; `columns` are added or put in their place."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "image": [jpeg((row * 7 % 256, 60, 30)) for row in range(count)],
            "caption": [f"a {LABELS[row % len(LABELS)]} number {row}" for row in range(count)],
            "shape": [LABELS[row % len(LABELS)] for row in range(count)],
            **columns,
        }
    )
    share = -(-count // shards)
    for shard in range(shards):
        pq.write_table(table.slice(shard * share, share), folder / f"part-{shard}.parquet")
    return folder
