import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.tracking.meters import Meter
from pipeline.tracking.plots import (
    plot_bridge,
    plot_curves,
    plot_projection,
    plot_similarities,
)
from pipeline.tracking.tracker import (
    Input,
    MetricLog,
    RunRef,
    check_reachable,
    close_run,
    log_artifacts,
    log_inputs,
    open_run,
    read_history,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

DEAD = RunRef(uri="http://127.0.0.1:9", run_id="0" * 32)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tracking_uri("embedded", str(tmp_path_factory.mktemp("runs")))


@pytest.fixture
def ref(uri: str, request: pytest.FixtureRequest) -> RunRef:
    return open_run(uri, "tests", request.node.name, params={}, tags={}, run_id=None)


@pytest.fixture
def client(uri: str) -> "MlflowClient":
    import mlflow

    return mlflow.MlflowClient(tracking_uri=uri)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def _log_all(ref: RunRef, *points: tuple[int, dict[str, float]]) -> None:
    metrics = MetricLog(ref, system_metrics_seconds=10)
    for step, values in points:
        metrics.log(step, values)
    metrics.close()


def test_embedded_is_a_file_in_the_storage() -> None:
    assert tracking_uri("embedded", "/data/runs") == "sqlite:////data/runs/mlflow.db"
    assert tracking_uri("http://host:5000", "/data/runs") == "http://host:5000"


def test_a_run_is_created_with_its_params_and_tags(uri: str, client: "MlflowClient") -> None:
    params = {f"key.{number}": number for number in range(130)} | {"long": "x" * 9000}
    ref = open_run(uri, "first", "a run", params=params, tags={"a.b": "c"}, run_id=None)
    run = client.get_run(ref.run_id)
    assert (run.info.run_name, run.info.status) == ("a run", "RUNNING")
    assert client.get_experiment(run.info.experiment_id).name == "first"
    assert run.data.params["key.129"] == "129"
    assert len(run.data.params) == 131
    assert run.data.params["long"] == "x" * 6000
    assert run.data.tags["a.b"] == "c"


def test_going_on_keeps_one_run(uri: str, client: "MlflowClient") -> None:
    ref = open_run(uri, "second", "a", params={"p": 1}, tags={}, run_id=None)
    close_run(ref, "FAILED")
    assert client.get_run(ref.run_id).info.status == "FAILED"
    again = open_run(uri, "second", "a", params={}, tags={}, run_id=ref.run_id)
    assert again == ref
    experiment = client.get_experiment_by_name("second").experiment_id
    (run,) = client.search_runs([experiment])
    assert (run.info.run_id, run.info.status, run.data.params) == (
        ref.run_id,
        "RUNNING",
        {"p": "1"},
    )
    other = open_run(uri, "second", "a", params={}, tags={}, run_id=None)
    assert other.run_id != ref.run_id
    assert len(client.search_runs([experiment])) == 2


def test_a_refused_run_is_the_users_to_mend(uri: str) -> None:
    with pytest.raises(UserError, match=r"tracking.uri: MLflow at sqlite:.* refused the run: .*"):
        open_run(uri, "tests", "a", params={}, tags={}, run_id="unknown")


@pytest.mark.usefixtures("_impatient")
def test_a_dead_server_refuses_the_run() -> None:
    with pytest.raises(UserError, match=rf"tracking.uri: MLflow at {DEAD.uri} refused the run: "):
        open_run(DEAD.uri, "tests", "a", params={}, tags={}, run_id=None)


def test_status_and_artifacts_arrive(ref: RunRef, client: "MlflowClient", tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "plan.txt").write_text("a plan")
    (tmp_path / "inner" / "b.txt").write_text("b")
    log_artifacts(ref, tmp_path)
    close_run(ref, "FINISHED")
    run = client.get_run(ref.run_id)
    assert run.info.status == "FINISHED"
    assert {item.path for item in client.list_artifacts(ref.run_id)} == {"inner", "plan.txt"}
    database = Path(ref.uri.removeprefix("sqlite:///"))
    assert list((database.parent / "mlartifacts").rglob("plan.txt"))


def test_the_data_sets_of_a_run_can_be_searched_for(ref: RunRef, client: "MlflowClient") -> None:
    train = Input(role="training", source="/data/cc3m/train", digest="0123456789ab", rows=300)
    val = Input(role="evaluation", source="s3://b/a/val?region=x, /c/d", digest="ba", rows=60)
    log_inputs(ref, [train, val])
    found = client.get_run(ref.run_id).inputs.dataset_inputs
    described = {
        each.tags[0].value: (each.dataset.name, each.dataset.source_type, each.dataset.profile)
        for each in found
    }
    assert described == {
        "training": ("cc3m/train", "local", '{"num_rows": 300}'),
        "evaluation": ("a/val, c/d", "s3", '{"num_rows": 60}'),
    }
    experiment = client.get_run(ref.run_id).info.experiment_id
    (run,) = client.search_runs([experiment], "dataset.digest = '0123456789ab'")
    assert run.info.run_id == ref.run_id


def test_points_arrive_in_order_of_their_steps(ref: RunRef) -> None:
    points = [(step, {"train/loss": 1 / step, "train/step": step}) for step in range(1, 51)]
    _log_all(ref, *points)
    history = read_history(ref, ["train/loss", "train/step", "train/none"])
    assert history["train/loss"] == [(step, pytest.approx(1 / step)) for step in range(1, 51)]
    assert history["train/step"][-1] == (50, 50.0)
    assert history["train/none"] == []


@pytest.mark.usefixtures("_impatient")
def test_what_a_dead_tracker_did_not_take_is_taken_over(ref: RunRef) -> None:
    """As a checkpoint does, through JSON; what was delivered meanwhile is not sent twice."""
    dead = MetricLog(DEAD, system_metrics_seconds=10)
    for step in (8, 16, 24):
        dead.log(step, {"train/loss": step / 8})
    kept = json.loads(json.dumps(dead.undelivered))
    dead.close()
    _log_all(ref, (8, {"train/loss": 1.0}))
    points = [(step, at, values) for step, at, values in kept]
    metrics = MetricLog(ref, 10, points)
    metrics.log(32, {"train/loss": 4.0})
    metrics.close()
    assert metrics.undelivered == []
    found = read_history(ref, ["train/loss"])["train/loss"]
    assert found == [(8, 1.0), (16, 2.0), (24, 3.0), (32, 4.0)]


def test_points_arrive_before_the_log_is_closed(ref: RunRef) -> None:
    metrics = MetricLog(ref, system_metrics_seconds=10)
    metrics.log(8, {"train/loss": 1.0})
    deadline = time.monotonic() + 20
    while not read_history(ref, ["train/loss"])["train/loss"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert read_history(ref, ["train/loss"])["train/loss"] == [(8, 1.0)]
    metrics.close()


def test_a_reopened_log_leaves_out_steps_it_has(ref: RunRef) -> None:
    _log_all(ref, (8, {"train/loss": 3.0}), (16, {"train/loss": 2.0}))
    _log_all(ref, (16, {"train/loss": 9.0}), (24, {"train/loss": 1.0}))
    assert read_history(ref, ["train/loss"])["train/loss"] == [(8, 3.0), (16, 2.0), (24, 1.0)]


@pytest.mark.usefixtures("_impatient")
def test_a_dead_server_stops_no_one(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    started = time.monotonic()
    metrics = MetricLog(DEAD, system_metrics_seconds=10)
    for step in range(1000):
        metrics.log(step, {"train/loss": 1.0})
    assert time.monotonic() - started < 1
    metrics.close(timeout=20)
    assert f"MLflow at {DEAD.uri} does not answer (" in caplog.text
    assert "1000 metric points could not be delivered" in caplog.text
    (tmp_path / "plan.txt").write_text("a plan")
    log_artifacts(DEAD, tmp_path)
    log_inputs(DEAD, [])
    close_run(DEAD, "FINISHED")
    for what in ("log artifacts", "log the data sets", "end the run"):
        assert f"MLflow: could not {what}: " in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


@pytest.mark.usefixtures("_impatient")
def test_closing_waits_no_longer_than_its_timeout(
    silent_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = MetricLog(RunRef(uri=silent_server, run_id="0" * 32), system_metrics_seconds=10)
    metrics.log(1, {"train/loss": 1.0})
    started = time.monotonic()
    metrics.close(timeout=0.3)
    assert 0.3 <= time.monotonic() - started < 1.5
    assert f"MLflow at {silent_server} did not take the last points in time" in caplog.text
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "mlflow")
    thread.join(20)  # its last warning belongs to this test


def test_trackers_that_answer_or_can_exist_are_reachable(tmp_path: Path) -> None:
    check_reachable(f"sqlite:///{tmp_path}/mlflow.db")
    check_reachable("postgresql://host/mlflow")


@pytest.mark.parametrize("answer", ["200 OK", "401 Unauthorized", "404 Not Found"])
def test_any_answer_of_a_server_will_do(answer: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                request = connection.recv(4096)
                asked.append(request.split(b"\r\n")[0])
                connection.sendall(f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n".encode())

        asked: list[bytes] = []
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        check_reachable(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        thread.join(5)
    assert asked == [b"GET /health HTTP/1.1"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("mlruns", r"'mlruns' is no tracker; give embedded, sqlite:///FILE or http://HOST:PORT"),
        ("http://127.0.0.1:9", r"no MLflow server answers at http://127.0.0.1:9 \(.*refused"),
        ("https://127.0.0.1:9/x", r"no MLflow server answers at https://127.0.0.1:9/x \("),
        ("http://", r"no MLflow server answers at http:// \(.*no host given"),
    ],
)
def test_unreachable_trackers_are_named(uri: str, message: str) -> None:
    with pytest.raises(UserError, match="^tracking.uri: " + message):
        check_reachable(uri)


def test_meter_gives_the_rates_of_its_window() -> None:
    meter = Meter(started=time.perf_counter() - 10)
    meter.add(64, 1.0)
    meter.add(64, 1.5)
    rates = meter.window()
    assert rates["samples_per_s"] == pytest.approx(12.8, rel=0.02)
    assert rates["step_s"] == pytest.approx(5, rel=0.02)
    assert rates["data_wait_share"] == pytest.approx(0.25, rel=0.02)


def test_meter_starts_afresh_after_a_window_and_a_skip() -> None:
    meter = Meter(started=time.perf_counter() - 100)
    meter.add(64, 50.0)
    meter.skip()
    assert (meter.samples, meter.steps, meter.waited) == (0, 0, 0.0)
    meter.started -= 2
    meter.add(10, 0.0)
    rates = meter.window()
    assert rates["samples_per_s"] == pytest.approx(5, rel=0.05)
    assert rates["data_wait_share"] == 0


def test_meter_of_an_empty_or_impossible_window_stays_finite() -> None:
    assert Meter(started=time.perf_counter() - 1).window()["samples_per_s"] == 0
    meter = Meter(started=time.perf_counter() + 100)
    meter.add(1, 5.0)
    assert meter.window()["data_wait_share"] == 1.0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_curves_are_drawn_one_panel_a_metric(tmp_path: Path, count: int) -> None:
    history = {f"train/{number}": [(8, 2.0), (16, 1.0)] for number in range(count)}
    assert plot_curves({**history, "train/none": []}, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        assert image.width == (605 if count == 1 else 1210)
        assert image.height == 352 * (1 if count < 3 else 2)


@pytest.mark.parametrize("labels", [["a", "b", ""] * 4, [""] * 12])
def test_embeddings_are_drawn_with_labels_and_without(tmp_path: Path, labels: list[str]) -> None:
    rows = np.random.default_rng(0).normal(size=(2, 12, 5)).astype(np.float32)
    for name, draw in (("plane", plot_projection), ("cosines", plot_similarities)):
        draw(rows[0], rows[1], labels, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert np.asarray(image).std() > 5, "more than an empty page"


def test_the_bridge_is_drawn_at_the_first_and_the_last_point(tmp_path: Path) -> None:
    name = "train/structure/bridge_residual_at_{:.3f}"
    history = {name.format(t): [(8, 1 - t), (16, 0.5), (24, 0.1)] for t in (0.0, 0.5, 1.0)}
    assert plot_bridge(history, tmp_path / "bridge.png")
    assert (tmp_path / "bridge.png").stat().st_size > 5000
    assert not plot_bridge({name.format(0.5): []}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_without_points_nothing_is_drawn(tmp_path: Path) -> None:
    assert not plot_curves({"train/loss": []}, tmp_path / "curves.png")
    assert not plot_curves({}, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())
