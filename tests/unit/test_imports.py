"""P1 as a fact about imports: no loss but the comparators can reach other workers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LOSSES = sorted(Path("pipeline/losses").glob("*.py"))
COMPARATORS = "contrastive.py"


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


@pytest.mark.parametrize("path", LOSSES, ids=lambda path: path.name)
def test_only_comparators_reach_torch_distributed(path: Path) -> None:
    reaches = any(
        name.startswith(("torch.distributed", "torch.ops.c10d", "ray", "deepspeed", "mpi4py"))
        for name in _imported(path)
    )
    assert reaches == (path.name == COMPARATORS)


HOMES = {
    "ray.data": ("pipeline/data/stream.py", "pipeline/data/prepare/on_ray.py"),
    "deepspeed": "pipeline/engine/",
    "mlflow": "pipeline/tracking/",
}


@pytest.mark.parametrize("library", HOMES)
def test_each_outside_system_has_one_home(library: str) -> None:
    users = {
        path.as_posix()
        for root in ("pipeline", "jobs")
        for path in Path(root).rglob("*.py")
        if any(name == library or name.startswith(f"{library}.") for name in _imported(path))
    }
    assert users
    assert all(user.startswith(HOMES[library]) for user in users), users


def test_data_tasks_start_without_torch() -> None:
    """Every task process would pay for it: a second, and 200 MB. Those of training are Ray's."""
    for module, unwanted in (("decode", "{'torch', 'ray'}"), ("stream", "{'torch'}")):
        code = f"import sys, pipeline.data.{module}; print({unwanted} & set(sys.modules))"
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == "set()"


def test_no_attic_modules() -> None:
    names = {path.stem for root in ("pipeline", "jobs") for path in Path(root).rglob("*.py")}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


def test_the_loop_stays_readable_and_free_of_third_parties() -> None:
    path = Path("pipeline/train/loop.py")
    assert len(path.read_text().splitlines()) <= 120
    imports = {
        node.module
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    assert imports == {"collections.abc", "dataclasses", "enum", "typing", "pipeline.errors"}
    assert not any(isinstance(node, ast.Import) for node in ast.walk(ast.parse(path.read_text())))
