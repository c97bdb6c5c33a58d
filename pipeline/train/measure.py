"""What `gammaray evaluate` measures of a run, and where it keeps what it found.

With `--suite all` also what the run's config does not name: few-shot probes, and the runs that were
fine-tuned from it, each by its own task. Enters: a run. Leaves: `Evaluation`s for the driver; of
what it measured, files beside the run and points, figures and files in MLflow.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config.load import override_values, parse_config
from pipeline.config.schema import Config, DataConfig, LinearProbeTask, SourceConfig
from pipeline.data.layout import read_catalog, read_classes
from pipeline.errors import UserError
from pipeline.evaluate.probe import SHOTS
from pipeline.evaluate.report import Result, results
from pipeline.evaluate.suite import Sample, Suite, TaskSample
from pipeline.tracking import tracker
from pipeline.train.figures import draw_sample
from pipeline.train.preflight import prepare_evaluation
from pipeline.train.store import META, RunFolder, RunRecord, list_runs

SUITE = "suite"  # the folder of results, of artifacts, and the prefix of metrics
WHERE = ("cluster.", "tracking.")  # what is overridden for the fine-tuned runs too
_REMEDY = "name the set with evaluate.linear_probe"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A checkpoint of a run, and what it is to be measured by."""

    folder: RunFolder
    record: RunRecord
    config: Config
    checkpoint: str
    suite: Suite

    @property
    def name(self) -> str:
        """The run's name: that of its folder."""
        return _name(self.folder)

    @property
    def mlflow(self) -> tracker.RunRef:
        """Its MLflow run, at the URI the config has now (a server may move)."""
        uri = tracker.tracking_uri(self.config.tracking.uri, self.config.cluster.storage)
        return tracker.RunRef(uri=uri, run_id=self.record.mlflow_run_id)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What an evaluation found, or why it failed."""

    asked: Evaluation
    metrics: dict[str, float]
    sample: Sample | TaskSample | None
    failure: str | None = None

    @property
    def results(self) -> list[Result]:
        """The same, task by task; none if it failed."""
        return [] if self.failure is not None else results(self.asked.config, self.metrics)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The results in the form of CLIP_benchmark's output."""
        return [each.to_json(self.asked.name, self.asked.checkpoint) for each in self.results]


def _name(folder: RunFolder) -> str:
    return folder.path.rsplit("/", 1)[-1]


def samples_at(folder: RunFolder, checkpoint: str) -> int:
    """How many samples a checkpoint that is there has seen."""
    meta = folder.read_text(f"{checkpoint}/{META}")
    assert meta is not None, "the checkpoint was read"
    return json.loads(meta)["progress"]["samples"]


def ask(
    folder: RunFolder, record: RunRecord, config: Config, checkpoint: str | None = None
) -> Evaluation:
    """Ask for what `config` names, of the run's newest checkpoint or the named one.

    Raises `UserError` when there is none, or the rows or resources are lacking.
    """
    chosen = folder.checkpoint(checkpoint)
    suite = prepare_evaluation(config, record)
    return Evaluation(folder=folder, record=record, config=config, checkpoint=chosen, suite=suite)


def ask_all(
    folder: RunFolder,
    record: RunRecord,
    config: Config,
    checkpoint: str | None,
    overrides: Sequence[str],
    say: Say,
) -> list[Evaluation]:
    """Ask for all that the run can be measured by: the run itself first, then those tuned from it.

    What is left out is told to `say`, with the reason. Of the `overrides`, which `config` has,
    those of cluster and tracking hold for the other runs too. Raises `UserError` as `ask`, for the
    run itself.
    """
    asked = [ask(folder, record, _with_probes(config, say), checkpoint)]
    where = [override for override in overrides if override.startswith(WHERE)]
    for tuned, its in _tuned_from(folder, say):
        try:
            values = override_values(its.config, where)
            asked.append(ask(tuned, its, parse_config(values, tuned.url)))
        except UserError as error:
            say(f"run {_name(tuned)} is left out: {error}")
    return asked


def _with_probes(config: Config, say: Say) -> Config:
    """`config` with a probe, few-shot and full, of each zero-shot column that has none."""
    if config.task is not None:
        return config
    probed = {task.column for task in config.evaluate.linear_probe}
    more = []
    for task in config.evaluate.zero_shot:
        if task.column in probed:
            continue
        try:
            path, split = _training_set(config, task.column)
            more.append(
                LinearProbeTask(column=task.column, train=path, train_split=split, shots=SHOTS)
            )
        except UserError as error:
            say(f"no probe of {task.column}: {error}")
    probes = (*config.evaluate.linear_probe, *more)
    evaluate = config.evaluate.model_copy(update={"linear_probe": probes})
    return config.model_copy(update={"evaluate": evaluate})


