"""Runs that a tracker holds, as plain records, for whoever reads them.

Enters: a tracker's URI, names, a filter in MLflow's own words. Leaves: `Tracked`.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.tracking.tracker import Input, RunRef, check_reachable, connect

if TYPE_CHECKING:
    from mlflow.entities import Run

PAGE = 1000  # runs that a search gives at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracked:
    """A run as the tracker has it; `metrics` are the last values, times in ms since 1970."""

    ref: RunRef
    experiment: str
    name: str
    status: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    began: int | None = None
    ended: int | None = None
    inputs: tuple[Input, ...] = ()


def search_runs(uri: str, experiment: str | None = None, where: str = "") -> list[Tracked]:
    """All runs of an experiment, or of all, that MLflow's filter `where` lets pass; oldest first.

    Raises `UserError` when there is no such tracker or experiment, or the filter is refused.
    """
    check_exists(uri)
    client = connect(uri)
    with _refusals(uri):
        names = {each.experiment_id: each.name for each in client.search_experiments()}
        ids = [key for key, name in names.items() if experiment in (None, name)]
    if not ids:
        raise UserError(
            f"--experiment: {uri} has no experiment {experiment!r}; it has {sorted(names.values())}"
        )
    found: list[Tracked] = []
    token: str | None = None
    with _refusals(uri):
        while True:
            page = client.search_runs(
                ids,
                where,
                max_results=PAGE,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            found += [_tracked(uri, run, names[run.info.experiment_id]) for run in page]
            token = page.token
            if not token:
                return found


def get_runs(uri: str, name: str) -> list[Tracked]:
    """The run of that id, or all of that name. Raises `UserError` when there is none."""
    with_name = search_runs(uri, where=f"attributes.run_name = '{name}'")
    found = with_name or search_runs(uri, where=f"attributes.run_id = '{name}'")
    if not found:
        raise UserError(
            f"{name}: {uri} has no run of that name or id; give the folder of a run, such as "
            "runs/demo, or set MLFLOW_TRACKING_URI to the tracker that has it"
        )
    return found


def check_exists(uri: str) -> None:
    """Raise `UserError` unless there is a tracker at `uri`: asking for a file would make it."""
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise UserError(
            f"{uri}: no tracker there; set MLFLOW_TRACKING_URI (sqlite:///FILE or "
            "http://HOST:PORT), or give the folders of runs"
        )
    check_reachable(uri)


def _tracked(uri: str, run: object, experiment: str) -> Tracked:
    from mlflow.entities import Run

    assert isinstance(run, Run)
    return Tracked(
        ref=RunRef(uri=uri, run_id=run.info.run_id),
        experiment=experiment,
        name=run.info.run_name or run.info.run_id,
        status=run.info.status,
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        metrics=dict(run.data.metrics),
        began=run.info.start_time,
        ended=run.info.end_time,
        inputs=tuple(_inputs(run)),
    )


def _inputs(run: "Run") -> Iterator[Input]:
    """The data sets that our own runs say they read; what others say has other forms."""
    for each in run.inputs.dataset_inputs if run.inputs else ():
        roles = {tag.key: tag.value for tag in each.tags}
        with suppress(ValueError, KeyError, TypeError):
            role = roles["mlflow.data.context"]
            if role in ("training", "evaluation"):
                yield Input(
                    role=role,
                    source=json.loads(each.dataset.source)["uri"],
                    digest=each.dataset.digest,
                    rows=int(json.loads(each.dataset.profile or "")["num_rows"]),
                )


@contextmanager
def _refusals(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        said = " ".join(str(error).split())[:500]
        raise UserError(f"{uri}: MLflow refuses the search: {said}") from error
