"""Sweeps: what runs one has, which of them are finished, and what became of it.

Enters: a config's values and the axes to vary. Leaves: `Sweep`, then `Ended`. A sweep's state is
that of its runs' folders: whoever starts it again runs those that are unfinished.

STORAGE/NAME/sweep.json   its MLflow run, and the runs that were stopped early for good
STORAGE/NAME-.../         its runs, as any others
"""

import getpass
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.compare.find import SWEEP
from pipeline.compare.measure import direction
from pipeline.config.load import override_values, parse_config
from pipeline.config.schema import Config, flatten
from pipeline.config.space import Axis, make_variants
from pipeline.errors import Problem, UserError, raise_problems
from pipeline.tracking import tracker
from pipeline.train import driver
from pipeline.train.lease import Lease, leased, wait_for_the_dead
from pipeline.train.preflight import prepare
from pipeline.train.store import RunFolder, changed_keys
from pipeline.train.sweep_record import SweepRecord, read_sweep, write_sweep
from pipeline.train.trials import Race, Trial, run_trials


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A sweep that can start. `config` is what all trials share, `race` of one that stops early."""

    name: str
    config: Config
    axes: tuple[Axis, ...]
    folder: RunFolder
    trials: tuple[Trial, ...]
    race: Race | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a sweep ended: its own MLflow run, those of its runs, and why some failed, by name."""

    run: tracker.RunRef
    runs: tuple[tracker.RunRef, ...]
    failures: Mapping[str, str]


def plan_sweep(
    values: Mapping[str, Any], source: str, axes: Sequence[Axis], metric: str | None
) -> Sweep:
    """Check and plan every run of the sweep. `metric` is what runs are stopped early by.

    Raises `UserError` with every problem of every run, each once.
    """
    config = parse_config(values, source)
    folder = RunFolder.of(config.cluster.storage, config.name)
    _check_place(folder, config, axes)
    _check_metric(config, metric)
    trials: list[Trial] = []
    found: dict[str, list[str]] = {}
    for variant in make_variants(config.name, axes):
        named = {**values, "name": variant.name}
        try:
            trials.append(_plan(parse_config(override_values(named, variant.overrides), source)))
        except UserError as error:
            for text in _problems_of(error):
                found.setdefault(text, []).append(variant.name)
    raise_problems(
        [Problem(place=_places(names), message=text) for text, names in found.items()],
        "This sweep cannot start",
    )
    return Sweep(
        name=config.name,
        config=config,
        axes=tuple(axes),
        folder=folder,
        trials=tuple(trials),
        race=_make_race(metric, trials),
    )


def run_sweep(sweep: Sweep, listen: driver.Listener, log_path: Path) -> Ended:
    """Run what is unfinished of the sweep. Raises `KeyboardInterrupt` when it was interrupted.

    `UserError` when another driver has taken it over. `close_sweep` ends its MLflow run.
    """
    say = driver.saying(listen)
    with leased(sweep.folder, say, "start another sweep with name=...") as lease:
        with driver.session(sweep.config, listen, log_path):
            state = _open(sweep)
            try:
                failures = _run(sweep, state, lease, say, log_path.parent)
            except BaseException:
                if not lease.is_lost:
                    tracker.close_run(state.run, "KILLED")
                raise
        runs = [
            tracker.RunRef(uri=state.mlflow_uri, run_id=record.mlflow_run_id)
            for trial in sweep.trials
            if (record := trial.folder.read_record()) is not None
        ]
        for run in runs:  # one may have been begun on its own, or under another parent
            tracker.set_tags(run, {"mlflow.parentRunId": state.mlflow_run_id})
        return Ended(run=state.run, runs=tuple(runs), failures=failures)


def close_sweep(ended: Ended) -> None:
    """End the sweep's MLflow run."""
    tracker.close_run(ended.run, "FAILED" if ended.failures else "FINISHED")


