"""Runs of a real sqlite tracker: found by folder, name, id, experiment and filter."""

from pathlib import Path

import pytest

from pipeline.compare.find import COMPARED, SWEEP, find_runs, read_courses
from pipeline.errors import UserError
from pipeline.tracking import search
from pipeline.tracking.tracker import MetricLog, RunRef, close_run, open_run, tracking_uri
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
        ({"where": "loss is small"}, "MLflow refuses the search: "),
    ],
)
def test_what_finds_nothing_says_so(uri: str, asked: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_runs(uri, **asked)


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
