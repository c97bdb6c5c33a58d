"""Where a comparison is kept, and what is said when it is not."""

import io
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from pipeline.cli.compare import compare, present, sweep_out
from pipeline.compare.find import COMPARED, SWEEP, find_runs
from pipeline.compare.record import record
from pipeline.errors import UserError
from pipeline.tracking.search import Tracked
from pipeline.tracking.tracker import close_run, connect, log_metrics, open_run
from pipeline.train.store import RunFolder
from pipeline.train.sweep_record import SweepRecord, write_sweep
from tests.unit.compare.runs import RECALL


@pytest.fixture
def found(tmp_path: Path) -> list[Tracked]:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    ref = open_run(uri, "x", "one", params={"train.seed": 0}, tags={}, run_id=None)
    log_metrics(ref, 8, {RECALL: 0.5})
    close_run(ref, "FINISHED")
    return find_runs(uri, folders=[ref])


def _present(found: list[Tracked], out: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    present(console, found, (), out, record)
    return console.file.getvalue()  # pyright: ignore


def test_files_that_mlflow_has_not_taken_are_not_said_to_be_there(
    found: list[Tracked], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir(mode=0o755)
    assert "has them too." in _present(found, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    artifacts = tmp_path / "mlartifacts"
    artifacts.rename(tmp_path / "away")
    artifacts.write_text("in the way")
    text = _present(found, tmp_path / "out")
    assert "warning: not kept in MLflow: " in text
    assert "MLflow cannot keep files of run" in text
    assert "has them too" not in text
    client = connect(found[0].ref.uri)
    experiment = client.get_run(found[0].ref.run_id).info.experiment_id
    kept = client.search_runs([experiment], f"tags.`{COMPARED}` != ''")
    assert sorted(run.info.status for run in kept) == ["FAILED", "FINISHED"]


def test_a_folder_that_cannot_be_written_is_named(found: list[Tracked], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"/file: cannot be written \(.*\); give gammaray compare"):
        _present(found, tmp_path / "file")


def test_a_metric_that_no_picture_shows_is_said(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    ref = open_run(uri, "x", "one", params={"train.seed": 0}, tags={}, run_id=None)
    log_metrics(ref, 8, {f"eval/zero_shot/{n}/accuracy": 0.5 for n in range(4)})
    log_metrics(ref, 8, {"eval/zero_shot/0/chance": 0.25})
    close_run(ref, "FINISHED")
    text = _present(find_runs(uri, folders=[ref]), tmp_path / "out")
    assert "Pictures: the first 3 of 4 metrics; others with" in text
    assert "eval/zero_shot/0/accuracy, % (chance 25 %)" in text


def test_a_sweeps_comparison_goes_into_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    parent = open_run(uri, "x", "losses", params={}, tags={SWEEP: "losses"}, run_id=None)
    tags: dict[str, Any] = {"mlflow.parentRunId": parent.run_id}
    ref = open_run(uri, "x", "one", params={"train.seed": 0}, tags=tags, run_id=None)
    log_metrics(ref, 8, {RECALL: 0.5})
    close_run(ref, "FINISHED")
    swept = SweepRecord(keys=[], mlflow_uri=uri, mlflow_run_id=parent.run_id, stopped=[])
    write_sweep(RunFolder.of(str(tmp_path / "deep"), "losses"), swept)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    app = typer.Typer()
    app.command()(compare)
    for asked, folder in (
        (["deep/losses/"], "deep/losses/comparison"),
        (["deep/losses", "--out", "else"], "else"),
        (["deep/losses", "one"], "runs/comparison"),
        (["one"], "runs/comparison"),
    ):
        console = Console(file=io.StringIO(), width=200)
        result = CliRunner().invoke(app, asked, obj=console)
        assert result.exception is None
        assert f" are in {folder}\n" in console.file.getvalue()  # pyright: ignore
        assert (tmp_path / folder / "comparison.md").exists()
    assert sweep_out("s3://bucket/runs/losses/") == Path("runs/losses/comparison")
