"""Bulk embedding: a row for a row, bad ones with the reason, and a job that can stop anywhere."""

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch

from pipeline.data.decode import REASONS
from pipeline.data.layout import read_catalog
from pipeline.data.prepare import gather
from pipeline.data.prepare.job import Options, prepare
from pipeline.data.prepare.store import Store
from pipeline.embed.encoder import Checkpoint, find_checkpoint, read_encoder
from pipeline.embed.job import Outcome, embed
from pipeline.embed.pieces import cut_pieces, read_piece
from pipeline.errors import UserError
from tests.tiny import FUSION, tiny_config, tiny_module, tiny_tokenizer
from tests.tiny_data import LABELS, jpeg, write_pairs
from tests.tiny_run import publish_module

COLUMNS = ["file", "row_group", "row", "key", "caption", "image_embedding", "text_embedding",
           "reason"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = tiny_config()
    return publish_module(tmp_path_factory.mktemp("run"), config, tiny_module(config))[0].url


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Seven rows in two shards, of one row group each: of 4 and 3."""
    return write_pairs(tmp_path / "in", 7, shards=2)


def _embed(
    run: str | Checkpoint, path: Path, out: Path, runner: Any = map, **options: Any
) -> Outcome:
    found = run if isinstance(run, Checkpoint) else find_checkpoint(run)
    return embed(found, str(path), str(out), runner, **options)


def _norms(column: pa.ChunkedArray) -> list[float]:
    return [float(np.linalg.norm(value)) for value in column.to_pylist()]


def test_a_row_for_a_row_with_its_identity_and_unit_vectors(
    run: str, pairs: Path, tmp_path: Path
) -> None:
    outcome = _embed(run, pairs, tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == COLUMNS
    files = [str(pairs / f"part-{shard}.parquet") for shard in (0, 0, 0, 0, 1, 1, 1)]
    assert table["file"].to_pylist() == files
    assert table["row"].to_pylist() == [0, 1, 2, 3, 0, 1, 2]
    assert table["caption"][5].as_py() == "a cross number 5"
    assert table["key"].null_count == table["reason"].null_count == 7
    for name in ("image_embedding", "text_embedding"):
        assert table.schema.field(name).type == pa.list_(pa.float32())
        assert _norms(table[name]) == pytest.approx([1.0] * 7, abs=1e-5)
    assert (outcome.embedded, outcome.facts["rows"], outcome.facts["reasons"]) == (7, 7, {})
    assert sorted(path.name for path in (tmp_path / "out.parquet").iterdir()) == [
        "_embedding.json", "part-0000000.parquet", "part-0000001.parquet",
    ]  # fmt: skip
    footer = pq.read_metadata(tmp_path / "out.parquet" / "part-0000001.parquet").metadata
    assert footer is not None
    facts = json.loads(footer[b"gammaray"])
    assert (facts["run"], facts["checkpoint"], facts["rows"]) == (run, "step-00000004", 3)


@pytest.mark.parametrize("model", [{}, FUSION], ids=["two_tower", "fusion"])
def test_embeddings_are_what_the_towers_give(
    pairs: Path, tmp_path: Path, model: dict[str, Any]
) -> None:
    config = tiny_config(model=model)
    module = tiny_module(config)
    run = publish_module(tmp_path, config, module)[0].url
    _embed(run, pairs, tmp_path / "out")
    found = pq.read_table(tmp_path / "out")
    encoder = read_encoder(run)
    captions = [f"a {LABELS[row % 3]} number {row}" for row in range(7)]
    assert found["caption"].to_pylist() == captions
    # Ids of a text by the tokenizers library alone: start, words, end, padding.
    words = tokenizers.Tokenizer.from_str(tiny_tokenizer().json)
    ids = [[1, *words.encode(text).ids[:6], 3] for text in captions]
    tokens = torch.tensor([[*row, *[0] * (8 - len(row))] for row in ids])
    with torch.no_grad():
        expected = module.eval()(None, tokens).text
    assert len({tuple(row) for row in expected.tolist()}) > 1
    for text in (found["text_embedding"].to_pylist(), encoder.texts(captions)):
        assert torch.allclose(torch.tensor(text), expected, atol=1e-6)
    rows = read_catalog(str(pairs), "IN")
    (first, *_) = cut_pieces(rows, 99)
    images = [row.image for row in read_piece(rows.sources[0], first)]
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        pixels, _ = encoder.read_pictures(images, pool)
        expected = module.eval()(torch.from_numpy(pixels), None).image
    got = torch.tensor(found["image_embedding"].to_pylist()[:4])
    assert torch.allclose(got, expected, atol=1e-6)


def test_bad_rows_stay_with_their_reasons(run: str, tmp_path: Path) -> None:
    images = [jpeg(), b"broken", None, jpeg(), None]
    captions = ["a red circle", "a blue star", "a cross", "  ", None]
    write_pairs(tmp_path / "in", 5, image=images, caption=captions, shape=["x"] * 5,
                uid=[f"u{row}" for row in range(5)])  # fmt: skip
    outcome = _embed(run, tmp_path / "in", tmp_path / "out")
    table = pq.read_table(tmp_path / "out")
    assert table["row"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["key"].to_pylist() == ["u0", "u1", "u2", "u3", "u4"]
    assert table["reason"].to_pylist() == [
        None, "corrupt_image", "null_image", "empty_caption", "null_image, empty_caption",
    ]  # fmt: skip
    assert table["image_embedding"].is_valid().to_pylist() == [True, False, False, True, False]
    assert table["text_embedding"].is_valid().to_pylist() == [True, True, True, False, False]
    reasons = {"corrupt_image": 1, "null_image": 2, "empty_caption": 2}
    assert outcome.facts["reasons"] == reasons
    assert set(reasons) <= set(REASONS)


def test_no_row_is_usable(run: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "in", 2, image=[b"x", b"y"], caption=["", ""], shape=["x"] * 2)
    _embed(run, tmp_path / "in", tmp_path / "out")
    table = pq.read_table(tmp_path / "out")
    assert table["image_embedding"].null_count == table["text_embedding"].null_count == 2


@pytest.mark.parametrize(
    ("kept", "columns"),
    [
        ("image", ["file", "row_group", "row", "key", "image_embedding", "reason"]),
        ("caption", ["file", "row_group", "row", "key", "caption", "text_embedding", "reason"]),
    ],
)
def test_one_side_alone(
    run: str, pairs: Path, tmp_path: Path, kept: str, columns: list[str]
) -> None:
    whole = pq.read_table(pairs / "part-0.parquet")
    (tmp_path / "half").mkdir()
    pq.write_table(whole.select([kept]), tmp_path / "half" / "0.parquet")
    _embed(run, tmp_path / "half", tmp_path / "out")
    _embed(run, pairs, tmp_path / "both")
    found = pq.read_table(tmp_path / "out")
    assert found.column_names == columns
    name = columns[-2]
    assert found[name].to_pylist() == pq.read_table(tmp_path / "both")[name].to_pylist()[:4]


def test_neither_side_is_refused(run: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"number": [1]}), tmp_path / "in" / "0.parquet")
    with pytest.raises(UserError, match=r"^IN: no image column in .*its columns are number: int64"):
        _embed(run, tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match=r"name yours with --image-column NAME$"):
        _embed(run, tmp_path / "in", tmp_path / "out")


def test_pieces_are_runs_of_row_groups(tmp_path: Path) -> None:
    write_pairs(tmp_path, 10)
    table = pq.read_table(tmp_path / "part-0.parquet")
    pq.write_table(table, tmp_path / "part-0.parquet", row_group_size=3)
    catalog = read_catalog(str(tmp_path), "IN")
    groups = [piece.row_groups for piece in cut_pieces(catalog, 6)]
    assert groups == [((0, 3), (1, 3)), ((2, 3), (3, 1))]
    assert [piece.rows for piece in cut_pieces(catalog, 2)] == [3, 3, 3, 1]
    rows = [
        row for piece in cut_pieces(catalog, 6) for row in read_piece(catalog.sources[0], piece)
    ]
    assert [(row.row_group, row.row) for row in rows][2:5] == [(0, 2), (1, 0), (1, 1)]


def test_tables_larger_than_what_is_kept_are_written_bit_by_bit(
    run: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _embed(run, pairs, tmp_path / "whole")
    monkeypatch.setattr("pipeline.embed.work.WRITTEN_ROWS", 2)
    monkeypatch.setattr("pipeline.embed.encoder.BATCHES", {"cpu": 2, "cuda": 2})
    _embed(run, pairs, tmp_path / "out")
    assert pq.read_metadata(tmp_path / "out" / "part-0000000.parquet").num_row_groups == 2
    found, whole = pq.read_table(tmp_path / "out"), pq.read_table(tmp_path / "whole")
    assert found.drop_columns(["image_embedding", "text_embedding"]) == whole.drop_columns(
        ["image_embedding", "text_embedding"]
    )
    for name in ("image_embedding", "text_embedding"):
        expected = np.array(whole[name].to_pylist())
        assert np.allclose(np.array(found[name].to_pylist()), expected, atol=1e-6)


# ---- to go on ------------------------------------------------------------------------------------


class _Stopped(Exception):
    pass


def _stops_after(count: int) -> Callable[..., Any]:
    def runner(function: Callable[[Any], dict[str, Any]], items: list[Any]) -> Any:
        for item in items[:count]:
            yield function(item)
        raise _Stopped

    return runner


def test_it_goes_on_with_what_is_missing(run: str, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "in", 12, shards=4)
    whole = _embed(run, pairs, tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(_Stopped):
        _embed(run, pairs, out, _stops_after(2))
    assert [path.name for path in out.iterdir()] == ["_work"], "a reader finds nothing yet"
    shards = out / "_work" / "shards"
    # What a kill leaves while a file is written, and one that had no time to be moved.
    (out / "_work" / "0123.tmp").write_bytes(b"PAR1 half")
    done: list[int] = []

    def runner(function: Callable[[Any], dict[str, Any]], items: list[Any]) -> Any:
        done.extend(item.number for item in items)
        return map(function, items)

    assert sorted(path.name for path in shards.iterdir()) == [
        "part-0000000.parquet", "part-0000001.parquet",
    ]  # fmt: skip
    resumed = _embed(run, pairs, out, runner)
    assert done == [2, 3]
    assert (resumed.embedded, whole.embedded) == (6, 12)
    assert resumed.facts == whole.facts
    assert pq.read_table(out) == pq.read_table(tmp_path / "whole")
    assert not (out / "_work").exists()


def test_finished_pieces_are_looked_at_at_once(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = write_pairs(tmp_path / "in", 8, shards=8)
    with pytest.raises(_Stopped):
        _embed(run, pairs, tmp_path / "out", _stops_after(6))
    together = threading.Barrier(6)
    read = gather._read_footer

    def wait(store: Store, name: str) -> dict[str, Any]:
        together.wait(timeout=30)
        return read(store, name)

    monkeypatch.setattr(gather, "_read_footer", wait)
    assert _embed(run, pairs, tmp_path / "out").embedded == 2


def test_killed_while_files_are_shown(run: str, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = _embed(run, pairs, tmp_path / "whole")
    _embed(run, pairs, out)
    facts = (out / "_embedding.json").read_text()
    (out / "_work" / "shards").mkdir(parents=True)
    (out / "_embedding.json").rename(out / "_work" / "plan.json")
    (out / "part-0000001.parquet").rename(out / "_work" / "shards" / "part-0000001.parquet")
    resumed = _embed(run, pairs, out)
    assert resumed.embedded == 0
    assert resumed.facts == whole.facts == json.loads(facts)
    assert pq.read_table(out).num_rows == 7


def test_finished_it_is_left_alone(run: str, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = _embed(run, pairs, out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = _embed(run, pairs, out)
    assert (again.embedded, again.facts) == (0, first.facts)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    (out / "part-0000000.parquet").unlink()
    with pytest.raises(
        UserError, match=r"is finished, but part-0000000.parquet is not there; remove"
    ):
        _embed(run, pairs, out)


def _begin(run: str, pairs: Path, out: Path, finished: bool) -> None:
    """Embed `pairs`, to the end or to its first piece."""
    if finished:
        _embed(run, pairs, out)
    else:
        with pytest.raises(_Stopped):
            _embed(run, pairs, out, _stops_after(1))


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [True, False])
def test_out_of_something_else(run: str, pairs: Path, tmp_path: Path, finished: bool) -> None:
    out = tmp_path / "out"
    _begin(run, pairs, out, finished)
    other = tiny_config(train={"seed": 1, "global_batch": 8, "samples": 64})
    another = publish_module(tmp_path / "another", other, tiny_module(other))[0].url
    said = (
        r"^OUT: .*made with another checkpoint, step-.* of .*, and this is .*another/tiny; choose"
    )
    with pytest.raises(UserError, match=said):
        _embed(another, pairs, out)
    with pytest.raises(UserError, match=r"was made of other columns, image and caption, now image "
                       r"and shape; choose another folder, or remove it"):  # fmt: skip
        _embed(run, pairs, out, caption_column="shape")
    write_pairs(pairs, 9, shards=3)
    with pytest.raises(UserError, match=r"^OUT: .*was made of other files than IN holds now .*: "
                       r"\S+part-0.parquet changed, \S+part-1.parquet changed, \S+part-2.parquet "
                       r"is new; restore them, choose another folder, or remove it"):  # fmt: skip
        _embed(run, pairs, out)


@pytest.mark.parametrize("finished", [True, False])
def test_a_file_of_the_same_size_in_the_place_of_another(
    run: str, pairs: Path, tmp_path: Path, finished: bool
) -> None:
    out = tmp_path / "out"
    _begin(run, pairs, out, finished)
    path = pairs / "part-1.parquet"
    before = path.stat()
    content = path.read_bytes()
    path.write_bytes(content.replace(b"number 5", b"NUMBER 5"))
    assert path.stat().st_size == before.st_size
    with pytest.raises(
        UserError, match=r"dates are compared\): \S+part-1.parquet changed; restore"
    ):
        _embed(run, pairs, out)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert _embed(run, pairs, out).facts["rows"] == 7, "restored, it goes on"


def test_of_many_changed_files_some_are_named(run: str, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "in", 6, shards=6)
    _embed(run, pairs, tmp_path / "out")
    for path in pairs.iterdir():
        os.utime(path, (1, 1))
    (pairs / "part-0.parquet").unlink()
    with pytest.raises(
        UserError, match=r"part-0.parquet is gone, .*part-3.parquet changed and 2 mo"
    ):
        _embed(run, pairs, tmp_path / "out")


def test_another_step_of_the_same_run(run: str, pairs: Path, tmp_path: Path) -> None:
    first = find_checkpoint(run)
    _embed(first, pairs, tmp_path / "out")
    later = Checkpoint(
        folder=first.folder, record=first.record, name="step-00000008", weights="another"
    )
    with pytest.raises(UserError, match=r"this is step-00000008 of .*; go on with --checkpoint "
                       r"step-00000004, choose another folder, or remove it"):  # fmt: skip
        _embed(later, pairs, tmp_path / "out")


def test_places_that_cannot_be_used(run: str, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^OUT: .* lies in IN"):
        _embed(run, pairs, pairs / "out")
    (tmp_path / "file.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"^OUT: .*file.parquet is a file; embeddings are a folder"):
        _embed(run, pairs, tmp_path / "file.parquet")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"^OUT: .*full holds other files \(notes.txt\); choose"):
        _embed(run, pairs, tmp_path / "full")


def test_out_has_a_half_finished_prepare_in_it(run: str, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(_Stopped):
        prepare(str(pairs), str(out), Options(), _stops_after(0))
    with pytest.raises(UserError, match=r"^OUT: .*out holds a `gammaray data prepare` that is not "
                       r"finished; choose another folder, or remove it"):  # fmt: skip
        _embed(run, pairs, out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "photo"}, "^--image-column: 'photo' is not in"),
        ({"caption_column": "words"}, "^--caption-column: 'words' is not in"),
        ({"image_column": "caption"}, "^--image-column: 'caption' holds text"),
        ({"caption_column": "image"}, "^--caption-column: 'image' in .* it must be string"),
    ],
)
def test_columns_are_named_as_the_command_has_them(
    run: str, pairs: Path, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        _embed(run, pairs, tmp_path / "out", **options)


def test_shards_of_different_columns(run: str, pairs: Path, tmp_path: Path) -> None:
    table = pq.read_table(pairs / "part-1.parquet")
    pq.write_table(table.rename_columns(["image", "words", "shape"]), pairs / "part-1.parquet")
    with pytest.raises(UserError, match=r"^IN: .*every shard needs it once: name the column with "
                       r"--image-column or --caption-column, or remove the file"):  # fmt: skip
        _embed(run, pairs, tmp_path / "out")


def test_runs_that_cannot_be_used(run: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: no run there; give the folder of a run"):
        find_checkpoint(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^--checkpoint: .* has no 'step-9'; it has \['step-0000"):
        find_checkpoint(run, "step-9")
    tuned = tiny_config(model={**FUSION, "init": "runs/start"}, task={"kind": "entailment"})
    url = publish_module(tmp_path, tuned, tiny_module(tiny_config()))[0].url
    with pytest.raises(
        UserError, match=r"tiny: is fine-tuned for entailment, .* with: .*runs/start$"
    ):
        find_checkpoint(url)


def test_a_row_group_that_has_changed(run: str, pairs: Path) -> None:
    catalog = read_catalog(str(pairs), "IN")
    (piece, *_) = cut_pieces(catalog, 99)
    write_pairs(pairs, 5, shards=2)
    with pytest.raises(RuntimeError, match=r"row group 0 has 3 rows, and had 4 when the job began"):
        list(read_piece(catalog.sources[0], piece))


def test_texts_without_words_are_refused(run: str) -> None:
    encoder = read_encoder(run)
    assert encoder.texts([]).shape == (0, 16)
    with pytest.raises(UserError, match=r"^texts: ' ' has no words"):
        encoder.texts(["a circle", " "])
