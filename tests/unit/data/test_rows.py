"""Rows of every layout people have, as one table."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from pipeline.data.layout import read_catalog
from pipeline.data.rows import read_rows

ONE, TWO = b"one", b"two"


def _read(folder: Path, columns: dict[str, Any], **given: Any) -> list[dict[str, Any]]:
    pq.write_table(pa.table(columns), folder / "0.parquet")
    catalog = read_catalog(str(folder), "data.train", **given)
    (shard,) = catalog.shards
    table = read_rows(pafs.LocalFileSystem(), shard.path, 0, catalog.sources[0].columns)
    assert table.num_rows == shard.row_groups[0]
    return table.to_pylist()


TEXTS = ["a", "b"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "binary": {"image": [ONE, TWO], "text": TEXTS},
    "large types": {
        "jpg": pa.array([ONE, TWO], pa.large_binary()),
        "txt": pa.array(TEXTS, pa.large_string()),
    },
    "dictionary text": {
        "jpg": [ONE, TWO], "caption": pa.array(TEXTS).dictionary_encode(),
    },
    "Hugging Face struct": {
        "image": [{"bytes": ONE, "path": "x.jpg"}, {"bytes": TWO, "path": None}], "text": TEXTS,
    },
    "struct without path": {"image": [{"bytes": ONE}, {"bytes": TWO}], "text": TEXTS},
    "lists of binary": {"image": [[ONE], [TWO]], "caption": TEXTS},
    "lists of structs": {
        "image": [[{"bytes": ONE, "path": None}], [{"bytes": TWO, "path": "y"}]],
        "caption": [["a"], ["b"]],
    },
    "extra columns": {
        "LICENSE": [None, "?"], "image": [ONE, TWO], "caption": TEXTS, "exif": ["{}", None],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_read_as_they_are(tmp_path: Path, name: str) -> None:
    assert _read(tmp_path, LAYOUTS[name]) == [
        {"row": 0, "image": [ONE], "caption": ["a"], "absence": None},
        {"row": 1, "image": [TWO], "caption": ["b"], "absence": None},
    ]


def test_several_images_and_captions_and_nulls_among_them(tmp_path: Path) -> None:
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    images = [[{"bytes": ONE, "path": "1"}, {"bytes": None, "path": None}], None, []]
    rows = _read(
        tmp_path,
        {"image": pa.array(images, kind), "caption": [["a", None, "b"], None, []]},
    )
    assert [row["image"] for row in rows] == [[ONE, None], [], []]
    assert [row["caption"] for row in rows] == [["a", None, "b"], None, []]


def test_a_failed_download_is_told_from_a_null_image(tmp_path: Path) -> None:
    """img2dataset keeps failed rows, with a status and no image."""
    rows = _read(
        tmp_path,
        {
            "jpg": [ONE, None, None, TWO],
            "caption": ["a", "b", "c", "d"],
            "status": ["success", "failed_to_download", "success", "failed_to_resize"],
        },
    )
    assert [row["absence"] for row in rows] == [None, "failed_download", None, None]


def test_images_beside_the_table_are_fetched(tmp_path: Path) -> None:
    """Null bytes with a path: relative to the shard, absolute, a URL; one is not there."""
    (tmp_path / "pictures").mkdir()
    files = [tmp_path / "pictures" / f"{index}.jpg" for index in range(3)]
    for index, file in enumerate(files):
        file.write_bytes(bytes([index]))
    paths = ["pictures/0.jpg", str(files[1]), f"file://{files[2]}", "pictures/none.jpg", None, "z"]
    content = [None] * 5 + [TWO]
    expected = [[b"\0"], [b"\1"], [b"\2"], [None], [None], [TWO]]
    absences = [None, None, None, "missing_file", None, None]
    cells = [{"bytes": inside, "path": path} for inside, path in zip(content, paths, strict=True)]
    rows = _read(tmp_path, {"image": cells, "caption": list("abcdef")})
    assert [row["image"] for row in rows] == expected
    assert [row["absence"] for row in rows] == absences
    rows = _read(tmp_path, {"where": paths[:5], "caption": list("abcde")}, image="where")
    assert [row["image"] for row in rows] == expected[:5]
    assert [row["absence"] for row in rows] == absences[:5]


def test_a_row_keeps_its_number_where_a_split_is_chosen(tmp_path: Path) -> None:
    values = {"image": [ONE, TWO, ONE], "text": ["a", "b", "c"], "split": ["val", "train", "train"]}
    rows = _read(tmp_path, values)
    assert [(row["row"], row["caption"]) for row in rows] == [(1, ["b"]), (2, ["c"])]


def test_files_may_differ_in_their_types(tmp_path: Path) -> None:
    for index, name in enumerate(LAYOUTS):
        if {"image", "caption"} <= set(LAYOUTS[name]):
            pq.write_table(pa.table(LAYOUTS[name]), tmp_path / f"{index}.parquet")
    catalog = read_catalog(str(tmp_path), "data.train")
    tables = [
        read_rows(pafs.LocalFileSystem(), shard.path, 0, catalog.sources[0].columns)
        for shard in catalog.shards
    ]
    assert len(tables) == 3
    assert pa.concat_tables(tables).num_rows == catalog.num_rows == 6


def test_an_unreadable_row_group_is_named(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    pq.write_table(pa.table({"image": [ONE] * 999, "caption": ["a" * 99] * 999}), path)
    catalog = read_catalog(str(path), "data.train")
    content = bytearray(path.read_bytes())
    content[4:64] = b"\xff" * 60
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"0\.parquet: row group 0 cannot be read: "):
        read_rows(pafs.LocalFileSystem(), str(path), 0, catalog.sources[0].columns)
