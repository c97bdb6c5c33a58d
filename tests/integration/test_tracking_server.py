"""A run on a real MLflow server: it goes on when the server dies or moves."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipeline.tracking.registry import register
from pipeline.tracking.tracker import close_run, log_artifacts, log_metrics, open_run
from tests.integration.mlflow_server import Server
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


# Long enough to be caught in the middle: the server answers seconds after a step.
LONG = {"epochs": 4, "checkpoint_every": 3}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def test_a_run_outlives_its_server_and_says_so(server: Server, tmp_path: Path) -> None:
    config = write_run(tmp_path, train=LONG, tracking={"uri": server.uri})
    driver = start("train", str(config))
    wait_for(lambda: checkpoint_at(tmp_path, 6) and points(tmp_path, "train/loss"))
    server.kill()
    output = finish(driver)
    assert f"warning: MLflow at {server.uri} does not answer" in output
    assert "metric points could not be delivered" in output
    assert "text to image R@1 of 60" in output
    assert mlflow_runs(tmp_path) == ["RUNNING"]


def test_a_report_is_made_of_what_a_server_has(server: Server, tmp_path: Path) -> None:
    """Its files come through the server, and the run is found by its name."""
    ref = open_run(server.uri, "tests", "served", params={}, tags={}, run_id=None)
    for samples in (10, 20):
        log_metrics(ref, samples, {"train/loss": 1 / samples})
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "plan.txt").write_text("Length: 2 steps.")
    Image.new("RGB", (8, 8)).save(tmp_path / "left" / "contact_sheet.png")
    log_artifacts(ref, tmp_path / "left")
    close_run(ref, "FAILED")
    out = tmp_path / "served.html"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": server.uri}
    finish(start("report", "served", "--out", str(out), env=environment))
    text = out.read_text()
    for part in ("Length: 2 steps.", 'alt="Pairs of the training data"', ">failed<", "<svg"):
        assert part in text, part


def test_a_model_is_registered_through_a_server(server: Server, tmp_path: Path) -> None:
    import mlflow

    ref = open_run(server.uri, "tests", "served", params={}, tags={}, run_id=None)
    log_metrics(ref, 10, {"eval/vqa/accuracy": 0.5})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(2**20))
    made = register(ref, tmp_path / "model", "scenes", samples=10, tags={"gammaray.step": "5"})
    client = mlflow.MlflowClient(server.uri)
    version = client.get_model_version("scenes", made.version)
    assert (version.run_id, version.tags["gammaray.step"]) == (ref.run_id, "5")
    (metric,) = client.get_logged_model(made.model_id).metrics or []
    assert (metric.key, metric.step, metric.value) == ("eval/vqa/accuracy", 10, 0.5)
    mlflow.set_tracking_uri(server.uri)
    there = mlflow.artifacts.download_artifacts("models:/scenes/1", dst_path=str(tmp_path / "got"))
    assert (Path(there) / "model.safetensors").stat().st_size == 2**20


def test_a_run_follows_its_server_to_another_address(server: Server, tmp_path: Path) -> None:
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
