"""All that a report is made of: a run as its tracker has it, with its points and files.

Enters: where the run is. Leaves: `Record`. Must not know: pages, pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.tracking.artifacts import Reading, read_files, read_points
from pipeline.tracking.search import Tracked, read_runs
from pipeline.tracking.tracker import RunRef

FILES = (".png", ".json", ".txt", ".yaml", ".tsv")
MOST_BYTES = 16 * 2**20  # of a file: a page that browsers open


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A run. `lacking` says why there are no files, if they could not be read."""

    run: Tracked
    points: Mapping[str, Sequence[Reading]]
    files: Mapping[str, bytes]
    lacking: str | None = None

    def curve(self, metric: str) -> Sequence[Reading]:
        """Its readings; none where it was not logged."""
        return self.points.get(metric, ())

    def text(self, path: str) -> str:
        """A file as text; empty where it is not there."""
        return self.files.get(path, b"").decode(errors="replace")

    @property
    def evaluated(self) -> dict[str, float]:
        """The last evaluation's metrics, as the evaluation names them."""
        return {
            name.removeprefix("eval/"): value
            for name, value in self.run.metrics.items()
            if name.startswith("eval/")
        }


def read_record(ref: RunRef) -> Record:
    """Read a run. Raises `UserError` when the tracker does not answer, or has no such run."""
    (run,) = read_runs([ref])
    names = [name for name in run.metrics if not name.startswith("system/")]
    try:
        files, lacking = read_files(ref, FILES, MOST_BYTES), None
    except UserError as error:
        files, lacking = {}, str(error)
    return Record(run=run, points=read_points(ref, names), files=files, lacking=lacking)
