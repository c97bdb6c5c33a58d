"""What `gammaray evaluate` says before the workers, which say nothing until the end."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import cli
from pipeline.train import driver, measure
from tests.tiny import tiny_config
from tests.tiny_run import publish_module


def test_evaluate_says_first_what_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(
        data={"val": "/sets/scenes/val"}, evaluate={"zero_shot": [{"column": "shape"}]}
    )
    run, _ = publish_module(tmp_path, config, torch.nn.Linear(1, 1))
    found = SimpleNamespace(name="tiny", config=config)
    said: list[str] = []

    def evaluate(*_: Any) -> None:
        said.append(capfd.readouterr().out)

    monkeypatch.setattr(measure, "ask", lambda *_: found)
    monkeypatch.setattr(driver, "evaluate", evaluate)
    monkeypatch.setattr("sys.argv", ["gammaray", "evaluate", run.url])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert said == ["Measures tiny by retrieval of scenes/val; zero-shot of shape.\n"]
