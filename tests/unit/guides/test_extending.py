"""The guide to extending: what stands in it, applied to a copy of the sources, trains."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[3]
GUIDE = ROOT / "pipeline/README.md"
MOST_LINES = 49
NEW = re.compile(r"`([\w/]+\.py)`, new:\n\n```python\n(.*?)^```$", re.S | re.M)
DIFF = re.compile(r"^```diff\n(.*?)^```$", re.S | re.M)
HUNK = re.compile(r"^--- a/(\S+)\n\+\+\+ b/\1\n((?:[ +-].*\n)+?)(?=^--- a/|\Z)", re.M)
RUN = ROOT / "tests/unit/guides/extended.py"


class Change(NamedTuple):
    """A new file, `old` then being empty, or lines of one that change."""

    path: str
    old: str
    new: str
    added: int


def _changes(text: str) -> list[Change]:
    found = [Change(path, "", body, len(body.splitlines())) for path, body in NEW.findall(text)]
    for block in DIFF.findall(text):
        hunks = HUNK.findall(block)
        assert "".join(f"--- a/{path}\n+++ b/{path}\n{lines}" for path, lines in hunks) == block
        for path, lines in hunks:
            split = lines.splitlines(keepends=True)
            old, new = ("".join(each[1:] for each in split if each[0] in kept)
                        for kept in (" -", " +"))  # fmt: skip
            found.append(Change(path, old, new, sum(each[0] == "+" for each in split)))
    return found


SECTIONS = {
    part.splitlines()[0]: _changes(part) for part in re.split(r"(?m)^## ", GUIDE.read_text())[1:]
}


@pytest.mark.parametrize("name", ["A loss", "An evaluator", "A model"])
def test_each_takes_fewer_than_fifty_lines(name: str) -> None:
    assert 0 < sum(change.added for change in SECTIONS[name]) <= MOST_LINES


def _apply(change: Change, root: Path) -> None:
    path = root / change.path
    if not change.old:
        assert not path.exists(), f"{change.path} is there already"
        path.write_text(change.new)
        return
    text = path.read_text()
    assert text.count(change.old) == 1, f"{change.path} has not once:\n{change.old}"
    path.write_text(text.replace(change.old, change.new))


def test_what_the_guide_says_trains_and_evaluates(tmp_path: Path) -> None:
    root, out = tmp_path / "copy", tmp_path / "found.json"
    shutil.copytree(
        ROOT / "pipeline", root / "pipeline", ignore=shutil.ignore_patterns("__pycache__")
    )
    (root / "tests").mkdir()
    for name in ("__init__.py", "tiny.py"):
        shutil.copy(ROOT / "tests" / name, root / "tests")
    shutil.copy(RUN, root)
    for changes in SECTIONS.values():
        for change in changes:
            _apply(change, root)
    done = subprocess.run(
        [sys.executable, str(root / RUN.name), str(root), str(out)],
        cwd=root, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    for name in ("loss", "model"):
        losses = found[name]
        assert losses[-1] < 0.8 * losses[0], f"{name} does not learn: {losses}"
    for way in ("text_to_image", "image_to_text"):
        best = found["evaluation"][f"retrieval/{way}_recall_at_1"]
        assert best <= found["evaluation"][f"reciprocal_rank/{way}"] <= 1
    shutil.copy(ROOT / "pyproject.toml", root)
    changed = sorted({change.path for changes in SECTIONS.values() for change in changes})
    for command in (["check"], ["format", "--check"]):
        checked = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *changed],
            cwd=root, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert checked.returncode == 0, checked.stdout
