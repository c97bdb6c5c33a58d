"""Where the time went: sums that were worked out by hand."""

import pytest

from pipeline.report.spent import (
    ANEW,
    BETWEEN,
    COMPUTE,
    END,
    EVALUATE,
    PAUSE,
    SAVE,
    START,
    WAIT,
    spend,
)
from tests.unit.report.runs import curve, record, trained


def _seconds(run: object) -> dict[str, float]:
    return {each.what: each.seconds for each in spend(run)}  # pyright: ignore[reportArgumentType]


def test_every_second_of_a_run_is_said_once() -> None:
    spent = spend(trained())
    assert {each.what: each.seconds for each in spent} == pytest.approx(
        {START: 20, WAIT: 2, COMPUTE: 8 + 20, SAVE: 3, BETWEEN: 2, EVALUATE: 35, END: 10}
    )
    assert sum(each.seconds for each in spent) == pytest.approx(100)
    assert spent[0].what == EVALUATE
    assert spent[0].share == pytest.approx(0.35)


def test_what_a_restart_costs_is_said_apart() -> None:
    again = {"train/attempt": curve((100, 30, 1), (200, 55, 2))}
    assert _seconds(trained(points=again))[ANEW] == pytest.approx(5)


def test_a_pause_between_two_commands_is_no_start() -> None:
    """The command was given again 4 of the 5 s after the last step."""
    again = {"train/attempt": curve((100, 30, 1), (200, 55, 2))}
    tags = {"gammaray.event.20231114T221354Z.resumed": "the command was given again"}
    found = _seconds(trained(points=again, tags=tags))
    assert found[PAUSE] == pytest.approx(4)
    assert found[ANEW] == pytest.approx(1)


def test_an_evaluation_between_steps_is_no_saving() -> None:
    between = {"eval/rows": curve((100, 33, 1000), (200, 90, 1000))}
    found = _seconds(trained(points=between))
    assert found[SAVE] == pytest.approx(3)
    assert found[EVALUATE] == pytest.approx(2 + 35)


def test_a_run_without_a_step_only_started() -> None:
    assert _seconds(record(status="FAILED")) == {START: 100}


def test_a_run_that_was_lost_ends_where_it_was_last_heard_of() -> None:
    """Its last point is of 55 s, its last event of 70."""
    tags = {"gammaray.event.20231114T221430Z.failed": "worker 1 died"}
    run = record(status="RUNNING", points={"train/loss": curve((9, 55, 1.0))}, tags=tags)
    assert _seconds(run) == {START: 70}
