"""Every form in which people have pairs, built as they have it, read or refused."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.prepare.files import find_files
from pipeline.data.prepare.sources import Origin, open_origin
from pipeline.data.prepare.units import SourceRow
from pipeline.errors import UserError
from tests.tiny_data import jpeg

RED, GREEN = jpeg((250, 0, 0)), jpeg((0, 250, 0))


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (24, 20), (0, 0, 250, 128)).save(buffer, "PNG")
    return buffer.getvalue()


def _open(path: Path | str, scratch: Path, images: str = "", **names: str) -> Origin:
    columns = {"image": "auto", "caption": "auto", **names}
    return open_origin(find_files(str(path)), images=images, scratch=str(scratch), **columns)


def _rows(path: Path | str, scratch: Path, images: str = "", **names: str) -> list[SourceRow]:
    source = _open(path, scratch, images, **names)
    return [row for unit in source.units for row in source.reader.rows(unit)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


# ---- Parquet -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_img2dataset_parquet_with_failed_rows(data: Path, scratch: Path, kind: str) -> None:
    rows = 5
    bad = {1: "failed_to_download", 3: "failed_to_resize"}
    pictures = [None if row in bad else RED for row in range(rows)]
    table = pa.table(
        {
            "NSFW": pa.array(["UNLIKELY"] * rows),
            "similarity": pa.array([0.3] * rows, pa.float64()),
            "caption": [f"caption {row}" for row in range(rows)],
            "url": [f"https://example.org/{row}.jpg" for row in range(rows)],
            "key": [f"{row:09d}" for row in range(rows)],
            "status": [bad.get(row, "success") for row in range(rows)],
            "error_message": pa.array([bad.get(row) for row in range(rows)], pa.string()),
            **{
                name: pa.array([None if row in bad else 24 for row in range(rows)], pa.int32())
                for name in ("width", "height", "original_width", "original_height")
            },
            "exif": ["{}"] * rows,
            "sha256": ["0" * 64] * rows,
            kind: pa.array(pictures, pa.binary()),
        }
    )
    pq.write_table(table, data / "00000.parquet", row_group_size=2)
    (data / "00000_stats.json").write_text("{}")
    found = _rows(data, scratch)
    assert [row.key for row in found] == [f"{row:09d}" for row in range(rows)]
    assert [row.absence for row in found] == [
        None, "failed_download", None, "failed_download", None,
    ]  # fmt: skip
    assert [row.images for row in found] == [[RED], [None], [RED], [None], [RED]]
    assert [(row.unit.group, row.row) for row in found] == [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4)]


def _image_column(*cells: tuple[bytes | None, str | None]) -> pa.Array:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": data, "path": path} for data, path in cells], kind)


def test_hugging_face_structs_splits_and_several_captions(data: Path, scratch: Path) -> None:
    (data / "beside.jpg").write_bytes(GREEN)
    table = pa.table(
        {
            "image": _image_column((RED, "a.jpg"), (None, "beside.jpg"), (None, "lost.jpg")),
            "caption": pa.array([["one", " two "], ["three"], ["four"]], pa.list_(pa.string())),
            "sentids": pa.array([["0", "1"], ["2"], ["3"]]),
            "split": ["train", "val", "test"],
            "img_id": ["10", "11", "12"],
            "filename": ["a.jpg", "b.jpg", "c.jpg"],
        }
    )
    pq.write_table(table, data / "TEST-00000-of-00001.parquet")
    found = _rows(data, scratch)
    assert [row.captions for row in found] == [["one", "two"], ["three"], ["four"]]
    assert [row.split for row in found] == ["train", "val", "test"]
    assert [row.key for row in found] == ["10", "11", "12"]
    assert [row.images for row in found] == [[RED], [GREEN], [None]]
    assert [row.absence for row in found] == [None, None, "missing_file"]


def test_lists_of_images_and_names_of_other_hubs(data: Path, scratch: Path) -> None:
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pictures = [[{"bytes": RED, "path": None}, {"bytes": GREEN, "path": None}], []]
    table = pa.table({"image": pa.array(pictures, kind), "alt_text": [["a"], ["b"]]})
    pq.write_table(table, data / "0.parquet")
    assert [row.images for row in _rows(data, scratch)] == [[RED, GREEN], []]
    wds = pa.table({"__key__": ["k"], "jpg": _image_column((RED, "k.jpg")), "txt": ["c"]})
    pq.write_table(wds, data / "0.parquet")
    (row,) = _rows(data, scratch)
    assert (row.key, row.images, row.captions) == ("k", [RED], ["c"])


def test_files_may_differ_in_types(data: Path, scratch: Path) -> None:
    for number, (binary, ids) in enumerate(
        [(pa.binary(), pa.int64()), (pa.large_binary(), pa.float64())]
    ):
        table = pa.table(
            {
                "id": pa.array([7 + number], ids),
                "image": pa.array([RED], binary),
                "caption": ["x"] if number else [["x", "y"]],
            }
        )
        pq.write_table(table, data / f"{number}.parquet")
    found = _rows(data, scratch)
    assert [row.key for row in found] == ["7", "8"]
    assert [row.captions for row in found] == [["x", "y"], ["x"]]


def test_rows_without_an_identity_are_named_by_file_and_row(data: Path, scratch: Path) -> None:
    (data / "deep").mkdir()
    table = pa.table({"image": [RED] * 3, "caption": ["a", "b", "c"]})
    pq.write_table(table, data / "deep" / "x.parquet", row_group_size=2)
    keys = [row.key for row in _rows(data, scratch)]
    assert keys == [f"deep/x.parquet:{row}" for row in range(3)]


def test_a_damaged_row_group_is_rows_that_say_so(data: Path, scratch: Path) -> None:
    table = pa.table({"image": [RED * 5] * 4, "caption": ["a", "b", "c", "d"]})
    path = data / "x.parquet"
    pq.write_table(table, path, row_group_size=2, compression="snappy", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[4:64] = b"\xff" * 60  # the first page's header
    path.write_bytes(content)
    found = _rows(data, scratch)
    assert [row.absence for row in found] == ["damaged_file", "damaged_file", None, None]
    assert [row.row for row in found] == [0, 1, 2, 3]


METADATA_ONLY = {
    "laion": {
        "SAMPLE_ID": pa.array([1.0]), "URL": ["https://x/1.jpg"], "TEXT": ["a"],
        "HEIGHT": pa.array([9.0]), "WIDTH": pa.array([9.0]), "similarity": [0.3],
    },
    "coyo": {"id": [1], "url": ["https://x/1.jpg"], "text": ["a"], "image_phash": ["f"]},
    "datacomp": {"uid": ["f"], "url": ["https://x/1.jpg"], "text": ["a"], "sha256": ["0"]},
    "conceptual": {"image_url": ["https://x/1.jpg"], "caption": ["a"]},
}  # fmt: skip


@pytest.mark.parametrize("name", METADATA_ONLY)
def test_links_without_pixels_are_refused(data: Path, scratch: Path, name: str) -> None:
    pq.write_table(pa.table(METADATA_ONLY[name]), data / "0.parquet")
    with pytest.raises(UserError, match=r"links .* but no pixels; .*img2dataset"):
        _open(data, scratch)


def test_a_wrong_column_names_the_option(data: Path, scratch: Path) -> None:
    pq.write_table(pa.table({"image": [RED], "caption": ["a"]}), data / "0.parquet")
    with pytest.raises(UserError, match=r"^--caption-column: 'words' is not in"):
        _open(data, scratch, caption="words")
    with pytest.raises(UserError, match=r"--images: is /pics, but .* holds parquet"):
        _open(data, scratch, images="/pics")


# ---- WebDataset ----------------------------------------------------------------------------------


def _tar(path: Path, *members: tuple[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_tars_with_text_or_json_captions(data: Path, scratch: Path) -> None:
    (data / "no").mkdir()
    _tar(
        data / "00000.tar",
        ("000.jpg", RED), ("000.json", b'{"caption": "from json"}'), ("000.txt", b" from\n text"),
        ("001.png", _png()), ("001.json", b'{"TEXT": "laion", "split": "val"}'),
        ("a/b.c/002.cls.txt", b"no caption"), ("a/b.c/002.webp", RED), ("a/b.c/002.txt", b"deep"),
    )  # fmt: skip
    _tar(data / "00001.tar", ("000.jpeg", GREEN), ("000.txt", b"again"))
    found = _rows(data, scratch)
    assert [row.key for row in found] == ["000", "001", "a/b.c/002", "000"]
    assert [row.captions for row in found] == [["from text"], ["laion"], ["deep"], ["again"]]
    assert [row.images for row in found] == [[RED], [_png()], [RED], [GREEN]]
    assert [row.split for row in found] == [None, "val", None, None]
    assert [(row.unit.name, row.row) for row in found][2:] == [("00000.tar", 2), ("00001.tar", 0)]
    named = _rows(data / "00000.tar", scratch, caption="caption", image="png")
    assert [row.captions for row in named] == [["from json"], [], []]
    assert [row.images for row in named] == [[None], [_png()], [None]]


def test_img2dataset_tars_beside_their_index(data: Path, scratch: Path) -> None:
    failed = json.dumps({"status": "failed_to_download", "caption": "c"}).encode()
    broken = b"\xff{not json"
    _tar(
        data / "00000.tar", ("0.jpg", RED), ("0.json", broken), ("0.txt", b"a"), ("1.json", failed)
    )
    index = pa.table({"caption": ["a"], "url": ["https://x/0.jpg"], "key": ["0"]})
    pq.write_table(index, data / "00000.parquet")
    found = _rows(data, scratch)
    assert [(row.key, row.absence) for row in found] == [("0", None), ("1", "failed_download")]
    pq.write_table(index, data / "other.parquet")
    with pytest.raises(UserError, match=r"holds tars and also Parquet \(other.parquet\)"):
        _open(data, scratch)


def test_samples_that_lack_a_part(data: Path, scratch: Path) -> None:
    _tar(data / "0.tar", ("a.txt", b"words"), ("b.jpg", RED), ("c.jpg", RED), ("c.txt", b"c"))
    found = _rows(data, scratch)
    assert [(row.images, row.captions) for row in found] == [
        ([None], ["words"]), ([RED], []), ([RED], ["c"]),
    ]  # fmt: skip


def test_compressed_tars_and_odd_text(data: Path, scratch: Path) -> None:
    odd = json.dumps({"caption": "half a \ud83d smile"}).encode()
    _tar(data / "0.tar.gz", ("a.jpg", RED), ("a.json", odd), ("b.jpg", RED), ("b.txt", b"\xffx"),
         mode="w:gz")  # fmt: skip
    captions = [row.captions[0] for row in _rows(data, scratch)]
    assert captions == ["half a ? smile", "\N{REPLACEMENT CHARACTER}x"]


MEMBERS = [(f"{row}.{kind}", RED if kind == "jpg" else b"text") for row in range(3)
           for kind in ("jpg", "txt")]  # fmt: skip


def test_a_tar_that_breaks_off_gives_what_it_has(data: Path, scratch: Path) -> None:
    path = _tar(data / "0.tar", *MEMBERS)
    whole = path.read_bytes()
    second = 2 * 512 + -(-len(RED) // 512) * 512 + 512  # where row 1 begins
    path.write_bytes(whole[: second + 600])
    found = _rows(data, scratch)
    assert [(row.row, row.key, row.absence) for row in found] == [
        (0, "0", None), (1, "1", "damaged_file"),
    ]  # fmt: skip
    assert found[0].images == [RED]
    path.write_bytes(b"")
    assert [row.absence for row in _rows(data, scratch)] == ["damaged_file"]


def test_a_header_without_sense_does_not_end_a_tar_in_silence(data: Path, scratch: Path) -> None:
    members = [(f"{row:03d}.{kind}", content * 20) for row in range(200)
               for kind, content in (("jpg", RED), ("txt", b"text"))]  # fmt: skip
    path = _tar(data / "0.tar", *members)
    content = bytearray(path.read_bytes())
    place = content.index(b"100.jpg")
    content[place : place + 512] = b"\x07" * 512
    path.write_bytes(content)
    found = _rows(data, scratch)
    assert [row.absence for row in found] == [None] * 100 + ["damaged_file"]


# ---- tables --------------------------------------------------------------------------------------


@pytest.fixture
def pictures(data: Path) -> Path:
    folder = data / "pics"
    (folder / "val2014").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "val2014/c.jpg"):
        (folder / name).write_bytes(RED if name == "a.jpg" else GREEN)
    return folder


def test_csv_with_quotes_and_paths_beside_it(data: Path, scratch: Path, pictures: Path) -> None:
    text = (
        "image,caption,split\n"
        'pics/a.jpg,"commas, ""quotes""\nand lines",train\n'
        f"{pictures}/b.jpg,absolute,\n"
        "pics/lost.jpg,lost,train\n"
        ",no image,train\n"
        "pics/a.jpg\n"
    )
    (data / "pairs.csv").write_text(text, encoding="utf-8-sig")
    found = _rows(data / "pairs.csv", scratch)
    assert [row.images for row in found] == [[RED], [GREEN], [None], [None], [RED]]
    assert [row.captions for row in found] == [
        ['commas, "quotes" and lines'], ["absolute"], ["lost"], ["no image"], [],
    ]  # fmt: skip
    assert [row.absence for row in found] == [None, None, "missing_file", None, None]
    assert [row.split for row in found] == ["train", None, "train", "train", None]
    assert [row.key for row in found] == [
        "pics/a.jpg", f"{pictures}/b.jpg", "pics/lost.jpg", "pairs.csv:3", "pics/a.jpg",
    ]  # fmt: skip
    assert _rows(data, scratch) == found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pairs.tsv", "caption\timage_path\na, b\ta.jpg\n"),
        ("pairs.csv", "filepath\ttitle\na.jpg\ta, b\n"),
        ("pairs.csv", "file_name;text\na.jpg;a, b\n"),
    ],
)
def test_other_separators_and_names(
    data: Path, scratch: Path, pictures: Path, name: str, text: str
) -> None:
    (data / name).write_text(text)
    (row,) = _rows(data / name, scratch, images=str(pictures))
    assert (row.images, row.captions, row.key) == ([RED], ["a, b"], "a.jpg")


def test_many_rows_keep_their_numbers(data: Path, scratch: Path, pictures: Path) -> None:
    lines = [f"pics/a.jpg,caption {row}" for row in range(300)]
    (data / "a.csv").write_text("image,caption\n" + "\n".join(lines))
    (data / "b.csv").write_text("image,caption\npics/b.jpg,last\n")
    source = _open(f"{data}/*.csv", scratch)
    assert [unit.rows for unit in source.units] == [128, 128, 44, 1]
    found = [row for unit in source.units for row in source.reader.rows(unit)]
    assert [(row.unit.name, row.row) for row in found] == [
        *(("a.csv", row) for row in range(300)), ("b.csv", 0),
    ]  # fmt: skip
    assert found[299].captions == ["caption 299"]


def _json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_karpathy_splits(data: Path, scratch: Path, pictures: Path) -> None:
    def image(split: str, number: int, **more: Any) -> dict[str, Any]:
        sentences = [
            {
                "tokens": ["a"],
                "raw": f"{split} {each}",
                "imgid": number,
                "sentid": 5 * number + each,
            }
            for each in range(2)
        ]
        return {"sentids": [0, 1], "imgid": number, "split": split, "sentences": sentences, **more}

    coco = {
        "dataset": "coco",
        "images": [image("restval", 0, filepath="val2014", filename="c.jpg", cocoid=42)],
    }
    (row,) = _rows(_json(data / "dataset_coco.json", coco), scratch, images=str(pictures))
    assert (row.key, row.split, row.captions) == ("42", "restval", ["restval 0", "restval 1"])
    assert row.images == [GREEN]
    flickr = {"dataset": "flickr30k", "images": [image("train", 7, filename="a.jpg")]}
    (row,) = _rows(_json(data / "dataset_flickr30k.json", flickr), scratch, images=str(pictures))
    assert (row.key, row.split, row.images) == ("7", "train", [RED])


def test_coco_captions(data: Path, scratch: Path, pictures: Path) -> None:
    value = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 24}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": 1, "id": 10, "caption": "one"},
            {"image_id": 3, "id": 11, "caption": "of no image"},
            {"image_id": 1, "id": 12, "caption": "two"},
        ],
    }
    found = _rows(_json(data / "captions_val2014.json", value), scratch, images=str(pictures))
    assert [(row.key, row.captions, row.images) for row in found] == [
        ("1", ["one", "two"], [RED]), ("2", [], [GREEN]), ("3", ["of no image"], [None]),
    ]  # fmt: skip


def test_albef_lists(data: Path, scratch: Path, pictures: Path) -> None:
    value = [
        {"image": "a.jpg", "caption": "one", "image_id": "coco_1"},
        {"image": "b.jpg", "caption": ["two", "three"]},
    ]
    found = _rows(_json(data / "albef.json", value), scratch, images=str(pictures))
    assert [(row.key, row.captions) for row in found] == [
        ("coco_1", ["one"]), ("b.jpg", ["two", "three"]),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_lines_of_json(data: Path, scratch: Path, pictures: Path, name: str) -> None:
    lines = ['{"image_path": "pics/a.jpg", "caption": "one"}', "",
             '{"image_path": "pics/b.jpg", "caption": "half \\ud83d"}']  # fmt: skip
    (data / name).write_text("\n".join(lines))
    found = _rows(data / name, scratch)
    assert [row.captions for row in found] == [["one"], ["half ?"]]
    assert [row.images for row in found] == [[RED], [GREEN]]


# ---- refusals ------------------------------------------------------------------------------------

REFUSED = {
    "cc3m": (
        "x.tsv",
        "a caption\thttps://x/1.jpg\n",
        "list of links without a header.*img2dataset",
    ),
    "cc12m": ("x.tsv", "https://x/1.jpg\ta caption\n", "list of links without a header.*tsv"),
    "links": ("x.csv", "url,caption\nhttps://x,a\n", "links .column 'url'.*img2dataset.*csv"),
    "cells": ("x.csv", "image,caption\na.jpg,a\nhttps://x,a\n", "links .column 'image'"),
    "object": ("x.json", '{"pairs": []}', r"holds \['pairs'\]; known are"),
    "texts": ("x.json", '["a.jpg"]', "entry 0 of x.json is a.jpg"),
    "cut": ("x.json", '[{"image": ', "x.json is not JSON"),
    "cut line": ("x.jsonl", '{"image": "a", "caption": "b"}\n{"im', "x.jsonl line 2 is not JSON"),
    "no caption": ("x.csv", "image,words\na.jpg,a\n", "no caption column.*--caption-column"),
    "no image": ("x.csv", "photo,caption\na.jpg,a\n", "no image column.*--image-column"),
    "empty": ("x.csv", "image,caption\n", "lists no pairs"),
    "nothing": ("x.txt", "words", r"kind \['.txt'\], and no Parquet, tar, CSV"),
    "pictures": ("x.jpg", "words", "write a CSV with the columns image and caption"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_pairs_is_refused(data: Path, scratch: Path, case: str) -> None:
    name, text, message = REFUSED[case]
    (data / name).write_text(text)
    with pytest.raises(UserError, match=message):
        _open(data, scratch)


def test_other_refusals(data: Path, scratch: Path) -> None:
    with pytest.raises(UserError, match=r"IN: .*nowhere does not exist"):
        _open(data / "nowhere", scratch)
    with pytest.raises(UserError, match="no file matches"):
        _open(f"{data}/*.csv", scratch)
    (data / "a.csv").write_bytes(b"image,caption\na.jpg,\xff\xfe\n")
    with pytest.raises(UserError, match=r"a\.csv is not UTF-8"):
        _open(data, scratch)
    (data / "b.csv").write_text("")
    with pytest.raises(UserError, match=r"2 tables \(a.csv, b.csv\); give one, or a pattern"):
        _open(data, scratch)


@pytest.mark.parametrize(
    "names",
    [("train/0.parquet", "val/0.parquet"),
     ("data/train-00000-of-1.parquet", "data/test-00000-of-1.parquet")],
)  # fmt: skip
def test_splits_do_not_melt_into_one_set(data: Path, scratch: Path, names: tuple[str, str]) -> None:
    for name in names:
        (data / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": [RED], "caption": ["a"]}), data / name)
    with pytest.raises(UserError, match=r"holds the splits .*prepare each by itself"):
        _open(data, scratch)
    assert len(_rows((data / names[0]).parent / "*train*" if "-" in names[0] else
                     data / "train", scratch)) == 1  # fmt: skip


def test_the_digest_follows_the_files(data: Path) -> None:
    path = data / "0.parquet"
    pq.write_table(pa.table({"image": [RED], "caption": ["a"]}), path)
    digest = find_files(str(data)).digest
    assert find_files(str(data)).digest == digest
    pq.write_table(pa.table({"image": [GREEN], "caption": ["a"]}), path)
    assert find_files(str(data)).digest != digest
