"""The `gammaray` command: plan, train, evaluate, data demo, doctor.

Exit status: 0 done, 1 the run failed, 2 something the user can mend before the first step.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pipeline.config.load import dump, load_config, parse_config
from pipeline.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, help="Make and look at data.")
app.add_typer(data_app, name="data")

ConfigPath = Annotated[Path, typer.Argument(help="The run's YAML.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to it: section.key=value ...")]
GOES_ON = "The same command goes on with this run."
JsonPath = Annotated[Path | None, typer.Option("--json", help="Also write the facts here.")]


def main() -> None:
    """Run the command; errors a user can mend become one message and exit status 2."""
    # The process's own descriptor of the terminal: training sends 1 and 2 to a log file.
    console = Console(file=os.fdopen(os.dup(1), "w"), highlight=False)
    try:
        app(obj=console, standalone_mode=True)
    except UserError as error:
        console.print(f"[bold red]error[/] {_plain(str(error))}")
        sys.exit(2)


def _plain(text: str) -> str:
    """Text with brackets that rich must not read as markup."""
    return text.replace("[", r"\[")


def _write_json(path: Path | None, facts: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


@app.command()
def plan(
    context: typer.Context, config: ConfigPath, overrides: Overrides = None, json: JsonPath = None
) -> None:
    """Check a config and say what would happen; needs no cluster."""
    from pipeline.train.preflight import prepare

    console: Console = context.obj
    prepared = prepare(load_config(config, overrides or ()))
    console.print(dump(prepared.config), markup=False)
    _print_plan(console, prepared)
    _write_json(
        json,
        {"config": prepared.config.model_dump(mode="json"), "plan": prepared.plan.to_json()},
    )


def _print_plan(console: Console, prepared: Any) -> None:
    console.print(_plain(prepared.catalog.describe() + "."))
    for sentence in prepared.plan.sentences():
        console.print(_plain(sentence))


@app.command()
def train(
    context: typer.Context, config: ConfigPath, overrides: Overrides = None, json: JsonPath = None
) -> None:
    """Train; the same command goes on with a run that was stopped."""
    console: Console = context.obj
    run = load_config(config, overrides or ())
    run_training(run, console, json)


def run_training(config: Any, console: Console, json_path: Path | None = None) -> None:
    """Train `config` with progress on `console`; exits with 1 when the run fails."""
    log_path = _log_path(config)
    console.print(
        f"[bold]gammaray[/] trains '{config.name}'. What Ray and DeepSpeed print: {log_path}",
        soft_wrap=True,
    )
    from pipeline.train import driver

    with _Screen(console) as screen:
        try:
            outcome = driver.train(config, screen.show, log_path)
        except driver.RunFailed as error:
            screen.stop()
            console.print(f"[bold red]failed[/] {_plain(str(error))}")
            console.print(f"Details: {log_path}", soft_wrap=True)
            if error.can_go_on:
                console.print(GOES_ON)
            sys.exit(1)
        except KeyboardInterrupt:
            screen.stop()
            console.print(f"Interrupted. {GOES_ON}")
            sys.exit(130)
    _print_outcome(console, outcome)
    facts = {
        "name": outcome.name,
        "folder": outcome.folder,
        "metrics": outcome.metrics,
        "samples_per_s": outcome.samples_per_s,
        "seconds": outcome.seconds,
        "mlflow_uri": outcome.mlflow.uri,
        "mlflow_run_id": outcome.mlflow.run_id,
        "bad_rows": outcome.bad_rows,
    }
    _write_json(json_path, facts)


def _log_path(config: Any) -> Path:
    storage = config.cluster.storage
    root = Path(storage) if "://" not in storage else Path.home() / ".cache" / "gammaray"
    return root / "logs" / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}.log"


class _Screen:
    """One live line on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console):
        self._console = console
        self._is_live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: Any = None
        self._plan: Any = None
        self._started = time.monotonic()
        self._trained_from = (0.0, 0)
        self._next_line = 0.0

    def __enter__(self) -> "_Screen":
        if self._is_live:
            self._progress.start()
            self._task = self._progress.add_task("starting", total=None, numbers="")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the live line away."""
        if self._is_live:
            self._progress.stop()

    def show(self, event: Any) -> None:
        """Show one event of the driver."""
        handler: Callable[[Any], None] | None = getattr(self, f"_on_{event['kind']}", None)
        if handler is not None:
            handler(event)

    def _say(self, text: str) -> None:
        self._console.print(_plain(text), soft_wrap=True)

    def _describe(self, text: str) -> None:
        if self._is_live:
            self._progress.update(self._task, description=text)

    def _on_phase(self, event: Any) -> None:
        self._describe(event["text"])
        if not self._is_live:
            self._say(f"{event['text']} ...")

    def _on_planned(self, event: Any) -> None:
        prepared = event["prepared"]
        self._plan = prepared.plan
        for sentence in [f"{prepared.catalog.describe()}.", *prepared.plan.sentences()]:
            self._say(sentence)
        if event["resumed"]:
            self._say(f"Run '{event['name']}' is unfinished: going on with it.")
            if prepared.began is not None:
                self._say(
                    f"It began with {prepared.began.workers} worker(s) and a global batch of "
                    f"{prepared.began.global_batch:,}; it goes on with {self._plan.workers} and "
                    f"{self._plan.global_batch:,}. Length and virtual batch stay."
                )
        elif event["name"] != prepared.config.name:
            self._say(f"'{prepared.config.name}' is finished: this run is '{event['name']}'.")

    def _on_started(self, event: Any) -> None:
        self._trained_from = (time.monotonic(), event["samples"])
        self._say(
            f"Training from step {event['step']:,} "
            f"(workers were up after {time.monotonic() - self._started:.0f} s)."
        )
        if self._is_live:
            self._progress.update(
                self._task,
                description="training",
                total=self._plan.samples,
                completed=event["samples"],
            )

    def _on_step(self, event: Any) -> None:
        point = event["metrics"]
        numbers = (
            f"step {event['step']:,}/{self._last_step(event):,}  "
            f"{point['train/samples_per_s']:,.0f} samples/s  "
            f"loss {point.get('train/loss', float('nan')):.3f}  "
            f"data wait {100 * point['train/data_wait_share']:.0f}%"
        )
        if self._is_live:
            self._progress.update(
                self._task,
                description="training",
                completed=event["samples"],
                numbers=numbers,
            )
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + 10
            self._say(f"{numbers}  ETA {self._eta(event['samples'])}")

    def _last_step(self, event: Any) -> int:
        """Not the plan's number when other workers took larger or smaller steps before."""
        left = self._plan.samples - event["samples"]
        return event["step"] + left // self._plan.global_batch

    def _eta(self, samples: int) -> str:
        begun, before = self._trained_from
        rate = (samples - before) / max(time.monotonic() - begun, 1e-9)
        left = round((self._plan.samples - samples) / max(rate, 1e-9))
        return f"{left // 3600:d}:{left // 60 % 60:02d}:{left % 60:02d}"

    def _on_warning(self, event: Any) -> None:
        self._say(f"warning: {event['text']}")

    def _on_evaluating(self, event: Any) -> None:
        self._describe("evaluating")

    def _on_evaluation(self, event: Any) -> None:
        metrics = event["metrics"]
        shown = [
            f"{name} {100 * value:.1f}%"
            for name, value in metrics.items()
            if name.endswith(("/accuracy", "recall_at_1"))
        ]
        where = f"step {event['step']:,}: " if "step" in event else ""
        self._say(f"{where}{', '.join(shown)}")


