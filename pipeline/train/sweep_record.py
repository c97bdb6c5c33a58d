"""What is kept of a sweep beside its runs: STORAGE/NAME/sweep.json."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.config.schema import resolve_path
from pipeline.errors import UserError
from pipeline.tracking.tracker import RunRef
from pipeline.train.store import RunFolder

RECORD = "sweep.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRecord:
    """The keys that it varies, its own MLflow run, and the runs that were stopped early."""

    keys: list[str]
    mlflow_uri: str
    mlflow_run_id: str
    stopped: list[str]

    @property
    def run(self) -> RunRef:
        """The sweep's own MLflow run, the parent of its runs."""
        return RunRef(uri=self.mlflow_uri, run_id=self.mlflow_run_id)


def read_sweep(folder: RunFolder) -> SweepRecord | None:
    """The record of the sweep in a folder; None where there is none. Raises `UserError`."""
    try:
        text = folder.read_text(RECORD)
        return None if text is None else SweepRecord(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{folder.url}/{RECORD}: not a sweep's record ({error}); remove it, or use another name"
        ) from error


def write_sweep(folder: RunFolder, record: SweepRecord) -> None:
    """Keep the record of a sweep in its folder."""
    folder.filesystem.create_dir(folder.path, recursive=True)
    folder.write_text(RECORD, json.dumps(asdict(record), indent=1))


def open_sweep(name: str) -> SweepRecord | None:
    """The record of the sweep at STORAGE/NAME; None where there is none."""
    storage, _, last = resolve_path(name.rstrip("/"), Path.cwd()).rpartition("/")
    return read_sweep(RunFolder.of(storage, last))
