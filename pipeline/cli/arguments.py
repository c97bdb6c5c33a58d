"""Arguments that several commands take, and the file that `--json` names."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.errors import UserError

ConfigPath = Annotated[Path, typer.Argument(help="The run's YAML.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to it: section.key=value ...")]
RunPath = Annotated[str, typer.Argument(help="Folder or URL of a run, e.g. runs/demo.")]


def _writable(path: Path | None) -> Path | None:
    """Refuse it before the work, not after."""
    if path is not None and (
        path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK)
    ):
        raise typer.BadParameter(f"{path} cannot be written; name a file in a folder of yours")
    return path


JsonPath = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the facts here.", callback=_writable),
]


def write_json(path: Path | None, facts: Any) -> None:
    """Write `facts` to the file of `--json`, if it was given."""
    if path is None:
        return
    try:
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json: {path} cannot be written ({error}); name another file") from error
