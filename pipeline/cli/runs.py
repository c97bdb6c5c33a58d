"""`gammaray plan`, `train`, `evaluate`: what is done with a run, and how it ended."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipeline.cli.arguments import ConfigPath, JsonPath, Overrides, RunPath, write_json
from pipeline.cli.screen import Screen, plain
from pipeline.config.load import dump, load_config, parse_config
from pipeline.config.schema import Config, resolve_path
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.train.store import RunFolder, RunRecord

TASKS = {
    "vqa": "answers to questions",
    "reasoning": "statements, true or false",
    "entailment": "entailment",
    "classification": "classification",
    "assignment": "texts to pictures",
}
GOES_ON = "The same command goes on with this run."


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
    log_path = _log_path(run)
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


def _log_path(config: Any) -> Path:
    storage = config.cluster.storage
    root = Path(storage) if "://" not in storage else Path.home() / ".cache" / "gammaray"
    return root / "logs" / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}.log"


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
    rows = [
        (label, metrics[f"{kind}/accuracy"], metrics[f"{kind}/chance"])
        for kind, label in TASKS.items()
        if f"{kind}/accuracy" in metrics
    ]
    for kind, label in (("zero_shot", "zero-shot accuracy"), ("linear_probe", "linear probe")):
        for name, value in metrics.items():
            if name.startswith(f"{kind}/") and name.endswith("/accuracy"):
                _, column, *shots = name.removesuffix("/accuracy").split("/")
                of = ", ".join([column, *(part.replace("_", " ") for part in shots)])
                rows.append((f"{label}, {of}", value, metrics[f"{kind}/{column}/chance"]))
    for kind, how in (("retrieval", ""), ("retrieval_reranked", ", re-ranked")):
        for way, label in (("text_to_image", "text to image"), ("image_to_text", "image to text")):
            value = metrics.get(f"{kind}/{way}_recall_at_1")
            if value is not None:
                chance = metrics[f"{kind}/{way}_chance_at_1"]
                rows.append((f"{label} R@1 of {metrics['rows']:,.0f}{how}", value, chance))
    return rows


def evaluate(
    context: typer.Context,
    run: RunPath,
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Name of a checkpoint in it; else the newest.")
    ] = None,
    json: JsonPath = None,
) -> None:
    """Measure a checkpoint; overrides change what it is measured on."""
    from pipeline.config.load import override_values
    from pipeline.train import driver

    console: Console = context.obj
    folder, record = find_run(run)
    config = parse_config(override_values(record.config, overrides or ()), run)
    log_path = _log_path(config)
    with Screen(console) as screen:
        try:
            metrics = driver.evaluate(folder, config, checkpoint, screen.show, log_path)
        except driver.RunFailed as error:
            screen.stop()
            console.print(f"[bold red]failed[/] {plain(str(error))}")
            console.print(f"Details: {log_path}", soft_wrap=True)
            sys.exit(1)
    table = Table(title=f"Evaluation of {run}", title_justify="left", show_edge=False)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for label, value in metrics.items():
        table.add_row(label, f"{value:,.4f}")
    console.print(table)
    write_json(json, {"run": run, "metrics": metrics})


def find_run(run: str) -> "tuple[RunFolder, RunRecord]":
    """The folder and record of the run at STORAGE/NAME. Raises `UserError` where there is none."""
    from pipeline.train.store import RunFolder

    # Workers run in other folders.
    storage, _, name = resolve_path(run.rstrip("/"), Path.cwd()).rpartition("/")
    folder = RunFolder.of(storage, name)
    record = folder.read_record()
    if record is None:
        raise UserError(f"{run}: no run there; give the folder of a run, such as runs/demo")
    return folder, record
