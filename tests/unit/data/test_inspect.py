"""What `gammaray data inspect` says of a data set."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.data import inspect as inspect_module
from pipeline.data.inspect import inspect
from pipeline.data.layout import mix, read_catalog


def _picture(width: int, height: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards: 6 good rows, a broken image, a failed download, an empty caption."""
    first = {
        "jpg": [_picture(40, 30)] * 4 + [b"broken", None],
        "caption": ["two words", "a", "b", "c", "d", "e"],
        "status": ["success"] * 5 + ["failed_to_download"],
    }
    second = {
        "jpg": [_picture(64, 20, "PNG")] * 3,
        "caption": ["x", "y", "  "],
        "status": ["success"] * 3,
    }
    for index, columns in enumerate((first, second)):
        pq.write_table(pa.table(columns), tmp_path / f"{index}.parquet", row_group_size=4)
    return tmp_path


def test_a_sample_is_counted_by_what_it_is(folder: Path) -> None:
    found = inspect(read_catalog(str(folder), "PATH"))
    assert found.rows_read == 9
    assert found.bad == {"corrupt_image": 1, "failed_download": 1, "empty_caption": 1}
    assert found.named == [
        (f"{folder}/0.parquet:1:0", "corrupt_image"),
        (f"{folder}/0.parquet:1:1", "failed_download"),
        (f"{folder}/1.parquet:0:2", "empty_caption"),
    ]
    assert found.formats == {"JPEG": 4, "PNG": 3}
    quantiles = found.quantiles()
    assert quantiles["image width"] == pytest.approx([40, 40, 64, 64])
    assert quantiles["words a caption"][-1] == 2
    assert quantiles["rows a row group"] == pytest.approx([2, 3, 3.9, 4])
    assert [caption for _, caption in found.pairs] == ["two words", "a", "b", "c", "x", "y"]
    assert found.advice() == []


def test_few_rows_of_a_mixture_come_from_all_its_sources(folder: Path, tmp_path: Path) -> None:
    """Its sources have columns of other names."""
    other = tmp_path / "other"
    other.mkdir()
    rows = {"image": [_picture(8, 8)] * 4, "text": ["p", "q", "r", "s"]}
    pq.write_table(pa.table(rows), other / "0.parquet")
    catalogs = [read_catalog(str(path), "data.train") for path in (folder / "1.parquet", other)]
    found = inspect(mix(catalogs, [1, 1], "data.train"), rows=4, groups=2)
    assert found.rows_read == 4
    assert len({caption for _, caption in found.pairs} & {"p", "q", "r", "s"}) == 2


def test_advice_names_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_module, "LARGE_GROUP", 10)
    pq.write_table(
        pa.table(
            {"jpg": [_picture(700, 900)] * 9 + [b""] * 30, "caption": list(map(str, range(39)))}
        ),
        folder / "0.parquet",
    )
    advice = inspect(read_catalog(str(folder / "0.parquet"), "PATH")).advice()
    assert len(advice) == 3
    assert "30 of 39 sampled rows are unusable" in advice[0]
    assert all("gammaray data prepare" in sentence for sentence in advice[1:])


def test_captions_that_cleaning_would_change_are_counted(tmp_path: Path) -> None:
    captions = ["a <b>dog</b>", "schÃ¶n", "Tom &amp; Jerry", "a < b", "I <3 “you”", "x\t y", ""]
    columns = {"jpg": [_picture(40, 30)] * 7, "caption": captions}
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    found = inspect(read_catalog(str(tmp_path), "PATH"))
    assert found.unclean_captions == found.to_json()["unclean_captions"] == 3
    (sentence,) = found.advice()
    assert "3 of 6 sampled captions hold broken" in sentence
    assert "data.clean_captions=true" in sentence


def test_labels_are_told(tmp_path: Path) -> None:
    """Captions that are labels, and columns that look like some, also where shards differ."""
    rows = 40
    columns = {
        "jpg": [_picture(8, 8)] * rows,
        "caption": ["a cat", "a dog"] * (rows // 2),
        "kind": ["cat", "dog"] * (rows // 2),
        "breed": [row % 4 for row in range(rows)],
        "key": [str(row) for row in range(rows)],
        "size": [8] * rows,
        "score": [0.5, 0.25] * (rows // 2),
        "status": ["success", "failed"] * (rows // 2),
    }
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    del columns["breed"]
    pq.write_table(pa.table(columns), tmp_path / "1.parquet")
    found = inspect(read_catalog(str(tmp_path), "PATH"))
    assert found.labels == found.to_json()["labels"] == {"kind": 2, "breed": 4}
    (sentence,) = found.advice()
    assert "the captions are labels, 2 different of 80 sampled" in sentence
    assert "evaluate.retrieval=false" in sentence


def test_the_command_prints_draws_and_writes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sheet, facts = tmp_path / "sheet.png", tmp_path / "facts.json"
    arguments: list[Any] = [
        "gammaray",
        "data",
        "inspect",
        folder,
        "--sheet",
        sheet,
        "--json",
        facts,
    ]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    out = capfd.readouterr().out
    for part in (
        "9 rows in 2 Parquet",
        "Different captions: 8 of 8 (sampled)",
        "jpg: binary",
        "JPEG 4, PNG 3",
        ":1:0  corrupt_image",
    ):
        assert part in out
    with Image.open(sheet) as image:
        drawn = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (abs(drawn - [200, 30, 30]) < 4).all(1).any(), "the picture's red"
    assert json.loads(facts.read_text())["bad"]["corrupt_image"] == 1
