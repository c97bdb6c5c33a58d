"""The MLflow tracker: one run per training run, metrics without waiting, artifacts at the end.

The one place that knows mlflow. Enters: plain names and numbers. Leaves: points in MLflow.
Must not know: training.
"""

import contextlib
import http.client
import json
import logging
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
Role = Literal["training", "evaluation"]
FLUSH_SECONDS = 2.0
RETRY_SECONDS = 15.0
MAX_BUFFERED = 100_000
DATABASES = ("postgresql", "mysql", "mssql")
REMEDIES = (  # by what MLflow, or what it stands on, says
    ("error code 40[13]|permission", "give an account that may: MLFLOW_TRACKING_USERNAME and "
     "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"),
    ("is locked", "another process writes to it: try again, or have runs log to a server"),
    ("no module named", "install that module, which the database needs"),
    ("api request|connect", "see that it runs there; if it has moved, set MLFLOW_TRACKING_URI "
     "and give runs by name or id"),
    ("", "see that it is an MLflow tracker, and that what was asked is right"),
)  # fmt: skip
Point = tuple[int, int, dict[str, float]]  # step, time in ms, value by metric


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRef:
    """Where a run is: all that another process needs to log to it."""

    uri: str
    run_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """A data set that a run reads; `digest` changes with its files, `source` is where they lie."""

    role: Role
    source: str
    digest: str
    rows: int


def tracking_uri(uri: str, storage: str) -> str:
    """Resolve `embedded` to a sqlite file inside the storage folder."""
    if uri != "embedded":
        return uri
    return f"sqlite:///{storage}/mlflow.db"


def check_reachable(uri: str) -> None:
    """Raise `UserError` unless the tracker at `uri` answers (a server) or can exist (a file)."""
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"tracking.uri: cannot make the folder of {uri} ({error}); choose another"
            ) from error
        return
    if uri.startswith(DATABASES):
        return  # MLflow's own first call says whether the database answers
    if not uri.startswith(("http://", "https://")):
        raise UserError(
            f"tracking.uri: {uri!r} is no tracker; give embedded, sqlite:///FILE or http://HOST:PORT"
        )
    if (why := silence(uri)) is not None:
        raise UserError(
            f"tracking.uri: no MLflow server answers at {uri} ({why}); start it, mend the "
            "address, or use tracking.uri=embedded"
        )


def silence(uri: str) -> str | None:
    """Why no server answers at `uri`; None if one does."""
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=5) as answer:
            answer.read()
    except urllib.error.HTTPError:
        return None  # it answers; what it thinks of us shows at the first real call
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(error)
    return None


@contextlib.contextmanager
def refusals(uri: str, what: str) -> Iterator[None]:
    """Raise `UserError` for whatever MLflow raises when asked to do `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        remedy = next(each for sign, each in REMEDIES if re.search(sign, said, re.IGNORECASE))
        raise UserError(f"{uri}: MLflow cannot {what} ({said}); {remedy}") from error


def open_run(
    uri: str,
    experiment: str,
    name: str,
    *,
    params: Mapping[str, str | int | float | bool],
    tags: Mapping[str, str],
    run_id: str | None,
) -> RunRef:
    """Create the MLflow run of a training run, or go on with `run_id`.

    Raises `UserError` when the tracker refuses.
    """
    client = connect(uri)
    try:
        if run_id is not None:
            client.get_run(run_id)  # or an error: sqlite would make a database without it
            client.update_run(run_id, status="RUNNING")
        else:
            created = client.create_run(
                _experiment(client, uri, experiment), run_name=name, tags=dict(tags)
            )
            run_id = created.info.run_id
            from mlflow.entities import Param

            entries = [Param(key, str(value)[:6000]) for key, value in params.items()]
            for start in range(0, len(entries), 100):
                client.log_batch(run_id, params=entries[start : start + 100])
    except Exception as error:
        raise UserError(f"tracking.uri: MLflow at {uri} refused the run: {error}") from error
    return RunRef(uri=uri, run_id=run_id)


def log_inputs(ref: RunRef, inputs: Sequence[Input]) -> None:
    """Say which data sets the run reads; a tracker that is gone is only warned of."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    entries = [
        DatasetInput(
            Dataset(
                name=_short_name(each.source),
                digest=each.digest,
                source_type=each.source.partition("://")[0] if "://" in each.source else "local",
                source=json.dumps({"uri": each.source}),
                profile=json.dumps({"num_rows": each.rows}),
            ),
            [InputTag("mlflow.data.context", each.role)],
        )
        for each in inputs
    ]
    with _tolerant("log the data sets"):
        connect(ref.uri).log_inputs(ref.run_id, entries)


def _short_name(source: str) -> str:
    """The last two parts of each path: a folder `train` alone says little."""
    paths = (path.partition("?")[0].rstrip("/").split("/") for path in source.split(", "))
    return ", ".join("/".join(path[-2:]) for path in paths)[:500]


def close_run(ref: RunRef, status: Status) -> None:
    """End the run; a tracker that is gone by now is only warned of."""
    with _tolerant("end the run"):
        connect(ref.uri).set_terminated(ref.run_id, status)


def set_tags(ref: RunRef, tags: Mapping[str, str]) -> bool:
    """Tag the run; whether the tracker took it."""
    try:
        client = connect(ref.uri)
        for name, value in tags.items():
            client.set_tag(ref.run_id, name, value[:5000])
    except Exception as error:  # noqa: BLE001  no tracker's failure may stop training
        log.warning("MLflow: could not tag the run: %s", error)
        return False
    return True


