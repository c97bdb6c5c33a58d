"""`gammaray data`: make data, and look at it."""

import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipeline.cli.arguments import JsonPath, write_json
from pipeline.cli.screen import Bar, plain
from pipeline.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Make and look at data.")


@app.command()
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    rows: Annotated[int, typer.Option(help="Training pairs.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Another seed, other scenes.")] = 0,
    private: Annotated[
        bool,
        typer.Option(
            "--private",
            help="A texture that only the picture shows, an owner that only the caption names.",
        ),
    ] = False,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="Instead of captions: vqa (questions and answers), statements (true or false), "
            "pairs (statements about two pictures), entailment, or boxes (statements about boxes "
            "of shapes, like NLVR's). Or descriptions: captions that tell more.",
        ),
    ] = None,
) -> None:
    """Make a procedural image-text set: scenes of coloured shapes with captions, or a task."""
    from pipeline.data.demo import write_demo
    from pipeline.data.questions import TASKS

    console: Console = context.obj
    if task is not None and task not in TASKS:
        raise UserError(
            f"--task is {task}; there is {', '.join(TASKS)}: choose one or leave it out"
        )
    try:
        with console.status(f"Drawing {rows:,} scenes ...") as status:
            summary = write_demo(
                out,
                rows,
                seed,
                lambda done, total: status.update(f"Drew {done:,} of {total:,} rows ..."),
                private=private,
                task=TASKS[task] if task else None,
            )
    except ValueError as error:
        raise UserError(str(error)) from error
    except BrokenProcessPool as error:
        raise UserError(
            f"{out}: a process that drew rows was killed (by the system, if memory ran out); "
            "nothing is left of the set: run the command again"
        ) from error
    splits = ", ".join(f"{name} {count:,}" for name, count in summary.rows.items())
    done = f"made in {summary.seconds:.0f} s" if summary.created else "already there"
    console.print(f"Demo data in {out}: {splits} ({summary.bytes / 1e6:.0f} MB), {done}.")


@app.command("prepare")
def prepare_data(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(metavar="IN", help="Folder, file, glob or URL: Parquet, tar, CSV, JSON."),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of the shards.")],
    short_side: Annotated[
        int, typer.Option(min=16, help="Larger pictures are shrunk to this many pixels.")
    ] = 288,
    images: Annotated[
        str, typer.Option(help="Folder of a table's image paths; else the table's own.")
    ] = "",
    image_column: Annotated[
        str, typer.Option(help="Column (or ending in tars) of images.")
    ] = "auto",
    caption_column: Annotated[str, typer.Option(help="Column of captions.")] = "auto",
    seed: Annotated[int, typer.Option(help="Another seed, another order.")] = 0,
) -> None:
    """Turn pairs of any form into shuffled Parquet shards of small pictures.

    So too questions (VQA), statements (NLVR2) and hypotheses (SNLI-VE) about pictures. The same
    command goes on with a job that was stopped.
    """
    from pipeline.data.prepare.job import Options, prepare
    from pipeline.data.prepare.on_ray import JobFailed, OnRay

    console: Console = context.obj
    options = Options(
        short_side=short_side,
        seed=seed,
        image_column=image_column,
        caption_column=caption_column,
        images=images,
    )
    try:
        with Bar(console) as bar, OnRay() as run:
            outcome = prepare(source, out, options, run, bar)
    except JobFailed as error:
        console.print(f"[bold red]failed[/] {plain(str(error))}")
        console.print("The same command goes on with what is missing.")
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on with what is missing.")
        sys.exit(130)
    _print_prepared(console, outcome)


