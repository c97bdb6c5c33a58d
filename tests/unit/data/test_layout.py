import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.layout import as_captions, mix, read_captions, read_catalog, read_classes
from pipeline.errors import UserError

IMAGES = pa.array([b"one", b"two"])
TEXTS = pa.array(["a", "b"])
HF_IMAGES = pa.array([{"bytes": b"one", "path": "1.jpg"}, {"bytes": b"two", "path": None}])


def _write(path: Path, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def _pairs(path: Path, **columns: object) -> Path:
    return _write(path, **{"image": IMAGES, "caption": TEXTS, **columns})


def _columns(path: Path, **given: str) -> tuple[str, str]:
    columns = read_catalog(str(path), "data.train", **given).sources[0].columns
    return columns.image, columns.caption


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        pytest.param(
            {"jpg": IMAGES, "url": TEXTS, "caption": TEXTS, "key": TEXTS, "width": [1, 2]},
            ("jpg", "caption"),
            id="img2dataset",
        ),
        pytest.param({"image": HF_IMAGES, "text": TEXTS}, ("image", "text"), id="hugging-face"),
        pytest.param(
            {"image": HF_IMAGES, "captions": [["a", "b"], ["c"]]}, ("image", "captions"), id="lists"
        ),
        pytest.param({"png": IMAGES, "TEXT": TEXTS}, ("png", "TEXT"), id="upper-case-text"),
        pytest.param(
            {"bytes": IMAGES.cast(pa.large_binary()), "txt": TEXTS.cast(pa.large_string())},
            ("bytes", "txt"),
            id="large-types",
        ),
        pytest.param(
            {"webp": IMAGES, "sentence": pa.array([["a"], []], pa.large_list(pa.string()))},
            ("webp", "sentence"),
            id="large-list",
        ),
        pytest.param(
            {"image": TEXTS, "jpg": IMAGES, "caption": [1, 2], "text": TEXTS},
            ("jpg", "text"),
            id="a-known-name-of-another-type-is-passed-over",
        ),
        pytest.param(
            {"jpg": IMAGES, "image": IMAGES, "text": TEXTS, "caption": TEXTS},
            ("image", "caption"),
            id="first-known-name-wins",
        ),
    ],
)
def test_columns_of_known_layouts_are_found(
    tmp_path: Path, columns: dict, expected: tuple[str, str]
) -> None:
    assert _columns(_write(tmp_path / "0.parquet", **columns)) == expected


def test_given_columns_win_over_known_names(tmp_path: Path) -> None:
    path = _pairs(tmp_path / "0.parquet", picture=HF_IMAGES, words=[["a"], ["b"]])
    assert _columns(path, image="picture") == ("picture", "caption")
    assert _columns(path, caption="words") == ("image", "words")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": "pic"}, r"data.image_column: 'pic' is not in .*; its columns are image: binary"),
        (
            {"image": "numbers"},
            r"'numbers' in .* is list<.*it must be binary, struct<bytes, path> or",
        ),
        ({"image": "other"}, r"'other' in .* is struct<path: string>; it must be binary"),
        ({"caption": "words"}, r"data.caption_column: 'words' is not in "),
        ({"caption": "image"}, r"'image' in .* is binary; it must be string or list<string>"),
        ({"caption": "numbers"}, r"'numbers' in .* is list<.*int64>; it must be string"),
    ],
)
def test_given_columns_must_be_there_and_fit(tmp_path: Path, given: dict, message: str) -> None:
    path = _pairs(tmp_path / "0.parquet", other=[{"path": "a"}] * 2, numbers=[[1], [2]])
    with pytest.raises(UserError, match=message):
        _columns(path, **given)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"pixels": IMAGES, "text": TEXTS}, r"no image column in .*columns are pixels: binary, "),
        ({"image": TEXTS, "text": TEXTS}, r"no image column .*image: string.*image_column=\.\.\."),
        ({"image": IMAGES, "words": TEXTS}, r"no caption column .*data.caption_column=\.\.\."),
    ],
)
def test_no_known_column_is_refused_with_what_is_there(
    tmp_path: Path, columns: dict, message: str
) -> None:
    with pytest.raises(UserError, match="^data.train: " + message):
        _columns(_write(tmp_path / "0.parquet", **columns))


def test_links_without_pixels_are_refused_with_how_to_download(tmp_path: Path) -> None:
    path = _write(tmp_path / "laion.parquet", URL=TEXTS, TEXT=TEXTS)
    with pytest.raises(
        UserError, match=r"holds links \(column 'URL'\) .*img2dataset --url_list .*--url_col URL "
    ):
        _columns(path)


