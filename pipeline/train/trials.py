"""The runs of a sweep as trials of Ray Tune, as many at a time as the cluster has room for.

Each trial is a driver of its own, in an actor on the head: `driver.train`, which asks Ray Train for
workers. Tune decides which runs start and, by ASHA, which stop; what is finished it
need not know: that is in the runs' folders. That all are to save and end they read from a board.

The one place that knows ray.tune.
"""

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from pipeline.compare.measure import direction
from pipeline.config.plan import clock
from pipeline.config.schema import ClusterConfig, Config
from pipeline.data.storage import open_filesystem
from pipeline.errors import UserError
from pipeline.tracking import tracker
from pipeline.train import driver
from pipeline.train.board import Board
from pipeline.train.loop import Wish
from pipeline.train.store import RunFolder, RunRecord

KEPT = 3  # ASHA lets one of so many go on
STOP_SECONDS = 600.0  # for a run that is stopped to save and close its books
POLL_SECONDS = 1.0  # between two looks at the board
ROOM_SECONDS = 10.0  # between two requests for more room
LINE_SECONDS = 60.0  # between two lines on where a run is
INTERRUPTED = "it was interrupted"
# No trial takes CPUs from its workers; its driver is on the head, which no autoscaler takes away.
HEAD = {"node:__internal_head__": 0.001}
SETTINGS = {
    # It would kill the running trials, ten seconds after it has asked them to stop.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
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
    is_lost: Callable[[], bool],
) -> dict[str, str]:
    """Run trials to their ends; gives why some failed. `stop` is told of who is stopped by ASHA.

    Those that are finished, or `stopped` before, only tell the race how they went. At SIGINT or
    SIGTERM, or once `is_lost`, no more begin, the running ones save and end, and this returns
    early. A second signal raises `KeyboardInterrupt`.
    """
    os.environ.update(SETTINGS)
    tasks = {
        trial.name: _Task(config=trial.config, is_over=trial.is_finished or trial.name in stopped)
        for trial in trials
    }
    board, waiting = Board(), _Waiting([trial.config.cluster for trial in trials])
    filesystem, root = open_filesystem(folder.url)
    folder.remove("tune")
    actor: Any = tune.with_parameters(
        _Run,
        tasks=tasks,
        parent=parent,
        metric=None if race is None else race.metric,
        log_folder=log_folder,
        board=board,
    )
    heard: list[int] = []

    def why_to_end() -> str | None:
        if heard:
            return "Stopping: runs that train save first; once more to stop without"
        if is_lost():
            return "Another driver has taken this sweep over; runs that train save and end"
        return None

    def end() -> None:
        waiting.set_finished()
        board.ask(Wish.STOP)

    watcher = _Watcher(tasks, say, stop, why_to_end, end)
    tuner = tune.Tuner(
        tune.with_resources(actor, tune.PlacementGroupFactory([HEAD])),
        param_space={"trial": tune.grid_search(list(tasks))},
        tune_config=tune.TuneConfig(
            scheduler=None if race is None else _asha(race),
            search_alg=waiting,
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
        with _signals(heard):
            tuner.fit()
    finally:
        folder.remove("tune")
    return watcher.failures


@contextlib.contextmanager
def _signals(heard: list[int]) -> Iterator[None]:
    """Only note the first SIGINT or SIGTERM in `heard`; a second one interrupts."""

    def hear(number: int, _: object) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, hear) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


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


class _Waiting(BasicVariantGenerator):
    """Gives trials out while there is room, and has a cluster that can grow make room for one more.

    Tune's own way is to ask for the room of all of them and to hold it for each; but it is not the
    trials that need it, it is their workers, which Ray Train asks for.
    """

    def __init__(self, needs: Sequence[ClusterConfig]):
        super().__init__()
        self._needs, self._left = needs, len(needs)
        self._wanted: PlacementGroup | None = None
        self._asked_at = -ROOM_SECONDS

    def next_trial(self) -> Any:
        """The next trial; None when there is no room, or all have been given out."""
        self.max_concurrent = _room(self._needs)
        trial = super().next_trial()
        if trial is None and self._left:
            self._ask_for_room()
        elif trial is not None:
            self._left -= 1
        if not self._left:
            self._withdraw()
        return trial

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Give room back that was asked for: a run that saves may need it, and is waited for."""
        super().on_trial_complete(trial_id, result, error)
        self._withdraw()

    def set_finished(self) -> None:
        """No more are to be given out."""
        super().set_finished()
        self._withdraw()

    def save_to_dir(self, dirpath: str, session_str: str) -> None:
        """Nothing: Tune keeps it for a restore of its own, which nobody asks for."""

    def _ask_for_room(self) -> None:
        """What waits for nodes has an autoscaler start them; what it gets is given back at once."""
        if self._wanted is not None:
            if self._wanted.wait(0):
                self._withdraw()
        elif time.monotonic() > self._asked_at + ROOM_SECONDS:
            self._asked_at = time.monotonic()
            self._wanted = placement_group(_bundles(max(self._needs, key=_cpus)))

    def _withdraw(self) -> None:
        if self._wanted is not None:
            remove_placement_group(self._wanted)
            self._wanted = None


def _room(needs: Sequence[ClusterConfig]) -> int:
    """How many of the largest trials the cluster has room for; one, even if it has to grow."""
    resources = ray.cluster_resources()
    rooms = []
    for need in needs:
        rooms.append(resources.get("CPU", 0.0) / _cpus(need))
        if need.gpus_per_worker:
            rooms.append(resources.get("GPU", 0.0) / (need.max_workers * need.gpus_per_worker))
    return max(1, int(min(rooms)))


def _cpus(need: ClusterConfig) -> float:
    return need.max_workers * need.cpus_per_worker + need.ingest_cpus


def _bundles(need: ClusterConfig) -> list[dict[str, float]]:
    """What a trial takes, in parts that are each on one node."""
    worker: dict[str, float] = {"CPU": need.cpus_per_worker}
    if need.gpus_per_worker:
        worker["GPU"] = need.gpus_per_worker
    return [worker] * need.max_workers + [{"CPU": 1.0}] * need.ingest_cpus


class _Watcher(tune.Callback):
    """Says how the trials go, on the driver, and has them `end` once there is a reason."""

    def __init__(
        self,
        tasks: Mapping[str, _Task],
        say: Callable[[str], None],
        stop: Callable[[str], None],
        why_to_end: Callable[[], str | None],
        end: Callable[[], None],
    ):
        self._tasks, self._say, self._stop = tasks, say, stop
        self._why_to_end, self._end = why_to_end, end
        self._ended = sum(task.is_over for task in tasks.values())
        self._is_ending = self._has_warned = False
        self._stopped: list[Any] = []  # actors
        self._saving: list[ray.ObjectRef[None]] = []
        self.failures: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps its callbacks for a restore of its own, which nobody asks for.
        return {}

    def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
        """Called some ten times a second."""
        if not self._is_ending and (why := self._why_to_end()):
            self._is_ending = True
            self._say(why)
            self._end()

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        """Called as often; at the end waits for those that still save, which Tune would kill."""
        # An actor lives as long as it is held here; what it is to answer does not hold it.
        self._saving += [actor.wait.remote() for actor in self._stopped]
        self._stopped.clear()
        if self._saving and all(trial.is_finished() for trial in trials):
            ray.wait(self._saving, num_returns=len(self._saving), timeout=STOP_SECONDS)
            self._saving.clear()

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Called when a trial begins, or begins anew."""
        if not self._tasks[_name_of(trial)].is_over:
            self._say(f"{_name_of(trial)} begins")

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Called when a trial has said something."""
        if "progress" in result:
            self._say(f"{_name_of(trial)}: {result['progress']}")
        if "warning" in result and not self._has_warned:
            self._has_warned = True
            self._say(f"{_name_of(trial)}: {result['warning']}")

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Called when a trial has ended, or ASHA has stopped it."""
        name, result = _name_of(trial), trial.last_result or {}
        if self._tasks[name].is_over:
            if failure := result.get("failure"):
                self._say(f"{name} takes no part in the race: {failure}")
        elif "failure" not in result:
            self._stopped.append(trial.temporary_state.ray_actor)
            self._stop(name)
            self._tell(f"{name} is stopped early, at {result.get('samples', 0):,} samples")
        elif result["failure"] == INTERRUPTED:
            self._say(f"{name} is stopped; the same command goes on with it")
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
    """A driver in an actor, beside Tune's calls: `step` gives an evaluation, a line, or the end."""

    def setup(self, config: dict[str, Any], **given: Any) -> None:
        """Begin, or go on with, the run that `config` names; `given` by `run_trials`."""
        self._tasks: Mapping[str, _Task] = given["tasks"]
        self._parent: str = given["parent"]
        self._metric: str | None = given["metric"]
        self._log_folder: Path = given["log_folder"]
        self._board: Board = given["board"]
        self._begin(self._tasks[config["trial"]])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next run on: a new actor would load all of PyTorch again."""
        self.cleanup()
        self._begin(self._tasks[new_config["trial"]])
        return True

    def step(self) -> dict[str, Any]:
        """Wait for an evaluation, for the end, or until it is time to say where the run is."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._heard.get(timeout=POLL_SECONDS)
            if self._board.wish() == Wish.STOP:
                self._stop.set()
            if time.monotonic() >= self._next_line:
                self._next_line = time.monotonic() + LINE_SECONDS
                return {"progress": self._doing}  # without a metric it does not count in the race

    def wait(self) -> None:
        """Answer, which an actor does when what was asked before is done."""

    def cleanup(self) -> None:
        """Have the run save and end, if it has not."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)

    def _begin(self, task: _Task) -> None:
        self._task = task
        self._heard: queue.Queue[dict[str, Any]] = queue.Queue()
        self._stop = threading.Event()
        # Step and samples at which the workers began, samples of a step and of the whole run.
        self._place = (0, 0, 0, 0)
        self._trained_since = 0.0
        self._doing = "starting"
        self._next_line = time.monotonic() + LINE_SECONDS
        self._thread: threading.Thread | None = None
        self._told: dict[str, Any] = {}
        try:
            record = self._read_record()
            if self._metric is not None and record is not None:
                self._replay(record, self._metric)
        except UserError as error:
            self._end(str(error))
            return
        # A run may have finished before its actor was lost.
        if task.is_over or (record is not None and record.is_finished):
            self._end("")
        elif self._board.wish() == Wish.STOP:
            self._end(INTERRUPTED)
        else:
            self._thread = threading.Thread(target=self._train, daemon=True)
            self._thread.start()

    def _read_record(self) -> RunRecord | None:
        """The run's record, at the tracker that the config has now."""
        config = self._task.config
        record = RunFolder.of(config.cluster.storage, config.name).read_record()
        if record is None:
            return None
        uri = tracker.tracking_uri(config.tracking.uri, config.cluster.storage)
        return replace(record, mlflow_uri=uri)

    def _replay(self, record: RunRecord, metric: str) -> None:
        """Tell the race of the evaluations that a run had before. Raises `UserError`."""
        run = record.mlflow
        try:
            points = tracker.read_history(run, [metric])[metric]
        except Exception as error:
            raise UserError(
                f"{run.uri}: cannot read {metric} of run {run.run_id} ({error}); mend the tracker, "
                "or sweep without --asha"
            ) from error
        for samples, value in points:
            self._tell(samples, value)

    def _train(self) -> None:
        config = self._task.config
        log_path = self._log_folder / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}.log"
        try:
            driver.train(config, self._listen, log_path, stop=self._stop)
        except KeyboardInterrupt:
            self._end(INTERRUPTED)
        except Exception as error:  # noqa: BLE001  one run's failure is not the others'
            self._end(f"{' '.join(str(error).split())} (log: {log_path})")
        else:
            self._end("")

    def _adopt(self) -> None:
        """Make the run a child of the sweep's, once it is recorded.

        One that is killed before begins anew, as another: the sweep would have both.
        """
        if (record := self._read_record()) is not None:
            tracker.set_tags(record.mlflow, {"mlflow.parentRunId": self._parent})

    def _listen(self, event: driver.Event) -> None:
        match event["kind"]:
            case "phase" | "warning":
                sys.stderr.write(f"{event['text']}\n")
                self._doing = event["text"]
            case "started":
                plan = event["plan"]
                self._place = event["step"], event["samples"], plan.global_batch, plan.samples
                self._trained_since = time.monotonic()
                self._doing = f"training from step {event['step']:,}"
                self._adopt()
            case "step":
                self._doing = self._where(event)
            case "evaluating":
                self._doing = "evaluating"
            case "evaluation" if self._metric is not None:
                value = event["metrics"].get(self._metric.removeprefix("eval/"))
                if value is None:
                    self._heard.put({**self._told, "warning": self._lacking(event["metrics"])})
                else:
                    step, samples, batch, whole = self._place
                    samples += (event["step"] - step) * batch
                    self._tell(samples, value, is_last=samples + batch > whole)

    def _where(self, event: driver.Event) -> str:
        """The step of how many, how fast, and how long the rest takes at the pace so far."""
        _, before, batch, whole = self._place
        left = whole - event["samples"]
        taken = time.monotonic() - self._trained_since
        seconds = round(left * taken / max(1, event["samples"] - before))
        return (
            f"step {event['step']:,}/{event['step'] + left // batch:,}, "
            f"{event['metrics']['train/samples_per_s']:,.0f} samples/s, "
            f"ETA {clock(seconds)}"
        )

    def _lacking(self, metrics: Mapping[str, float]) -> str:
        names = [name for each in metrics if direction(name := f"eval/{each}") is not None]
        return (
            f"--asha: the evaluation has no {self._metric}, so the run is not stopped early; it "
            f"has {', '.join(names) or 'no metric'}: interrupt, and go on with one that it has"
        )

    def _tell(self, samples: int, value: float, *, is_last: bool = False) -> None:
        """What comes last comes with the end: who has trained to it is not stopped early."""
        assert self._metric is not None
        self._told = {"samples": samples, self._metric: value}
        if not is_last:
            self._heard.put(self._told)

    def _end(self, failure: str) -> None:
        self._heard.put({**self._told, "done": True, "failure": failure})