def _print_outcome(console: Console, outcome: Any) -> None:
    table = Table(title=f"Run '{outcome.name}'", title_justify="left", show_edge=False)
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("chance", justify="right")
    for label, value, chance in headline(outcome.metrics):
        table.add_row(label, f"{100 * value:.1f} %", f"{100 * chance:.2f} %")
    table.add_row("training speed", f"{outcome.samples_per_s:,.0f} samples/s", "")
    if outcome.bad_rows:
        table.add_row("unusable rows", f"{outcome.bad_rows:,}", "")
    console.print()
    console.print(table)
    console.print()
    uri = outcome.mlflow.uri
    look = (
        f"{Path(sys.executable).parent}/mlflow ui --backend-store-uri {uri}"
        if uri.startswith("sqlite")
        else f"open {uri}"
    )
    console.print(
        f"Took {outcome.seconds:.0f} s. Checkpoints: {outcome.folder}\n"
        f"MLflow run {outcome.mlflow.run_id} in {uri}\n"
        "Next:\n"
        f"  look at it      {look}\n"
        f"  evaluate again  gammaray evaluate {outcome.folder}\n"
        "  your own data   gammaray train CONFIG data.train=FOLDER data.val=FOLDER",
        markup=False,
        soft_wrap=True,
    )


def headline(metrics: dict[str, float]) -> list[tuple[str, float, float]]:
    """Give (label, value, chance) rows of the measures a person looks at first."""
    rows = []
    for name, value in metrics.items():
        if name.startswith("zero_shot/") and name.endswith("/accuracy"):
            column = name.split("/")[1]
            rows.append(
                (f"zero-shot accuracy, {column}", value, metrics[f"zero_shot/{column}/chance"])
            )
    for way, label in (("text_to_image", "text to image"), ("image_to_text", "image to text")):
        value = metrics.get(f"retrieval/{way}_recall_at_1")
        if value is not None:
            chance = metrics[f"retrieval/{way}_chance_at_1"]
            rows.append((f"{label} R@1 of {metrics['rows']:,.0f}", value, chance))
    return rows


@app.command()
def evaluate(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="Folder of a run, e.g. runs/demo.")],
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Name of a checkpoint in it; else the newest.")
    ] = None,
    json: JsonPath = None,
) -> None:
    """Measure a checkpoint; overrides change what it is measured on."""
    run_evaluation(run, overrides or [], checkpoint, context.obj, json)


