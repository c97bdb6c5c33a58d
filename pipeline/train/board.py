"""Messages from the workers to whoever watches the run: a small Ray actor on the driver's node."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Event = Mapping[str, Any]


class _Board:
    def __init__(self) -> None:
        self._events: list[Event] = []

    def post(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events


_BOARD: Any = ray.remote(num_cpus=0)(_Board)


class Board:
    """Workers `post` without waiting; the driver `take`s what has come since."""

    def __init__(self) -> None:
        here = ray.get_runtime_context().get_node_id()
        self._actor: Any = _BOARD.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False)
        ).remote()

    def post(self, kind: str, **content: Any) -> None:
        """Send an event; returns at once."""
        self._actor.post.remote({"kind": kind, **content})

    def take(self) -> list[Event]:
        """Give the events posted since the last call, in order."""
        return ray.get(self._actor.take.remote())


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
