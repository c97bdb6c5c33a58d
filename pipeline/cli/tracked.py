"""Runs that are meant by what was typed: folders, or names and ids that a tracker knows."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.runs import find_run

if TYPE_CHECKING:
    from pipeline.tracking.tracker import RunRef

DEFAULT = "runs/mlflow.db"  # the tracker of runs whose config names none


def is_folder(run: str) -> bool:
    """Whether a run is given by its folder or URL, not by its name."""
    return "/" in run or Path(run).is_dir()


def run_of_folder(run: str) -> "RunRef":
    """The MLflow run of a folder. Raises `UserError` where there is none."""
    _, record = find_run(run)
    return record.mlflow


def tracker_of(folders: "Sequence[RunRef]" = ()) -> str:
    """The tracker of the folders, else of the environment, else the one of the default storage."""
    if folders:
        return folders[0].uri
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DEFAULT).resolve()}"
