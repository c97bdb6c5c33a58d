"""The driver: prepare, ask Ray for workers, watch, and close the run's books.

Enters: a `Config` and a listener for events. Leaves: an `Outcome`. The same on a laptop and on
the head node of a cluster.
"""

import contextlib
import getpass
import importlib.metadata
import json
import logging
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig

from pipeline.config.load import dump, parse_config
from pipeline.config.schema import Config, WorkersRange, flatten
from pipeline.data.connect import connecting
from pipeline.data.layout import Catalog
from pipeline.data.rows import BadRow
from pipeline.data.storage import open_filesystem
from pipeline.data.stream import start_ray_data_here
from pipeline.errors import Problem, UserError, raise_problems
from pipeline.evaluate.suite import Sample, TaskSample
from pipeline.report import page
from pipeline.tracking import tracker
from pipeline.train.board import Board, Event, pass_warnings_on
from pipeline.train.figures import draw_pairs, draw_run
from pipeline.train.lease import Lease, leased
from pipeline.train.loop import Wish
from pipeline.train.measure import Evaluation, Measured
from pipeline.train.preflight import Prepared, lacking_resources, prepare
from pipeline.train.store import CONFIG, RunFolder, RunRecord, changed_keys, find_run
from pipeline.train.witness import Failures, Introduction, PlannedResize, Trainer
from pipeline.train.worker import EvaluationJob, Job, evaluate_worker, train_worker, versions

Listener = Callable[[Event], None]
LOG = logging.getLogger(__name__)
POLL_SECONDS = 0.5
WAITING_SECONDS = 60.0  # between two sentences about what the cluster lacks
ABORT_SECONDS = 15.0  # for Ray Train to stop its workers when no more is wanted of them
END_SECONDS = 30.0  # for what waits for Ray Train to hear that it has ended


