"""Runs that a tracker holds, as plain records, for whoever reads them.

Enters: a tracker's URI, names, a filter in MLflow's own words. Leaves: `Tracked`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline.errors import UserError
from pipeline.tracking.tracker import DATABASES, Input, RunRef, connect, refusals, silence

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.store.entities import PagedList

PAGE = 1000  # runs or experiments that a search gives at once
IDS = 100  # that one search asks for
T = TypeVar("T")


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
    with refusals(uri, "search for runs"):
        client = connect(uri)
        experiments = _pages(
            lambda token: client.search_experiments(max_results=PAGE, page_token=token)
        )
        names = {each.experiment_id: each.name for each in experiments}
        ids = [key for key, name in names.items() if experiment in (None, name)]
        if not ids:
            raise UserError(
                f"--experiment: {uri} has no experiment {experiment!r}; it has "
                f"{sorted(names.values())}"
            )
        order = ["attributes.start_time ASC"]
        found = _pages(
            lambda token: client.search_runs(
                ids, where, max_results=PAGE, order_by=order, page_token=token
            )
        )
        return [_tracked(uri, run, names[run.info.experiment_id]) for run in found]


def _pages(ask: "Callable[[str | None], PagedList[T]]") -> Iterator[T]:
    """All that a search gives; `ask` takes the token of a page, None for the first."""
    token = None
    while True:
        page = ask(token)
        yield from page
        token = page.token
        if not token:
            return


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


def read_runs(refs: Sequence[RunRef]) -> list[Tracked]:
    """The runs that are referred to, in that order. Raises `UserError` when one is not there."""
    asked: dict[str, list[str]] = {}
    for ref in refs:
        asked.setdefault(ref.uri, []).append(ref.run_id)
    found: dict[RunRef, Tracked] = {}
    for uri, ids in asked.items():
        for start in range(0, len(ids), IDS):
            listed = ", ".join(f"'{each}'" for each in ids[start : start + IDS])
            runs = search_runs(uri, where=f"attributes.run_id IN ({listed})")
            found |= {run.ref: run for run in runs}
    for ref in refs:
        if ref not in found:
            raise UserError(
                f"{ref.uri}: has no run {ref.run_id}, it may have been deleted; restore it there, "
                "or leave it out"
            )
    return [found[ref] for ref in refs]


def check_exists(uri: str) -> None:
    """Raise `UserError` unless there is a tracker at `uri`: asking for a file would make it."""
    remedy = (
        "set MLFLOW_TRACKING_URI (sqlite:///FILE or http://HOST:PORT), or give the folders of runs"
    )
    if uri.startswith("sqlite:///"):
        if not Path(uri.removeprefix("sqlite:///")).is_file():
            raise UserError(f"{uri}: no tracker there; {remedy}")
    elif uri.startswith(("http://", "https://")):
        if (why := silence(uri)) is not None:
            raise UserError(f"{uri}: no MLflow server answers ({why}); start it, or {remedy}")
    elif not uri.startswith(DATABASES):
        raise UserError(f"{uri}: is no tracker; {remedy}")


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
