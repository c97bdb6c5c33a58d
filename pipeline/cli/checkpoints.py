"""`gammaray checkpoints`: what a run has saved, whether it is whole, and fewer of it."""

import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipeline.cli.arguments import JsonPath, RunPath, write_json
from pipeline.cli.runs import find_run
from pipeline.cli.screen import plain

if TYPE_CHECKING:
    from pipeline.train.inventory import Entry
    from pipeline.train.store import RunFolder


def checkpoints(
    context: typer.Context,
    run: RunPath,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file, and compare its SHA-256.")
    ] = False,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Remove all but so many of the newest whole ones.")
    ] = None,
    json: JsonPath = None,
) -> None:
    """List a run's checkpoints; verify them; remove old ones. Exit status 1: one is damaged."""
    from pipeline.train.inventory import list_checkpoints

    console: Console = context.obj
    folder, _ = find_run(run)
    entries = list_checkpoints(folder)
    if verify:
        entries = [_verified(console, folder, entry) for entry in entries]
    _print(console, run, entries, verify)
    removed = [] if keep is None else _prune(console, folder, entries, keep)
    facts = [entry.to_json() for entry in entries if entry.name not in removed]
    write_json(json, {"run": run, "verified": verify, "checkpoints": facts, "removed": removed})
    if any(entry.damage for entry in entries):
        sys.exit(1)


def _verified(console: Console, folder: "RunFolder", entry: "Entry") -> "Entry":
    from pipeline.train.publish import Damaged
    from pipeline.train.publish import verify as verify_files

    if not entry.is_whole:
        return entry
    with console.status(f"Reading {entry.name} ({entry.size / 1e6:,.1f} MB) ..."):
        try:
            verify_files(folder, entry.name)
        except Damaged as damage:
            return replace(entry, damage=str(damage))
    return entry


def _print(console: Console, run: str, entries: "list[Entry]", is_verified: bool) -> None:
    if not entries:
        console.print(f"{run} has no checkpoint yet.", soft_wrap=True)
        return
    console.print(f"Checkpoints of {run}", soft_wrap=True)
    table = Table(show_edge=False)
    table.add_column("name")
    for title in ("samples", "age", "size", "files"):
        table.add_column(title, justify="right")
    table.add_column("state")
    whole = "whole: every hash is right" if is_verified else "whole"
    for entry in entries:
        table.add_row(
            entry.name,
            "" if entry.samples is None else f"{entry.samples:,}",
            "" if entry.saved_at is None else age(time.time() - entry.saved_at),
            f"{entry.size / 1e6:,.1f} MB",
            f"{entry.files:,}",
            whole if entry.is_whole else "damaged" if entry.is_published else "not published",
        )
    console.print(table)
    for entry in entries:
        if entry.damage is not None:
            console.print(f"[red]damaged[/] {plain(entry.damage)}", soft_wrap=True)


def _prune(console: Console, folder: "RunFolder", entries: "list[Entry]", keep: int) -> list[str]:
    """Remove old checkpoints while no driver can begin; a damaged one counts for nothing."""
    from pipeline.train.lease import leased
    from pipeline.train.publish import prune

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    with leased(folder, say, "leave it to the training, which keeps train.keep"):
        removed = prune(folder, keep, [entry.name for entry in entries if entry.is_whole])
    freed = sum(entry.size for entry in entries if entry.name in removed)
    say(f"Removed {', '.join(removed)} ({freed / 1e6:,.1f} MB)." if removed else "None removed.")
    return removed


def age(seconds: float) -> str:
    """A time span in its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
