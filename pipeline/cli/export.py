"""`gammaray export`: what a run has learned, in a form that others load."""

import contextlib
import io
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.cli.arguments import JsonPath, RunPath, write_json
from pipeline.cli.runs import find_run
from pipeline.cli.screen import plain

if TYPE_CHECKING:
    from pipeline.export.forms import Exported
    from pipeline.tracking.registry import Version
    from pipeline.train.store import RunFolder, RunRecord


class Format(StrEnum):
    """Whose form it is."""

    TRANSFORMERS = "transformers"
    OPENCLIP = "openclip"
    SAFETENSORS = "safetensors"


class Dtype(StrEnum):
    """What the weights are rounded to."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


def export(
    context: typer.Context,
    run: RunPath,
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not be there yet.")],
    form: Annotated[Format, typer.Option("--format", help="Whose form.")] = Format.TRANSFORMERS,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights.")] = Dtype.FP32,
    checkpoint: Annotated[
        str | None, typer.Option(help="Name of a checkpoint in it; else the newest.")
    ] = None,
    register: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Make it a version of this model in MLflow, too."),
    ] = None,
    json: JsonPath = None,
) -> None:
    """Write a checkpoint's weights, tokenizer, preprocessing and a model card for other libraries.

    transformers: a CLIPModel; of a fusion model a ViT, two BERTs, and heads. openclip: of a
    two-tower model, for open_clip. safetensors: all weights by our names.
    """
    console: Console = context.obj
    folder, record = find_run(run)
    if register is not None:
        from pipeline.tracking.registry import check_name

        check_name(record.mlflow, register)
    said = io.StringIO()  # DeepSpeed's and transformers' progress
    with (
        console.status(f"Reading {run} ..."),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        from pipeline.export.forms import export_run

        done = export_run(
            folder, record, out, form=form.value, dtype=dtype.value, checkpoint=checkpoint
        )
    if done.lack is not None:
        console.print(
            f"warning: the model card has no measures: {plain(done.lack)}", soft_wrap=True
        )
    size = sum(done.files.values())
    console.print(
        f"Wrote {out}: {done.checkpoint} of {run} in the form {form}, {dtype}, "
        f"{size / 1e6:,.1f} MB. How to use it: {out / 'README.md'}",
        soft_wrap=True,
    )
    facts = {"run": run, "checkpoint": done.checkpoint, "out": str(out), "format": form.value,
             "dtype": dtype.value, "files": done.files}  # fmt: skip
    write_json(json, facts)
    if register is not None:
        with console.status(f"Registering {register} ..."):
            version = _register(folder, record, done, out, register, form)
        console.print(
            f"Registered as version {version.version} of {register} in {record.mlflow_uri}, with "
            f"{version.metrics} measures that the run took at this checkpoint.",
            soft_wrap=True,
        )
        write_json(json, {**facts, "registered": asdict(version)})


def _register(
    folder: "RunFolder", record: "RunRecord", done: "Exported", out: Path, name: str, form: Format
) -> "Version":
    from pipeline.tracking.registry import register
    from pipeline.train.measure import samples_at

    step = int(done.checkpoint.removeprefix("step-"))
    tags = {"gammaray.step": str(step), "gammaray.format": form.value}
    samples = samples_at(folder, done.checkpoint)
    return register(record.mlflow, out, name, samples=samples, tags=tags)
