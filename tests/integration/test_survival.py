"""Runs that lose a worker, a node, a driver, a storage: they end as if nothing had been.

On several Ray nodes of this machine. An uninterrupted twin at the same seed says what the losses
must be: the same to the last bit, since a restored step repeats what was lost.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.data.order import union
from tests.integration.run_cli import (
    events,
    finish,
    is_trainer,
    mlflow_runs,
    newest_step,
    points,
    start,
    used_rows,
    wait_for,
    write_run,
)

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

ROWS, BATCH, EPOCHS = 300, 16, 6
STEPS = EPOCHS * ROWS // BATCH
NODE_CPUS = 2


class _Nodes:
    """A Ray cluster of processes on this machine: a head without work, and nodes."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.address = self._cluster.address
        self._nodes: list[Any] = []

    def set(self, count: int) -> None:
        """Make it `count` nodes; those that were lost are gone from the list already."""
        while len(self._nodes) < count:
            self._nodes.append(self._cluster.add_node(num_cpus=NODE_CPUS))

    def kill(self) -> None:
        """SIGKILL the raylet of the newest node, as when a machine is switched off."""
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)

    def drain(self, seconds: int) -> Any:
        """Give notice that the newest node is taken away after some seconds."""
        node = self._nodes.pop()
        subprocess.run(
            [
                str(Path(sys.executable).with_name("ray")), "drain-node",
                "--address", self.address, "--node-id", node.node_id,
                "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
                "--deadline-remaining-seconds", str(seconds),
            ],
            check=True,
            capture_output=True,
        )  # fmt: skip
        return node

    def take(self, node: Any) -> None:
        """Take a drained node away."""
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes() -> Iterator[_Nodes]:
    before = dict(os.environ)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "1"
    found = _Nodes()
    try:
        yield found
    finally:
        found.close()
        os.environ.clear()
        os.environ.update(before)


def _write(folder: Path, nodes: _Nodes, **cluster: Any) -> Path:
    settings = {"address": nodes.address, "workers": 2, "cpus_per_worker": 1.5, **cluster}
    return write_run(
        folder,
        rows=ROWS,
        train={"global_batch": BATCH, "epochs": EPOCHS, "checkpoint_every": 8, "log_every": 1},
        data={"val": None},
        evaluate={"zero_shot": []},
        # All that has state of its own: slow towers, a running mean, auxiliaries.
        structure={"views": "momentum", "in_modal": 0.5, "separation": {"weight": 0.5}},
        cluster=settings,
    )


