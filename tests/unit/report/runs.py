"""Records of runs as a tracker would give them, made of a few numbers."""

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from pipeline.report.record import Record
from pipeline.tracking.artifacts import Reading
from pipeline.tracking.search import Tracked
from pipeline.tracking.tracker import Input, RunRef

BEGAN = 1_700_000_000  # s: 2023-11-14 22:13:20 UTC
ENDED = BEGAN + 100


def picture(width: int = 8, height: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def curve(*points: tuple[int, float, float]) -> list[Reading]:
    """Points of (samples, seconds since the start, value)."""
    return [Reading(samples, int(1000 * (BEGAN + at)), value) for samples, at, value in points]


def record(
    name: str = "tiny",
    *,
    status: str = "FINISHED",
    points: dict[str, list[Reading]] | None = None,
    metrics: dict[str, float] | None = None,
    tags: dict[str, str] | None = None,
    params: dict[str, Any] | None = None,
    files: Mapping[str, str | bytes] | None = None,
    inputs: tuple[Input, ...] = (),
    lacking: str | None = None,
) -> Record:
    """A run; metrics are the last values of `points` and `metrics`."""
    last = {metric: each[-1].value for metric, each in (points or {}).items() if each}
    run = Tracked(
        ref=RunRef(uri="http://mlflow:5000", run_id="abc123"),
        experiment="losses",
        name=name,
        status=status,
        params={"data.val": "/val", "model.kind": "two_tower", **(params or {})},
        tags={"gammaray.storage": f"runs/{name}", **(tags or {})},
        metrics={**last, **(metrics or {})},
        began=1000 * BEGAN,
        ended=None if status == "RUNNING" else 1000 * ENDED,
        inputs=inputs,
    )
    given = {path: each.encode() if isinstance(each, str) else each
             for path, each in (files or {}).items()}  # fmt: skip
    return Record(run=run, points=points or {}, files=given, lacking=lacking)


def trained(**more: Any) -> Record:
    """Two windows of ten steps; a save between; an evaluation and the end after them.

    Steps take 1 s from 20 to 30 s, a fifth waiting, and 2 s from 35 to 55 s; it saves for 3 s of
    the 5 between; the evaluation ends at 90 s.
    """
    points = {
        "train/step": curve((100, 30, 10), (200, 55, 20)),
        "train/step_s": curve((100, 30, 1.0), (200, 55, 2.0)),
        "train/data_wait_share": curve((100, 30, 0.2), (200, 55, 0.0)),
        "train/saving_seconds": curve((100, 30, 0.0), (200, 55, 3.0)),
        "train/samples_per_s": curve((100, 30, 100.0), (200, 55, 50.0)),
        "train/loss": curve((100, 30, 3.0), (200, 55, 2.0)),
        "train/attempt": curve((100, 30, 1), (200, 55, 1)),
        "train/world_size": curve((100, 30, 2), (200, 55, 2)),
        "eval/rows": curve((200, 90, 1000)),
        "eval/zero_shot/shape/accuracy": curve((200, 90, 0.9)),
        "eval/zero_shot/shape/chance": curve((200, 90, 0.5)),
        "eval/geometry/modality_gap": curve((200, 90, 0.25)),
        "eval/bad_rows": curve((200, 90, 4)),
    }
    return record(points={**points, **more.pop("points", {})}, **more)
