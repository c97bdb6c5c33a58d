"""`gammaray sweep` on a real Ray Tune: twelve runs, a driver that is killed, Ctrl-C, one table."""

import json
import os
import signal
import sqlite3
from pathlib import Path

import pytest

from pipeline.train.lease import wait_for_the_dead
from pipeline.train.store import list_runs
from tests.integration.run_cli import (
    finish,
    mlflow_runs,
    points,
    run,
    start,
    wait_for,
    write_run,
)

pytestmark = pytest.mark.integration

AXES = ["--over", "loss.kind=gamma,infonce_local,sigmoid_local", "--over", "train.seed=0,1,2,3"]


def _finished(runs: Path) -> dict[str, str]:
    """MLflow run ids of the finished runs, by name."""
    records = [folder.read_record() for folder in list_runs(str(runs))]
    return {each.name: each.mlflow_run_id for each in records if each and each.is_finished}


def _times(runs: Path) -> dict[str, tuple[int, int, str]]:
    """Start, end and status of every run of the tracker, by its id."""
    with sqlite3.connect(runs / "mlflow.db") as database:
        rows = database.execute("select run_uuid, start_time, end_time, status from runs")
        return {run_id: (began, ended, status) for run_id, began, ended, status in rows}


def _children(runs: Path, parent: str) -> set[str]:
    with sqlite3.connect(runs / "mlflow.db") as database:
        rows = database.execute(
            "select run_uuid from tags where key = 'mlflow.parentRunId' and value = ?", (parent,)
        )
        return {run_id for (run_id,) in rows}


@pytest.mark.timeout(1800)
def test_twelve_runs_survive_a_kill_of_their_driver(tmp_path: Path) -> None:
    config = write_run(
        tmp_path,
        rows=64,
        train={"epochs": 0.5, "checkpoint_every": 1},
        evaluate={"max_rows": 20, "zero_shot": []},
        cluster={"workers": 1},
    )
    runs = tmp_path / "runs"
    command = ["sweep", str(config), *AXES, "--json", str(tmp_path / "facts.json")]
    driver = start(*command)
    before = wait_for(lambda: len(done := _finished(runs)) >= 4 and done, 900, driver)
    # The driver alone: what it started ends by itself, which may take it seconds.
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    for folder in list_runs(str(runs)):
        wait_for_the_dead(folder)
    before = _finished(runs)
    then = _times(runs)
    assert len(before) < 12

    output = finish(start(*command), 900)
    facts = json.loads((tmp_path / "facts.json").read_text())
    done = _finished(runs)
    assert len(done) == 12, output
    assert f"{12 - len(before)} of 12 runs are to be done" in output
    now = _times(runs)
    for name, run_id in before.items():
        assert done[name] == run_id
        if then[run_id][2] == "FINISHED":
            assert now[run_id] == then[run_id], f"{name} was run again"
    assert len(now) == 13, "twelve runs and their parent"
    assert _children(runs, facts["mlflow_run_id"]) == set(done.values()) == set(facts["runs"])
    assert {status for _, _, status in now.values()} == {"FINISHED"}
    assert "12 run(s) of 3 config(s), seeds apart:" in output
    assert output.count("┃ equal samples") == 2, "a table for each recall at 1"
    files = runs / "tiny" / "comparison"
    assert "# 12 run(s) of 3 config(s)" in (files / "comparison.md").read_text()
    kept = {path.name for path in (runs / "mlartifacts" / facts["mlflow_run_id"]).rglob("*.*")}
    assert {"comparison.md", "comparison.json", "curves.png"} <= kept

    (files / "comparison.md").unlink()
    again = run("compare", str(runs / "tiny"))
    assert "12 run(s) of 3 config(s), seeds apart:" in again
    assert (files / "comparison.md").exists(), "where the sweep had written it"


@pytest.mark.timeout(1200)
def test_asha_stops_some_and_lets_the_best_go_on(tmp_path: Path) -> None:
    config = write_run(
        tmp_path,
        rows=96,
        train={"epochs": 2, "checkpoint_every": 4},
        evaluate={"max_rows": 20, "zero_shot": [], "every": 1},
        cluster={"workers": 1},
    )
    metric = "eval/retrieval/text_to_image_recall_at_5"
    command = ["sweep", str(config), "--over", "optim.lr=3e-3,1e-9,1e-8,1e-7", "--asha", metric]
    output = finish(start(*command), 900)
    record = json.loads((tmp_path / "runs" / "tiny" / "sweep.json").read_text())
    assert record["stopped"], output
    assert len(_finished(tmp_path / "runs")) + len(record["stopped"]) == 4
    assert "is stopped early, at" in output
    assert "4 run(s) of 4 config(s)" in output
    assert "0 of 4 runs are to be done" in finish(start(*command))


@pytest.mark.timeout(1200)
def test_an_interruption_saves_what_runs_and_a_second_one_does_not_wait(tmp_path: Path) -> None:
    config = write_run(
        tmp_path,
        rows=64,
        train={"epochs": 1000, "checkpoint_every": 100_000},
        evaluate={"max_rows": 20, "zero_shot": []},
        # So many that there is room for one run.
        cluster={"workers": 1, "ingest_cpus": max(1, (os.cpu_count() or 1) - 1)},
    )
    runs = tmp_path / "runs"
    command = ["sweep", str(config), "--over", "train.seed=0,1,2"]

    def samples() -> list[int]:
        return [at for at, _ in points(runs, "train/loss")]

    driver = start(*command)
    wait_for(lambda: len(samples()) > 3, 300, driver)
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=240)
    assert driver.returncode == 130, output
    assert "Stopping: runs that train save first; once more to stop without" in output
    assert "tiny-seed_0 is stopped; the same command goes on with it" in output
    assert "tiny-seed_1" not in output, "no more begin"
    assert mlflow_runs(runs) == ["KILLED", "KILLED"], "the run and its parent"
    (saved,) = (runs / "tiny-seed_0").glob("step-*/manifest.json")
    assert len(samples()) == int(saved.parent.name.removeprefix("step-"))

    before = samples()
    driver = start(*command)
    wait_for(lambda: len(samples()) > len(before) + 3, 300, driver)
    driver.send_signal(signal.SIGTERM)
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 130, output
    assert "is stopped; the same command" not in output
    assert list((runs / "tiny-seed_0").glob("step-*/manifest.json")) == [saved]
    assert len(samples()) == len(set(samples())), "it went on where it had saved"
