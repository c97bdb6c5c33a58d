"""The driver: prepare, ask Ray for workers, watch, and close the run's books.

Enters: a `Config` and a listener for events. Leaves: an `Outcome`. The same on a laptop and on
the head node of a cluster.
"""

import contextlib
import getpass
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline.config.load import dump, parse_config
from pipeline.config.schema import Config, flatten
from pipeline.data.storage import open_filesystem
from pipeline.data.stream import BadRow
from pipeline.errors import UserError, raise_problems
from pipeline.tracking import tracker
from pipeline.tracking.plots import PANELS, plot_curves
from pipeline.train.board import Board, Event, pass_warnings_on
from pipeline.train.preflight import Prepared, lacking_resources, prepare, prepare_evaluation
from pipeline.train.store import META, RunFolder, RunRecord, changed_keys, find_run
from pipeline.train.worker import EvaluationJob, Job, evaluate_worker, train_worker, versions

Listener = Callable[[Event], None]
POLL_SECONDS = 0.5


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


def train(config: Config, listen: Listener, log_path: Path) -> Outcome:
    """Run `config` to its end: a new run, or the unfinished one of that name.

    Events (dicts with a `kind`) go to `listen`; what Ray and DeepSpeed print goes to `log_path`.
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
    with _quiet(log_path), _ray(config, listen), pass_warnings_on(listen):
        raise_problems(_ask_cluster(config), "The cluster lacks resources")
        listen({"kind": "phase", "text": "Opening the MLflow run"})
        record = _reopen(config, record) if record else _new_record(prepared, folder, name)
        folder.write_record(record)
        run = tracker.RunRef(uri=record.mlflow_uri, run_id=record.mlflow_run_id)
        listen({"kind": "phase", "text": f"Starting {prepared.plan.workers} worker(s)"})
        board = Board()
        watch = _Watch(board, listen)
        job = Job(
            config=prepared.config,
            plan=prepared.plan,
            tokenizer=prepared.tokenizer,
            catalog=prepared.catalog,
            suite=prepared.suite,
            run=run,
            run_name=name,
            board=board,
        )
        status: tracker.Status = "FAILED"
        try:
            _fit(train_worker, {"job": job}, config, config.cluster.storage, name, watch)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            bad_rows = folder.read_quarantine()
            _log_artifacts(run, prepared, bad_rows)
            tracker.close_run(run, status)
        folder.write_record(replace(record, is_finished=True))
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
    folder: RunFolder, config: Config, checkpoint: str | None, listen: Listener, log_path: Path
) -> dict[str, float]:
    """Evaluate a checkpoint of a run (the newest, or the named one) under `config`."""
    record = folder.read_record()
    names = folder.checkpoints()
    if record is None or not names:
        raise UserError(
            f"{folder.url}: no run with a checkpoint there; give the folder of a run, such as "
            "runs/demo"
        )
    chosen = checkpoint or names[-1]
    if chosen not in names:
        raise UserError(f"{folder.url}: no checkpoint {chosen!r}; it has {names}")
    suite = prepare_evaluation(config, record.tokenizer)
    listen({"kind": "phase", "text": f"Evaluating {folder.url}/{chosen}"})
    meta = json.loads(folder.read_text(f"{chosen}/{META}") or "{}")
    with _quiet(log_path), _ray(config, listen):
        raise_problems(_ask_cluster(config), "The cluster lacks resources")
        board = Board()
        watch = _Watch(board, listen)
        job = EvaluationJob(
            config=config,
            tokenizer=record.tokenizer,
            suite=suite,
            checkpoint=ray.train.Checkpoint(f"{folder.path}/{chosen}", folder.filesystem),
            zero_stage=meta["zero_stage"],
            board=board,
        )
        name = f"evaluate-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            _fit(evaluate_worker, {"job": job}, config, folder.url, name, watch)
        finally:
            # Ray Train keeps its own notes there; an evaluation leaves nothing to resume.
            folder.filesystem.delete_dir(f"{folder.path}/{name}")
    return watch.metrics


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
    return RunRecord(
        name=name,
        config=config.model_dump(mode="json"),
        tokenizer=prepared.tokenizer,
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
        "gammaray.loss": config.loss.kind,
        "gammaray.prior": config.loss.prior if config.loss.kind == "gamma" else "none",
        "gammaray.zero_stage": str(config.engine.zero_stage),
        "gammaray.workers": str(config.cluster.workers),
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


def _commit() -> str | None:
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


def _log_artifacts(run: tracker.RunRef, prepared: Prepared, bad: list[BadRow]) -> None:
    """Config, plan, versions, dropped rows and curves; made at the end, whatever the end."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary)
        (path / "config.yaml").write_text(dump(prepared.config))
        plan = [prepared.catalog.describe(), *prepared.plan.sentences()]
        (path / "plan.txt").write_text("\n".join(plan) + "\n")
        listing = "\n".join(f"{name}=={version}" for name, version in versions().items())
        (path / "versions.txt").write_text(listing + "\n")
        if bad:
            rows = [f"{row.path}:{row.row_group}:{row.row}\t{row.reason}" for row in bad]
            (path / "dropped_rows.tsv").write_text("\n".join(rows) + "\n")
        with contextlib.suppress(Exception):
            plot_curves(tracker.read_history(run, list(PANELS)), path / "curves.png")
        tracker.log_artifacts(run, path)


