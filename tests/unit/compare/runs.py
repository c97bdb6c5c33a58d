"""Runs as a tracker would have them, made of a few numbers."""

from typing import Any

from pipeline.compare.curves import CLOCK, Course
from pipeline.compare.measure import LOSS
from pipeline.tracking.search import Tracked
from pipeline.tracking.tracker import RunRef

RECALL = "eval/retrieval/text_to_image_recall_at_1"


def tracked(
    name: str,
    seed: int = 0,
    *,
    status: str = "FINISHED",
    tags: dict[str, str] | None = None,
    metrics: dict[str, float] | None = None,
    **params: Any,
) -> Tracked:
    """A run; of parameters' names `__` stands for a dot."""
    given = {key.replace("__", "."): str(value) for key, value in params.items()}
    return Tracked(
        ref=RunRef(uri="http://nowhere", run_id=f"id-of-{name}"),
        experiment="losses",
        name=name,
        status=status,
        params={"name": name, "train.seed": str(seed), **given},
        tags=tags or {},
        metrics=metrics or {},
    )


def course(step_s: float, *values: float, workers: int = 1, batch: int = 10) -> Course:
    """A step of `batch` samples for each of the values, which are of recall."""
    places = [batch * number for number in range(1, len(values) + 1)]
    clock = [
        [(place, float(number)) for number, place in enumerate(places, 1)],
        [(place, step_s) for place in places],
        [(place, float(workers)) for place in places],
    ]
    points = dict(zip(CLOCK, clock, strict=True))
    return Course(points={**points, RECALL: list(zip(places, values, strict=True)), LOSS: []})
