"""Arguments that several commands take, and the file that `--json` names."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigPath = Annotated[Path, typer.Argument(help="The run's YAML.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to it: section.key=value ...")]
RunPath = Annotated[str, typer.Argument(help="Folder or URL of a run, e.g. runs/demo.")]
JsonPath = Annotated[Path | None, typer.Option("--json", help="Also write the facts here.")]


def write_json(path: Path | None, facts: Any) -> None:
    """Write `facts` to the file of `--json`, if it was given."""
    if path is not None:
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
