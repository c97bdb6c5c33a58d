"""The runs of a sweep as trials of Ray Tune, as many at a time as the cluster has room for.

Each trial is a driver of its own, in an actor on the head: `driver.train`, which asks Ray Train for
workers. Tune decides which runs start and, by ASHA, which stop; what is finished it
need not know: that is in the runs' folders.

The one place that knows ray.tune.
"""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from pipeline.config.schema import Config
from pipeline.data.storage import open_filesystem
from pipeline.tracking.tracker import RunRef, read_history
from pipeline.train import driver
from pipeline.train.store import RunFolder

KEPT = 3  # ASHA lets one of so many go on
STOP_SECONDS = 600.0  # for a run that is stopped to save and close its books
# No trial takes CPUs from its workers; its driver is on the head, which no autoscaler takes away.
HEAD = {"node:__internal_head__": 0.001}
SETTINGS = {
    # Relative paths are those of the command.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Its files of results and its tables: MLflow has them.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A run that fails before its first evaluation has no metric.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A run of a sweep: `samples` it is planned for, and those at its `first` evaluation."""

    config: Config
    folder: RunFolder
    is_finished: bool
    samples: int
    first: int

    @property
    def name(self) -> str:
        """The run's name."""
        return self.config.name


@dataclass(frozen=True, kw_only=True, slots=True)
class Race:
    """ASHA: by which metric, and the samples at which it first and last decides."""

    metric: str
    better: Literal["higher", "lower"]
    first: int
    longest: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """What a trial's actor needs to know of its run."""

    config: Config
    is_over: bool


def run_trials(
    trials: Sequence[Trial],
    *,
    race: Race | None,
    stopped: frozenset[str],
    parent: str,
    folder: RunFolder,
    log_folder: Path,
    say: Callable[[str], None],
    stop: Callable[[str], None],
) -> dict[str, str]:
    """Run trials to their ends; gives why some failed. `stop` is told of who is stopped by ASHA.

    Those that are finished, or `stopped` before, only tell the race how they went. When Tune hears
    SIGINT it kills the running ones, which go on from their checkpoints, and this returns early.
    """
    os.environ.update(SETTINGS)
    tasks = {
        trial.name: _Task(config=trial.config, is_over=trial.is_finished or trial.name in stopped)
        for trial in trials
    }
    watcher = _Watcher(tasks, say, stop)
    filesystem, root = open_filesystem(folder.url)
    folder.remove("tune")
    actor: Any = tune.with_parameters(
        _Run,
        tasks=tasks,
        parent=parent,
        metric=None if race is None else race.metric,
        log_folder=log_folder,
    )
    tuner = tune.Tuner(
        tune.with_resources(actor, tune.PlacementGroupFactory([HEAD])),
        param_space={"trial": tune.grid_search(list(tasks))},
        tune_config=tune.TuneConfig(
            scheduler=None if race is None else _asha(race),
            max_concurrent_trials=_room(trials),
            # One that ASHA stopped saves first, while the next begins in an actor of its own.
            reuse_actors=race is None,
            trial_name_creator=_name_of,
            trial_dirname_creator=_name_of,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=root,
            storage_filesystem=filesystem,
            # An actor that is lost starts anew, and goes on with its run.
            failure_config=tune.FailureConfig(max_failures=trials[0].config.cluster.max_failures),
            # Checkpoints are the runs' own.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[watcher],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        folder.remove("tune")
    return watcher.failures


def _name_of(trial: Any) -> str:
    return trial.config["trial"]


def _asha(race: Race) -> ASHAScheduler:
    return ASHAScheduler(
        time_attr="samples",
        metric=race.metric,
        mode="max" if race.better == "higher" else "min",
        max_t=race.longest,
        grace_period=race.first,
        reduction_factor=KEPT,
        stop_last_trials=False,
    )


def _room(trials: Sequence[Trial]) -> int:
    """How many of the largest trials the cluster has room for; one, even if it has to grow."""
    resources = ray.cluster_resources()
    rooms = []
    for trial in trials:
        cluster = trial.config.cluster
        workers = cluster.max_workers
        cpus = workers * cluster.cpus_per_worker + cluster.ingest_cpus
        rooms.append(resources.get("CPU", 0.0) / cpus)
        if cluster.gpus_per_worker:
            rooms.append(resources.get("GPU", 0.0) / (workers * cluster.gpus_per_worker))
    return max(1, int(min(rooms)))


class _Watcher(tune.Callback):
    """Says how the trials go, on the driver."""

    def __init__(
        self,
        tasks: Mapping[str, _Task],
        say: Callable[[str], None],
        stop: Callable[[str], None],
    ):
        self._tasks, self._say, self._stop = tasks, say, stop
        self._ended = sum(task.is_over for task in tasks.values())
        self.failures: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps its callbacks for a restore of its own, which nobody asks for.
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Called when a trial begins, or begins anew."""
        if not self._tasks[_name_of(trial)].is_over:
            self._say(f"{_name_of(trial)} begins")

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Called when a trial has ended, or ASHA has stopped it; not at an interruption."""
        name, result = _name_of(trial), trial.last_result or {}
        if self._tasks[name].is_over:
            return
        if "failure" not in result:
            self._stop(name)
            self._tell(f"{name} is stopped early, at {result.get('samples', 0):,} samples")
        elif result["failure"]:
            self._fail(name, result["failure"])
        else:
            self._tell(f"{name} is finished")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Called when a trial's actor is lost for good."""
        if self._tasks[_name_of(trial)].is_over:
            return
        said = str(trial.get_error() or "its driver was lost")
        self._fail(_name_of(trial), said.strip().splitlines()[-1])

    def _fail(self, name: str, why: str) -> None:
        self.failures[name] = why
        self._tell(f"{name} failed: {why}")

    def _tell(self, text: str) -> None:
        self._ended += 1
        self._say(f"{text} ({self._ended} of {len(self._tasks)})")


class _Run(tune.Trainable):
    """A driver in an actor: `step` gives an evaluation, or the end. Runs beside Tune's calls."""

    def setup(self, config: dict[str, Any], **given: Any) -> None:
        """Begin, or go on with, the run that `config` names; `given` by `run_trials`."""
        self._tasks: Mapping[str, _Task] = given["tasks"]
        self._parent: str = given["parent"]
        self._metric: str | None = given["metric"]
        self._log_folder: Path = given["log_folder"]
        self._begin(self._tasks[config["trial"]])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next run on: a new actor would load all of PyTorch again."""
        self.cleanup()
        self._begin(self._tasks[new_config["trial"]])
        return True

    def step(self) -> dict[str, Any]:
        """Wait for an evaluation, or for the end."""
        return self._heard.get()

    def cleanup(self) -> None:
        """Have the run save and end, if it has not."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)

    def _begin(self, task: _Task) -> None:
        self._heard: queue.Queue[dict[str, Any]] = queue.Queue()
        self._stop = threading.Event()
        # Step and samples at which the workers began, samples of a step and of the whole run.
        self._place = (0, 0, 0, 0)
        self._thread: threading.Thread | None = None
        self._told: dict[str, Any] = {}
        record = RunFolder.of(task.config.cluster.storage, task.config.name).read_record()
        if self._metric is not None and record is not None:
            self._replay(RunRef(uri=record.mlflow_uri, run_id=record.mlflow_run_id), self._metric)
        # A run may have finished before its actor was lost.
        if task.is_over or (record is not None and record.is_finished):
            self._end("")
            return
        self._thread = threading.Thread(target=self._train, args=[task.config], daemon=True)
        self._thread.start()

    def _replay(self, run: RunRef, metric: str) -> None:
        """Tell the race of the evaluations that a run had before."""
        for samples, value in read_history(run, [metric])[metric]:
            self._tell(samples, value)

    def _train(self, config: Config) -> None:
        log_path = self._log_folder / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}.log"
        tags = {"mlflow.parentRunId": self._parent}
        try:
            driver.train(config, self._listen, log_path, tags=tags, stop=self._stop)
        except KeyboardInterrupt:
            self._end("it was interrupted")
        except Exception as error:  # noqa: BLE001  one run's failure is not the others'
            self._end(f"{' '.join(str(error).split())} (log: {log_path})")
        else:
            self._end("")

    def _listen(self, event: driver.Event) -> None:
        match event["kind"]:
            case "phase" | "warning":
                sys.stderr.write(f"{event['text']}\n")
            case "started":
                plan = event["plan"]
                self._place = event["step"], event["samples"], plan.global_batch, plan.samples
            case "evaluation" if self._metric is not None:
                value = event["metrics"].get(self._metric.removeprefix("eval/"))
                if value is not None:
                    step, samples, batch, whole = self._place
                    samples += (event["step"] - step) * batch
                    self._tell(samples, value, is_last=samples + batch > whole)

    def _tell(self, samples: int, value: float, *, is_last: bool = False) -> None:
        """What comes last comes with the end: who has trained to it is not stopped early."""
        assert self._metric is not None
        self._told = {"samples": samples, self._metric: value}
        if not is_last:
            self._heard.put(self._told)

    def _end(self, failure: str) -> None:
        self._heard.put({**self._told, "done": True, "failure": failure})
