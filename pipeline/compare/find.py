"""The runs that are meant by folders, names, an experiment or a filter, and their metric points.

Enters: what was typed, and where the tracker is. Leaves: `Tracked`, `Course`.
"""

from collections.abc import Mapping, Sequence

from pipeline.compare.curves import Course
from pipeline.compare.measure import needed
from pipeline.errors import UserError
from pipeline.tracking.search import Tracked, get_runs, read_runs, search_runs
from pipeline.tracking.tracker import RunRef, read_history

SWEEP = "gammaray.sweep"  # tag of a sweep's own run, whose children are its runs
COMPARED = "gammaray.compared"  # tag of a comparison's own run: the ids of what it compared


def find_runs(
    uri: str,
    *,
    folders: Sequence[RunRef] = (),
    names: Sequence[str] = (),
    experiment: str | None = None,
    where: str | None = None,
) -> list[Tracked]:
    """The runs in the order in which they are named, then those that are searched for, each once.

    `folders` are runs that say where their tracker is; all else is asked of `uri`. A sweep that is
    named stands for its runs. A comparison's own run is none. Raises `UserError` when there is no
    run, or nothing was asked for.
    """
    if not (folders or names or experiment or where):
        raise UserError(
            "nothing to compare; give runs (folders, names or ids), --experiment NAME, or "
            "--where FILTER"
        )
    named = read_runs(folders)
    named += [run for name in names for run in get_runs(uri, name)]
    found = [each for run in named for each in _runs_of(run)]
    if experiment is not None or where is not None:
        found += search_runs(uri, experiment, where or "")
    runs = {run.ref.run_id: run for run in found if not run.tags.keys() & {COMPARED, SWEEP}}
    if not runs and experiment is None and where is None:
        raise UserError(
            f"{', '.join(run.name for run in named)}: a sweep of which no run has begun, or a "
            "comparison; name runs"
        )
    if not runs:
        raise UserError(
            f"--where: no run of {uri} passes {where!r}; the filter is MLflow's, such as "
            "\"params.`loss.kind` = 'gamma' and metrics.`eval/rows` > 0\""
            if where is not None
            else f"--experiment: {experiment!r} of {uri} has no runs; name another"
        )
    return list(runs.values())


def _runs_of(run: Tracked) -> list[Tracked]:
    """The runs of a sweep, or the run itself."""
    if SWEEP not in run.tags:
        return [run]
    return search_runs(
        run.ref.uri, run.experiment, f"tags.`mlflow.parentRunId` = '{run.ref.run_id}'"
    )


def read_courses(runs: Sequence[Tracked], metrics: Sequence[str]) -> Mapping[str, Course]:
    """How each run went, by its id: the points of `metrics` and of what time is made of."""
    return {run.ref.run_id: _read_course(run, needed(metrics)) for run in runs}


def _read_course(run: Tracked, names: Sequence[str]) -> Course:
    """A metric that the run has not logged is not asked for."""
    logged = read_history(run.ref, [name for name in names if name in run.metrics])
    return Course(points={name: logged.get(name, []) for name in names})
