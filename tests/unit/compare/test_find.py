"""Runs of a real sqlite tracker: found by folder, name, id, experiment and filter."""

import sqlite3
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.compare import find
from pipeline.compare.curves import CLOCK
from pipeline.compare.find import COMPARED, SWEEP, find_runs, read_courses
from pipeline.errors import UserError
from pipeline.tracking import search
from pipeline.tracking.artifacts import read_points
from pipeline.tracking.search import Tracked
from pipeline.tracking.tracker import (
    MetricLog,
    RunRef,
    close_run,
    open_run,
    read_history,
    tracking_uri,
)
from tests.unit.compare.runs import RECALL


@pytest.fixture(scope="module")
def refs(tmp_path_factory: pytest.TempPathFactory) -> list[RunRef]:
    uri = tracking_uri("embedded", str(tmp_path_factory.mktemp("runs")))
    refs = []
    for name, experiment, tags in (
        ("one", "x", {}),
        ("two", "x", {}),
        ("one", "y", {}),
        ("compare", "x", {COMPARED: "..."}),
    ):
        params = {"loss.kind": "gamma", "train.seed": len(refs)}
        refs.append(open_run(uri, experiment, name, params=params, tags=tags, run_id=None))
    log = MetricLog(refs[0], system_metrics_seconds=10)
    for step in (1, 2):
        point = {"train/step": step, "train/step_s": 0.5, "train/world_size": 2, RECALL: 0.1 * step}
        log.log(8 * step, point)
    log.close()
    close_run(refs[0], "FINISHED")
    return refs


@pytest.fixture
def uri(refs: list[RunRef]) -> str:
    return refs[0].uri


def test_runs_are_found_in_every_way(refs: list[RunRef], uri: str) -> None:
    one, two, other, _ = (ref.run_id for ref in refs)

    def ids(**asked: object) -> list[str]:
        return [run.ref.run_id for run in find_runs(uri, **asked)]  # pyright: ignore

    assert ids(folders=[refs[1]]) == [two]
    assert ids(names=["one"]) == [one, other]
    assert ids(names=[two, "one"]) == [two, one, other]
    assert ids(experiment="x") == [one, two]
    assert ids(where="params.`train.seed` = '2'") == [other]
    assert ids(experiment="x", where="params.`loss.kind` = 'gamma'") == [one, two]
    assert ids(names=[two], experiment="x") == [two, one]


def test_a_run_is_as_the_tracker_has_it(refs: list[RunRef], uri: str) -> None:
    run, _ = find_runs(uri, experiment="x")
    assert (run.name, run.experiment, run.status) == ("one", "x", "FINISHED")
    assert run.params == {"loss.kind": "gamma", "train.seed": "0"}
    assert run.metrics[RECALL] == 0.2
    course = read_courses([run], [RECALL])[run.ref.run_id]
    assert course.points[RECALL] == [(8, 0.1), (16, 0.2)]
    assert (course.seconds, course.worker_seconds) == (1.0, 2.0)


