"""What a run has left with a sqlite tracker, read back."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.tracking.artifacts import read_files, read_points
from pipeline.tracking.search import get_runs
from pipeline.tracking.tracker import (
    Input,
    RunRef,
    close_run,
    log_artifacts,
    log_inputs,
    log_metrics,
    open_run,
)


@pytest.fixture
def ref(tmp_path: Path) -> RunRef:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    return open_run(uri, "tests", "tiny", params={}, tags={}, run_id=None)


def test_files_are_read_by_ending_and_size_from_all_folders(ref: RunRef, tmp_path: Path) -> None:
    left = tmp_path / "left"
    (left / "suite" / "deep").mkdir(parents=True)
    (left / "plan.txt").write_text("a plan")
    (left / "suite" / "deep" / "b.json").write_text("{}")
    (left / "large.txt").write_text("x" * 100)
    (left / "page.html").write_text("no")
    log_artifacts(ref, left)
    assert read_files(ref, (".txt", ".json"), 50) == {
        "plan.txt": b"a plan",
        "suite/deep/b.json": b"{}",
    }


def test_a_place_that_does_not_give_files_is_named(ref: RunRef) -> None:
    nobody = RunRef(uri=ref.uri, run_id="0" * 32)
    with pytest.raises(UserError, match=f"cannot give the files of run {nobody.run_id} "):
        read_files(nobody, (".txt",), 50)


def test_points_have_their_time_and_are_in_order(ref: RunRef) -> None:
    log_metrics(ref, 20, {"a": 2.0})
    log_metrics(ref, 10, {"a": 1.0})
    (run,) = get_runs(ref.uri, ref.run_id)
    points = read_points(ref, ["a", "b"])
    assert [(point.samples, point.value) for point in points["a"]] == [(10, 1.0), (20, 2.0)]
    assert points["b"] == []
    assert run.began is not None
    assert all(point.ms >= run.began for point in points["a"])


def test_a_run_says_when_it_ended_and_what_it_read(ref: RunRef) -> None:
    inputs = [
        Input(role="training", source="/data/train", digest="ab", rows=30),
        Input(role="evaluation", source="s3://b/val", digest="cd", rows=4),
    ]
    log_inputs(ref, inputs)
    (before,) = get_runs(ref.uri, "tiny")
    assert before.ended is None
    close_run(ref, "FINISHED")
    (after,) = get_runs(ref.uri, "tiny")
    assert after.ended is not None
    assert set(after.inputs) == set(inputs)


def test_data_sets_that_others_log_are_passed_over(ref: RunRef) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    from pipeline.tracking.tracker import connect

    theirs = Dataset(name="x", digest="e", source_type="local", source="no json", profile=None)
    tag = InputTag("mlflow.data.context", "training")
    connect(ref.uri).log_inputs(ref.run_id, [DatasetInput(theirs, [tag])])
    (run,) = get_runs(ref.uri, "tiny")
    assert run.inputs == ()