def _print_prepared(console: Console, outcome: Any) -> None:
    stats = outcome.stats
    done = "" if outcome.created else " It was finished already; nothing to do."
    lines = [
        f"{stats['rows_out']:,} of {stats['rows_in']:,} rows in {len(stats['shards'])} shard(s) at "
        f"{outcome.out} ({stats['image_bytes'] / 1e6:,.1f} MB of images).{done}",
        f"Images kept as they were: {stats['images_kept']:,}; shrunk or encoded anew: "
        f"{stats['images_encoded']:,}.",
        f"Content hash {stats['content_hash']}",
    ]
    if stats["dropped"]:
        reasons = ", ".join(f"{name} {count:,}" for name, count in stats["dropped"].items())
        lines.insert(1, f"Dropped: {reasons}; {outcome.out}/{stats['quarantine']} lists them.")
    if stats["further_images_left_out"]:
        lines.insert(2, "Rows had several images; the first of each was taken, "
                        f"{stats['further_images_left_out']:,} left out.")  # fmt: skip
    if "labels" in stats:
        labels = ", ".join(f"{name} {count:,}" for name, count in stats["labels"].items())
        lines.append(f"Labels: {labels}")
    if stats["source"].get("task", "captions") == "captions":
        lines.append(f"Next: gammaray train CONFIG data.train={outcome.out}")
    console.print("\n".join(lines), markup=False, soft_wrap=True)


@app.command()
def inspect(
    context: typer.Context,
    path: Annotated[str, typer.Argument(help="Folder, file, glob or URL of Parquet.")],
    image_column: Annotated[str, typer.Option(help="Column of images.")] = "auto",
    caption_column: Annotated[str, typer.Option(help="Column of captions.")] = "auto",
    split: Annotated[str, typer.Option(help="Value of a column `split`, or all.")] = "all",
    sheet: Annotated[
        Path | None, typer.Option(help="Draw a contact sheet of pairs to this PNG.")
    ] = None,
    json: JsonPath = None,
) -> None:
    """Look at a data set before training: columns, row groups, a sample of its rows."""
    from pipeline.data.inspect import draw_sheet
    from pipeline.data.inspect import inspect as look
    from pipeline.data.layout import read_catalog

    console: Console = context.obj
    catalog = read_catalog(path, "PATH", image_column, caption_column, split=split)
    with console.status("Reading a sample ..."):
        found = look(catalog)
    _print_inspection(console, found)
    if sheet is not None:
        draw_sheet(found, sheet)
        console.print(f"Contact sheet: {sheet}", soft_wrap=True)
    write_json(json, found.to_json())


def _print_inspection(console: Console, found: Any) -> None:
    console.print(plain(found.catalog.describe() + "."), soft_wrap=True)
    schema = ", ".join(
        f"{column.name}: {column.type}" for column in found.catalog.sources[0].schema
    )
    console.print(plain(f"Columns: {schema}"), soft_wrap=True)
    table = Table(title=f"A sample of {found.rows_read:,} rows", title_justify="left",
                  show_edge=False)  # fmt: skip
    table.add_column("measure")
    for title in ("least", "median", "95 %", "most"):
        table.add_column(title, justify="right")
    for name, values in found.quantiles().items():
        table.add_row(
            name, *(f"{value:,.0f}" if value >= 10 else f"{value:.3g}" for value in values)
        )
    console.print(table)
    console.print(
        f"Different captions: {len(found.captions):,} of {found.captions.total():,} (sampled)"
    )
    if found.labels:
        labels = ", ".join(f"{name} ({count} values)" for name, count in found.labels.items())
        console.print(plain(f"Perhaps labels, for evaluate.zero_shot: {labels}"), soft_wrap=True)
    formats = ", ".join(f"{name} {count}" for name, count in found.formats.most_common())
    console.print(f"Formats: {formats or 'no image could be decoded'}")
    bad = ", ".join(f"{reason} {count}" for reason, count in found.bad.most_common())
    console.print(f"Unusable rows: {bad or 'none'}")
    for row, reason in found.named:
        console.print(plain(f"  {row}  {reason}"), soft_wrap=True)
    for sentence in found.advice():
        console.print(f"[yellow]look[/] {plain(sentence)}", soft_wrap=True)