@pytest.fixture(scope="module")
def twin(nodes: _Nodes, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run to which nothing happens, by sample."""
    folder = tmp_path_factory.mktemp("twin")
    nodes.set(2)
    finish(start("train", str(_write(folder, nodes))))
    return dict(points(folder / "runs", "train/loss"))


def _check(folder: Path, twin: dict[int, float]) -> None:
    """One finished MLflow run, each point once, each row once, the losses of the twin."""
    assert mlflow_runs(folder / "runs") == ["FINISHED"]
    losses = points(folder / "runs", "train/loss")
    assert len(losses) == len(dict(losses)), "no step is logged twice"
    used = {epoch: union(pairs) for epoch, pairs in used_rows(folder / "runs" / "tiny").items()}
    assert all(used[epoch] == ((0, ROWS),) for epoch in range(EPOCHS - 1))
    # As many rows as samples: none was used a second time in its epoch.
    assert sum(end - begin for pairs in used.values() for begin, end in pairs) == STEPS * BATCH
    assert dict(losses) == twin


@pytest.fixture
def tell_lost(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], None]:
    """Print what the trouble cost."""

    def tell(folder: Path) -> None:
        with capsys.disabled():
            sys.stdout.write(f" lost {_lost(folder):.1f} s ")

    return tell


def _lost(folder: Path) -> float:
    """Seconds between the last step before the trouble and the first after it."""
    import sqlite3

    with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
        rows = database.execute("select timestamp from metrics where key = 'train/loss'").fetchall()
    times = sorted(at for (at,) in rows)
    return max(later - earlier for earlier, later in itertools.pairwise(times)) / 1000


def test_a_node_is_switched_off(
    nodes: _Nodes, twin: dict[int, float], tmp_path: Path, tell_lost: Callable[[Path], None]
) -> None:
    nodes.set(2)
    driver = start("train", str(_write(tmp_path, nodes)))
    wait_for(lambda: newest_step(tmp_path, after=15))
    nodes.kill()
    time.sleep(2)
    nodes.set(2)
    output = finish(driver)
    tell_lost(tmp_path)
    assert "restarting (2 more allowed before the next checkpoint)" in " ".join(output.split())
    failed, started = events(tmp_path / "runs")
    assert failed.startswith("failed: worker")
    assert started.startswith("started: attempt 2 from step ")
    _check(tmp_path, twin)


def test_a_node_is_taken_away_with_notice(
    nodes: _Nodes, twin: dict[int, float], tmp_path: Path, tell_lost: Callable[[Path], None]
) -> None:
    """What was saved at the notice is what the run goes on from: no step is lost."""
    nodes.set(2)
    driver = start("train", str(_write(tmp_path, nodes)), "train.checkpoint_every=1000")
    wait_for(lambda: len(points(tmp_path / "runs", "train/loss")) > 10)
    node = nodes.drain(seconds=60)
    at = wait_for(lambda: newest_step(tmp_path, after=0))
    nodes.take(node)
    nodes.set(2)
    output = finish(driver)
    tell_lost(tmp_path)
    assert "restarting" not in output, "it is no failure"
    (started,) = events(tmp_path / "runs")
    assert started == f"started: attempt 2 from step {at} with 2 worker(s), 2 before"
    _check(tmp_path, twin)


def test_workers_follow_the_nodes(nodes: _Nodes, tmp_path: Path) -> None:
    """It starts with the one node there is, grows with a second one, and shrinks when it dies."""
    while len(nodes._nodes) > 1:
        nodes.kill()
    nodes.set(1)
    config = _write(
        tmp_path, nodes, workers={"min": 1, "max": 2, "check_every_s": 2}, max_failures=0
    )
    driver = start("train", str(config), "train.epochs=400", "train.checkpoint_every=1000")

    def sizes() -> list[float]:
        return [value for _, value in points(tmp_path / "runs", "train/world_size")]

    wait_for(lambda: len(sizes()) > 5)
    assert set(sizes()) == {1}
    nodes.set(2)
    wait_for(lambda: 2 in sizes())
    at = newest_step(tmp_path, after=0)
    assert at is not None, "a planned resize saves first"
    driver.send_signal(signal.SIGTERM)
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 130, output
    assert "Saving before the end" in output
    assert mlflow_runs(tmp_path / "runs") == ["KILLED"]
    resizing, started, stopped = events(tmp_path / "runs")
    assert resizing == "resizing: to 2 workers, all is saved first"
    assert started.startswith(f"started: attempt 2 from step {at} with 2 worker(s), 1 before")
    assert stopped == "stopped: by Ctrl-C or SIGTERM"
    losses = points(tmp_path / "runs", "train/loss")
    assert len(losses) == len(dict(losses))


@pytest.mark.parametrize("moment", ["while it is written", "while it is sent"])
def test_a_kill_in_a_checkpoint(
    nodes: _Nodes,
    twin: dict[int, float],
    tmp_path: Path,
    moment: str,
    tell_lost: Callable[[Path], None],
) -> None:
    """The checkpoint that was under way is none; the one before it is taken."""
    nodes.set(2)
    folder = tmp_path / "runs" / "tiny"

    def begun() -> Any:
        if moment == "while it is written":
            return [path for path in _unsent(tmp_path) if not any(path.glob("part-*"))]
        return [path for path in folder.glob("step-*") if not (path / "manifest.json").exists()]

    driver = start("train", str(_write(tmp_path, nodes)), "train.checkpoint_every=2")
    wait_for(lambda: newest_step(tmp_path, after=3))
    _kill_soon(driver, begun)
    finish(driver)
    tell_lost(tmp_path)
    assert not _unsent(tmp_path), "what the killed worker had written is removed"
    _check(tmp_path, twin)


def _unsent(folder: Path) -> list[Path]:
    """What the run's workers have written and not sent, or not all of it."""
    run = json.loads((folder / "runs" / "tiny" / "run.json").read_text())["mlflow_run_id"]
    return list(Path(tempfile.gettempdir()).glob(f"gammaray-{run}-*"))


def _trainers() -> list[psutil.Process]:
    """The training workers: children of the nodes, which this process has started."""
    return [each for each in psutil.Process().children(recursive=True) if is_trainer(each)]


def _kill_soon(driver: subprocess.Popen[str], begun: Callable[[], Any]) -> None:
    """SIGKILL a training worker at a moment."""
    found = _trainers()
    deadline = time.monotonic() + 60
    while not begun() and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.001)
    found[-1].kill()


def test_a_frozen_worker_is_named_and_replaced(
    nodes: _Nodes, twin: dict[int, float], tmp_path: Path
) -> None:
    nodes.set(2)
    driver = start("train", str(_write(tmp_path, nodes)), "cluster.stall_minutes=0.4")
    wait_for(lambda: newest_step(tmp_path, after=7))
    _trainers()[-1].suspend()
    output = " ".join(finish(driver).split())
    assert "say nothing: frozen, or cut off" in output, output
    stacks = list((tmp_path / "runs" / "mlartifacts").rglob("stalls/*.txt"))
    # The other worker waits for it in the loop: in a step's collective, or in a checkpoint's.
    assert any("run_loop" in path.read_text() for path in stacks)
    _check(tmp_path, twin)
