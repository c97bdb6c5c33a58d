"""`gammaray compare`: what runs have in common, where they differ, and what came of it."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipeline.cli.screen import plain
from pipeline.cli.tracked import is_folder, run_of_folder, tracker_of
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.compare.measure import Comparison
    from pipeline.tracking.search import Tracked
    from pipeline.tracking.tracker import RunRef


def compare(
    context: typer.Context,
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN", help="Folders of runs or sweeps; names or ids of MLflow runs."
        ),
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(help="All runs of this MLflow experiment.")
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            metavar="FILTER", help="Of these, or of all, those that MLflow's filter passes."
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Compare this, not what all runs share. Repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the files; without it SWEEP/comparison for a sweep's folder, "
            "else runs/comparison."
        ),
    ] = None,
) -> None:
    """Compare runs: configs, metrics over seeds, learning curves, quality against cost.

    The tracker is that of the folders, else MLFLOW_TRACKING_URI, else runs/mlflow.db.
    """
    from pipeline.compare.find import find_runs
    from pipeline.compare.record import record

    console: Console = context.obj
    folders = [_run_of_folder(run) for run in runs or () if is_folder(run)]
    names = [run for run in runs or () if not is_folder(run)]
    uri = tracker_of(folders)
    with console.status("Reading the runs ..."):
        found = find_runs(uri, folders=folders, names=names, experiment=experiment, where=where)
    if out is None:
        out = _default_out(() if experiment or where else runs or ())
    present(console, found, metric or (), out, record)


def _default_out(runs: Sequence[str]) -> Path:
    from pipeline.train.sweep_record import open_sweep

    is_sweep = len(runs) == 1 and is_folder(runs[0]) and open_sweep(runs[0]) is not None
    return sweep_out(runs[0]) if is_sweep else Path("runs/comparison")


def sweep_out(folder: str) -> Path:
    """Where a sweep's comparison goes: into its folder, or into runs/NAME for one elsewhere."""
    url = folder.rstrip("/")
    home = Path("runs", url.rpartition("/")[2]) if "://" in url else Path(url)
    return home / "comparison"


def _run_of_folder(folder: str) -> "RunRef":
    """Of a run, or of a sweep, which stands for its runs."""
    from pipeline.train.sweep_record import open_sweep

    sweep = open_sweep(folder)
    return run_of_folder(folder) if sweep is None else sweep.run


def present(
    console: Console,
    found: "Sequence[Tracked]",
    metric: Sequence[str],
    out: Path,
    keep: "Callable[[Comparison, Path], RunRef]",
) -> None:
    """Compare runs: print the tables, write the files to `out`, `keep` them in MLflow."""
    from pipeline.compare.figures import draw_curves, draw_pareto
    from pipeline.compare.find import read_courses
    from pipeline.compare.group import group_runs
    from pipeline.compare.measure import choose_metrics
    from pipeline.compare.measure import compare as compare_groups
    from pipeline.compare.write import say_drawn, write_files

    with console.status("Reading the metrics ..."):
        groups = group_runs(found)
        metrics = choose_metrics(groups, metric)
        comparison = compare_groups(groups, metrics, read_courses(found, metrics))
    _print(console, comparison)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pictures = {"curves.png": draw_curves, "pareto.png": draw_pareto}
        figures = [name for name, draw in pictures.items() if draw(comparison, folder / name)]
        write_files(comparison, figures, folder)
        try:
            out.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                shutil.copyfile(path, out / path.name)
        except OSError as error:
            raise UserError(
                f"{out}: cannot be written ({error}); give gammaray compare another --out"
            ) from error
        files = ", ".join(sorted(path.name for path in folder.iterdir()))
        console.print(f"{files} are in {out}", markup=False, soft_wrap=True)
        if figures and (drawn := say_drawn(comparison)):
            console.print(drawn, markup=False, soft_wrap=True)
        _record(console, comparison, folder, keep)


def _print(console: Console, comparison: "Comparison") -> None:
    from pipeline.compare.write import RESULTS, config_table, headed, result_rows, say_time

    count = sum(len(each.members) for each in comparison.groups)
    console.print(f"{count} run(s) of {len(comparison.groups)} config(s), seeds apart:")
    for each in comparison.groups:
        names = ", ".join(
            member.run.name + ("" if member.why_not is None else f" ({member.why_not})")
            for member in each.members
        )
        cost = "" if each.cost is None else f" Cost: {say_time(each.cost, 'worker-')}."
        console.print(f"  {each.group.title}: {names}.{cost}", markup=False, soft_wrap=True)
    if comparison.differs:
        _show(console, None, *config_table(comparison))
    for metric in comparison.metrics:
        _show(console, headed(comparison, metric), RESULTS, result_rows(comparison, metric))
    for warning in comparison.warnings:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)


def _show(
    console: Console, title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    table = Table(title=title, title_justify="left", show_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(plain, row))
    console.print(table)
    console.print()


def _record(
    console: Console,
    comparison: "Comparison",
    folder: Path,
    keep: "Callable[[Comparison, Path], RunRef]",
) -> None:
    try:
        run = keep(comparison, folder)
    except UserError as error:
        console.print(f"warning: not kept in MLflow: {plain(str(error))}", soft_wrap=True)
        return
    console.print(
        f"MLflow run {run.run_id} in {run.uri} has them too.", markup=False, soft_wrap=True
    )