class RunFailed(Exception):
    """Training ended without reaching its plan; the message says why.

    `can_go_on`: whether the same command may do better.
    """

    def __init__(self, message: str, *, can_go_on: bool):
        super().__init__(message)
        self.can_go_on = can_go_on


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run ended."""

    name: str
    folder: str
    metrics: dict[str, float]
    samples_per_s: float
    seconds: float
    mlflow: tracker.RunRef
    bad_rows: int


def train(
    config: Config,
    listen: Listener,
    log_path: Path,
    *,
    stop: threading.Event | None = None,
) -> Outcome:
    """Run `config` to its end: a new run, or the unfinished one of that name.

    Events (dicts with a `kind`) go to `listen`; what Ray and DeepSpeed print goes to `log_path`.
    `stop` is set to have it end like at SIGTERM.
    Raises `UserError` before the first step for what the user can mend, `RunFailed` later.
    """
    started = time.monotonic()
    folder, record = find_run(config.cluster.storage, config.name)
    if record is not None:
        _check_unchanged(config, record)
    listen({"kind": "phase", "text": "Reading the data and planning"})
    prepared = prepare(config, record)
    if record is not None and record.data_digest != prepared.catalog.digest:
        raise UserError(
            f"data.train: {prepared.catalog.root} changed since run '{record.name}' began (digest "
            f"{record.data_digest}, now {prepared.catalog.digest}); the rows already used cannot "
            "be told: restore the files, or start a new run with name=..."
        )
    name = folder.path.rsplit("/", 1)[-1]
    listen({"kind": "planned", "prepared": prepared, "name": name, "resumed": record is not None})
    say = saying(listen)
    with (
        leased(folder, say) as lease,
        session(config, listen, log_path),
    ):
        _check_cluster(config)
        start_ray_data_here()
        say("Opening the MLflow run")
        is_resumed = record is not None
        record = _reopen(config, record) if record else _new_record(prepared, folder, name)
        folder.write_record(record)
        folder.write_text(CONFIG, dump(prepared.config))
        run = record.mlflow
        say(f"Starting {prepared.plan.workers} worker(s)")
        board = Board(record.attempts)
        watch = Watch(board, listen, config, _Diary(run, folder, record))
        if is_resumed:
            watch.diary.note("resumed", f"the command was given again, on {socket.gethostname()}")
        job = Job(
            sizes=prepared.sizes,
            tokenizer=prepared.tokenizer,
            catalog=prepared.catalog,
            suite=prepared.suite,
            asked=prepared.asked,
            run=run,
            run_name=name,
            board=board,
        )
        status: tracker.Status = "FAILED"
        try:
            work = partial(train_worker, job)
            _fit(work, config, config.cluster.storage, name, watch, lease, stop)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            watch.diary.note("stopped", "by Ctrl-C or SIGTERM")
            raise
        finally:
            bad_rows = folder.read_quarantine()
            _log_artifacts(run, prepared, bad_rows, watch.sample)
            watch.diary.close()
            tracker.close_run(run, status)
            _report(run)
        folder.write_record(replace(watch.diary.record, is_finished=True))
    return Outcome(
        name=name,
        folder=folder.url,
        metrics=watch.metrics,
        samples_per_s=watch.samples_per_s,
        seconds=time.monotonic() - started,
        mlflow=run,
        bad_rows=len(bad_rows),
    )


def evaluate(
    asked: Sequence[Evaluation],
    listen: Listener,
    log_path: Path,
    take: Callable[[Measured], None],
) -> None:
    """Evaluate checkpoints of runs, one after the other, and have each taken as it comes.

    One that fails is told as such, and does not keep the others from being measured.
    """
    with session(asked[0].config, listen, log_path):
        for each in asked:
            take(_evaluate(each, listen))


def _evaluate(asked: Evaluation, listen: Listener) -> Measured:
    folder, config = asked.folder, asked.config
    listen({"kind": "phase", "text": f"Evaluating {folder.url}/{asked.checkpoint}"})
    storage, run_name = folder.url.rsplit("/", 1)
    board = Board()
    watch = Watch(board, listen, config, None)
    job = EvaluationJob(
        config=config,
        tokenizer=asked.record.tokenizer,
        suite=asked.suite,
        storage=storage,
        run_name=run_name,
        name=asked.checkpoint,
        board=board,
    )
    name = f"evaluate-{time.strftime('%Y%m%d-%H%M%S')}"
    failure = None
    try:
        _check_cluster(config)
        _fit(partial(evaluate_worker, job), config, folder.url, name, watch, None)
        if not watch.metrics:
            failure = "nothing was heard of what the workers found; try again"
    except (RunFailed, UserError) as error:
        failure = str(error)
    except Exception as error:  # noqa: BLE001  one run's failure is not the others'
        traceback.print_exc()
        failure = f"{type(error).__name__}: {error}"
    finally:
        # Ray Train keeps its own notes there; an evaluation leaves nothing to resume.
        folder.remove(name)
    return Measured(asked=asked, metrics=watch.metrics, sample=watch.sample, failure=failure)


def _check_unchanged(config: Config, record: RunRecord) -> None:
    before, now = _flat(record.config), flatten(config)
    if changes := changed_keys(before, now):
        listing = "\n".join(f"  {change}" for change in changes)
        raise UserError(
            f"run '{record.name}' is unfinished and was started with another config:\n{listing}\n"
            "Go on with the old values, or start a new run with name=..."
        )


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return flatten(parse_config(values, "the run's record"))


def _new_record(prepared: Prepared, folder: RunFolder, name: str) -> RunRecord:
    config = prepared.config
    run = tracker.open_run(
        tracker.tracking_uri(config.tracking.uri, config.cluster.storage),
        config.tracking.experiment,
        name,
        params=flatten(config),
        tags=_tags(prepared, folder),
        run_id=None,
    )
    tracker.log_inputs(run, list(_inputs(prepared)))
    return RunRecord(
        name=name,
        config=config.model_dump(mode="json"),
        tokenizer=prepared.tokenizer,
        asked=prepared.asked,
        data_digest=prepared.catalog.digest,
        mlflow_uri=run.uri,
        mlflow_run_id=run.run_id,
        is_finished=False,
    )


def _reopen(config: Config, record: RunRecord) -> RunRecord:
    """Go on with the record's MLflow run, at the URI the config has now (a server may move)."""
    run = tracker.open_run(
        tracker.tracking_uri(config.tracking.uri, config.cluster.storage),
        config.tracking.experiment,
        record.name,
        params={},
        tags={},
        run_id=record.mlflow_run_id,
    )
    return replace(record, mlflow_uri=run.uri)


