"""What trouble costs a run: time until it is past the step it had reached, and its checkpoints.

One run of the demo's model on Ray nodes that are processes of this machine, workers of half its
cores each. While it trains, a worker is killed, a node is switched off, a node is taken away with
notice, and a node is given. Each time another node takes a lost one's place at once. The times are
those of the steps in the MLflow run. Of each checkpoint: what the step loop waited for it, and the
seconds and steps until it was published.

    python -m jobs.bench.recovery [--quick] [--json FILE] [--figure FILE]

Goal: the step loop waits for less than 5 % of the time between checkpoints at the default interval.
"""

import itertools
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from jobs.bench.report import arguments, conclude, show_table
from pipeline.config.schema import TrainConfig
from pipeline.data.demo import write_demo

ROWS, EVERY = 20_000, 25
GLOBAL_BATCH = 128  # of configs/demo.yaml
NODE_CPUS = 2
NOTICE_SECONDS = 60
LONGEST = 300.0  # to wait for anything
MOST_BLOCKING = 0.05
DEFAULT_EVERY = TrainConfig.model_fields["checkpoint_every"].default


@dataclass(frozen=True, slots=True)
class Step:
    """A point of the run: samples seen, when, by which attempt, of how many workers."""

    samples: int
    at: float
    attempt: int
    workers: int


class Nodes:
    """A Ray head without work, and nodes of it."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.address = str(self._cluster.address)
        self._nodes: list[Any] = []

    def add(self) -> None:
        """Start a node."""
        self._nodes.append(self._cluster.add_node(num_cpus=NODE_CPUS))

    def switch_off(self) -> None:
        """SIGKILL the newest node; another takes its place."""
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)
        self.add()

    def give_notice(self) -> None:
        """Tell Ray that the newest node will be taken away; another takes its place."""
        subprocess.run(
            [
                str(Path(sys.executable).with_name("ray")), "drain-node",
                "--address", self.address, "--node-id", self._nodes.pop().node_id,
                "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
                "--deadline-remaining-seconds", str(NOTICE_SECONDS),
            ],
            check=True,
            capture_output=True,
        )  # fmt: skip
        self.add()

    def kill_worker(self) -> None:
        """SIGKILL a training worker."""
        found: list[psutil.Process] = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # ended by now, a zombie included
                if "RayTrainWorker" in " ".join([process.name(), *process.cmdline()]):
                    found.append(process)
        found[-1].kill()

    def close(self) -> None:
        """End the head and the nodes."""
        self._cluster.shutdown()


class Run:
    """`gammaray train` in a process, and what its MLflow run holds so far."""

    def __init__(self, folder: Path, address: str):
        self.folder = folder
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "pipeline.cli", "train", "configs/demo.yaml",
                f"data.train={folder}/data/train", f"data.val={folder}/data/test",
                f"cluster.storage={folder}/runs", f"cluster.address={address}",
                "cluster.workers={min: 1, max: 2, check_every_s: 2}", "cluster.cpus_per_worker=1.5",
                "train.epochs=1000", f"train.checkpoint_every={EVERY}",
                "train.log_every=1", "train.keep=1000",
            ],
            stdout=(folder / "run.log").open("wb"),
            stderr=subprocess.STDOUT,
            # A shell may have started this with SIGINT ignored, which children inherit.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip

    def metric(self, name: str) -> dict[int, tuple[float, float]]:
        """Value and time of each point, by samples seen."""
        path = self.folder / "runs" / "mlflow.db"
        if self._process.poll() is not None:
            raise RuntimeError(f"the run has ended: {(self.folder / 'run.log').read_text()}")
        if not path.exists():
            return {}
        try:
            with sqlite3.connect(path) as database:
                rows = database.execute(
                    "select step, value, timestamp from metrics where key = ?", (name,)
                ).fetchall()
        except sqlite3.OperationalError:  # its tables are being made
            return {}
        return {step: (value, at / 1000) for step, value, at in rows}

    def steps(self) -> list[Step]:
        """All points so far, in order."""
        attempts, workers = self.metric("train/attempt"), self.metric("train/world_size")
        return [
            Step(samples, at, int(attempts[samples][0]), int(value))
            for samples, (value, at) in sorted(workers.items())
            if samples in attempts
        ]

    def wait(self, condition: Callable[[list[Step]], bool]) -> list[Step]:
        """Wait until the points are so."""
        deadline = time.monotonic() + LONGEST
        while time.monotonic() < deadline:
            if condition(steps := self.steps()):
                return steps
            time.sleep(0.5)
        raise RuntimeError(f"it did not happen: {(self.folder / 'run.log').read_text()}")

    def stop(self) -> None:
        """SIGTERM: it saves, and ends."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(LONGEST)
            except subprocess.TimeoutExpired:
                self._process.kill()


