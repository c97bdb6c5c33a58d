"""What a run has left with its tracker: its files, and metric points with their times.

Enters: a run. Leaves: bytes by path, readings by metric. Must not know: what they mean.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.tracking.tracker import RunRef, connect, refusals

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Reading(NamedTuple):
    """A value of a metric: at so many samples, logged at a time in ms since 1970."""

    samples: int
    ms: int
    value: float


def read_points(ref: RunRef, names: Sequence[str]) -> dict[str, list[Reading]]:
    """All readings of each metric, by samples.

    Raises `UserError` when the tracker does not answer, or has no such run.
    """
    with refusals(ref.uri, f"give the metrics of run {ref.run_id}"):
        client = connect(ref.uri)
        return {
            name: sorted(
                Reading(point.step, point.timestamp, point.value)
                for point in client.get_metric_history(ref.run_id, name)
            )
            for name in names
        }


def read_files(ref: RunRef, suffixes: Sequence[str], most_bytes: int) -> dict[str, bytes]:
    """The run's files that end so and are no larger, by path.

    Raises `UserError` when the tracker, or the place where it keeps files, does not give them.
    """
    with refusals(ref.uri, f"give the files of run {ref.run_id}"):
        client = connect(ref.uri)
        wanted = [path for path, size in _walk(client, ref.run_id, None)
                  if path.endswith(tuple(suffixes)) and size <= most_bytes]  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            return {
                path: Path(client.download_artifacts(ref.run_id, path, folder)).read_bytes()
                for path in wanted
            }


def _walk(client: "MlflowClient", run_id: str, folder: str | None) -> Iterator[tuple[str, int]]:
    for each in client.list_artifacts(run_id, folder):
        if each.is_dir:
            yield from _walk(client, run_id, each.path)
        else:
            yield each.path, each.file_size or 0
