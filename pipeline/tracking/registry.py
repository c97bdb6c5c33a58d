"""A folder with a model as a version in MLflow's registry, tied to the run that trained it.

Enters: a run, a folder, a name. Leaves: a logged model with the run's evaluations, and a `Version`.
Must not know: what is in the folder.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.tracking.search import check_exists
from pipeline.tracking.tracker import RunRef, connect, refusals

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric

EVALUATIONS = ("eval/", "suite/")  # how the names of what a run measured begin
COMMIT = "mlflow.source.git.commit"
MODEL_TYPE = "gammaray"
UPLOAD_SECONDS = "3600"  # a server that takes gigabytes answers when it has stored them


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """A version of a registered model, and the logged model that it is; `metrics` it has."""

    name: str
    version: str
    model_id: str
    metrics: int


def check_name(ref: RunRef, name: str) -> None:
    """Raise `UserError` unless a model of that name can be registered where the run is."""
    if not name.strip() or any(sign in name for sign in "/:.%\"'"):
        raise UserError(
            f"--register: {name!r} is no name of a model; give one without / : . % and quotes"
        )
    check_exists(ref.uri)
    with refusals(ref.uri, f"give run {ref.run_id}"):
        connect(ref.uri).get_run(ref.run_id)


def register(
    ref: RunRef, folder: Path, name: str, *, samples: int, tags: Mapping[str, str]
) -> Version:
    """Register `folder`, which was made of the run's checkpoint at so many samples, as `name`.

    Its files become the logged model's, with what the run measured at these samples, by values and
    times that it has. Raises `UserError` when the tracker refuses; what was begun is marked FAILED.
    """
    with refusals(ref.uri, f"register {folder} as {name}"):
        client = connect(ref.uri)
        run = client.get_run(ref.run_id)
        if (commit := run.data.tags.get(COMMIT)) is not None:
            tags = {**tags, "gammaray.commit": commit}
        model = client.create_logged_model(
            run.info.experiment_id,
            name=name,
            source_run_id=ref.run_id,
            tags=dict(tags),
            model_type=MODEL_TYPE,
        )
        try:
            with _patience():
                client.log_model_artifacts(model.model_id, str(folder))
            measured = list(_measured(client, ref, samples, model.model_id, run.data.metrics))
            for start in range(0, len(measured), 1000):  # MLflow's most
                client.log_batch(ref.run_id, metrics=measured[start : start + 1000])
        except BaseException:
            client.finalize_logged_model(model.model_id, "FAILED")
            raise
        client.finalize_logged_model(model.model_id, "READY")
        version = _add_version(client, ref, name, model, tags)
    return Version(name=name, version=version, model_id=model.model_id, metrics=len(measured))


def _add_version(
    client: "MlflowClient", ref: RunRef, name: str, model: "LoggedModel", tags: Mapping[str, str]
) -> str:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # Not as models:/ID: MLflow would look for that in the tracker of its environment.
    made = client.create_model_version(
        name,
        model.artifact_location,
        ref.run_id,
        {**tags, "gammaray.logged_model": model.model_id},
        model_id=model.model_id,
    )
    # The other way round, as MLflow itself says it.
    versions = json.dumps([{"name": name, "version": made.version}])
    client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: versions})
    return str(made.version)


def _measured(
    client: "MlflowClient", ref: RunRef, samples: int, model_id: str, names: Mapping[str, float]
) -> "Iterator[Metric]":
    """The evaluations at so many samples: the run's own points, so that it gets none anew."""
    from mlflow.entities import Metric

    for name in sorted(name for name in names if name.startswith(EVALUATIONS)):
        points = [each for each in client.get_metric_history(ref.run_id, name)
                  if each.step == samples]  # fmt: skip
        if points:
            last = max(points, key=lambda point: point.timestamp)
            yield Metric(
                name, last.value, last.timestamp, samples, model_id=model_id, run_id=ref.run_id
            )


@contextmanager
def _patience() -> Iterator[None]:
    before = os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]  # as `connect` has set it
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = UPLOAD_SECONDS
    try:
        yield
    finally:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = before
