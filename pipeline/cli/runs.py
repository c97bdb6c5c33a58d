"""`gammaray plan`, `train`, `evaluate`: what is done with a run, and how it ended."""

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipeline.cli.arguments import ConfigPath, JsonPath, Overrides, RunPath, write_json
from pipeline.cli.log import cached_log, stamped
from pipeline.cli.screen import Screen, plain
from pipeline.config.load import dump, load_config, parse_config
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.evaluate.headline import headline

if TYPE_CHECKING:
    from pipeline.train.measure import Evaluation, Measured
    from pipeline.train.store import RunFolder, RunRecord

TITLES = {
    "zeroshot_classification": "zero-shot",
    "zeroshot_retrieval": "retrieval",
    "reranked_retrieval": "re-ranked",
    "linear_probe": "linear probe",
}
LOG_WIDTH = 140  # of a table that no terminal bounds
GOES_ON = "The same command goes on with this run."


class Choice(StrEnum):
    """What `gammaray evaluate` measures."""

    CONFIG = "config"
    ALL = "all"


def plan(
    context: typer.Context, config: ConfigPath, overrides: Overrides = None, json: JsonPath = None
) -> None:
    """Check a config and say what would happen; needs no cluster."""
    from pipeline.train.preflight import prepare

    console: Console = context.obj
    prepared = prepare(load_config(config, overrides or ()))
    console.print(dump(prepared.config), markup=False)
    _print_plan(console, prepared)
    write_json(
        json,
        {"config": prepared.config.model_dump(mode="json"), "plan": prepared.plan.to_json()},
    )


def _print_plan(console: Console, prepared: Any) -> None:
    console.print(plain(prepared.catalog.describe() + "."))
    for sentence in prepared.plan.sentences():
        console.print(plain(sentence))


def train(
    context: typer.Context, config: ConfigPath, overrides: Overrides = None, json: JsonPath = None
) -> None:
    """Train; the same command goes on with a run that was stopped."""
    run = load_config(config, overrides or ())
    if run.task is not None:
        raise UserError(
            f"task: {config} is for {run.task.kind}, a fine-tuning: run gammaray finetune {config}"
        )
    _run(context.obj, run, json)


def finetune(
    context: typer.Context, config: ConfigPath, overrides: Overrides = None, json: JsonPath = None
) -> None:
    """Fine-tune a fusion model for a task; the same command goes on with a stopped run."""
    run = load_config(config, overrides or ())
    if run.task is None:
        raise UserError(
            f"task: {config} has none, it is a pretraining: run gammaray train {config}, or say "
            "what to fine-tune for, e.g. task.kind=vqa"
        )
    _run(context.obj, run, json)


def _run(console: Console, run: Config, json: Path | None) -> None:
    log_path = log_path_of(console, run)
    console.print(
        f"[bold]gammaray[/] {'trains' if run.task is None else 'fine-tunes'} '{run.name}'. "
        f"What Ray and DeepSpeed print: {log_path}",
        soft_wrap=True,
    )
    from pipeline.train import driver

    with Screen(console) as screen:
        try:
            outcome = driver.train(run, screen.show, log_path)
        except driver.RunFailed as error:
            screen.stop()
            console.print(f"[bold red]failed[/] {plain(str(error))}")
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
    write_json(json, facts)


def log_path_of(console: Console, config: Any) -> Path:
    """Where to send what Ray and DeepSpeed print from now on."""
    storage = config.cluster.storage
    if "://" in storage:
        return cached_log(console, config.name)
    return Path(storage) / "logs" / stamped(config.name)


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
    uri, here = outcome.mlflow.uri, Path(sys.executable).parent  # perhaps not on the PATH
    look = (
        f"{here}/mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite") else f"open {uri}"
    )
    console.print(
        f"Took {outcome.seconds:.0f} s. Checkpoints: {outcome.folder}\n"
        f"MLflow run {outcome.mlflow.run_id} in {uri}\n"
        "Next:\n"
        f"  look at it      {look}\n"
        f"  read its report {here}/gammaray report {outcome.folder}\n"
        f"  evaluate again  {here}/gammaray evaluate {outcome.folder}\n"
        f"  your own data   {here}/gammaray train CONFIG data.train=FOLDER data.val=FOLDER",
        markup=False,
        soft_wrap=True,
    )


