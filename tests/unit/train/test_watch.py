"""How the driver judges what workers and controller tell it."""

from collections.abc import Mapping
from typing import Any

import pytest
from ray.exceptions import RayActorError

from pipeline.train.driver import Watch
from pipeline.train.loop import Wish
from pipeline.train.witness import blame
from tests.tiny import tiny_config


class _Diary:
    def __init__(self) -> None:
        self.notes: list[tuple[str, str]] = []
        self.attempt = self.workers = 0

    def note(self, kind: str, text: str) -> None:
        self.notes.append((kind, text))

    def begin(self, attempt: int, workers: int) -> None:
        self.attempt, self.workers = attempt, workers

    def keep_stacks(self, event: Mapping[str, Any]) -> None:
        self.note("stacks", str(event["rank"]))


class _Board:
    def __init__(self, *events: Mapping[str, Any]):
        self._events = list(events)

    def take(self) -> list[Mapping[str, Any]]:
        return self._events


def _watch(*events: Mapping[str, Any], **cluster: Any) -> tuple[Watch, _Diary, list[str]]:
    diary, warnings = _Diary(), []
    config = tiny_config(cluster=cluster)
    watch = Watch(
        _Board(*events),  # pyright: ignore[reportArgumentType]
        lambda event: warnings.append(event["text"]) if event["kind"] == "warning" else None,
        config,
        diary,  # pyright: ignore[reportArgumentType]
    )
    with watch.running():
        pass
    return watch, diary, warnings


def _started(attempt: int, workers: int = 2) -> dict[str, Any]:
    return {"kind": "started", "attempt": attempt, "workers": workers, "step": 10 * attempt}


def _failed(message: str = "worker 1 died") -> dict[str, Any]:
    return {"kind": "failed", "message": message}


CHECKPOINT = {"kind": "checkpoint", "name": "step-00000010"}
MOVED = {"kind": "left", "wish": Wish.MOVE, "step": 12}


def test_failures_since_the_last_checkpoint_count() -> None:
    again = [_failed(), _started(2), CHECKPOINT, _failed(), _started(3)]
    watch, diary, warnings = _watch(_started(1), *again, max_failures=1)
    assert watch.given_up is None
    assert warnings[0] == "worker 1 died; restarting (0 more allowed before the next checkpoint)"
    assert (diary.attempt, diary.workers) == (3, 2)
    watch, _, _ = _watch(_started(1), *again, _failed("worker 0: boom"), max_failures=1)
    assert watch.given_up == "worker 0: boom"


def test_workers_that_start_anew_as_planned_have_not_failed() -> None:
    watch, diary, _ = _watch(_started(1), MOVED, _failed(), _started(2, 3), max_failures=0)
    assert watch.given_up is None
    assert diary.notes == [("started", "attempt 2 from step 20 with 3 worker(s), 2 before")]


def _stalled(rank: int, step: int, doing: str) -> dict[str, Any]:
    return {"kind": "stalled", "rank": rank, "node": f"10.0.0.{rank}", "step": step,
            "doing": doing, "seconds": 600, "stacks": ""}  # fmt: skip


@pytest.mark.parametrize(
    ("stalled", "said"),
    [
        (
            [_stalled(0, 7, "in a step"), _stalled(1, 7, "waiting for data")],
            "worker 1 on 10.0.0.1 did nothing for 600 s; step 7, waiting for data",
        ),
        (
            [_stalled(0, 7, "in a step"), _stalled(1, 6, "in a step")],
            "worker 1 on 10.0.0.1 did nothing for 600 s; step 6, in a step",
        ),
        ([_stalled(0, 7, "in a step")], "worker(s) [1] say nothing: frozen, or cut off"),
    ],
)
def test_the_late_rank_is_named(stalled: list[dict[str, Any]], said: str) -> None:
    watch, diary, _ = _watch(_started(1), *stalled, _failed("worker 0: Timed out"), max_failures=0)
    assert watch.given_up is not None
    assert watch.given_up.startswith(said)
    assert [text for kind, text in diary.notes if kind == "stacks"] == [
        str(event["rank"]) for event in stalled
    ]


def test_who_died_is_blamed_before_who_missed_him() -> None:
    lost = RuntimeError("gloo\n[rank 0] Connection closed by peer")
    assert blame({0: lost, 1: RayActorError()}).startswith("worker 1 died: ")
    assert blame({0: lost}) == "worker 0: [rank 0] Connection closed by peer"
