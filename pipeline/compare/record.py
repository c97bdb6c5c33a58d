"""A comparison as an MLflow run of its own, with its files as artifacts.

Enters: a comparison and a folder of files. Leaves: the run's `RunRef`.
"""

import getpass
from pathlib import Path

from pipeline.compare.find import COMPARED
from pipeline.compare.measure import Comparison
from pipeline.errors import UserError
from pipeline.tracking.tracker import RunRef, close_run, open_run, upload

NAME = 200  # characters
IDS = 5000  # characters of a tag


def record(comparison: Comparison, folder: Path) -> RunRef:
    """Keep all files of `folder` in a new run of the first run's experiment.

    It names the compared runs in a tag and changes none of them: a run has room for one parent, and
    may be in many comparisons. Raises `UserError` when the tracker refuses.
    """
    first = comparison.groups[0].members[0].run
    whats = [each.group.what for each in comparison.groups]
    ids = [member.run.ref.run_id for each in comparison.groups for member in each.members]
    lines = [
        f"- {each.group.title}: {', '.join(member.run.name for member in each.members)}"
        for each in comparison.groups
    ]
    run = open_run(
        first.ref.uri,
        first.experiment,
        f"compare {' / '.join(whats)}"[:NAME],
        params={},
        tags={
            COMPARED: ",".join(ids)[:IDS],
            "mlflow.note.content": "\n".join(lines)[:IDS],
            "mlflow.source.name": "gammaray compare",
            "mlflow.user": getpass.getuser(),
        },
        run_id=None,
    )
    try:
        upload(run, folder)
    except UserError:
        close_run(run, "FAILED")
        raise
    close_run(run, "FINISHED")
    return run


def record_in(run: RunRef, folder: Path) -> RunRef:
    """Keep all files of `folder` in the run of the sweep that was compared.

    Raises `UserError` when the tracker refuses.
    """
    upload(run, folder)
    return run