def _run(
    sweep: Sweep, state: SweepRecord, lease: Lease, say: Callable[[str], None], log_folder: Path
) -> dict[str, str]:
    stopped = set(state.stopped) if sweep.race is not None else set()
    left = [each for each in sweep.trials if not each.is_finished and each.name not in stopped]
    say(f"{len(left)} of {len(sweep.trials)} runs are to be done")
    if not left:
        return {}
    for trial in left:
        wait_for_the_dead(trial.folder)

    def stop(name: str) -> None:
        stopped.add(name)
        write_sweep(sweep.folder, replace(state, stopped=sorted(stopped)))

    # A race is also with those that are finished.
    asked = left if sweep.race is None else sweep.trials
    failures = run_trials(
        asked,
        race=sweep.race,
        stopped=frozenset(stopped),
        parent=state.mlflow_run_id,
        folder=sweep.folder,
        log_folder=log_folder,
        say=say,
        stop=stop,
        is_lost=lambda: lease.is_lost,
    )
    if lease.is_lost:
        raise UserError(
            f"{sweep.folder.url}: another driver has taken this sweep over; leave it to that one, "
            "or stop it and give the same command again"
        )
    lost = [each.name for each in left if each.name not in stopped | failures.keys()
            and not _is_finished(each.folder)]  # fmt: skip
    if lost:
        raise KeyboardInterrupt
    return failures


def _plan(config: Config) -> Trial:
    folder = RunFolder.of(config.cluster.storage, config.name)
    record = folder.read_record()
    if record is not None:
        before = flatten(parse_config(record.config, "the run's record"))
        if changes := changed_keys(before, flatten(config)):
            raise UserError(
                f"{folder.url}: was started with another config: {'; '.join(changes)}; go on with "
                "the old values, or start another sweep with name=..."
            )
        if record.is_finished:
            return Trial(config=config, folder=folder, is_finished=True, samples=0, first=0)
    plan = prepare(config, record).plan
    every = config.evaluate.every
    first = plan.samples if every == "end" else every * plan.global_batch
    return Trial(config=config, folder=folder, is_finished=False, samples=plan.samples, first=first)


def _check_place(folder: RunFolder, config: Config, axes: Sequence[Axis]) -> None:
    if folder.read_record() is not None:
        raise UserError(
            f"name: {folder.url} is a run, not a sweep; name the sweep otherwise with name=..."
        )
    state = read_sweep(folder)
    keys = [axis.key for axis in axes]
    if state is not None and state.keys != keys:
        raise UserError(
            f"name: sweep '{config.name}' varies {', '.join(state.keys)}, now it is to vary "
            f"{', '.join(keys)}; vary the same keys (of other values, if you like), or start "
            "another sweep with name=..."
        )


def _check_metric(config: Config, metric: str | None) -> None:
    if metric is None:
        return
    if not metric.startswith("eval/") or direction(metric) is None:
        raise UserError(
            f"--asha: {metric!r} is no metric of an evaluation that is better when it is higher or "
            "lower; give one such as eval/retrieval/text_to_image_recall_at_1"
        )
    if config.evaluate.every == "end" or config.data.val is None:
        raise UserError(
            "--asha: the runs are evaluated at their end only, when there is nothing left to stop; "
            "set data.val, and evaluate.every to a number of steps"
        )


def _make_race(metric: str | None, trials: Sequence[Trial]) -> Race | None:
    better = None if metric is None else direction(metric)
    if metric is None or better is None:
        return None
    longest = max(trial.samples for trial in trials)
    first = max(trial.first for trial in trials)
    return Race(metric=metric, better=better, first=max(1, first), longest=max(1, longest, first))


def _problems_of(error: UserError) -> list[str]:
    """What a run's error lists, or the error itself."""
    _, *lines = str(error).splitlines()
    listed = [re.sub(r"^\s+\d+\. ", "", line) for line in lines if re.match(r"\s+\d+\. ", line)]
    return listed or [str(error)]


def _places(names: Sequence[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _open(sweep: Sweep) -> SweepRecord:
    """Make the sweep's MLflow run, or go on with it."""
    state = read_sweep(sweep.folder)
    config = sweep.config
    run = tracker.open_run(
        tracker.tracking_uri(config.tracking.uri, config.cluster.storage),
        config.tracking.experiment,
        sweep.name,
        params={axis.key: json.dumps(axis.values) for axis in sweep.axes},
        tags={
            SWEEP: sweep.name,
            "gammaray.storage": sweep.folder.url,
            "mlflow.source.name": "gammaray sweep",
            "mlflow.user": getpass.getuser(),
        },
        run_id=None if state is None else state.mlflow_run_id,
    )
    state = SweepRecord(
        keys=[axis.key for axis in sweep.axes],
        mlflow_uri=run.uri,
        mlflow_run_id=run.run_id,
        stopped=[] if state is None else state.stopped,
    )
    write_sweep(sweep.folder, state)
    return state


def _is_finished(folder: RunFolder) -> bool:
    record = folder.read_record()
    return record is not None and record.is_finished