def test_the_index_of_tars_is_refused_with_how_to_prepare(tmp_path: Path) -> None:
    path = _write(tmp_path / "00000.parquet", caption=TEXTS, url=TEXTS, key=TEXTS)
    (tmp_path / "00000.tar").write_bytes(b"tar")
    with pytest.raises(UserError, match=r"index of WebDataset tars .*gammaray data prepare "):
        _columns(path)


@pytest.mark.parametrize(("name", "what"), [("0.tar", "WebDataset tars"), ("a.tsv", "tables")])
def test_other_formats_are_refused_with_how_to_prepare(
    tmp_path: Path, name: str, what: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"for {what} run: gammaray data prepare .* OUT"):
        read_catalog(str(tmp_path), "data.train")


@pytest.mark.parametrize(
    ("values", "place", "asked", "chosen"),
    [
        (["train", "val"], "data.train", "auto", ("train",)),
        (["train", "val"], "data.val", "auto", ("val",)),
        (["restval", "test"], "data.train", "auto", ("restval",)),
        (["validation", "test"], "data.val", "auto", ("validation",)),
        (["test", "train"], "data.val", "auto", ("test",)),
        (["val", "test"], "evaluate.linear_probe.0.test", "auto", ("test",)),
        (["train", "test"], "evaluate.linear_probe.0.train", "auto", ("train",)),
        (["train", "val"], "data.train", "val", ("val",)),
        (["train", "val"], "data.train", "all", ()),
        (["train", "train"], "data.train", "auto", ()),
        (["extra", "extra"], "data.train", "auto", ()),
    ],
)
def test_a_split_column_filters(
    tmp_path: Path, values: list[str], place: str, asked: str, chosen: tuple[str, ...]
) -> None:
    _pairs(tmp_path / "0.parquet", split=values)
    catalog = read_catalog(str(tmp_path), place, split=asked)
    assert catalog.sources[0].columns.split == chosen
    kept = [value in chosen for value in values] if chosen else [True, True]
    assert catalog.num_rows == sum(kept)
    assert read_captions(catalog, 9) == [
        text for text, keep in zip(["a", "b"], kept, strict=True) if keep
    ]
    assert f"of 2, whose split is {chosen[0]}," in catalog.describe() if chosen else True


@pytest.mark.parametrize(
    ("values", "asked", "message"),
    [
        (["a", "b"], "auto", r"data.train: column 'split' holds \['a', 'b'\].*data.train_split="),
        (["train", "val"], "dev", r"data.train_split: is dev; column 'split' holds "),
        ([1, 2], "train", r"data.train_split: is train, but .* has no column 'split' of text"),
    ],
)
def test_a_split_that_is_not_there_is_refused(
    tmp_path: Path, values: list[object], asked: str, message: str
) -> None:
    _pairs(tmp_path / "0.parquet", split=values)
    with pytest.raises(UserError, match=message):
        read_catalog(str(tmp_path), "data.train", split=asked)


def test_missing_paths_and_folders_without_parquet(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("a")
    (tmp_path / "LICENSE").write_text("b")
    with pytest.raises(UserError, match=r"^data.val: .*none does not exist; give a folder or file"):
        read_catalog(str(tmp_path / "none"), "data.val")
    with pytest.raises(UserError, match=r"no .parquet file .*2 file\(s\) of kind .*csv.*LICENSE"):
        read_catalog(str(tmp_path), "data.train")
    with pytest.raises(UserError, match=r"no file matches .*x\*\.parquet"):
        read_catalog(str(tmp_path / "x*.parquet"), "data.train")
    with pytest.raises(UserError, match=r"nowhere://a cannot be reached: "):
        read_catalog("nowhere://a", "data.train")


@pytest.mark.parametrize("content", [b"", b"not parquet at all", None])
def test_unreadable_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    whole = _pairs(tmp_path / "0.parquet").read_bytes()
    (tmp_path / "1.parquet").write_bytes(whole[:-20] if content is None else content)
    with pytest.raises(UserError, match=r"1\.parquet is not readable Parquet: "):
        read_catalog(str(tmp_path), "data.train")


def test_no_rows_at_all_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "0.parquet", image=IMAGES[:0], caption=TEXTS[:0])
    with pytest.raises(UserError, match="holds Parquet files but no rows"):
        read_catalog(str(tmp_path), "data.train")
    _pairs(tmp_path / "1.parquet")
    assert read_catalog(str(tmp_path), "data.train").num_rows == 2


