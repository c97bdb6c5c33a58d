"""`gammaray doctor`: look over this machine, and what a config points to."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipeline.cli.arguments import JsonPath, Overrides, write_json
from pipeline.cli.screen import plain
from pipeline.config.load import load_config


def doctor(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(help="Also check its storage, tracker and data.")
    ] = None,
    overrides: Overrides = None,
    json: JsonPath = None,
) -> None:
    """Look over this machine, and a config's storage and tracker."""
    from pipeline.train.doctor import examine

    console: Console = context.obj
    findings = examine(load_config(config, overrides or ()) if config else None)
    table = Table(show_edge=False)
    for title in ("check", "found", "advice"):
        table.add_column(title)
    for finding in findings:
        mark = "[green]ok[/]" if finding.is_ok else "[yellow]look[/]"
        table.add_row(f"{mark} {finding.name}", plain(finding.found), plain(finding.advice))
    console.print(table)
    write_json(json, [finding.to_json() for finding in findings])
    if not all(finding.is_ok for finding in findings):
        sys.exit(1)