def _tags(prepared: Prepared, folder: RunFolder) -> dict[str, str]:
    config = prepared.config
    tags = {
        "gammaray.name": folder.path.rsplit("/", 1)[-1],
        "gammaray.storage": folder.url,
        **_kind_tags(config),
        "gammaray.zero_stage": str(config.engine.zero_stage),
        "gammaray.workers": str(prepared.plan.workers),
        "gammaray.data_digest": prepared.catalog.digest,
        "gammaray.version": importlib.metadata.version("gammaray"),
        "mlflow.note.content": "\n\n".join(
            [f"{prepared.catalog.describe()}.", *prepared.plan.sentences()]
        ),
        "mlflow.source.name": "gammaray train",
        "mlflow.user": getpass.getuser(),
    }
    commit = _commit()
    return {**tags, "mlflow.source.git.commit": commit} if commit else tags


def _inputs(prepared: Prepared) -> Iterator[tracker.Input]:
    """The data sets that a run reads: their rows are not read for it."""
    catalogs: dict[tracker.Role, Catalog] = {"training": prepared.catalog}
    if prepared.suite is not None:
        catalogs["evaluation"] = prepared.suite.catalog
    for role, catalog in catalogs.items():
        yield tracker.Input(
            role=role, source=catalog.root, digest=catalog.digest, rows=catalog.num_rows
        )


def _kind_tags(config: Config) -> dict[str, str]:
    model = {"gammaray.model": config.model.kind}
    if config.task is not None:
        init = config.model.init or "none"
        return {**model, "gammaray.task": config.task.kind, "gammaray.init": init}
    prior = config.loss.prior if config.loss.kind == "gamma" else "none"
    return {**model, "gammaray.loss": config.loss.kind, "gammaray.prior": prior}


def _commit() -> str | None:
    """Of the code: as `gammaray submit` said, which sends no repository, or of the one it is in."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON") or "{}")
    if said := (job.get("metadata") or {}).get("commit"):
        return said
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
        return asked.stdout.strip() or None
    return None


def _log_artifacts(
    run: tracker.RunRef,
    prepared: Prepared,
    bad: list[BadRow],
    sample: Sample | TaskSample | None,
) -> None:
    """Config, plan, versions, dropped rows and figures; made at the end, whatever the end."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary)
        (path / CONFIG).write_text(dump(prepared.config))
        plan = [prepared.catalog.describe(), *prepared.plan.sentences()]
        (path / "plan.txt").write_text("\n".join(plan) + "\n")
        listing = "\n".join(f"{name}=={version}" for name, version in versions().items())
        (path / "versions.txt").write_text(listing + "\n")
        if bad:
            rows = [f"{row.path}:{row.row_group}:{row.row}\t{row.reason}" for row in bad]
            (path / "dropped_rows.tsv").write_text("\n".join(rows) + "\n")
        draw_pairs(prepared.catalog, path)
        draw_run(run, prepared.config, sample, path)
        tracker.log_artifacts(run, path)