def evaluate(
    context: typer.Context,
    run: RunPath,
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Name of a checkpoint in it; else the newest.")
    ] = None,
    suite: Annotated[
        Choice, typer.Option(help="What its config names, or all it can be measured by.")
    ] = Choice.CONFIG,
    json: JsonPath = None,
) -> None:
    """Measure a checkpoint; overrides change what it is measured on.

    With --suite all also by few-shot probes, and all runs that were fine-tuned from it, each by its
    task; for these, overrides of cluster and tracking count alone. What is found is kept: RUN/suite
    has it in the form of CLIP_benchmark's output, MLflow the metrics, and right and wrong cases
    with their pictures.
    """
    from pipeline.config.load import override_values
    from pipeline.evaluate.report import subjects
    from pipeline.train import driver, measure

    console: Console = context.obj
    folder, record = find_run(run)
    config = parse_config(override_values(record.config, overrides or ()), run)
    log_path = log_path_of(console, config)
    asked: list[Evaluation] = []
    measured: list[Measured] = []

    def take(each: "Measured") -> None:
        measured.append(each)
        write_json(json, _facts(run, measured))
        if suite is Choice.ALL:
            measure.keep(each, asked[0])

    is_interrupted = False
    try:
        with Screen(console) as screen:
            if suite is Choice.ALL:
                asked += measure.ask_all(
                    folder, record, config, checkpoint, overrides or (), screen.warn
                )
            else:
                asked.append(measure.ask(folder, record, config, checkpoint))
            for each in asked:  # workers give the whole at once: till then nothing more is heard
                screen.say(f"Measures {each.name} by {'; '.join(subjects(each.config))}.")
            driver.evaluate(asked, screen.show, log_path, take)
    except KeyboardInterrupt:
        is_interrupted = True
    finally:
        found = [each for each in measured if each.failure is None]
        if found:
            _print_results(console, found)
        if suite is Choice.ALL and found:
            console.print(f"A file for each result: {folder.url}/{measure.SUITE}", soft_wrap=True)
        elif found:
            _print_others(console, found[0].metrics)
        why_not = {each.asked.name: each.failure for each in measured if each.failure is not None}
        if measured:
            why_not |= {each.name: "the command ended before" for each in asked[len(measured) :]}
        for name, why in why_not.items():
            console.print(f"[bold red]not measured[/] {plain(f'{name}: {why}')}", soft_wrap=True)
    if is_interrupted:
        console.print("Interrupted.")
        sys.exit(130)
    if why_not:
        console.print(f"Details: {log_path}", soft_wrap=True)
        sys.exit(1)


def _facts(run: str, measured: "Sequence[Measured]") -> dict[str, Any]:
    """What was found so far."""
    return {
        "run": run,
        "metrics": measured[0].metrics,
        "results": [record for each in measured for record in each.records],
        "failures": {
            each.asked.name: each.failure for each in measured if each.failure is not None
        },
    }


def _print_others(console: Console, metrics: dict[str, float]) -> None:
    """What is no share: how many rows, and how the modalities lie."""
    for name, value in metrics.items():
        if name.split("/")[-1] in ("rows", "bad_rows"):
            console.print(f"{name} {value:,.0f}")
        elif name.startswith("geometry/"):
            console.print(f"{name} {value:.4f}")


def _print_results(console: Console, measured: "Sequence[Measured]") -> None:
    """One table of all runs and tasks."""
    table = Table(show_edge=False)
    for title in ("run", "task", "data", "metric"):
        table.add_column(title)
    for title in ("value", "spread", "chance"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in measured:
        for result in each.results:
            for line in result.lines:
                table.add_row(
                    plain(each.asked.name),
                    TITLES.get(result.task, result.task),
                    plain(result.dataset),
                    plain(line.metric),
                    f"{100 * line.value:.1f} %",
                    "" if line.spread is None else f"± {100 * line.spread:.1f}",
                    "" if line.chance is None else f"{100 * line.chance:.2f} %",
                )
    if not console.is_terminal:
        console.width = LOG_WIDTH  # or else the cells would be cut as for a narrow terminal
    console.print()
    console.print(table)


def find_run(run: str) -> "tuple[RunFolder, RunRecord]":
    """The folder and record of the run at STORAGE/NAME. Raises `UserError` where there is none."""
    from pipeline.train.store import open_run

    return open_run(run)
