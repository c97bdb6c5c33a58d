"""What is printed during a run, where there is no terminal."""

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pipeline.cli.screen import Bar, Screen
from pipeline.train.loop import Wish

PLAN = SimpleNamespace(workers=2, samples=1000, global_batch=100)
HALF = SimpleNamespace(workers=1, samples=1000, global_batch=50)
POINT = {"train/samples_per_s": 10.0, "train/loss": 1.5, "train/data_wait_share": 0.25}


class _Run:
    """A screen whose text can be read, of a run that has been planned."""

    def __init__(self) -> None:
        self._text = io.StringIO()
        self._screen = Screen(Console(file=self._text, highlight=False, width=200))
        catalog = SimpleNamespace(describe=lambda: "rows")
        plan = SimpleNamespace(**vars(PLAN), sentences=list)
        config = SimpleNamespace(name="a")
        prepared = SimpleNamespace(plan=plan, catalog=catalog, config=config, began=None)
        self.shows("planned", prepared=prepared, name="a", resumed=False)

    def shows(self, kind: str, **content: Any) -> str:
        self._text.truncate(0)
        self._text.seek(0)
        self._screen.show({"kind": kind, **content})
        return self._text.getvalue()


@pytest.fixture
def run() -> _Run:
    return _Run()


def _start(run: _Run, attempt: int = 1, workers: int = 2, step: int = 0, plan: Any = PLAN) -> str:
    return run.shows("started", step=step, samples=0, attempt=attempt, workers=workers, plan=plan)


def test_a_first_start_is_short(run: _Run) -> None:
    said = _start(run)
    assert re.fullmatch(r"Training from step 0 \(workers were up after \d+ s\)\.\n", said)


def test_later_starts_say_how_many_workers(run: _Run) -> None:
    _start(run)
    assert _start(run, attempt=2, step=1500) == "Training from step 1,500 with 2 worker(s).\n"


def test_fewer_workers_than_planned_are_named(run: _Run) -> None:
    assert "with 1 worker(s) (workers were up" in _start(run, workers=1, plan=HALF)


def test_the_last_step_follows_from_the_workers_there_are(run: _Run) -> None:
    _start(run)
    _start(run, attempt=2, workers=1, step=4, plan=HALF)
    assert "step 5/15 " in run.shows("step", step=5, samples=500, metrics=POINT)


def test_a_step_line_says_what_is_saved(run: _Run) -> None:
    _start(run)
    assert run.shows("checkpoint", name="step-00001200") == ""
    said = run.shows("step", step=5, samples=500, metrics=POINT)
    assert "10 samples/s  loss 1.500  data wait 25%  saved 1,200  ETA " in said


def test_workers_that_left(run: _Run) -> None:
    assert run.shows("left", step=7, wish=Wish.STOP) == "Saved at step 7.\n"
    moving = run.shows("left", step=1007, wish=Wish.MOVE)
    assert moving == "Saved at step 1,007; the workers start anew.\n"


def test_a_resize_is_announced(run: _Run) -> None:
    said = run.shows("resizing", workers=4)
    assert said == "Going on with 4 worker(s) as soon as all is saved.\n"


def test_brackets_are_no_markup(run: _Run) -> None:
    assert run.shows("warning", text="worker(s) [1] say") == "warning: worker(s) [1] say\n"


def test_every_event_is_shown_or_ignored_on_purpose() -> None:
    text = "".join(path.read_text() for path in Path("pipeline/train").glob("*.py"))
    kinds = re.findall(r'(?:post\(\s*|"kind": )"([a-z]+)"', text)
    assert len(set(kinds)) > 10
    assert set(kinds) == set(Screen(Console(file=io.StringIO()))._handlers)


def test_an_evaluation_is_told_in_training_alone(run: _Run) -> None:
    """After `gammaray evaluate` a table has the same."""
    metrics = {"zero_shot/shape/accuracy": 0.5, "rows": 60.0}
    said = run.shows("evaluation", step=7, metrics=metrics)
    assert said == "step 7: zero_shot/shape/accuracy 50.0%\n"
    assert run.shows("evaluation", metrics=metrics) == ""


class _Bar:
    """A bar of rows whose lines can be read, and a clock that it is shown by."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now, self._text = 100.0, io.StringIO()
        monkeypatch.setattr("pipeline.cli.screen.time.monotonic", lambda: self._now)
        self._bar = Bar(Console(file=self._text, width=200), "rows")

    def after(self, seconds: float, done: int) -> str:
        self._now += seconds
        self._text.truncate(0)
        self._text.seek(0)
        self._bar.show("embedding", done, 2500)
        return self._text.getvalue()


def test_a_bar_says_how_fast_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done before it began is not counted, nor on the way how long it took to start."""
    bar = _Bar(monkeypatch)
    assert bar.after(0, 500) == "embedding 20%\n"
    assert bar.after(30, 700) == "embedding 28%\n", "of the first piece nothing follows"
    assert bar.after(2, 900) == ""
    assert bar.after(8, 1200) == "embedding 48%  50 rows/s  ETA 0:00:26\n"
    assert bar.after(10, 2500) == "embedding 100%  40 rows/s\n", "2000 in 50 s"


def test_a_bar_of_one_piece_says_how_fast_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = _Bar(monkeypatch)
    assert bar.after(0, 0) == "embedding 0%\n"
    assert bar.after(25, 2500) == "embedding 100%  100 rows/s\n"