def test_shards_are_found_in_nested_folders_and_hidden_ones_are_not(tmp_path: Path) -> None:
    for name in ("b.parquet", "a/1.parquet", "a/c/0.parquet"):
        _pairs(tmp_path / "set" / name)
    for name in (".tmp/0.parquet", "_delta/0.parquet", "a/.1.parquet", "_metadata.parquet"):
        _write(tmp_path / "set" / name, other=[1])
    (tmp_path / "set" / "readme.md").write_text("x")
    catalog = read_catalog(str(tmp_path / "set"), "data.train")
    names = [Path(shard.path).relative_to(tmp_path / "set").as_posix() for shard in catalog.shards]
    assert names == ["a/1.parquet", "a/c/0.parquet", "b.parquet"]
    assert catalog.num_rows == 6


def test_a_hidden_folder_above_the_given_one_does_not_hide_it(tmp_path: Path) -> None:
    _pairs(tmp_path / ".cache" / "set" / "0.parquet")
    assert read_catalog(str(tmp_path / ".cache" / "set"), "data.train").num_rows == 2


def test_globs_and_single_files_take_just_what_they_name(tmp_path: Path) -> None:
    for name in ("x-0.parquet", "x-1.parquet", "y-0.parquet", "deep/x-2.parquet"):
        _pairs(tmp_path / name)

    def names(path: str) -> list[str]:
        catalog = read_catalog(str(tmp_path / path), "data.train")
        return [Path(shard.path).name for shard in catalog.shards]

    assert names("x-*.parquet") == ["x-0.parquet", "x-1.parquet"]
    assert names("**/x-[12].parquet") == ["x-2.parquet", "x-1.parquet"]
    assert names("y-0.parquet") == ["y-0.parquet"]


def test_relative_paths_and_file_urls_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pairs(tmp_path / "set" / "0.parquet")
    monkeypatch.chdir(tmp_path)
    for path in ("set", "set/*.parquet", (tmp_path / "set").as_uri()):
        catalog = read_catalog(path, "data.train")
        assert catalog.num_rows == 2
        assert read_captions(catalog, 10) == ["a", "b"]


def test_every_shard_needs_the_columns_and_the_labels(tmp_path: Path) -> None:
    _pairs(tmp_path / "0.parquet", label=TEXTS)
    _write(tmp_path / "1.parquet", image=IMAGES, caption=TEXTS)
    assert read_catalog(str(tmp_path), "data.val").num_rows == 4
    with pytest.raises(UserError, match=r"1.parquet has no column 'label' .*every shard needs it"):
        read_catalog(str(tmp_path), "data.val", labels=["label"])
    _write(tmp_path / "1.parquet", jpg=IMAGES, caption=TEXTS)
    with pytest.raises(UserError, match=r"1.parquet has no column 'image' \(it has \['jpg', "):
        read_catalog(str(tmp_path), "data.val")


