"""`gammaray sweep`: one config in many variants, and a table of what came of them."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.cli.arguments import ConfigPath, JsonPath, Overrides, write_json
from pipeline.cli.compare import present, sweep_out
from pipeline.cli.runs import log_path_of
from pipeline.cli.screen import Event, plain
from pipeline.config.load import read_values
from pipeline.config.space import read_axes

if TYPE_CHECKING:
    from pipeline.train.sweep import Ended, Sweep

GOES_ON = "The same command goes on with this sweep."


def sweep(
    context: typer.Context,
    config: ConfigPath,
    overrides: Overrides = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,VALUE", help="Vary this; with others, in all combinations."
        ),
    ] = None,
    asha: Annotated[
        str | None,
        typer.Option(metavar="METRIC", help="Stop early, by ASHA, what does worse in this."),
    ] = None,
    json: JsonPath = None,
) -> None:
    """Train a config in many variants, as many at a time as the cluster has room for.

    Each is a run of its own, under one parent in MLflow. The same command goes on with a sweep that
    was stopped: what is finished is not run again. `gammaray compare` of the sweep's folder or name
    gives its table again.
    """
    axes = read_axes(over or ())
    values = read_values(config, overrides or ())
    from pipeline.train.sweep import close_sweep, plan_sweep, run_sweep

    console: Console = context.obj
    with console.status("Planning every run ..."):
        planned = plan_sweep(values, str(config), axes, asha)
    log_path = log_path_of(console, planned.config)
    console.print(
        f"[bold]gammaray[/] sweeps '{planned.name}': {len(planned.trials)} runs. "
        f"What Ray and DeepSpeed print: {log_path}",
        soft_wrap=True,
    )

    def listen(event: Event) -> None:
        before = "warning: " if event["kind"] == "warning" else ""
        console.print(plain(f"{before}{event['text']}"), soft_wrap=True)

    try:
        ended = run_sweep(planned, listen, log_path)
    except KeyboardInterrupt:
        console.print(f"Interrupted. {GOES_ON}")
        sys.exit(130)
    close_sweep(ended)
    write_json(
        json,
        {
            "name": planned.name,
            "runs": [run.run_id for run in ended.runs],
            "failures": dict(ended.failures),
            "mlflow_uri": ended.run.uri,
            "mlflow_run_id": ended.run.run_id,
        },
    )
    _present(console, planned, ended)
    for name, why in ended.failures.items():
        console.print(f"[bold red]failed[/] {plain(f'{name}: {why}')}", soft_wrap=True)
    if ended.failures:
        console.print(GOES_ON)
        sys.exit(1)


def _present(console: Console, planned: "Sweep", ended: "Ended") -> None:
    from pipeline.compare.find import find_runs
    from pipeline.compare.record import record_in

    if not ended.runs:
        return
    found = find_runs(ended.run.uri, folders=ended.runs)
    out = sweep_out(planned.folder.url)
    present(console, found, (), out, lambda _, files: record_in(ended.run, files))
