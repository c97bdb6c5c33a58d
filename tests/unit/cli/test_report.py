"""`gammaray report`: which run is meant."""

from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from pipeline.cli.report import report
from pipeline.errors import UserError
from pipeline.tracking.tracker import close_run, log_metrics, open_run

app = typer.Typer()
app.command()(report)


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{tmp_path}/mlflow.db"


def _report(*arguments: str) -> None:
    result = CliRunner().invoke(app, arguments, obj=Console(quiet=True))
    if result.exception is not None:
        raise result.exception


def test_a_run_is_found_by_name_and_by_id(uri: str, tmp_path: Path) -> None:
    ref = open_run(uri, "tests", "tiny", params={"a": 1}, tags={}, run_id=None)
    log_metrics(ref, 10, {"train/loss": 1.0})
    log_metrics(ref, 20, {"train/loss": 0.5})
    close_run(ref, "FINISHED")
    _report("tiny")
    _report(ref.run_id, "--out", "deep/x.html")
    first, second = (tmp_path / "report.html").read_text(), (tmp_path / "deep/x.html").read_text()
    assert first == second
    assert "<title>tiny: report</title>" in first
    assert "<svg" in first


def test_a_name_of_several_runs_is_refused_with_their_ids(uri: str) -> None:
    refs = [open_run(uri, "tests", "tiny", params={}, tags={}, run_id=None) for _ in range(2)]
    with pytest.raises(UserError, match="tiny: 2 runs have that name; give the id of one") as told:
        _report("tiny")
    assert all(ref.run_id in str(told.value) for ref in refs)


def test_a_folder_without_a_run_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="no run there; give the folder of a run"):
        _report("runs/none")
