"""What every benchmark says the same way: arguments, circumstances, tables, the verdict."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Give a parser with the arguments all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the same table from fewer runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results here")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the results (PNG)")
    return parser


def circumstances() -> dict[str, Any]:
    """Commit, command, hardware, versions and date of a result."""
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "commit": asked.stdout.strip() or "unknown",
        "command": " ".join([Path(sys.executable).name, "-m", *_module(), *sys.argv[1:]]),
        "hardware": f"{_processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _module() -> list[str]:
    spec = sys.modules["__main__"].__spec__
    return [spec.name] if spec is not None else sys.argv[:1]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; all columns but the first are numbers."""
    table = Table(title=title, title_justify="left", show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    # Wide enough for a file: a pipe has no width of its own.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def conclude(results: dict[str, Any], missed: Sequence[str], json_file: Path | None) -> None:
    """Write the results, say which goals were missed, and exit with 1 if any was."""
    facts = {**circumstances(), **results, "missed": list(missed)}
    if json_file is not None:
        json_file.write_text(json.dumps(facts, indent=1) + "\n")
    for goal in missed:
        print(f"missed: {goal}")
    print(f"commit {facts['commit']}, {facts['hardware']}, {facts['date']}")
    sys.exit(1 if missed else 0)
