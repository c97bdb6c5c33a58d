"""Shards from pairs: each row once, bytes kept, one order, and a job that can stop anywhere."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.layout import read_catalog
from pipeline.data.prepare.job import Options, Outcome, Sizes, prepare
from pipeline.data.prepare.scatter import order_of
from pipeline.data.prepare.store import Store
from pipeline.errors import UserError
from tests.tiny_data import jpeg, write_pairs

# A part per few row groups, several buckets to a shard, several shards: as a large set.
SMALL = Sizes(part=4_000, bucket=3_000, shard=12_000, row_group=4_000, buffer=3_000)


def _prepare(
    path: Path, out: Path, sizes: Sizes = SMALL, run: Any = map, **options: Any
) -> Outcome:
    return prepare(str(path), str(out), Options(**options), run, sizes=sizes)


def _read(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob("part-*")) for row in pq.read_table(path).to_pylist()]


def _encoded(size: tuple[int, int], kind: str = "JPEG", mode: str = "RGB", **more: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA")
    buffer = io.BytesIO()
    (image if mode == "RGBA" else image.convert("RGB").convert(mode)).save(buffer, kind, **more)
    return buffer.getvalue()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """200 rows, of which four cannot be used, in row groups of 20."""
    images: list[bytes | None] = [jpeg((row, 60, 30)) for row in range(200)]
    images[7], images[50], images[199] = b"broken", None, jpeg()[:-200]
    captions: list[str | None] = [f"number {row}" for row in range(200)]
    captions[120] = " \n"
    folder = write_pairs(tmp_path / "in", 0)
    table = pa.table({"uid": [f"u{row}" for row in range(200)], "image": images, "text": captions})
    (folder / "part-0.parquet").unlink()
    for shard in range(2):
        path = folder / f"{shard}.parquet"
        # As large as its images are, which photographs are and these are not.
        pq.write_table(
            table.slice(shard * 100, 100), path, row_group_size=20,
            use_dictionary=False, compression="none",
        )  # fmt: skip
    return folder


BAD = {"u7": "corrupt_image", "u50": "null_image", "u120": "empty_caption", "u199": "corrupt_image"}


def test_every_row_is_in_one_shard_or_in_the_quarantine(pairs: Path, tmp_path: Path) -> None:
    stats = _prepare(pairs, tmp_path / "out").stats
    rows = _read(tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "_quarantine.parquet").to_pylist()
    dropped = {row["key"]: row["reason"] for row in table}
    assert dropped == BAD
    assert len(table) == len(BAD)
    assert {row["key"]: (row["file"], row["row"]) for row in table}["u120"] == ("1.parquet", 20)
    keys = [row["key"] for row in rows]
    assert sorted(keys) == sorted({f"u{row}" for row in range(200)} - set(BAD))
    assert all(row["caption"] == f"number {row['key'][1:]}" for row in rows)
    assert (stats["rows_in"], stats["rows_out"]) == (200, 196)
    assert stats["dropped"] == {"corrupt_image": 2, "empty_caption": 1, "null_image": 1}
    assert sum(shard["rows"] for shard in stats["shards"]) == 196
    assert stats["image_bytes"] == sum(len(row["image"]) for row in rows)
    assert stats["caption_words"]["mean"] == 2
    assert not (tmp_path / "out" / "_work").exists()


def test_an_image_that_fits_keeps_its_bytes(tmp_path: Path) -> None:
    kept = {
        "rgb": _encoded((60, 40)),
        "fits exactly": _encoded((90, 50)),
        "gray": _encoded((40, 40), mode="L"),
        "progressive": _encoded((40, 40), progressive=True),
        "upright": _encoded((40, 30), exif=_exif(1)),
    }
    made = {
        "large": (_encoded((200, 100)), (100, 50)),
        "tall": (_encoded((100, 333)), (50, round(333 / 2))),
        "turned": (_encoded((40, 30), exif=_exif(6)), (30, 40)),
        "cmyk": (_encoded((40, 30), mode="CMYK"), (40, 30)),
        "png": (_encoded((40, 30), "PNG", "RGBA"), (40, 30)),
        "webp": (_encoded((40, 30), "WEBP"), (40, 30)),
        "palette": (_encoded((60, 70), "GIF", "P"), (50, round(70 * 50 / 60))),
    }
    images = [*kept.values(), *(data for data, _ in made.values())]
    names = [*kept, *made]
    write_pairs(tmp_path / "in", len(names), image=images, key=names)
    stats = _prepare(tmp_path / "in", tmp_path / "out", short_side=50).stats
    rows = {row["key"]: row for row in _read(tmp_path / "out")}
    assert set(rows) == set(names)
    for name, data in kept.items():
        assert rows[name]["image"] == data, name
    for name, (data, size) in made.items():
        assert rows[name]["image"] != data
        assert (rows[name]["width"], rows[name]["height"]) == size, name
    for row in rows.values():
        with Image.open(io.BytesIO(row["image"])) as image:
            assert (image.format, image.size) == ("JPEG", (row["width"], row["height"]))
    assert (stats["images_kept"], stats["images_encoded"]) == (len(kept), len(made))
    assert stats["short_side"]["max"] == 50
    assert stats["source_short_side"]["max"] == 100


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_transparency_lies_on_white_and_colours_stay(tmp_path: Path) -> None:
    clear, blue = io.BytesIO(), io.BytesIO()
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(clear, "PNG")
    Image.new("RGB", (400, 400), (20, 40, 200)).save(blue, "PNG")
    write_pairs(
        tmp_path / "in", 2, image=[clear.getvalue(), blue.getvalue()], key=["clear", "blue"]
    )
    _prepare(tmp_path / "in", tmp_path / "out")
    rows = {row["key"]: np.asarray(Image.open(io.BytesIO(row["image"])))
            for row in _read(tmp_path / "out")}  # fmt: skip
    assert (rows["clear"] == 255).all()
    assert abs(rows["blue"].astype(int) - (20, 40, 200)).max() <= 3


def test_the_order_is_the_rows_own_whatever_the_sizes(pairs: Path, tmp_path: Path) -> None:
    """Parts, buckets and shards are how it is done; the rows' order is what comes out."""
    _prepare(pairs, tmp_path / "small")
    _prepare(pairs, tmp_path / "whole", Sizes())
    _prepare(pairs, tmp_path / "other", Sizes(), seed=1)
    small, whole, other = (
        [row["key"] for row in _read(tmp_path / name)] for name in ("small", "whole", "other")
    )
    assert small == whole
    assert sorted(other) == sorted(whole)
    assert other != whole
    places = np.array([int(key[1:]) for key in whole])
    expected = sorted(places, key=lambda row: order_of(0, row // 100, row % 100))
    assert places.tolist() == expected
    assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 0.2
    assert len(list((tmp_path / "small").glob("part-*"))) >= 5
    assert len(list((tmp_path / "whole").glob("part-*"))) == 1


def test_order_is_uniform() -> None:
    orders = np.array([order_of(0, file, row) for file in range(4) for row in range(5_000)], float)
    counts, _ = np.histogram(orders / 2**64, bins=20, range=(0, 1))
    assert abs(counts - 1000).max() < 5 * 1000**0.5


def test_shards_and_row_groups_are_bounded(pairs: Path, tmp_path: Path) -> None:
    stats = _prepare(pairs, tmp_path / "out").stats
    shards = [shard["image_bytes"] for shard in stats["shards"]]
    assert max(shards) <= SMALL.shard + 2 * SMALL.bucket
    assert max(shards) < 2 * min(shards)
    assert len(shards) == -(-sum(shards) // SMALL.shard)
    for path in (tmp_path / "out").glob("part-*"):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            images = file.read_row_group(group, columns=["image"]).column("image").to_pylist()
            assert sum(map(len, images)) <= SMALL.row_group


def test_the_same_source_gives_the_same_content(pairs: Path, tmp_path: Path) -> None:
    first, again = (_prepare(pairs, tmp_path / name).stats for name in ("first", "again"))
    assert first == again
    assert len(first["content_hash"]) == 64
    assert _prepare(pairs, tmp_path / "other", seed=2).stats["content_hash"] not in str(first)


def test_training_reads_what_was_prepared(pairs: Path, tmp_path: Path) -> None:
    _prepare(pairs, tmp_path / "out")
    catalog = read_catalog(str(tmp_path / "out"), "data.train")
    assert "image column 'image', caption column 'caption'" in catalog.describe()
    assert catalog.num_rows == 196
    assert pq.read_schema(tmp_path / "out" / "part-00000.parquet").names == [
        "key", "image", "caption", "width", "height",
    ]  # fmt: skip


def test_several_captions_and_splits_are_columns_of_all_shards(tmp_path: Path) -> None:
    """One caption type for all, though only the last of the files has several."""
    for number in range(3):
        captions = [[f"a {row}", f"b {row}"] if number == 2 else f"a {row}" for row in range(30)]
        splits = ["val" if row % 3 == 0 else "train" for row in range(30)]
        table = pa.table({"image": [jpeg()] * 30, "caption": captions, "split": splits})
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "in" / f"{number}.parquet")
    _prepare(tmp_path / "in", tmp_path / "out")
    schemas = [pq.read_schema(path) for path in (tmp_path / "out").glob("part-*")]
    assert len(schemas) > 1
    assert {str(schema.field("caption").type) for schema in schemas} == {"list<element: string>"}
    assert read_catalog(str(tmp_path / "out"), "data.val").num_rows == 30
    assert read_catalog(str(tmp_path / "out"), "data.train").num_rows == 60


def test_of_several_images_the_first_good_one_is_taken(tmp_path: Path) -> None:
    good = jpeg((1, 2, 3))
    images = pa.array([[b"broken", good, jpeg()], [b"broken", b""], []], pa.list_(pa.binary()))
    write_pairs(tmp_path / "in", 3, image=images, key=["a", "b", "c"])
    stats = _prepare(tmp_path / "in", tmp_path / "out").stats
    assert [(row["key"], row["image"]) for row in _read(tmp_path / "out")] == [("a", good)]
    assert stats["dropped"] == {"corrupt_image": 1, "null_image": 1}
    assert stats["further_images_left_out"] == 2


# ---- stopping and going on -----------------------------------------------------------------------


class _Killed(Exception):
    pass


def _stopping_after(results: int) -> Callable[..., Iterator[dict[str, Any]]]:
    """A runner that is killed after so many results, in any pass; the last item was half done."""
    left = results

    def run(function: Any, items: list[Any]) -> Iterator[dict[str, Any]]:
        nonlocal left
        for item in reversed(items):
            result = function(item)
            if left == 0:
                raise _Killed
            left -= 1
            yield result

    return run


def test_a_job_killed_anywhere_goes_on_to_the_same_content(pairs: Path, tmp_path: Path) -> None:
    whole = _prepare(pairs, tmp_path / "whole").stats
    out = tmp_path / "out"
    kills, stats = 0, {}
    while not (out / "stats.json").exists():
        try:
            stats = _prepare(pairs, out, run=_stopping_after(3)).stats
        except _Killed:
            kills += 1
            assert kills < 50, "it does not get on"
            assert not list(out.glob("part-*"))
    assert kills >= 4
    assert stats == whole
    assert _read(out) == _read(tmp_path / "whole")


@pytest.mark.parametrize("moves", [0, 1, 3])
def test_a_job_killed_while_it_shows_its_shards(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    move = Store.move
    done: list[str] = []

    def stop(store: Store, name: str, target: str) -> None:
        if len(done) == moves:
            raise _Killed
        done.append(name)
        move(store, name, target)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Store, "move", stop)
        with pytest.raises(_Killed):
            _prepare(pairs, out)
    assert len(list(out.glob("part-*"))) == moves

    def idle(function: Any, items: list[Any]) -> list[Any]:
        assert not items
        return []

    stats = _prepare(pairs, out, run=idle).stats
    assert stats == _prepare(pairs, tmp_path / "whole").stats
    assert len(_read(out)) == 196


def test_a_finished_folder_is_left_alone(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = _prepare(pairs, out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "_work").mkdir()  # as if killed just before the end
    again = _prepare(pairs, out)
    assert (first.created, again.created) == (True, False)
    assert again.stats == first.stats
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


@pytest.mark.parametrize("is_finished", [True, False])
def test_other_options_or_files_are_refused(pairs: Path, tmp_path: Path, is_finished: bool) -> None:
    out = tmp_path / "out"
    if is_finished:
        _prepare(pairs, out)
    else:
        with pytest.raises(_Killed):
            _prepare(pairs, out, run=_stopping_after(2))
    with pytest.raises(UserError, match=r"OUT: .* other options \(short_side 288, now 100\)"):
        _prepare(pairs, out, short_side=100)
    with pytest.raises(UserError, match="seed 0, now 3"):
        _prepare(pairs, out, seed=3)
    write_pairs(pairs, 3)
    with pytest.raises(UserError, match=r"was made from other files than .* holds now"):
        _prepare(pairs, out)


def test_a_lost_shard_and_strange_folders_are_refused(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _prepare(pairs, out)
    (out / "part-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"finished, but part-00001\.parquet is not there"):
        _prepare(pairs, out)
    for content in ("{}", "[1]"):
        strange = tmp_path / "strange"
        strange.mkdir(exist_ok=True)
        (strange / "stats.json").write_text(content)
        with pytest.raises(UserError, match=r"holds other files \(stats.json\); choose another"):
            _prepare(pairs, strange)
    with pytest.raises(UserError, match=r"OUT: .* lies in IN"):
        _prepare(pairs, pairs / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"OUT: .*file cannot be"):
        _prepare(pairs, tmp_path / "file")


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,caption\nlost.jpg,a\ngone.jpg,b\n,c\n")
    message = r"IN: none of 3 rows is usable \(missing_file 2, null_image 1\).*at --images"
    with pytest.raises(UserError, match=message):
        _prepare(tmp_path / "a.csv", tmp_path / "out")
    assert not list((tmp_path / "out").glob("part-*"))
    quarantine = pq.read_table(tmp_path / "out" / "_quarantine.parquet").to_pylist()
    assert [row["row"] for row in quarantine] == [0, 1, 2]


def test_a_table_of_files_becomes_shards(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg((number, 0, 0)))
    lines = [{"image_path": f"{number}.jpg", "caption": f"c{number}"} for number in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    stats = _prepare(tmp_path / "a.jsonl", tmp_path / "out").stats
    assert sorted((row["key"], row["caption"]) for row in _read(tmp_path / "out")) == [
        (f"{number}.jpg", f"c{number}") for number in range(5)
    ]
    assert stats["source"]["form"] == "table"
    assert stats["source"]["bytes"] == 5 * len(jpeg((0, 0, 0)))


def test_what_is_too_long_for_jpeg_is_dropped_not_fatal(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (70_000, 20)).save(buffer, "PNG")
    write_pairs(tmp_path / "in", 2, image=[buffer.getvalue(), jpeg()])
    assert _prepare(tmp_path / "in", tmp_path / "out").stats["dropped"] == {"huge_image": 1}