def _training_set(config: Config, column: str) -> tuple[str, str]:
    """Path and split of training rows with labels to fit a probe to. Raises `UserError` without."""
    sources = config.data.train
    found, refused = [], []
    for source in sources:
        try:
            found.append(_labelled_rows(config.data, source, column))
        except UserError as error:
            refused.append(error)
    if len(found) > 1:
        raise UserError(
            f"data.train: {len(found)} of its {len(sources)} sources can be probed, and one is "
            f"wanted; {_REMEDY}"
        )
    if not found:
        raise UserError("; ".join(map(str, refused)))
    return found[0]


def _labelled_rows(data: DataConfig, source: SourceConfig, column: str) -> tuple[str, str]:
    """Path and split of a source that a probe can be fitted to. Raises `UserError` of any other."""
    if source.image_column or source.caption_column:
        raise UserError(f"data.train: names columns of its own, data.val has others; {_REMEDY}")
    split = source.split or data.train_split
    catalog = read_catalog(
        source.path, "data.train", data.image_column, data.caption_column, [column], split
    )
    if source.path == data.val and not catalog.sources[0].columns.split:
        raise UserError(f"data.train: {source.path} is data.val too; {_REMEDY}")
    if len(read_classes(catalog, column)) < 2:
        raise UserError(f"data.train: '{column}' has fewer than two labels there; {_REMEDY}")
    return source.path, split


def _tuned_from(start: RunFolder, say: Say) -> Iterator[tuple[RunFolder, RunRecord]]:
    """The runs beside `start` that begin with it, or with one that does."""
    storage, _, _ = start.url.rpartition("/")
    begun: dict[str, list[tuple[RunFolder, RunRecord]]] = {}
    for folder in list_runs(storage):
        try:
            record = folder.read_record()
        except UserError as error:
            say(f"run {_name(folder)} is left out: {error}")
            continue
        init = record and record.config["model"].get("init")
        if record and init:
            begun.setdefault(init.rstrip("/"), []).append((folder, record))
    waiting = begun.pop(start.url.rstrip("/"), [])
    while waiting:
        folder, record = waiting.pop(0)
        yield folder, record
        waiting += begun.pop(folder.url, [])


def keep(measured: Measured, first: Evaluation) -> None:
    """Keep what was measured of one run, unless it failed.

    Its results, a file each, go to the folder of the `first` run, where those of the same name are
    replaced and others stay, and to that one's MLflow run. Its own MLflow run gets `suite/...`
    metrics at the samples its checkpoint has seen, and figures. A tracker that does not answer is
    only warned of. Raises `UserError` when the folder cannot be written.
    """
    if measured.failure is not None:
        return
    files = {_file_name(each): json.dumps(each, indent=1) + "\n" for each in measured.records}
    try:
        first.folder.filesystem.create_dir(f"{first.folder.path}/{SUITE}")
        for name, text in files.items():
            first.folder.write_text(f"{SUITE}/{name}", text)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"{first.folder.url}/{SUITE}: cannot be written ({error}); mend its permissions, or "
            "make room"
        ) from error
    asked = measured.asked
    points = {f"{SUITE}/{name}": value for name, value in measured.metrics.items()}
    tracker.log_metrics(asked.mlflow, samples_at(asked.folder, asked.checkpoint), points)
    with _suite_for(asked.mlflow) as folder:
        draw_sample(measured.sample, folder)
    with _suite_for(first.mlflow) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)


@contextmanager
def _suite_for(run: tracker.RunRef) -> Iterator[Path]:
    """A folder whose files become artifacts of the MLflow run, under `suite/`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / SUITE
        folder.mkdir()
        yield folder
        tracker.log_artifacts(run, Path(temporary))


def _file_name(record: dict[str, Any]) -> str:
    """A name of its own for each result."""
    shots = record["metrics"].get("fewshot_k", -1)
    parts = [record["dataset"], record["model"], record["task"]]
    if shots > 0:
        parts.append(f"{shots}_shots")
    return re.sub(r"[^\w\-.]+", "_", "_".join(parts)) + ".json"
