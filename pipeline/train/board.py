"""Messages from the workers to whoever watches the run: a small Ray actor on the driver's node."""

from collections.abc import Mapping
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
