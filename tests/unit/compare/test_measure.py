import math
import random
import time
from typing import Any

import pytest

from pipeline.compare.curves import Course
from pipeline.compare.group import group_runs
from pipeline.compare.measure import (
    Comparison,
    Spread,
    chance_of,
    choose_metrics,
    compare,
    direction,
    pareto_front,
    spread_of,
)
from pipeline.errors import UserError
from pipeline.tracking.search import Tracked
from tests.unit.compare.runs import RECALL, course, tracked


def _compare(*runs: tuple[Tracked, Course]) -> Comparison:
    groups = group_runs([run for run, _ in runs])
    return compare(groups, [RECALL], {run.ref.run_id: way for run, way in runs})


def _run(name: str, way: Course, *, loss: str = "a", **other: Any) -> tuple[Tracked, Course]:
    metrics = {RECALL: way.points[RECALL][-1][1]} if way.points[RECALL] else {}
    return tracked(name, metrics=metrics, loss__kind=loss, **other), way


@pytest.mark.parametrize(
    ("name", "better"),
    [
        (RECALL, "higher"),
        ("eval/zero_shot/shape/accuracy", "higher"),
        ("eval/linear_probe/color/5_shots/accuracy", "higher"),
        ("eval/linear_probe/color/5_shots/spread", None),
        ("eval/retrieval/text_to_image_chance_at_1", None),
        ("train/loss", "lower"),
        ("eval/rows", None),
        ("system/cpu_utilization_percentage", None),
    ],
)
def test_a_metrics_name_says_what_is_better(name: str, better: str | None) -> None:
    assert direction(name) == better


@pytest.mark.parametrize(
    ("name", "chance"),
    [
        (RECALL, "eval/retrieval/text_to_image_chance_at_1"),
        ("eval/retrieval/image_to_text_recall_at_10", "eval/retrieval/image_to_text_chance_at_10"),
        ("eval/zero_shot/a/b/accuracy", "eval/zero_shot/a/b/chance"),
        ("eval/zero_shot/shape/mean_class_accuracy", "eval/zero_shot/shape/chance"),
        ("eval/zero_shot/shape/top_5_accuracy", None),
        ("eval/linear_probe/color/5_shots/accuracy", "eval/linear_probe/color/chance"),
        ("eval/vqa/accuracy", "eval/vqa/chance"),
        ("train/loss", None),
    ],
)
def test_chance_is_logged_beside_its_metric(name: str, chance: str | None) -> None:
    assert chance_of(name) == chance


@pytest.mark.parametrize(
    ("chances", "found"), [((0.002, 0.002), 0.002), ((0.002, 0.001), None), ((0.002, None), None)]
)
def test_chance_is_said_where_it_is_the_same_everywhere(
    chances: tuple[float | None, ...], found: float | None
) -> None:
    way = course(1.0, 0.1)
    runs = [
        tracked(
            f"run{seed}",
            seed,
            metrics={RECALL: 0.1}
            | ({} if chance is None else {"eval/retrieval/text_to_image_chance_at_1": chance}),
        )
        for seed, chance in enumerate(chances)
    ]
    runs.append(tracked("killed", 9, status="KILLED"))
    assert _compare(*((run, way) for run in runs)).chance.get(RECALL) == found


def test_spread_is_the_sample_standard_deviation() -> None:
    """Of 1, 2, 4: mean 7/3, squared distances 16/9 + 1/9 + 25/9 = 42/9, half of it 7/3."""
    found = spread_of([1.0, None, 2.0, 4.0])
    assert found is not None
    assert found == (pytest.approx(7 / 3), pytest.approx(math.sqrt(7 / 3)), 3)
    assert spread_of([5.0]) == Spread(5.0, None, 1)
    assert spread_of([None]) is None


def test_final_and_best_and_equal_samples_and_equal_time() -> None:
    """B's steps take twice A's time and B's runs are one step shorter.

    All reach 20 samples, where A has 0.5 and 0.3; all reach 2 s: of A that is the end of step 2.
    """
    found = _compare(
        _run("a0", course(1.0, 0.1, 0.5, 0.4), seed=0),
        _run("a1", course(1.0, 0.2, 0.3, 0.6), seed=1),
        _run("b0", course(1.0, 0.1, 0.2, workers=2), loss="b"),
    )
    a, b = (each.results[RECALL] for each in found.groups)
    assert (found.samples[RECALL], found.seconds[RECALL]) == (20.0, 2.0)
    assert a.final == (pytest.approx(0.5), pytest.approx(0.1 * math.sqrt(2)), 2)
    assert a.best == (pytest.approx(0.55), pytest.approx(0.05 * math.sqrt(2)), 2)
    assert a.at_samples == (pytest.approx(0.4), pytest.approx(0.1 * math.sqrt(2)), 2)
    assert a.at_seconds == a.at_samples
    assert b.final == b.best == b.at_samples == b.at_seconds == (pytest.approx(0.2), None, 1)
    assert [each.cost for each in found.groups] == [(3.0, 0.0, 2), (4.0, None, 1)]
    assert found.groups[0].members[0].best(RECALL).samples == 20  # pyright: ignore
    assert found.front(RECALL) == ["A"]
    assert found.differs == ("loss.kind",)
    assert found.warnings == ("B has one run that counts: its spread is not known.",)


