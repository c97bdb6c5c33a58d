"""What a run measured, as its tracker knows it.

Enters: a run, a prefix of names, samples. Leaves: the last value of each metric by then.
"""

from pipeline.tracking.search import check_exists
from pipeline.tracking.tracker import RunRef, connect, read_history, refusals


def last_measures(ref: RunRef, prefix: str, samples: int) -> dict[str, float]:
    """Of each metric named `prefix`... the last value by so many samples, which are MLflow's steps.

    Raises `UserError` when the tracker does not answer, or has no such run.
    """
    check_exists(ref.uri)
    with refusals(ref.uri, f"give run {ref.run_id}"):
        names = connect(ref.uri).get_run(ref.run_id).data.metrics
    points = read_history(ref, sorted(name for name in names if name.startswith(prefix)))
    by_then = {
        name: [value for at, value in each if at <= samples] for name, each in points.items()
    }
    return {name: values[-1] for name, values in by_then.items() if values}
