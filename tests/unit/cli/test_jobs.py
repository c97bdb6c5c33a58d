"""What is refused before anything is sent, and what a job's log says of its end."""

import sys
from pathlib import Path

import pytest
import yaml

from pipeline import cli
from pipeline.cli.jobs import saved_line


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config that can be submitted, in the current folder; no cluster."""
    values = {
        "name": "tiny",
        "data": {"train": "s3://bucket/a"},
        "train": {"global_batch": 16, "epochs": 1},
        "cluster": {"storage": "s3://bucket/runs"},
        "tracking": {"uri": "http://mlflow:5000"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    return "run.yaml"


def _submit(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gammaray", "submit", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.global_batch=lots"], "train.global_batch: is 'lots'"),
        (["cluster.workers=3"], "train.global_batch: is 16; it must be a multiple"),
        (["cluster.storage=runs"], "cluster.storage: is 'runs', relative"),
        (["tracking.uri=embedded"], "tracking.uri: embedded needs local storage"),
        (["--env", "MY_SECRET=1"], "--env MY_SECRET: looks like a secret"),
        (["--address", "auto"], "--address: 'auto' is no URL of a dashboard"),
        ([], "http://127.0.0.1:9: no Ray cluster answers there"),
    ],
)
def test_submit_refuses(
    config: str,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert _submit(monkeypatch, config, *arguments) == 2
    captured = capfd.readouterr()
    assert said in captured.out
    assert "Traceback" not in captured.out + captured.err


def test_the_last_line_of_a_job_that_saved() -> None:
    log = "Saved at step 10; the workers start anew.\nstep 12\nSaved at step 1,055.\nInterrupted.\n"
    assert saved_line(log) == "Saved at step 1,055."
    assert saved_line("Saved at step 10; the workers start anew.\nTraining from step 10.\n") is None
