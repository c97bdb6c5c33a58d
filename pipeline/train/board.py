"""Messages between the workers and whoever watches the run: a small Ray actor on the driver's node.

Events go from workers (and Ray Train's controller) to the driver, wishes the other way.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.train.loop import Wish

Event = Mapping[str, Any]
PATIENCE = 10.0  # seconds to wait for the actor: it is idle but for such calls


class _Board:
    def __init__(self, attempts: int) -> None:
        self._events: list[Event] = []
        self._forgotten = 0
        self._attempts = attempts
        self._wish = Wish.NONE
        self._has_left = False

    def begin(self) -> int:
        # A wish to move is fulfilled once the workers start anew; a wish to stop stays.
        if self._wish == Wish.MOVE:
            self._wish = Wish.NONE
        self._has_left = False
        self._attempts += 1
        return self._attempts

    def ask(self, wish: Wish) -> None:
        self._wish = max(self._wish, wish)

    def wish(self) -> Wish:
        return self._wish

    def leave(self) -> None:
        self._has_left = True

    def has_left(self) -> bool:
        return self._has_left

    def post(self, event: Event) -> None:
        self._events.append(event)

    def take(self, taken: int) -> list[Event]:
        # What the driver has is forgotten only now: an answer that came too late was not had.
        del self._events[: taken - self._forgotten]
        self._forgotten = taken
        return self._events


_BOARD: Any = ray.remote(num_cpus=0)(_Board)


class Board:
    """Workers `post` without waiting; the driver `take`s what has come since, and may `ask`.

    `attempts`: how often the run's workers have been started before.
    """

    def __init__(self, attempts: int = 0) -> None:
        here = ray.get_runtime_context().get_node_id()
        self._actor: Any = _BOARD.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False)
        ).remote(attempts)
        self._taken = 0

    def post(self, kind: str, **content: Any) -> None:
        """Send an event; returns at once."""
        self._actor.post.remote({"kind": kind, **content})

    def take(self) -> list[Event]:
        """Give the events posted since the last call, in order."""
        events = ray.get(self._actor.take.remote(self._taken), timeout=PATIENCE)
        self._taken += len(events)
        return events

    def begin(self) -> int:
        """Number this start of the workers: the first is 1. Rank 0 calls it."""
        return ray.get(self._actor.begin.remote(), timeout=PATIENCE)

    def ask(self, wish: Wish) -> None:
        """Let the workers know of a wish; returns at once."""
        self._actor.ask.remote(wish)

    def wish(self) -> Wish:
        """What is wished for; NONE too when the board cannot be asked."""
        try:
            return ray.get(self._actor.wish.remote(), timeout=PATIENCE)
        except ray.exceptions.RayError:
            return Wish.NONE

    def leave(self) -> None:
        """Say that the workers have ended, and what they would save is saved. Rank 0 calls it."""
        self._actor.leave.remote()

    def has_left(self) -> bool:
        """Whether the workers that began last have ended."""
        return ray.get(self._actor.has_left.remote(), timeout=PATIENCE)


@contextlib.contextmanager
def pass_warnings_on(listen: Callable[[Event], None]) -> Iterator[None]:
    """Give what the package logs as a warning to `listen` too: its log is not where people look."""
    handler = _Handler(listen)
    logger = logging.getLogger("pipeline")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Handler(logging.Handler):
    def __init__(self, listen: Callable[[Event], None]):
        super().__init__(logging.WARNING)
        self._listen = listen

    def emit(self, record: logging.LogRecord) -> None:
        self._listen({"kind": "warning", "text": record.getMessage()})