def test_many_runs_come_page_by_page(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = find_runs(uri, where="attributes.status != 'X'")
    monkeypatch.setattr(search, "PAGE", 1)
    assert find_runs(uri, where="attributes.status != 'X'") == whole
    assert len(whole) == 3


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "nothing to compare; give runs .*, --experiment NAME, or --where FILTER"),
        ({"names": ["three"]}, "three: sqlite:.* has no run of that name or id; give"),
        ({"experiment": "z"}, r"--experiment: .* has no experiment 'z'; it has \['Default', 'x'"),
        ({"experiment": "Default"}, "--experiment: 'Default' of .* has no runs; name another"),
        ({"where": "params.a = 'b'"}, r"--where: no run of .* passes \"params.a = 'b'\"; the"),
        ({"where": "loss is small"}, r"MLflow cannot search for runs \(Invalid .*; see that it is"),
    ],
)
def test_what_finds_nothing_says_so(uri: str, asked: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_runs(uri, **asked)


def test_runs_of_folders_are_asked_for_together(
    refs: list[RunRef], uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def search_runs(uri: str, experiment: str | None = None, where: str = "") -> list[Tracked]:
        asked.append(where)
        return real(uri, experiment, where)

    real = search.search_runs
    monkeypatch.setattr(search, "search_runs", search_runs)
    folders = [refs[2], refs[0], refs[1]]
    assert [run.ref for run in find_runs(uri, folders=folders)] == folders
    assert len(asked) == 1
    monkeypatch.setattr(search, "IDS", 2)
    assert [run.ref for run in find_runs(uri, folders=folders)] == folders
    assert len(asked) == 3
    gone = RunRef(uri=uri, run_id="0" * 32)
    with pytest.raises(UserError, match=f"{uri}: has no run {gone.run_id}, it may have been del"):
        find_runs(uri, folders=[refs[0], gone])


def test_a_metric_that_a_run_lacks_is_not_asked_for(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def read_history(ref: RunRef, names: list[str]) -> dict[str, list[tuple[int, float]]]:
        asked.extend(names)
        return {name: [(8, 1.0)] for name in names}

    monkeypatch.setattr(find, "read_history", read_history)
    run, other = find_runs(uri, experiment="x")
    courses = read_courses([run, other], [RECALL])
    assert asked == [RECALL, *CLOCK]
    assert courses[run.ref.run_id].points["train/loss"] == []
    assert set(courses[other.ref.run_id].points) == {RECALL, "train/loss", *CLOCK}


@pytest.fixture
def strict_server() -> Iterator[str]:
    """A server that wants to know who asks."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_tracker_that_wants_an_account_says_how_to_give_one(strict_server: str) -> None:
    ref = RunRef(uri=strict_server, run_id="0" * 32)
    for ask in (
        lambda: find_runs(strict_server, experiment="x"),
        lambda: find_runs("", folders=[ref]),
        lambda: read_history(ref, ["a"]),
        lambda: read_points(ref, ["a"]),
    ):
        message = f"^{strict_server}: MLflow cannot .*401.*; give an account .*MLFLOW_TRACKING_USER"
        with pytest.raises(UserError, match=message):
            ask()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "http://127.0.0.1:9",
            r": no MLflow server answers \(.*refused.*; start it, or set ",
        ),
        ("mlruns", ": is no tracker; set MLFLOW_TRACKING_URI"),
        ("postgresql://127.0.0.1:9/x", r": MLflow cannot search for runs \(.*\); "),
        ("sqlite:///FOLDER/text.db", r": MLflow cannot search .*not a database.*; see that it is"),
        ("sqlite:///FOLDER/locked.db", r": MLflow cannot search .* is locked.*; another process"),
    ],
)
def test_a_tracker_that_cannot_be_asked_is_named_with_the_cause(
    tmp_path: Path, uri: str, message: str
) -> None:
    (tmp_path / "text.db").write_text("no database " * 20)
    lock = sqlite3.connect(tmp_path / "locked.db", isolation_level=None)
    lock.execute("create table t (x)")
    lock.execute("begin exclusive")
    uri = uri.replace("FOLDER", str(tmp_path))
    with pytest.raises(UserError, match=f"^{uri}{message}"):
        find_runs(uri, experiment="x")
    lock.close()
    assert not Path("mlruns").exists()


def test_a_tracker_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tracker there; set MLFLOW_TRACKING_URI"):
        find_runs(f"sqlite:///{tmp_path}/none.db", experiment="x")
    assert not list(tmp_path.iterdir())


def test_a_sweep_that_is_named_stands_for_its_runs(tmp_path: Path) -> None:
    uri = tracking_uri("embedded", str(tmp_path))
    parent = open_run(uri, "x", "swept", params={}, tags={SWEEP: "swept"}, run_id=None)
    with pytest.raises(UserError, match="swept: a sweep of which no run has begun"):
        find_runs(uri, names=["swept"])
    tags = {"mlflow.parentRunId": parent.run_id}
    for name in ("swept-a", "swept-b"):
        open_run(uri, "x", name, params={}, tags=tags, run_id=None)
    open_run(uri, "x", "other", params={}, tags={}, run_id=None)
    for asked in ({"names": ["swept"]}, {"folders": [parent]}):
        assert [run.name for run in find_runs(uri, **asked)] == ["swept-a", "swept-b"]
    assert [run.name for run in find_runs(uri, experiment="x")] == ["swept-a", "swept-b", "other"]