def test_row_groups_bytes_and_description(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    table = pa.table({"image": [b"x"] * 5, "caption": ["y"] * 5})
    pq.write_table(table, path, row_group_size=2)
    catalog = read_catalog(str(path), "data.train")
    assert catalog.shards[0].row_groups == (2, 2, 1)
    assert catalog.num_bytes == path.stat().st_size
    assert catalog.sources[0].schema.names == ["image", "caption"]
    assert catalog.shards[0].num_rows == 5
    assert len(catalog.shards[0].group_bytes) == 3
    assert "5 rows in 1 Parquet shard(s)" in catalog.describe()


@pytest.mark.parametrize("given", ["", "a.parquet", "*.parquet"])
def test_the_date_of_a_shard_is_known_and_not_of_the_digest(tmp_path: Path, given: str) -> None:
    path = _pairs(tmp_path / "a.parquet")
    os.utime(path, ns=(1, 1_700_000_000_123_456_789))
    catalog = read_catalog(str(tmp_path / given), "data.train")
    assert [shard.modified for shard in catalog.shards] == [1_700_000_000_123_456_789]
    os.utime(path, ns=(1, 1))
    assert read_catalog(str(tmp_path / given), "data.train").digest == catalog.digest


def test_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    """Each keeps its own columns; the digest follows the weights."""
    _pairs(tmp_path / "a" / "0.parquet")
    _write(tmp_path / "b" / "0.parquet", jpg=pa.array([b"x"] * 5), text=list("vwxyz"))
    parts = [read_catalog(str(tmp_path / name), "data.train") for name in "ab"]
    catalog = mix(parts, [2.0, 0.6], "data.train")
    assert (catalog.num_rows, catalog.rows_an_epoch) == (7, 4 + 3)
    assert [shard.source for shard in catalog.shards] == [0, 1]
    assert [source.columns.image for source in catalog.sources] == ["image", "jpg"]
    assert sorted(read_captions(catalog, 99)) == ["a", "b", *"vwxyz"]
    assert "seen 2 times an epoch; 5 rows in 1 " in catalog.describe()
    digests = {mix(parts, [2.0, weight], "").digest for weight in (0.6, 1.0, 3.0)}
    assert len(digests | {parts[0].digest}) == 4
    assert mix(parts[:1], [1.0], "").digest == parts[0].digest
    with pytest.raises(UserError, match=r"^data.train.1.weight: is 0.01; of the 5 rows at .*b an "):
        mix(parts, [1.0, 0.01], "data.train")


def test_digest_follows_the_shards_and_nothing_else(tmp_path: Path) -> None:
    def digest(folder: str = "set", **given: str) -> str:
        return read_catalog(str(tmp_path / folder), "data.train", **given).digest

    first = _pairs(tmp_path / "set" / "0.parquet", text=TEXTS)
    before = digest()
    first.touch()
    (tmp_path / "set" / "readme.md").write_text("x")
    assert digest() == before
    assert digest(caption="text") == before
    _pairs(tmp_path / "moved" / "0.parquet", text=TEXTS)
    assert digest("moved") == before

    second = _pairs(tmp_path / "set" / "1.parquet")
    both = digest()
    second.rename(tmp_path / "set" / "2.parquet")
    renamed = digest()
    _pairs(tmp_path / "set" / "2.parquet", caption=pa.array(["a longer caption", "b"]))
    rewritten = digest()
    assert len({before, both, renamed, rewritten}) == 4


def test_captions_come_evenly_from_all_shards(tmp_path: Path) -> None:
    for shard in range(3):
        texts = [f"{shard}-{row}" for row in range(10)]
        table = pa.table({"image": [b"x"] * 10, "caption": texts})
        pq.write_table(table, tmp_path / f"{shard}.parquet", row_group_size=3)
    catalog = read_catalog(str(tmp_path), "data.train")
    expected = [f"{shard}-{row}" for shard in range(3) for row in range(4)]
    assert read_captions(catalog, 12) == expected
    assert len(read_captions(catalog, 1000)) == 30


def test_captions_of_lists_and_without_the_empty_ones(tmp_path: Path) -> None:
    _write(
        tmp_path / "0.parquet", image=[b"x"] * 4, caption=[["a", " b\n c "], [], None, [None, ""]]
    )
    _write(tmp_path / "1.parquet", image=[b"x"] * 3, caption=["d", None, "  "])
    assert read_captions(read_catalog(str(tmp_path), "data.train"), 100) == ["a", "b c", "d"]


def test_classes_are_the_distinct_values_of_all_shards_as_text(tmp_path: Path) -> None:
    _pairs(tmp_path / "0.parquet", name=["star", None], number=[10, 2])
    _pairs(tmp_path / "1.parquet", name=["circle", "star"], number=[2, None])
    catalog = read_catalog(str(tmp_path), "data.val", labels=["name", "number"])
    assert read_classes(catalog, "name") == ["circle", "star"]
    assert read_classes(catalog, "number") == ["10", "2"]


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ("  two\t words\n", ["two words"]),
        (["a", "", None, " b "], ["a", "b"]),
        ("", []),
        (" \n", []),
        (None, []),
        ([], []),
        (7, []),
    ],
)
def test_as_captions(cell: object, captions: list[str]) -> None:
    assert as_captions(cell) == captions


def test_either_side_will_do_where_it_is_said(tmp_path: Path) -> None:
    _write(tmp_path / "images" / "0.parquet", jpg=IMAGES, number=[1, 2])
    _write(tmp_path / "texts" / "0.parquet", text=TEXTS, number=[1, 2])
    _pairs(tmp_path / "both" / "0.parquet")
    said = {}
    for name in ("images", "texts", "both"):
        catalog = read_catalog(str(tmp_path / name), "IN", either=True)
        columns = catalog.sources[0].columns
        said[name] = (columns.image, columns.caption)
        assert ("no caption column" in catalog.describe()) == (name == "images")
        assert ("no image column" in catalog.describe()) == (name == "texts")
    assert said == {"images": ("jpg", ""), "texts": ("", "text"), "both": ("image", "caption")}
    with pytest.raises(UserError, match="no caption column in"):
        read_catalog(str(tmp_path / "images"), "IN")
    with pytest.raises(UserError, match=r"^data.caption_column: 'words' is not in"):
        read_catalog(str(tmp_path / "images"), "IN", caption="words", either=True)