def _report(run: tracker.RunRef) -> None:
    """Keep a report of all that the tracker has of the run; one that fails is only warned of."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            page.write_report(run, Path(temporary) / page.NAME)
        except Exception as error:  # noqa: BLE001  no report may stand between a run and its end
            LOG.warning("no report of the run: %s", error)
            return
        tracker.log_artifacts(run, Path(temporary))


@contextlib.contextmanager
def session(config: Config, listen: Listener, log_path: Path) -> Iterator[None]:
    """Ray, a free console, and warnings told: what a driver works in."""
    with quiet(log_path), _ray(config, listen), pass_warnings_on(listen):
        yield


@contextlib.contextmanager
def _ray(config: Config, listen: Listener) -> Iterator[None]:
    """A connection to Ray, closed at the end: late lines of workers must not reach the console."""
    if ray.is_initialized():  # a sweep's, whose actor this is: not ours to close
        yield
        return
    _start_ray(config, listen)
    if threading.current_thread() is threading.main_thread():
        # In place of Ray's own: what stops a job before it trains is like Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        ray.shutdown()


def _start_ray(config: Config, listen: Listener) -> None:
    # A submitted job (RAY_ADDRESS is set) trains where it was submitted, whatever the config says.
    is_local = config.cluster.address == "local" and "RAY_ADDRESS" not in os.environ
    listen({"kind": "phase", "text": "Starting Ray" if is_local else "Connecting to Ray"})
    address = config.cluster.address
    remedy = "use local, or start one with `ray start --head`"
    with connecting(f"cluster.address: no Ray cluster at {address}", remedy):
        if is_local:
            ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False)
        else:
            ray.init(address=None if address == "local" else address)


def _check_cluster(config: Config) -> None:
    """Refuse what a Ray of our own can never give; any other cluster may get more nodes."""
    if config.cluster.address == "local" and "RAY_ADDRESS" not in os.environ:
        raise_problems(_lacking(config), "The cluster lacks resources")


def _lacking(config: Config) -> list[Problem]:
    resources = ray.cluster_resources()
    return lacking_resources(config, resources.get("CPU", 0), resources.get("GPU", 0))


def saying(listen: Listener) -> Callable[[str], None]:
    """Tell `listen` of what is being done, in a sentence."""
    return lambda text: listen({"kind": "phase", "text": text})


class _Diary:
    """Keeps what befalls a run: tags of its MLflow run, its record's attempts, stacks."""

    def __init__(self, run: tracker.RunRef, folder: RunFolder, record: RunRecord):
        self._run, self._folder, self.record = run, folder, record
        self._tags: dict[str, str] = {}

    def note(self, kind: str, text: str) -> None:
        """Tag the MLflow run with an event; again later, when the tracker does not answer."""
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        self._tags[f"gammaray.event.{moment}.{kind}"] = text
        self._deliver()

    def begin(self, attempt: int, workers: int) -> None:
        """Keep the number of this attempt for the next driver, and tag the MLflow run with it."""
        self.record = replace(self.record, attempts=attempt)
        self._folder.write_record(self.record)
        self._tags["gammaray.attempt"] = str(attempt)
        self._tags["gammaray.world_size"] = str(workers)
        self._deliver()

    def keep_stacks(self, event: Event) -> None:
        """Keep what a worker that stood still was doing, among the run's artifacts."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "stalls"
            folder.mkdir()
            name = f"step-{event['step']:08d}-rank-{event['rank']:05d}.txt"
            (folder / name).write_text(f"{_standing_still(event)}\n\n{event['stacks']}")
            tracker.log_artifacts(self._run, Path(temporary))

    def close(self) -> None:
        """Deliver what is left."""
        self._deliver()

    def _deliver(self) -> None:
        if self._tags and tracker.set_tags(self._run, self._tags):
            self._tags = {}


def _standing_still(event: Event) -> str:
    return (
        f"worker {event['rank']} on {event['node']} did nothing for {event['seconds']} s; step "
        f"{event['step']}, {event['doing']}"
    )


class Watch:
    """Passes the board's events on while the driver waits for the workers, and judges them.

    `given_up`: why no further restart will be tried.
    """

    def __init__(self, board: Board, listen: Listener, config: Config, diary: _Diary | None):
        self._board, self._listen, self._config = board, listen, config
        self._diary = diary
        self._done = threading.Event()
        self._rates: list[float] = []
        self._failures = 0
        self._stalled: list[Event] = []
        self._workers = 0
        self._said_waiting = time.monotonic()
        self.is_training = False
        self.has_left: Wish | None = None
        self.controller: Any = None
        self.metrics: dict[str, float] = {}
        self.sample: Sample | TaskSample | None = None
        self.stopped: str | None = None
        self.given_up: str | None = None

    @property
    def board(self) -> Board:
        """Where the workers post."""
        return self._board

    def say(self, text: str) -> None:
        """Tell the user what is being done."""
        self._listen({"kind": "phase", "text": text})

    @property
    def diary(self) -> _Diary:
        """Of a training run."""
        assert self._diary is not None, "an evaluation keeps none"
        return self._diary

    @property
    def samples_per_s(self) -> float:
        """Median over the windows, the first (start-up) left out."""
        rates = sorted(self._rates[1:] or self._rates)
        return rates[len(rates) // 2] if rates else 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Take events in a thread until the end of the block."""
        thread = threading.Thread(target=self._poll, name="board", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()
            self._take()

    def _poll(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            self._take()
            if not self.is_training:
                self._say_what_lacks()

    def _take(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            for event in self._board.take():
                self._heed(event)
                self._listen(event)

    def _heed(self, event: Event) -> None:
        match event["kind"]:
            case "step":
                self._rates.append(event["metrics"]["train/samples_per_s"])
            case "controller":
                self.controller = event["actor"]
            case "evaluation":
                self.metrics = event["metrics"]
            case "sample":
                self.sample = pickle.loads(event["sample"])
            case "stopped":
                self.stopped = event["message"]
            case "started":
                self._begin(event)
            case "checkpoint":
                self._failures = 0
            case "left":
                self.is_training, self.has_left = False, event["wish"]
            case "resizing":
                self.diary.note("resizing", f"to {event['workers']} workers, all is saved first")
            case "stalled":
                self._stalled.append(event)
                self.diary.keep_stacks(event)
            case "failed":
                self._fail(event["message"])

    def _begin(self, event: Event) -> None:
        self.is_training, self.has_left, self._stalled = True, None, []
        if event["attempt"] > 1:
            before = f", {self._workers} before" if self._workers else ""
            self.diary.note(
                "started",
                f"attempt {event['attempt']} from step {event['step']} with {event['workers']} "
                f"worker(s){before}",
            )
        self._workers = event["workers"]
        self.diary.begin(event["attempt"], event["workers"])

    def _fail(self, message: str) -> None:
        if self.has_left is not None:
            return  # how workers that are to start anew end
        self.is_training = False
        if self._stalled:
            message = self._blame_the_late()
        self._failures += 1
        if self._diary is not None:
            self._diary.note("failed", message)
        limit = self._config.cluster.max_failures
        if self._failures > limit:
            self.given_up = message
        else:
            left = limit - self._failures
            self._listen({"kind": "warning", "text": f"{message}; restarting ({left} more allowed "
                          "before the next checkpoint)"})  # fmt: skip

    def _blame_the_late(self) -> str:
        """Who held the others up: who says nothing at all, else who is furthest back."""
        heard = {event["rank"]: event for event in self._stalled}
        silent = sorted(set(range(self._workers)) - set(heard))
        if silent:
            waiting = "; ".join(_standing_still(event) for event in heard.values())
            return f"worker(s) {silent} say nothing: frozen, or cut off ({waiting})"
        late = min(heard.values(), key=lambda event: (event["step"], event["doing"] == "in a step"))
        return _standing_still(late)

    def _say_what_lacks(self) -> None:
        if time.monotonic() < self._said_waiting + WAITING_SECONDS:
            return
        self._said_waiting = time.monotonic()
        with contextlib.suppress(ray.exceptions.RayError):
            for problem in _lacking(self._config):
                self._listen({"kind": "warning", "text": f"waiting for nodes: {problem}"})


def _fit(
    work: Callable[[], None],
    config: Config,
    storage: str,
    name: str,
    watch: Watch,
    lease: Lease | None,
    stop: threading.Event | None = None,
) -> None:
    """Run `work` on every worker; restarts after failures. Raises `RunFailed`.

    What it needs is bound to it, not given as Ray Train's settings: the controller would load
    those, and for them the models, before it asks for workers.
    """
    cluster = config.cluster
    filesystem, root = open_filesystem(storage)
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    workers = cluster.workers
    elastic: dict[str, Any] = {"num_workers": workers}
    if isinstance(workers, WorkersRange):
        elastic = {
            "num_workers": (workers.min, workers.max),
            "elastic_resize_monitor_interval_s": workers.check_every_s,
        }
    trainer = Trainer(
        work,
        scaling_config=ScalingConfig(
            **elastic,
            use_gpu=bool(cluster.gpus_per_worker),
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(
            backend="nccl" if cluster.gpus_per_worker else "gloo",
            # Whoever stands still is found first, and named.
            timeout_s=max(1800, round(120 * cluster.stall_minutes)),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=root,
            storage_filesystem=filesystem,
            # Failures are counted here, since the last checkpoint, not by Ray Train, in all.
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[  # pyright: ignore[reportArgumentType]
                Introduction(watch.board),
                Failures(watch.board),
                PlannedResize(watch.board),
            ],
        ),
    )
    with watch.running():
        try:
            _wait(trainer, watch, lease, stop)
        except ray.train.TrainingFailedError as error:
            raise RunFailed(_cause(error), can_go_on=True) from error
    if watch.stopped is not None:
        raise RunFailed(watch.stopped, can_go_on=False)
    if watch.has_left is Wish.STOP:
        raise KeyboardInterrupt


def _wait(
    trainer: Trainer, watch: Watch, lease: Lease | None, stop: threading.Event | None = None
) -> None:
    """Run `trainer.fit()` beside the main thread, which hears of signals and of the end.

    At a first SIGINT or SIGTERM the workers are asked to save and stop; a second one does not wait
    for them, but for Ray Train to end, at most `END_SECONDS`.
    """
    failures: list[BaseException] = []

    def work() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001  it is raised in the main thread
            failures.append(error)

    thread = threading.Thread(target=work, name="trainer", daemon=True)
    with _signals() as heard:
        thread.start()
        has_asked = False
        try:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
                if stop is not None and stop.is_set() and not heard:
                    heard.append(signal.SIGTERM)
                if heard and not has_asked and watch.is_training:
                    watch.board.ask(Wish.STOP)
                    watch.say("Saving before the end; once more to stop without")
                    has_asked = True
                elif len(heard) > has_asked:
                    raise KeyboardInterrupt
                if watch.given_up is not None:
                    raise RunFailed(watch.given_up, can_go_on=True)
                if lease is not None and lease.is_lost:
                    raise RunFailed("another driver has taken this run over", can_go_on=False)
        finally:
            _end(thread, watch)
    if failures:
        raise failures[0]


def _end(thread: threading.Thread, watch: Watch) -> None:
    """End Ray Train's controller, and with it the thread that waits for it.

    Ray may not be shut down while a thread waits in it: the process would die of a bad address.
    """
    began = time.monotonic()
    asked = math.inf
    while thread.is_alive() and time.monotonic() < began + END_SECONDS:
        if watch.controller is not None and asked == math.inf:
            watch.controller.abort.remote()
            asked = time.monotonic()
        elif watch.controller is not None and time.monotonic() > asked + ABORT_SECONDS:
            # It hears of nothing while it waits for nodes.
            ray.kill(watch.controller)
        thread.join(POLL_SECONDS)
    if thread.is_alive():
        LOG.warning("Ray Train did not end within %.0f s", END_SECONDS)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM as they come, in place of what they would do."""
    heard: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda number, _: heard.append(number)) for kind in kinds]
    try:
        yield heard
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def _cause(error: BaseException) -> str:
    """The workers' own last words, without Ray's frames."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in sorted(failures.items()):
        lines = [line for line in str(failure).strip().splitlines() if line.strip()]
        if lines:
            return f"worker {rank}: {lines[-1].strip()}"
    return str(error).strip().splitlines()[-1]


@contextlib.contextmanager
def quiet(log_path: Path) -> Iterator[None]:
    """Send everything this process and Ray's workers print to `log_path`; the console stays free.

    At the level of file descriptors, since Ray's and DeepSpeed's C++ parts print too.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log_path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.getLogger("ray").setLevel(logging.INFO)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        os.close(saved[0])
        os.close(saved[1])
