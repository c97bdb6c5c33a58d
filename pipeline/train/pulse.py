"""A worker's second thread: hears of wishes, and notices when the first does nothing.

Enters: the board, Ray Train's notice of nodes that are taken away. Leaves: a wish for the loop to
read, the stacks of a worker that stands still. Must not know: the engine, the loss.
"""

import os
import sys
import threading
import time
import traceback

import ray.train
from ray.train.v2._internal.execution.context import get_train_context

from pipeline.train.board import Board
from pipeline.train.loop import Wish

POLL_SECONDS = 0.5
LAST_WORDS_SECONDS = 15.0  # for all ranks' stacks to reach the driver
STALLED = 70  # exit status of a worker that ended itself


class Pulse:
    """Of one rank. `beat` whenever something is done; `wish` costs nothing.

    When no beat comes for `stall_seconds` after another the stacks of all threads are posted and
    the process ends: Ray Train then starts the workers anew, from the last checkpoint.
    """

    def __init__(self, board: Board, rank: int, stall_seconds: float):
        self._board, self._rank, self._stall_seconds = board, rank, stall_seconds
        self._wish = Wish.NONE
        self._step, self._doing = 0, ""
        self._beaten: float | None = None
        self._closed = threading.Event()
        self._context = get_train_context()
        self._first = threading.get_ident()
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def beat(self, step: int, doing: str) -> None:
        """Say what is being done from now on."""
        self._step, self._doing, self._beaten = step, doing, time.monotonic()

    def rest(self) -> None:
        """What comes now may take as long as a checkpoint takes to fetch or to send."""
        self._beaten = None

    def wish(self) -> Wish:
        """What this rank has heard of; ranks may differ."""
        # Ray Train's own call for this is a barrier of all ranks through an actor, at each step.
        is_taken = self._context.preemption_context.preemption_info is not None
        return max(self._wish, Wish.MOVE if is_taken else Wish.NONE)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            if self._rank == 0:
                self._wish = self._board.wish()
            beaten = self._beaten
            if beaten is not None and time.monotonic() > beaten + self._stall_seconds:
                self._end(time.monotonic() - beaten)

    def _end(self, still: float) -> None:
        self._board.post(
            "stalled",
            rank=self._rank,
            node=ray.util.get_node_ip_address(),
            step=self._step,
            doing=self._doing,
            seconds=round(still),
            stacks=self._stacks(),
        )
        time.sleep(LAST_WORDS_SECONDS)
        os._exit(STALLED)

    def _stacks(self) -> str:
        """Of all threads, the one that trains first."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != self._first)
        return "\n".join(
            f"{names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in frames
        )
