"""The `gammaray` command: its subcommands, and how it ends.

Exit status: 0 done, 1 the run failed, 2 something the user can mend before the first step, 130
interrupted. A command imports what it needs when it runs: Ray and PyTorch take seconds.
"""

import os
import sys

import typer
from rich.console import Console

from pipeline.cli import (
    checkpoints,
    compare,
    data,
    doctor,
    embed,
    export,
    jobs,
    report,
    runs,
    sweep,
)
from pipeline.cli.screen import plain
from pipeline.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(runs.plan)
app.command()(runs.train)
app.command()(runs.finetune)
app.command()(sweep.sweep)
app.command()(runs.evaluate)
app.command()(checkpoints.checkpoints)
app.command()(compare.compare)
app.command()(report.report)
app.command()(export.export)
app.command()(embed.embed)
app.command()(jobs.submit)
app.command()(jobs.jobs)
app.command()(jobs.status)
app.command()(jobs.logs)
app.command()(jobs.stop)
app.add_typer(data.app, name="data")
app.command()(doctor.doctor)


def main() -> None:
    """Run the command; errors a user can mend become one message and exit status 2."""
    # The process's own descriptor of the terminal: training sends 1 and 2 to a log file.
    console = Console(file=os.fdopen(os.dup(1), "w"), highlight=False)
    try:
        app(obj=console, standalone_mode=True)
    except UserError as error:
        console.print(f"[bold red]error[/] {plain(str(error))}", soft_wrap=True)
        sys.exit(2)
