"""Starts the real `gammaray` command on tiny data, and reads what it left behind."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import yaml

from pipeline.data.demo import write_demo

TIMEOUT_S = 240


def write_run(folder: Path, rows: int = 300, **sections: dict[str, Any]) -> Path:
    """Demo data and a config of seconds in `folder`; gives the config's path."""
    write_demo(folder / "data", rows)
    values: dict[str, Any] = {
        "name": "tiny",
        "data": {
            "train": str(folder / "data" / "train"),
            "val": str(folder / "data" / "val"),
            "vocab_size": 320,
            "shuffle_window": 64,
        },
        "model": {
            "embed_dim": 16,
            "image": {"size": 32, "patch": 16, "width": 16, "layers": 1, "heads": 2},
            "text": {"context_length": 16, "width": 16, "layers": 1, "heads": 2},
        },
        "engine": {"zero_stage": 2, "precision": "fp32"},
        "train": {"global_batch": 16, "epochs": 2, "checkpoint_every": 5, "log_every": 1},
        "evaluate": {"max_rows": 60, "zero_shot": [{"column": "shape"}]},
        "cluster": {"workers": 2, "cpus_per_worker": 0.5, "storage": str(folder / "runs")},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(
    *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start the command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=cwd,
        env=env,
        # A shell starts what it puts in the background with SIGINT ignored, and children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def finish(process: subprocess.Popen[str], seconds: float = TIMEOUT_S) -> str:
    """Wait for the command; give what it printed. Fails with that text if it failed."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    return output


def run(*arguments: str) -> str:
    return finish(start(*arguments))


def wait_for(
    what: Callable[[], Any],
    seconds: float = TIMEOUT_S,
    driver: subprocess.Popen[str] | None = None,
) -> Any:
    """Poll until `what` gives something true, which a `driver` that has ended never does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        if driver is not None and driver.poll() is not None:
            raise AssertionError(f"the command has ended:\n{driver.communicate()[0]}")
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def checkpoint_at(folder: Path, step: int) -> bool:
    """Whether the run of `write_run(folder)` has the checkpoint of `step`."""
    return (folder / "runs" / "tiny" / f"step-{step:08d}" / "manifest.json").exists()


def newest_step(folder: Path, after: int) -> int | None:
    """The step of the newest checkpoint of `write_run(folder)`, if it is past `after`."""
    whole = (folder / "runs" / "tiny").glob("step-*/manifest.json")
    newest = max((int(path.parent.name.removeprefix("step-")) for path in whole), default=0)
    return newest if newest > after else None


def quarantined(folder: Path) -> set[tuple[str, int, int]]:
    """The rows that were dropped: shard, row group, row."""
    rows = [row for path in folder.glob("quarantine/*.parquet") for row in
            pq.read_table(path).to_pylist()]  # fmt: skip
    return {(row["path"], row["row_group"], row["row"]) for row in rows}


def is_trainer(process: psutil.Process) -> bool:
    """Whether it is a training worker; one that ends while it is looked at is none."""
    try:
        return "RayTrainWorker" in process.name() or "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def kill_a_worker(driver: subprocess.Popen[str]) -> None:
    """SIGKILL one training worker among the driver's descendants."""

    def workers() -> list[psutil.Process]:
        return [
            process
            for process in psutil.Process(driver.pid).children(recursive=True)
            if is_trainer(process)
        ]

    wait_for(workers)[-1].send_signal(signal.SIGKILL)


def kill_group(driver: subprocess.Popen[str]) -> None:
    """SIGKILL the driver and everything it started."""
    family = [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]
    os.kill(driver.pid, signal.SIGKILL)
    for process in family:
        if process.is_running():
            process.kill()
    driver.wait()


def points(runs: Path, metric: str) -> list[tuple[int, float]]:
    """All points of a metric in the tracker's database, by step; of all runs; none before it is."""
    if not (runs / "mlflow.db").exists():
        return []
    with sqlite3.connect(runs / "mlflow.db") as database:
        try:
            rows = database.execute("select step, value from metrics where key = ?", (metric,))
        except sqlite3.OperationalError:  # MLflow makes its tables step by step
            return []
        return sorted(rows.fetchall())


def events(runs: Path) -> list[str]:
    """What the tags of MLflow runs say has befallen them, in order: "failed: worker 1 ..."."""
    with sqlite3.connect(runs / "mlflow.db") as database:
        rows = database.execute(
            "select key, value from tags where key like 'gammaray.event.%' order by key"
        ).fetchall()
    return [f"{key.rsplit('.', 1)[1]}: {value}" for key, value in rows]


def mlflow_runs(runs: Path) -> list[str]:
    """The status of every run in the tracker's database."""
    with sqlite3.connect(runs / "mlflow.db") as database:
        return [status for (status,) in database.execute("select status from runs")]


def used_rows(folder: Path) -> dict[int, list[tuple[int, int]]]:
    """Rows used in each epoch, as the last checkpoint's parts have them; overlaps stay visible."""
    last = max(folder.glob("step-*/manifest.json")).parent
    workers = json.loads((last / "meta.json").read_text())["world_size"]
    parts = [json.loads((last / f"part-{rank:05d}.json").read_text()) for rank in range(workers)]
    used: dict[int, list[tuple[int, int]]] = {}
    for part in parts:
        for epoch, pairs in part["cursor"]["used"].items():
            used.setdefault(int(epoch), []).extend((start, end) for start, end in pairs)
    return used
