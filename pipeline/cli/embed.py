"""`gammaray embed`: what a run makes of pairs, in bulk."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pipeline.cli.arguments import JsonPath, RunPath, write_json
from pipeline.cli.log import cached_log
from pipeline.cli.screen import Bar, plain

GOES_ON = "The same command goes on with what is missing."


def embed(
    context: typer.Context,
    run: RunPath,
    source: Annotated[
        str, typer.Argument(metavar="IN", help="Folder, file, glob or URL of Parquet.")
    ],
    out: Annotated[
        str,
        typer.Argument(metavar="OUT", help="Folder or URL for Parquet, its name as you like."),
    ],
    checkpoint: Annotated[
        str | None, typer.Option(help="Name of a checkpoint in it; else the newest.")
    ] = None,
    image_column: Annotated[str, typer.Option(help="Column of images.")] = "auto",
    caption_column: Annotated[str, typer.Option(help="Column of captions.")] = "auto",
    workers: Annotated[
        int,
        typer.Option(min=0, help="Processes; 0: one for each GPU there is, else for 4 CPUs each."),
    ] = 0,
    gpu: Annotated[
        bool,
        typer.Option("--gpu", help="Ask for GPUs though none is there yet: the cluster adds them."),
    ] = False,
    json: JsonPath = None,
) -> None:
    """Embed images and captions: for each row of IN a row of OUT, unusable ones with the reason.

    The same command goes on with a job that was stopped.
    """
    console: Console = context.obj
    # Not beside the run: whoever embeds with it may not be allowed to write there.
    log_path = cached_log(console, f"{Path(run).name}-embed")
    console.print(
        f"[bold]gammaray[/] embeds {plain(source)}. What Ray and DeepSpeed print: {log_path}",
        soft_wrap=True,
    )
    from pipeline.data.prepare.on_ray import JobFailed, Keepers, OnRay
    from pipeline.embed.encoder import find_checkpoint
    from pipeline.embed.job import embed as embed_rows
    from pipeline.train.driver import quiet

    began = time.monotonic()
    found = find_checkpoint(run, checkpoint)
    try:
        with (
            quiet(log_path),
            Bar(console, "rows") as bar,
            OnRay(Keepers(count=workers, on_gpu=gpu)) as on_ray,
        ):
            outcome = embed_rows(
                found,
                source,
                out,
                on_ray,
                image_column=image_column,
                caption_column=caption_column,
                listener=bar,
            )
    except JobFailed as error:
        console.print(f"[bold red]failed[/] {plain(str(error))}", soft_wrap=True)
        console.print(f"Details: {log_path}", soft_wrap=True)
        console.print(GOES_ON)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print(f"Interrupted. {GOES_ON}")
        sys.exit(130)
    _print(console, outcome, time.monotonic() - began)
    write_json(json, {"out": outcome.out, "embedded": outcome.embedded, **outcome.facts})


def _print(console: Console, outcome: Any, seconds: float) -> None:
    facts = outcome.facts
    done = (
        f"{outcome.embedded:,} of them in {seconds:.0f} s"
        if outcome.embedded
        else "it was finished already; nothing to do"
    )
    lines = [
        f"{facts['rows']:,} rows in {len(facts['files'])} file(s) at {outcome.out}, of "
        f"{facts['checkpoint']}: {done}."
    ]
    if facts["reasons"]:
        reasons = ", ".join(f"{name} {count:,}" for name, count in facts["reasons"].items())
        lines.append(f"Without an embedding: {reasons}; column 'reason' says which rows.")
    if facts["captions_cut"]:
        lines.append(f"Captions cut to the context length: {facts['captions_cut']:,}.")
    console.print("\n".join(lines), markup=False, soft_wrap=True)
