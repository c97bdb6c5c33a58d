"""What `--suite all` adds to a run's own evaluation, what it leaves out, and why."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.load import parse_config
from pipeline.config.schema import Config
from pipeline.data.demo import write_demo
from pipeline.errors import UserError
from pipeline.evaluate.probe import SHOTS
from pipeline.train.measure import _file_name, _tuned_from, _with_probes, ask
from pipeline.train.store import RunFolder, RunRecord
from tests.tiny import tiny_tokenizer, tiny_values


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_demo(folder, 60)
    return folder


def _config(folder: Path, **sections: dict[str, Any]) -> Config:
    data = {"train": str(folder / "train"), "val": str(folder / "val"), **sections.pop("data", {})}
    evaluate = {
        "zero_shot": [{"column": "shape"}, {"column": "color"}],
        **sections.pop("evaluate", {}),
    }
    return parse_config(tiny_values(data=data, evaluate=evaluate, **sections), "test")


def test_zero_shot_columns_without_a_probe_get_one(scenes: Path) -> None:
    own = {"column": "color", "train": str(scenes / "train"), "shots": [2]}
    said: list[str] = []
    config = _with_probes(_config(scenes, evaluate={"linear_probe": [own]}), said.append)
    found = [(probe.column, probe.shots, probe.train) for probe in config.evaluate.linear_probe]
    train = str(scenes / "train")
    assert found == [("color", (2,), train), ("shape", SHOTS, train)]
    assert said == []


def test_what_cannot_be_probed_is_told_with_its_reason(scenes: Path, tmp_path: Path) -> None:
    table = pq.read_table(next((scenes / "train").glob("*.parquet")))
    half = pa.array(["train" if row % 2 else "val" for row in range(len(table))])
    for name, changed in {
        "bare": table.drop_columns(["shape"]),
        "one": table.set_column(
            table.schema.get_field_index("shape"), "shape", pa.array(["x"] * len(table))
        ),
        "split": table.set_column(table.schema.get_field_index("split"), "split", half),
    }.items():
        (tmp_path / name).mkdir()
        pq.write_table(changed, tmp_path / name / "part.parquet")
    train = str(scenes / "train")
    reasons = {
        str(tmp_path / "bare"): "has no column 'shape'",
        str(tmp_path / "one"): "'shape' has fewer than two labels",
        str(tmp_path / "split"): "chosen by its splits",
        str(scenes / "val"): "is data.val too",
        str(tmp_path / "none"): "does not exist",
        "two": "mixes 2 sources",
        "own": "names columns of its own",
    }
    several = {
        "two": [{"path": train}, {"path": train}],
        "own": [{"path": train, "image_column": "image"}],
    }
    for path, reason in reasons.items():
        said: list[str] = []
        given = several.get(path, path)
        config = _config(
            scenes, data={"train": given}, evaluate={"zero_shot": [{"column": "shape"}]}
        )
        assert _with_probes(config, said.append).evaluate.linear_probe == ()
        assert len(said) == 1, path
        assert said[0].startswith("no probe of shape: data.train")
        assert reason in said[0]


def _record(storage: Path, name: str, init: str | None) -> RunFolder:
    folder = RunFolder.of(str(storage), name)
    values = tiny_values(model={"init": init} if init else {})
    folder.write_record(
        RunRecord(
            name=name,
            config=values,
            tokenizer=tiny_tokenizer(),
            data_digest="",
            mlflow_uri="",
            mlflow_run_id="",
            is_finished=True,
        )
    )
    return folder


def test_the_runs_tuned_from_a_run_are_those_that_begin_with_it_or_one_that_does(
    tmp_path: Path,
) -> None:
    start = _record(tmp_path, "pre", None)
    _record(tmp_path, "assign", f"{tmp_path}/pre")
    _record(tmp_path, "pairs", f"{tmp_path}/assign")
    _record(tmp_path, "vqa", f"{tmp_path}/pre/")
    _record(tmp_path, "other", f"{tmp_path}/else")
    _record(tmp_path, "alone", None)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    (tmp_path / "mlartifacts").mkdir()
    said: list[str] = []
    found = [folder.url.rsplit("/", 1)[1] for folder, _ in _tuned_from(start, said.append)]
    assert found == ["assign", "vqa", "pairs"]
    assert len(said) == 1
    assert "broken is left out" in said[0]


def test_a_run_without_a_checkpoint_cannot_be_asked(tmp_path: Path, scenes: Path) -> None:
    folder = _record(tmp_path, "pre", None)
    with pytest.raises(UserError, match="no run with a checkpoint there"):
        ask(folder, _config(scenes))
    checkpoint = tmp_path / "pre" / "step-00000001"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="no checkpoint 'step-00000002'; it has"):
        ask(folder, _config(scenes), "step-00000002")
    assert ask(folder, _config(scenes)).checkpoint == "step-00000001"


def test_each_result_has_a_file_name_of_its_own() -> None:
    record = {"dataset": "scenes/val:shape", "model": "demo", "task": "linear_probe"}
    names = [_file_name({**record, "metrics": {"fewshot_k": k}}) for k in (5, 20, -1)]
    assert names == [
        "scenes_val_shape_demo_linear_probe_5_shots.json",
        "scenes_val_shape_demo_linear_probe_20_shots.json",
        "scenes_val_shape_demo_linear_probe.json",
    ]
