"""The loop: steps until the planned number, and what is due after a step, in reading order.

No third-party import and nothing of one rank in it, so it runs in a unit test with fakes. What is
due depends on the step number alone: every rank enters every collective.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from pipeline.errors import RunStop


class Wish(IntEnum):
    """What somebody wants of a run between two steps; of several wishes the largest counts."""

    NONE = 0
    MOVE = 1  # its workers are to start anew: elsewhere, or in another number
    STOP = 2


class Left(Exception):
    """The loop was left at a wish, with its state saved."""

    def __init__(self, wish: Wish):
        super().__init__(wish.name)
        self.wish = wish


@dataclass(frozen=True, kw_only=True, slots=True)
class Cadence:
    """How long, in samples, of which a step takes `global_batch`; what happens every so many steps.

    A run lasts as many samples whatever number of workers takes them: it ends where no whole step
    is left.
    """

    samples: int
    global_batch: int
    log_every: int
    evaluate_every: int | Literal["end"]
    checkpoint_every: int
    max_nonfinite: int


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far the run is; saved with every checkpoint."""

    step: int = 0
    samples: int = 0
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Actions:
    """What the loop calls, on every rank alike; any may stop the run by raising.

    `step` says whether it was finite and `wish` what is wished for, on every rank the same.
    """

    step: Callable[[Progress], bool]
    wish: Callable[[Progress], Wish]
    log: Callable[[Progress], None]
    evaluate: Callable[[Progress], None]
    checkpoint: Callable[[Progress], None]


def run_loop(progress: Progress, cadence: Cadence, actions: Actions) -> None:
    """Train from `progress` to the last whole step, then evaluate once more.

    A step that is not finite changes no weight; it is counted, and after `max_nonfinite` in a row
    `RunStop` is raised. Nothing is saved while such steps last, so the last good checkpoint
    stays; only the end of the run is always saved, with the weights of its last good step. At a
    wish the step is saved at once and `Left` is raised.
    """
    while progress.samples + cadence.global_batch <= cadence.samples:
        is_finite = actions.step(progress)
        progress.step += 1
        progress.samples += cadence.global_batch
        if is_finite:
            progress.nonfinite_in_a_row = 0
        else:
            progress.nonfinite_steps += 1
            progress.nonfinite_in_a_row += 1
            if progress.nonfinite_in_a_row >= cadence.max_nonfinite:
                raise RunStop(
                    f"step {progress.step}: loss or gradient not finite in "
                    f"{progress.nonfinite_in_a_row} steps in a row (train.max_nonfinite); start "
                    "under another name with lower optim.lr or longer optim.warmup_samples"
                )
        is_last = progress.samples + cadence.global_batch > cadence.samples
        if _is_due(progress.step, cadence.log_every) or is_last:
            actions.log(progress)
        wish = Wish.NONE if is_last else actions.wish(progress)
        if _is_due(progress.step, cadence.evaluate_every) and not is_last and not wish:
            actions.evaluate(progress)
        is_good = progress.nonfinite_in_a_row == 0
        if is_last or (is_good and (wish or _is_due(progress.step, cadence.checkpoint_every))):
            actions.checkpoint(progress)
        if wish:
            raise Left(wish)
    actions.evaluate(progress)


def _is_due(step: int, every: int | Literal["end"]) -> bool:
    return every != "end" and step % every == 0