def run_evaluation(
    run: str,
    overrides: list[str],
    checkpoint: str | None,
    console: Console,
    json_path: Path | None = None,
) -> None:
    """Evaluate the run in folder `run`, print a table, write JSON."""
    from pipeline.config.load import override_values
    from pipeline.train import driver
    from pipeline.train.store import RunFolder

    storage, _, name = run.rstrip("/").rpartition("/")
    folder = RunFolder.of(storage or ".", name)
    record = folder.read_record()
    if record is None:
        raise UserError(f"{run}: no run there; give the folder of a run, such as runs/demo")
    config = parse_config(override_values(record.config, overrides), run)
    log_path = _log_path(config)
    with _Screen(console) as screen:
        try:
            metrics = driver.evaluate(folder, config, checkpoint, screen.show, log_path)
        except driver.RunFailed as error:
            screen.stop()
            console.print(f"[bold red]failed[/] {_plain(str(error))}")
            console.print(f"Details: {log_path}", soft_wrap=True)
            sys.exit(1)
    table = Table(title=f"Evaluation of {run}", title_justify="left", show_edge=False)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for label, value in metrics.items():
        table.add_row(label, f"{value:,.4f}")
    console.print(table)
    _write_json(json_path, {"run": run, "metrics": metrics})


@data_app.command()
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    rows: Annotated[int, typer.Option(help="Training pairs.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Another seed, other scenes.")] = 0,
) -> None:
    """Make a procedural image-text set: scenes of coloured shapes with captions."""
    from pipeline.data.demo import write_demo

    console: Console = context.obj
    try:
        with console.status(f"Drawing {rows:,} scenes ..."):
            summary = write_demo(out, rows, seed)
    except ValueError as error:
        raise UserError(str(error)) from error
    splits = ", ".join(f"{name} {count:,}" for name, count in summary.rows.items())
    done = f"made in {summary.seconds:.0f} s" if summary.created else "already there"
    console.print(f"Demo data in {out}: {splits} ({summary.bytes / 1e6:.0f} MB), {done}.")


@data_app.command("prepare")
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

    The same command goes on with a job that was stopped.
    """
    from pipeline.data.prepare.job import Options, prepare
    from pipeline.data.prepare.on_ray import OnRay, PrepareFailed

    console: Console = context.obj
    options = Options(
        short_side=short_side,
        seed=seed,
        image_column=image_column,
        caption_column=caption_column,
        images=images,
    )
    try:
        with _Bar(console) as bar, OnRay() as run:
            outcome = prepare(source, out, options, run, bar)
    except PrepareFailed as error:
        console.print(f"[bold red]failed[/] {_plain(str(error))}")
        console.print("The same command goes on with what is missing.")
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on with what is missing.")
        sys.exit(130)
    _print_prepared(console, outcome)


class _Bar:
    """Work of several kinds, one after the other: a bar on a terminal, lines elsewhere."""

    def __init__(self, console: Console):
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: Any = None
        self._what = ""
        self._next_line = 0.0

    def __enter__(self) -> "_Bar":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(_plain(text), soft_wrap=True)

    def show(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` is done."""
        if what != self._what:
            self._what, self._next_line = what, 0.0
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(what, total=max(1, total))
        self._progress.update(self._task, completed=done)
        if not self._console.is_terminal and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + 10
            self.say(f"{what} {100 * done / max(1, total):.0f}%")


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
    lines.append(f"Next: gammaray train CONFIG data.train={outcome.out}")
    console.print("\n".join(lines), markup=False, soft_wrap=True)


@data_app.command()
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
    _write_json(json, found.to_json())


def _print_inspection(console: Console, found: Any) -> None:
    console.print(_plain(found.catalog.describe() + "."), soft_wrap=True)
    schema = ", ".join(
        f"{column.name}: {column.type}" for column in found.catalog.sources[0].schema
    )
    console.print(_plain(f"Columns: {schema}"), soft_wrap=True)
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
    formats = ", ".join(f"{name} {count}" for name, count in found.formats.most_common())
    console.print(f"Formats: {formats or 'no image could be decoded'}")
    bad = ", ".join(f"{reason} {count}" for reason, count in found.bad.most_common())
    console.print(f"Unusable rows: {bad or 'none'}")
    for row, reason in found.named:
        console.print(_plain(f"  {row}  {reason}"), soft_wrap=True)
    for sentence in found.advice():
        console.print(f"[yellow]look[/] {_plain(sentence)}", soft_wrap=True)


@app.command()
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
        table.add_row(f"{mark} {finding.name}", _plain(finding.found), _plain(finding.advice))
    console.print(table)
    _write_json(json, [finding.to_json() for finding in findings])
    if not all(finding.is_ok for finding in findings):
        sys.exit(1)


if __name__ == "__main__":
    main()