def test_no_mean_of_the_runs_that_happen_to_have_been_measured_early() -> None:
    """Evaluated once, at the end: at A's time, B has not been measured yet."""
    slow = course(2.0, 0.1, 0.2)
    slow = Course(points={**slow.points, RECALL: slow.points[RECALL][-1:]})
    found = _compare(_run("a", course(1.0, 0.1, 0.2)), _run("b", slow, loss="b"))
    assert found.seconds[RECALL] == 2.0
    assert found.groups[1].results[RECALL].at_seconds is None
    assert found.groups[1].results[RECALL].at_samples == (0.2, None, 1)


def test_unfinished_runs_are_said_and_are_in_no_mean() -> None:
    nothing = Course(points={**course(1.0).points})
    found = _compare(
        _run("whole", course(1.0, 0.2, 0.4)),
        _run("killed", course(1.0, 0.9), status="KILLED"),
        _run("failed", nothing, status="FAILED"),
        _run("going on", course(1.0, 0.9), status="RUNNING"),
        _run("unmeasured", nothing),
    )
    (only,) = found.groups
    assert [member.why_not for member in only.members] == [
        None,
        "stopped, at 10 samples",
        "failed, at 0 samples",
        "not finished, at 10 samples",
        "has none of the metrics",
    ]
    assert only.results[RECALL].final == (0.4, None, 1)
    assert found.samples[RECALL] == 20
    assert found.warnings[0] == (
        "4 of 5 runs are in no mean: killed stopped, at 10 samples; failed failed, at 0 samples; "
        "going on not finished, at 10 samples, and 1 more (comparison.md)."
    )


def test_code_that_is_not_the_same_is_warned_of() -> None:
    runs = [
        _run(name, course(1.0, 0.5), seed=seed, tags={"mlflow.source.git.commit": name * 20})
        for seed, name in enumerate("ab")
    ]
    assert _compare(*runs).warnings == (
        f"The runs are of 2 commits of the code: {'a' * 10}, {'b' * 10}.",
    )


def test_metrics_are_chosen_that_all_groups_have() -> None:
    both = {
        "eval/zero_shot/shape/accuracy": 0.1,
        "eval/retrieval/image_to_text_recall_at_1": 0.1,
        RECALL: 0.1,
        "eval/retrieval/text_to_image_recall_at_5": 0.1,
        "eval/retrieval/text_to_image_chance_at_1": 0.1,
        "eval/rows": 9.0,
        "train/loss": 1.0,
    }
    one = tracked("a", loss__kind="a", metrics={**both, "eval/vqa/accuracy": 0.1})
    other = tracked("b", loss__kind="b", metrics=both)
    dead = tracked("c", loss__kind="c", status="FAILED")
    assert choose_metrics(group_runs([one, other, dead]), []) == [
        RECALL,
        "eval/retrieval/image_to_text_recall_at_1",
        "eval/zero_shot/shape/accuracy",
    ]
    blind = tracked("d", loss__kind="d", metrics={"train/loss": 1.0})
    assert choose_metrics(group_runs([one, blind]), []) == ["train/loss"]
    assert choose_metrics(group_runs([dead]), []) == []
    assert choose_metrics(group_runs([one, blind]), ["eval/rows"]) == ["eval/rows"]


def test_a_metric_that_no_run_has_is_refused_with_the_nearest() -> None:
    groups = group_runs([tracked("a", metrics={RECALL: 0.1})])
    with pytest.raises(UserError, match=rf"--metric: no run has 'recall_at_1'; .*{RECALL}"):
        choose_metrics(groups, ["recall_at_1"])


def test_the_front_is_what_no_other_beats() -> None:
    """c is dearer and worse than b, d as good as b and dearer; e equals a."""
    places = {"a": (1.0, 0.2), "b": (2.0, 0.5), "c": (3.0, 0.4), "d": (2.5, 0.5), "e": (1.0, 0.2)}
    assert pareto_front(places, "higher") == ["a", "b", "e"]
    assert pareto_front(places, "lower") == ["a", "e"]
    assert pareto_front({}, "higher") == []


def test_the_front_of_many_is_found_soon() -> None:
    """As by comparing each with each, which for so many more would take an hour."""
    draw = random.Random(0)
    few = {str(n): (draw.randrange(30) / 1.0, draw.randrange(30) / 1.0) for n in range(300)}
    beaten = {
        name
        for name, (cost, quality) in few.items()
        for other in few.values()
        if other[0] <= cost and other[1] >= quality and other != (cost, quality)
    }
    assert pareto_front(few, "higher") == [name for name in few if name not in beaten]
    many = {str(n): (draw.random(), draw.random()) for n in range(100_000)}
    # Those no other beats, the hardest case: nothing can be left out early.
    many |= {f"best-{n}": (2.0 + n, 2.0 + n) for n in range(100_000)}
    began = time.process_time()
    front = pareto_front(many, "higher")
    assert time.process_time() - began < 20
    assert front[-100_000:] == [f"best-{n}" for n in range(100_000)]
