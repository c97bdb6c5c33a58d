"""Where logs go when the home cannot be written."""

from pathlib import Path

import pytest
from rich.console import Console

from pipeline.cli.log import cached_log
from pipeline.cli.runs import log_path_of
from tests.tiny import tiny_config


def test_a_log_goes_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    console = Console(record=True)
    path = cached_log(console, "demo-embed")
    assert path.parent == tmp_path / ".cache" / "gammaray" / "logs"
    assert path.name.startswith("demo-embed-2")
    assert console.export_text() == ""
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("home", ["file", "none"])
def test_without_a_home_it_goes_elsewhere_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    if home == "file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    else:
        monkeypatch.setattr(Path, "home", _no_home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    console = Console(record=True, width=500)
    config = tiny_config(cluster={"storage": "s3://bucket/runs"})
    path = log_path_of(console, config)
    assert path.parent.parent == tmp_path
    path.write_text("it can be written")
    said = console.export_text()
    assert "warning: ~/.cache/gammaray/logs cannot be written (" in said
    assert f"the log goes to {path.parent}" in said


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")
