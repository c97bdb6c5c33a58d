"""Where a comparison is kept, and what is said when it is not."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.cli.compare import present
from pipeline.compare.find import COMPARED, find_runs
from pipeline.compare.record import record
from pipeline.errors import UserError
from pipeline.tracking.search import Tracked
from pipeline.tracking.tracker import close_run, connect, log_metrics, open_run
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
