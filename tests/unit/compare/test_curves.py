import numpy as np
import pytest

from pipeline.compare.curves import Course, at, band, common_end
from tests.unit.compare.runs import RECALL, course


def _curve(*points: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = zip(*points, strict=True) if points else ((), ())
    return np.array(x), np.array(y)


def test_time_is_the_sum_of_steps_times_their_mean_duration() -> None:
    """Logged every other step, then another number of workers: 2 x 1 s, 2 x 3 s, 1 x 0.5 s."""
    run = Course(
        points={
            "train/step": [(10, 2.0), (20, 4.0), (25, 5.0)],
            "train/step_s": [(10, 1.0), (20, 3.0), (25, 0.5)],
            "train/world_size": [(10, 1.0), (20, 1.0), (25, 4.0)],
            RECALL: [(5, 0.1), (15, 0.2), (25, 0.3)],
        }
    )
    assert run.seconds == 8.5
    assert run.worker_seconds == 2 + 6 + 4 * 0.5
    assert run.samples == 25
    seconds, values = run.over_time(RECALL)
    assert seconds.tolist() == [1.0, 5.0, 8.5]
    assert values.tolist() == [0.1, 0.2, 0.3]
    assert [part.tolist() for part in run.over_samples(RECALL)] == [[5, 15, 25], [0.1, 0.2, 0.3]]


def test_a_run_without_a_clock_has_no_time_and_no_cost() -> None:
    run = Course(points={"train/step": [], "train/step_s": [], "train/world_size": [],
                         RECALL: [(5, 0.1)]})  # fmt: skip
    assert run.seconds is None
    assert run.worker_seconds is None
    assert len(run.over_time(RECALL)[0]) == 0
    assert course(0.5, 0.1, 0.2, workers=4).worker_seconds == 4.0


@pytest.mark.parametrize(
    ("x", "value"), [(10, 1.0), (15, 2.0), (20, 3.0), (9.9, None), (20.1, None)]
)
def test_between_points_a_curve_is_straight_and_outside_there_is_none(
    x: float, value: float | None
) -> None:
    assert at(_curve((10, 1), (20, 3)), x) == value
    assert at(_curve(), x) is None


def test_curves_end_together_where_the_first_ends() -> None:
    assert common_end([_curve((1, 0), (30, 0)), _curve((1, 0), (20, 0))]) == 20
    assert common_end([_curve((1, 0)), _curve()]) is None
    assert common_end([]) is None


def test_a_band_is_where_all_curves_are() -> None:
    """At 20, 25, 30 one curve has 2, 2.5, 3, the other 4, 5, 6: mean 3, 3.75, 4.5, sd gap/sqrt2."""
    found = band([_curve((10, 1), (30, 3)), _curve((20, 4), (25, 5), (30, 6), (40, 9)), _curve()])
    assert found is not None
    assert found.x.tolist() == [20, 25, 30]
    assert found.mean.tolist() == [3.0, 3.75, 4.5]
    assert found.spread == pytest.approx(np.array([2, 2.5, 3]) / 2**0.5)
    alone = band([_curve((1, 5))])
    assert alone is not None
    assert alone.spread.tolist() == [0.0]
    assert band([_curve()]) is None
