"""`gammaray report`: one HTML file on a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.cli.tracked import is_folder, run_of_folder, tracker_of
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.tracking.tracker import RunRef


def report(
    context: typer.Context,
    run: Annotated[
        str, typer.Argument(help="Folder or URL of a run; name or id of an MLflow run.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
) -> None:
    """Write one HTML file on a run: did it work, what next, curves, speed, events, data, cases.

    All comes from the run's tracker: a folder's own, else MLFLOW_TRACKING_URI, else runs/mlflow.db.
    A run makes the same file at its end and keeps it in MLflow, as report.html.
    """
    from pipeline.report.page import write_report

    console: Console = context.obj
    with console.status(f"Reading {run} ..."):
        write_report(run_of_folder(run) if is_folder(run) else _named(run), out)
    console.print(f"Wrote {out}: open it in a browser.", markup=False, soft_wrap=True)


def _named(name: str) -> "RunRef":
    from pipeline.tracking.search import get_runs

    found = get_runs(tracker_of(), name)
    if len(found) > 1:
        ids = ", ".join(run.ref.run_id for run in found)
        raise UserError(f"{name}: {len(found)} runs have that name; give the id of one: {ids}")
    return found[0].ref
