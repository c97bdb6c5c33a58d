"""The report at a run's end: it is kept, and cannot stand in the way."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.report import page
from pipeline.tracking.artifacts import read_files
from pipeline.tracking.tracker import RunRef, close_run, open_run
from pipeline.train import driver


def test_it_is_kept_with_the_run(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    ref = open_run(uri, "tests", "tiny", params={}, tags={}, run_id=None)
    close_run(ref, "KILLED")
    driver._report(ref)
    (text,) = read_files(ref, (".html",), 10**6).values()
    assert b"Go on with it" in text


@pytest.mark.parametrize("error", [ValueError("odd points"), UserError("no tracker")])
def test_one_that_fails_is_only_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(ref: RunRef, path: Path) -> None:
        raise error

    monkeypatch.setattr(page, "write_report", fail)
    driver._report(RunRef(uri="http://127.0.0.1:9", run_id="0"))
    assert f"no report of the run: {error}" in caplog.text