@contextlib.contextmanager
def _ray(config: Config, listen: Listener) -> Iterator[None]:
    """A connection to Ray, closed at the end: late lines of workers must not reach the console."""
    _start_ray(config, listen)
    try:
        yield
    finally:
        ray.shutdown()


def _start_ray(config: Config, listen: Listener) -> None:
    # A submitted job (RAY_ADDRESS is set) trains where it was submitted, whatever the config says.
    is_local = config.cluster.address == "local" and "RAY_ADDRESS" not in os.environ
    listen({"kind": "phase", "text": "Starting Ray" if is_local else "Connecting to Ray"})
    try:
        if is_local:
            ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False)
        else:
            address = config.cluster.address
            ray.init(address=None if address == "local" else address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cluster.address: no Ray cluster at {config.cluster.address} ({error}); use local, or "
            "start one with `ray start --head`"
        ) from error


def _ask_cluster(config: Config) -> list[Any]:
    resources = ray.cluster_resources()
    return lacking_resources(config, resources.get("CPU", 0), resources.get("GPU", 0))


class _Watch:
    """Passes the board's events on while the driver waits for the workers."""

    def __init__(self, board: Board, listen: Listener):
        self._board, self._listen = board, listen
        self._done = threading.Event()
        self._rates: list[float] = []
        self.metrics: dict[str, float] = {}
        self.stopped: str | None = None

    @property
    def samples_per_s(self) -> float:
        """Median over the windows, the first (start-up) left out."""
        rates = sorted(self._rates[1:] or self._rates)
        return rates[len(rates) // 2] if rates else 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
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

    def _take(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            for event in self._board.take():
                if event["kind"] == "step":
                    self._rates.append(event["metrics"]["train/samples_per_s"])
                elif event["kind"] == "evaluation":
                    self.metrics = event["metrics"]
                elif event["kind"] == "stopped":
                    self.stopped = event["message"]
                self._listen(event)


def _fit(
    work: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    config: Config,
    storage: str,
    name: str,
    watch: _Watch,
) -> None:
    """Run `work` on every worker; restarts after failures. Raises `RunFailed`."""
    cluster = config.cluster
    filesystem, root = open_filesystem(storage)
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    trainer = TorchTrainer(
        work,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=bool(cluster.gpus_per_worker),
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=root,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.train.keep),
        ),
    )
    with watch.running():
        try:
            _wait(trainer)
        except ray.train.TrainingFailedError as error:
            raise RunFailed(_cause(error), can_go_on=True) from error
    if watch.stopped is not None:
        raise RunFailed(watch.stopped, can_go_on=False)


def _wait(trainer: TorchTrainer) -> None:
    """Run `trainer.fit()` beside the main thread, where it would replace the handler of Ctrl-C."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001  it is raised in the main thread
            failures.append(error)

    thread = threading.Thread(target=work, name="trainer", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
    if failures:
        raise failures[0]


def _cause(error: BaseException) -> str:
    """The workers' own last words, without Ray's frames."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in sorted(failures.items()):
        lines = [line for line in str(failure).strip().splitlines() if line.strip()]
        if lines:
            return f"worker {rank}: {lines[-1].strip()}"
    return str(error).strip().splitlines()[-1]


@contextlib.contextmanager
def _quiet(log_path: Path) -> Iterator[None]:
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
