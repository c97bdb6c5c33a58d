"""A run on a real MLflow server: it goes on when the server dies or moves."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.run_cli import (
    checkpoint_at,
    finish,
    kill_group,
    mlflow_runs,
    points,
    run,
    start,
    wait_for,
    write_run,
)

pytestmark = pytest.mark.integration


class _Server:
    """`mlflow server` with its files in a folder; may be started again, at another port."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = ""

    def start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
             "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db",
             "--artifacts-destination", str(self._folder / "artifacts")],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        wait_for(self._answers)

    def kill(self) -> None:
        """SIGKILL the server and its workers, which share its session."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return True
        except OSError:
            return False


# Long enough to be caught in the middle: the server answers seconds after a step.
LONG = {"epochs": 4, "checkpoint_every": 3}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[_Server]:
    server = _Server(tmp_path)
    server.start()
    yield server
    server.kill()


def test_a_run_outlives_its_server_and_says_so(server: _Server, tmp_path: Path) -> None:
    config = write_run(tmp_path, train=LONG, tracking={"uri": server.uri})
    driver = start("train", str(config))
    wait_for(lambda: checkpoint_at(tmp_path, 6) and points(tmp_path, "train/loss"))
    server.kill()
    output = finish(driver)
    assert f"warning: MLflow at {server.uri} does not answer" in output
    assert "metric points could not be delivered" in output
    assert "text to image R@1 of 60" in output
    assert mlflow_runs(tmp_path) == ["RUNNING"]


def test_a_run_follows_its_server_to_another_address(server: _Server, tmp_path: Path) -> None:
    config = write_run(tmp_path, train=LONG, tracking={"uri": server.uri})
    driver = start("train", str(config))
    wait_for(lambda: checkpoint_at(tmp_path, 6) and points(tmp_path, "train/loss"))
    kill_group(driver)
    server.kill()
    server.start()
    output = run("train", str(config), f"tracking.uri={server.uri}")
    assert "Run 'tiny' is unfinished: going on with it." in output
    assert f"open {server.uri}" in output
    assert mlflow_runs(tmp_path) == ["FINISHED"]
    steps = [step for step, _ in points(tmp_path, "train/loss")]
    assert len(steps) == len(set(steps)) == 4 * 300 // 16
    assert list((tmp_path / "artifacts").rglob("curves.png"))