def log_metrics(ref: RunRef, step: int, metrics: Mapping[str, float]) -> None:
    """Log one point of each metric, at once; a tracker that is gone is only warned of."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    entries = [Metric(metric_name(name), value, now, step) for name, value in metrics.items()]
    with _tolerant("log metrics"):
        client = connect(ref.uri)
        for start in range(0, len(entries), 1000):  # MLflow's most
            client.log_batch(ref.run_id, metrics=entries[start : start + 1000])


def log_artifacts(ref: RunRef, folder: Path) -> None:
    """Upload every file under `folder`; a tracker that is gone is only warned of."""
    with _tolerant("log artifacts"):
        upload(ref, folder)


def upload(ref: RunRef, folder: Path) -> None:
    """Upload every file under `folder`. Raises `UserError` when the tracker does not take them."""
    with refusals(ref.uri, f"keep files of run {ref.run_id}"):
        connect(ref.uri).log_artifacts(ref.run_id, str(folder))


def read_history(ref: RunRef, names: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """Give (step, value) points of each metric, by step; a missing metric has none.

    Raises `UserError` when the tracker does not answer, or has no such run.
    """
    with refusals(ref.uri, f"give the metrics of run {ref.run_id}"):
        client = connect(ref.uri)
        return {
            name: sorted((m.step, m.value) for m in client.get_metric_history(ref.run_id, name))
            for name in names
        }


class MetricLog:
    """Sends points from a thread of its own: `log` never waits and never fails.

    When the tracker is gone, points wait (up to `MAX_BUFFERED`) and are sent once it answers. Those
    that still wait when a checkpoint is saved are saved with it (`undelivered`), and given to the
    log of the worker that goes on. Steps that were logged before are not logged again.
    """

    def __init__(self, ref: RunRef, system_metrics_seconds: int, undelivered: Sequence[Point] = ()):
        self._ref = ref
        self._interval = system_metrics_seconds
        self._waiting: deque[Point] = deque(undelivered, maxlen=MAX_BUFFERED)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue one point of each metric at `step`."""
        self._waiting.append((step, int(time.time() * 1000), dict(metrics)))

    @property
    def undelivered(self) -> list[Point]:
        """What the tracker has not taken yet."""
        return list(self._waiting.copy())

    def close(self, timeout: float = 30.0) -> None:
        """Send what is queued; give up after `timeout` seconds."""
        self._closing.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.warning("MLflow at %s did not take the last points in time", self._ref.uri)

    def _run(self) -> None:
        client: MlflowClient | None = None
        monitor: Any = None
        logged: dict[str, int] = {}
        is_open, is_warned, retry_at = True, False, 0.0
        while is_open or self._waiting:
            is_open = not self._closing.wait(FLUSH_SECONDS)
            if time.monotonic() < retry_at and is_open:
                continue
            try:
                if client is None:
                    client = connect(self._ref.uri)
                    monitor = _start_monitor(self._ref, self._interval)
                _send(client, self._ref.run_id, self._waiting, logged)
                is_warned = False
            except Exception as error:  # noqa: BLE001  no tracker's failure may stop training
                if not is_warned:
                    log.warning(
                        "MLflow at %s does not answer (%s); points wait", self._ref.uri, error
                    )
                is_warned, retry_at = True, time.monotonic() + RETRY_SECONDS
                if not is_open:
                    log.warning("%d metric points could not be delivered", len(self._waiting))
                    break
        if monitor is not None:
            with contextlib.suppress(Exception):
                monitor.finish()


def _send(
    client: "MlflowClient",
    run_id: str,
    waiting: deque[Point],
    logged: dict[str, int],
) -> None:
    """Send `waiting` in order; `logged` holds the last step of a metric before this attempt."""
    from mlflow.entities import Metric

    while waiting:
        points = [waiting[i] for i in range(min(len(waiting), 20))]
        for name in {name for _, _, metrics in points for name in metrics} - logged.keys():
            history = client.get_metric_history(run_id, metric_name(name))
            logged[name] = max((point.step for point in history), default=-1)
        entries = [
            Metric(metric_name(name), value, timestamp, step)
            for step, timestamp, metrics in points
            for name, value in metrics.items()
            if step > logged[name]
        ]
        if entries:
            client.log_batch(run_id, metrics=entries)
        for point in points:
            if waiting[0] is point:  # or else the oldest fell out meanwhile, to make room
                waiting.popleft()


def metric_name(name: str) -> str:
    """`name` with what MLflow refuses in metric names replaced (a label column may hold it)."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _start_monitor(ref: RunRef, interval: int) -> Any:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    monitor = SystemMetricsMonitor(
        ref.run_id, sampling_interval=interval, resume_logging=True, tracking_uri=ref.uri
    )
    monitor.start()
    return monitor


def _experiment(client: "MlflowClient", uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    location = None
    if uri.startswith("sqlite:///"):
        # Beside the database; MLflow's default is the current folder of whoever comes first.
        location = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
    return client.create_experiment(name, artifact_location=location)


def connect(uri: str) -> "MlflowClient":
    """A client of the tracker at `uri`; it has asked nothing yet."""
    # A dead server must cost seconds, not MLflow's default of minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # What is said of a run's end is the command's to say.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow  # seconds to import; not needed to plan or to show help

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.store.db"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return mlflow.MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def _tolerant(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001  no tracker's failure may fail a finished training
        log.warning("MLflow: could not %s: %s", what, error)
