"""What a person sees while a command works: one live line on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipeline.config.plan import clock

Event = Mapping[str, Any]  # as the driver gives them: of a `kind`, with what belongs to it
SAVED = "Saved at step "  # how the line begins that `gammaray stop` looks for in a job's log


def plain(text: str) -> str:
    """Text with brackets that rich must not read as markup."""
    return text.replace("[", r"\[")


def _ignore(event: Event) -> None:
    del event


class Screen:
    """Shows the events of a run's driver, as they come."""

    def __init__(self, console: Console):
        self._console = console
        self._is_live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: Any = None
        self._plan: Any = None
        self._began = time.monotonic()
        self._trained_from = (0.0, 0)
        self._saved = ""
        self._next_line = 0.0
        self._handlers: dict[str, Callable[[Event], None]] = {
            "phase": self._on_phase,
            "planned": self._on_planned,
            "started": self._on_started,
            "step": self._on_step,
            "evaluating": self._on_evaluating,
            "evaluation": self._on_evaluation,
            "checkpoint": self._on_checkpoint,
            "resizing": self._on_resizing,
            "left": self._on_left,
            "warning": self._on_warning,
            # What the driver makes of these comes as a warning, or is how it ends.
            "controller": _ignore,
            "failed": _ignore,
            "stalled": _ignore,
            "sample": _ignore,
            "stopped": _ignore,
        }

    def __enter__(self) -> "Screen":
        if self._is_live:
            self._progress.start()
            self._task = self._progress.add_task("starting", total=None, numbers="")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the live line away."""
        if self._is_live:
            self._progress.stop()

    def show(self, event: Event) -> None:
        """Show one event of the driver."""
        self._handlers[event["kind"]](event)

    def warn(self, text: str) -> None:
        """Show a sentence that is to be heeded."""
        self.say(f"warning: {text}")

    def say(self, text: str) -> None:
        """Show a line, above the live one."""
        self._console.print(plain(text), soft_wrap=True)

    def _describe(self, text: str) -> None:
        if self._is_live:
            self._progress.update(self._task, description=text)

    def _on_phase(self, event: Event) -> None:
        self._describe(event["text"])
        if not self._is_live:
            self.say(f"{event['text']} ...")

    def _on_planned(self, event: Event) -> None:
        prepared = event["prepared"]
        self._plan = prepared.plan
        for sentence in [f"{prepared.catalog.describe()}.", *prepared.plan.sentences()]:
            self.say(sentence)
        if event["resumed"]:
            self.say(f"Run '{event['name']}' is unfinished: going on with it.")
            if prepared.began is not None:
                self.say(
                    f"It began with {prepared.began.workers} worker(s) and a global batch of "
                    f"{prepared.began.global_batch:,}; it goes on with {self._plan.workers} and "
                    f"{self._plan.global_batch:,}. Length and virtual batch stay."
                )
        elif event["name"] != prepared.config.name:
            self.say(f"'{prepared.config.name}' is finished: this run is '{event['name']}'.")

    def _on_started(self, event: Event) -> None:
        now = time.monotonic()
        is_another = event["attempt"] > 1 or event["workers"] != self._plan.workers
        who = f" with {event['workers']} worker(s)" if is_another else ""
        up = "" if self._trained_from[0] else f" (workers were up after {now - self._began:.0f} s)"
        self.say(f"Training from step {event['step']:,}{who}{up}.")
        self._plan = event["plan"]
        self._trained_from = (now, event["samples"])
        if self._is_live:
            self._progress.update(
                self._task,
                description="training",
                total=self._plan.samples,
                completed=event["samples"],
            )

    def _on_step(self, event: Event) -> None:
        point = event["metrics"]
        numbers = (
            f"step {event['step']:,}/{self._last_step(event):,}  "
            f"{point['train/samples_per_s']:,.0f} samples/s  "
            f"loss {point.get('train/loss', float('nan')):.3f}  "
            f"data wait {100 * point['train/data_wait_share']:.0f}%{self._saved}"
        )
        if self._is_live:
            self._progress.update(
                self._task,
                description="training",
                completed=event["samples"],
                numbers=numbers,
            )
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + 10
            self.say(f"{numbers}  ETA {self._eta(event['samples'])}")

    def _last_step(self, event: Event) -> int:
        """Not the plan's number when other workers took larger or smaller steps before."""
        left = self._plan.samples - event["samples"]
        return event["step"] + left // self._plan.global_batch

    def _eta(self, samples: int) -> str:
        begun, before = self._trained_from
        rate = (samples - before) / max(time.monotonic() - begun, 1e-9)
        left = round((self._plan.samples - samples) / max(rate, 1e-9))
        return clock(left)

    def _on_checkpoint(self, event: Event) -> None:
        self._saved = f"  saved {int(event['name'].removeprefix('step-')):,}"

    def _on_resizing(self, event: Event) -> None:
        self.say(f"Going on with {event['workers']} worker(s) as soon as all is saved.")

    def _on_left(self, event: Event) -> None:
        goes_on = event["wish"].name == "MOVE"
        follows = "; the workers start anew" if goes_on else ""
        self.say(f"{SAVED}{event['step']:,}{follows}.")
        self._describe("starting anew" if goes_on else "stopping")

    def _on_warning(self, event: Event) -> None:
        self.warn(event["text"])

    def _on_evaluating(self, event: Event) -> None:
        self._describe("evaluating")

    def _on_evaluation(self, event: Event) -> None:
        if "step" not in event:
            return  # not in training: a table follows
        shown = [
            f"{name} {100 * value:.1f}%"
            for name, value in event["metrics"].items()
            if name.endswith(("/accuracy", "recall_at_1"))
        ]
        self.say(f"step {event['step']:,}: {', '.join(shown)}")


class Bar:
    """Work of several kinds, one after the other: a bar on a terminal, lines elsewhere.

    With a `unit` it also says how many of them are done in a second: on the way since the first
    were, before which all had to start up; at the end in the whole time.
    """

    def __init__(self, console: Console, unit: str = ""):
        self._console = console
        self._unit = unit
        self._began = (0.0, 0)  # when, and what was done by then
        self._first: tuple[float, int] | None = None  # the same of the first that was done after
        self._rate = ""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: Any = None
        self._what = ""
        self._next_line = 0.0

    def __enter__(self) -> "Bar":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(plain(text), soft_wrap=True)

    def show(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` is done."""
        if what != self._what:
            self._what, self._next_line = what, 0.0
            self._began, self._first, self._rate = (time.monotonic(), done), None, ""
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(what, total=max(1, total), rate="")
        if self._first is None and done > self._began[1]:
            self._first = (time.monotonic(), done)
        is_due = done >= total or time.monotonic() >= self._next_line  # its end is always said
        if is_due:
            self._next_line = time.monotonic() + 10
            self._rate, left = self._pace(done, total)
            if not self._console.is_terminal:
                self.say(f"{what} {100 * done / max(1, total):.0f}%{self._rate}{left}")
        self._progress.update(self._task, completed=done, rate=self._rate)

    def _pace(self, done: int, total: int) -> tuple[str, str]:
        """How fast it goes, and how long that will take; nothing before that can be known."""
        is_over = done >= total
        began, before = self._began if is_over else self._first or self._began
        if not self._unit or done == before:
            return "", ""
        rate = (done - before) / max(time.monotonic() - began, 1e-9)
        left = round((total - done) / rate)
        return f"  {rate:,.0f} {self._unit}/s", "" if is_over else f"  ETA {clock(left)}"
