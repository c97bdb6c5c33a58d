"""The help of all commands, on a terminal of 80 columns."""

import inspect
from itertools import pairwise

import pytest
from typer.testing import CliRunner

from pipeline.cli import app

WIDTH = 80
TEXTS = {
    name: command.callback.__doc__
    for prefix, each in (("", app), ("data ", app.registered_groups[0].typer_instance))
    for command in each.registered_commands
    if command.callback is not None
    for name in [f"{prefix}{command.name or command.callback.__name__}"]
}


def _lines(text: str) -> list[str]:
    """The text of a command's help, without its usage above and its arguments below."""
    lines = [line.strip() for line in text.split("\u256d")[0].splitlines()]
    start = next(number for number, line in enumerate(lines) if line.startswith("Usage:"))
    return lines[lines.index("", start) :]


@pytest.mark.parametrize("name", TEXTS)
def test_paragraphs_fill_their_lines(name: str) -> None:
    done = CliRunner(env={"COLUMNS": str(WIDTH)}).invoke(app, [*name.split(), "--help"])
    assert done.exit_code == 0
    paragraphs = "\n".join(_lines(done.stdout)).strip().split("\n\n")
    written = inspect.cleandoc(TEXTS[name] or "").replace("`", "").split("\n\n")
    assert [" ".join(each.split()) for each in paragraphs] == [
        " ".join(each.split()) for each in written
    ]
    for paragraph in paragraphs:
        lines = paragraph.splitlines()
        for line, after in pairwise(lines):
            assert len(f"{line} {after.split()[0]}") > WIDTH - 2, f"{line!r} has room for more"