@contextmanager
def started(folder: Path) -> Iterator[tuple[Nodes, Run]]:
    """A run on one node."""
    write_demo(folder / "data", ROWS)
    os.environ["RAY_AUTH_MODE"] = "disabled"  # all of it listens on this machine alone
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "1"
    nodes = Nodes()
    try:
        nodes.add()
        run = Run(folder, nodes.address)
        try:
            yield nodes, run
        finally:
            run.stop()
    finally:
        nodes.close()


def trouble(run: Run, make: Callable[[], None]) -> dict[str, float]:
    """Make trouble in the middle between two checkpoints; give what it cost, in seconds."""
    begun = run.steps()[-1].samples
    steps = run.wait(lambda steps: steps[-1].samples >= begun + EVERY * GLOBAL_BATCH
                     and steps[-1].samples // GLOBAL_BATCH % EVERY >= EVERY // 2)  # fmt: skip
    attempt, at = steps[-1].attempt, time.time()
    make()
    steps = run.wait(lambda steps: steps[-1].attempt > attempt)
    last = max(step.at for step in steps if step.attempt == attempt)
    first = min(step.at for step in steps if step.attempt > attempt)
    return {"at": at, "since_trouble": first - at, "without_a_step": first - last}


def checkpoints(run: Run) -> dict[str, Any]:
    """What checkpoints cost the step loop, and how long they were under way."""
    steps, saving = run.steps(), run.metric("train/saving_seconds")
    seconds = statistics.median(
        later.at - earlier.at
        for earlier, later in itertools.pairwise(steps)
        if earlier.attempt == later.attempt
    )
    blocked = [value for value, _ in saving.values() if value > 0]
    sent = []
    for path in sorted((run.folder / "runs" / "demo").glob("step-*/manifest.json")):
        samples = GLOBAL_BATCH * int(path.parent.name.removeprefix("step-"))
        published = path.stat().st_mtime
        for at in (step.at for step in steps if step.samples == samples):
            during = sum(at < step.at < published for step in steps)
            sent.append({"seconds": published - at, "steps": during})
    return {
        "step_seconds": seconds,
        "blocked_seconds": blocked,
        "share_at_default": statistics.median(blocked) / (DEFAULT_EVERY * seconds),
        "sent": sent,
    }


def draw(steps: list[Step], costs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw the run's progress, and when it met with what."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    begin = steps[0].at
    axes.plot([step.at - begin for step in steps], [step.samples for step in steps], ".", ms=2)
    for index, (name, found) in enumerate(costs.items()):
        for each in found:
            axes.axvline(each["at"] - begin, color=f"C{index + 1}", lw=1,
                         label=name if each is found[0] else None)  # fmt: skip
    axes.set(xlabel="seconds", ylabel="samples seen", title="A run that meets with trouble")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, judge."""
    options = arguments(__doc__).parse_args()
    rounds = 1 if options.quick else 5
    costs: dict[str, list[dict[str, float]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="recovery-") as folder,
        started(Path(folder)) as (nodes, run),
    ):
        run.wait(lambda steps: len(steps) > EVERY)
        costs["one worker more (1 to 2)"] = [trouble(run, nodes.add)]
        kinds = {"a worker killed": nodes.kill_worker}
        if not options.quick:
            kinds |= {
                "a node switched off": nodes.switch_off,
                "a node taken with notice": nodes.give_notice,
            }
        for _ in range(rounds):
            for name, make in kinds.items():
                costs.setdefault(name, []).append(trouble(run, make))
        saved, steps = checkpoints(run), run.steps()
    if options.figure is not None:
        draw(steps, costs, options.figure)
    show_table(
        f"Seconds until the run was past where it had been, medians of up to {rounds} (range)",
        ["what happened", "since it happened", "without a new step"],
        [
            [name, *(_spread([each[key] for each in found])
                     for key in ("since_trouble", "without_a_step"))]
            for name, found in costs.items()
        ],
    )  # fmt: skip
    show_table(
        f"Checkpoints, one in {EVERY} steps",
        ["a step takes s", "the loop waits s", f"of the time at one in {DEFAULT_EVERY}",
         "published after s", "steps meanwhile"],
        [[
            f"{saved['step_seconds']:.2f}",
            _spread(saved["blocked_seconds"]),
            f"{saved['share_at_default']:.2%}",
            _spread([each["seconds"] for each in saved["sent"]]),
            _spread([each["steps"] for each in saved["sent"]]),
        ]],
    )  # fmt: skip
    share = saved["share_at_default"]
    missed = [f"checkpoints take {share:.1%} of the steps' time; {MOST_BLOCKING:.0%} are allowed"]
    conclude(
        {"troubles": costs, "checkpoints": saved},
        missed if share >= MOST_BLOCKING else [],
        options.json,
    )


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
