"""What `--suite all` adds to a run's own evaluation, what it leaves out, and why."""

import contextlib
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.cli import runs
from pipeline.config.load import parse_config
from pipeline.config.schema import Config
from pipeline.data.demo import write_demo
from pipeline.errors import UserError
from pipeline.evaluate.probe import SHOTS
from pipeline.train import driver, measure
from pipeline.train.measure import (
    Evaluation,
    Measured,
    _file_name,
    _tuned_from,
    _with_probes,
    ask,
    keep,
)
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


def test_of_a_mixture_the_source_with_labels_is_probed(scenes: Path, tmp_path: Path) -> None:
    table = pq.read_table(next((scenes / "train").glob("*.parquet")))
    pq.write_table(table.drop_columns(["shape"]), tmp_path / "part.parquet")
    train = str(scenes / "train")
    config = _config(
        scenes,
        data={"train": [{"path": str(tmp_path)}, {"path": train}]},
        evaluate={"zero_shot": [{"column": "shape"}]},
    )
    said: list[str] = []
    (probe,) = _with_probes(config, said.append).evaluate.linear_probe
    assert (probe.column, probe.train, said) == ("shape", train, [])


def test_what_cannot_be_probed_is_told_with_its_reason(scenes: Path, tmp_path: Path) -> None:
    table = pq.read_table(next((scenes / "train").glob("*.parquet")))
    for name, changed in {
        "bare": table.drop_columns(["shape"]),
        "one": table.set_column(
            table.schema.get_field_index("shape"), "shape", pa.array(["x"] * len(table))
        ),
    }.items():
        (tmp_path / name).mkdir()
        pq.write_table(changed, tmp_path / name / "part.parquet")
    train = str(scenes / "train")
    reasons = {
        str(tmp_path / "bare"): "has no column 'shape'",
        str(tmp_path / "one"): "'shape' has fewer than two labels",
        str(scenes / "val"): "is data.val too",
        str(tmp_path / "none"): "does not exist",
        "two": "2 of its 2 sources can be probed, and one is wanted",
        "own": "names columns of its own",
        "neither": "'shape' has fewer than two labels there; name the set with "
        "evaluate.linear_probe; data.train: names columns of its own",
    }
    several = {
        "two": [{"path": train}, {"path": train}],
        "own": [{"path": train, "image_column": "image"}],
        "neither": [
            {"path": str(tmp_path / "one")},
            {"path": train, "image_column": "image"},
        ],
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


def _checkpoint(folder: RunFolder, samples: int = 8) -> None:
    """The least that counts as one."""
    checkpoint = Path(folder.path) / "step-00000001"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    (checkpoint / "meta.json").write_text(json.dumps({"progress": {"samples": samples}}))


def test_a_run_without_a_checkpoint_cannot_be_asked(tmp_path: Path, scenes: Path) -> None:
    folder = _record(tmp_path, "pre", None)
    record = folder.read_record()
    assert record is not None
    with pytest.raises(UserError, match=f"{tmp_path}/pre: it has no checkpoint yet; let it train"):
        ask(folder, record, _config(scenes))
    _checkpoint(folder)
    with pytest.raises(UserError, match=r"--checkpoint: .* has no 'step-00000002'; it has"):
        ask(folder, record, _config(scenes), "step-00000002")
    assert ask(folder, record, _config(scenes)).checkpoint == "step-00000001"


@pytest.fixture
def asked(tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> list[Evaluation]:
    """Of two runs, whose tracker does not answer."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    found = []
    for name in ("pre", "vqa"):
        folder = _record(tmp_path, name, None)
        _checkpoint(folder)
        record = folder.read_record()
        assert record is not None
        config = _config(scenes, tracking={"uri": "http://127.0.0.1:9"})
        found.append(ask(folder, record, config))
    return found


def _found(asked: Evaluation, column: str = "shape", value: float = 0.5) -> Measured:
    names = ("accuracy", "mean_class_accuracy", "chance")
    metrics = {f"zero_shot/{column}/{name}": value for name in names}
    return Measured(asked=asked, metrics=metrics, sample=None)


def _evaluate(monkeypatch: pytest.MonkeyPatch, asked: list[Evaluation], *found: Any) -> Any:
    """Run the command with an evaluation that finds this; gives exit status, text and facts."""

    def evaluate(_: object, listen: object, log_path: object, take: Any) -> None:
        for each in found:
            if isinstance(each, BaseException):
                raise each
            take(each)

    monkeypatch.setattr(measure, "ask_all", lambda *_: list(asked))
    monkeypatch.setattr(driver, "evaluate", evaluate)
    first = asked[0].folder
    console, facts = Console(file=io.StringIO(), width=200), Path(first.path) / "facts.json"
    status: Any = 0
    try:
        runs.evaluate(SimpleNamespace(obj=console), first.url, suite=runs.Choice.ALL, json=facts)  # pyright: ignore
    except (SystemExit, UserError) as end:
        status = end.code if isinstance(end, SystemExit) else end
    return status, console.file.getvalue(), json.loads(facts.read_text())  # pyright: ignore


def test_what_was_measured_outlives_an_interruption_and_a_tracker_that_refuses(
    monkeypatch: pytest.MonkeyPatch, asked: list[Evaluation], caplog: pytest.LogCaptureFixture
) -> None:
    status, text, facts = _evaluate(monkeypatch, asked, _found(asked[0]), KeyboardInterrupt())
    assert status == 130
    assert re.search(r"pre +│ zero-shot .* accuracy +│ 50.0 %", text)
    assert "not measured vqa: the command ended before\nInterrupted." in text
    assert [each["model"] for each in facts["results"]] == ["pre"]
    assert [path.name for path in Path(asked[0].folder.path, "suite").iterdir()]
    assert "MLflow: could not log metrics" in caplog.text


def test_the_failed_are_named_and_the_others_are_shown(
    monkeypatch: pytest.MonkeyPatch, asked: list[Evaluation]
) -> None:
    failed = Measured(asked=asked[0], metrics={}, sample=None, failure="a worker died")
    status, text, facts = _evaluate(monkeypatch, asked, failed, _found(asked[1]))
    assert status == 1
    assert re.search(r"vqa +│ zero-shot .* accuracy +│ 50.0 %", text)
    assert "not measured pre: a worker died" in text
    assert facts["failures"] == {"pre": "a worker died"}
    assert [each["model"] for each in facts["results"]] == ["vqa"]


def test_results_are_shown_before_they_cannot_be_kept(
    monkeypatch: pytest.MonkeyPatch, asked: list[Evaluation]
) -> None:
    (Path(asked[0].folder.path) / "suite").write_text("in the way")
    status, text, facts = _evaluate(monkeypatch, asked, _found(asked[0]))
    assert re.search(r"/pre/suite: cannot be written \(.*\); mend", str(status))
    assert re.search(r"pre +│ zero-shot .* accuracy +│ 50.0 %", text)
    assert len(facts["results"]) == 1


def test_a_result_is_replaced_by_a_newer_one_and_by_nothing_else(asked: list[Evaluation]) -> None:
    keep(_found(asked[0], "shape"), asked[0])
    keep(_found(asked[0], "color"), asked[0])
    keep(_found(asked[0], "color", value=0.25), asked[0])
    keep(Measured(asked=asked[1], metrics={}, sample=None, failure="it died"), asked[0])
    files = Path(asked[0].folder.path, "suite").iterdir()
    found = [json.loads(path.read_text()) for path in sorted(files)]
    assert [(each["dataset"][-5:], each["metrics"]["acc1"]) for each in found] == [
        ("color", 0.25),
        ("shape", 0.5),
    ]


def test_one_run_that_fails_in_any_way_does_not_keep_the_others_from_being_measured(
    monkeypatch: pytest.MonkeyPatch, asked: list[Evaluation], tmp_path: Path
) -> None:
    def fit(work: Any, config: Any, storage: str, name: str, watch: Any, lease: None) -> None:
        if storage.endswith("pre"):
            raise ValueError("what nobody thought of")
        watch.metrics = {"rows": 1.0}

    monkeypatch.setattr(driver, "_fit", fit)
    monkeypatch.setattr(driver, "Board", lambda: None)
    monkeypatch.setattr(driver, "_check_cluster", lambda _: None)
    monkeypatch.setattr(driver, "session", lambda *_: contextlib.nullcontext())
    taken: list[Measured] = []
    driver.evaluate(asked, lambda _: None, tmp_path / "log", taken.append)
    failure = "ValueError: what nobody thought of"
    assert [(each.failure, each.metrics) for each in taken] == [
        (failure, {}),
        (None, {"rows": 1.0}),
    ]


def test_each_result_has_a_file_name_of_its_own() -> None:
    record = {"dataset": "scenes/val:shape", "model": "demo", "task": "linear_probe"}
    names = [_file_name({**record, "metrics": {"fewshot_k": k}}) for k in (5, 20, -1)]
    assert names == [
        "scenes_val_shape_demo_linear_probe_5_shots.json",
        "scenes_val_shape_demo_linear_probe_20_shots.json",
        "scenes_val_shape_demo_linear_probe.json",
    ]
