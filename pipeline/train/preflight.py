"""Everything that can be known before a cluster is asked for: facts, plan, and all that is wrong.

Enters: a `Config`. Leaves: `Prepared`, or one `UserError` that lists every problem found.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from pipeline.config.load import parse_config
from pipeline.config.plan import Facts, Plan, find_contradictions, make_plan, resize
from pipeline.config.schema import Config, LinearProbeTask, WorkersRange
from pipeline.data.answers import AnswerList
from pipeline.data.augment import read_synonyms
from pipeline.data.clean import clean_captions
from pipeline.data.decode import Asked
from pipeline.data.layout import (
    Catalog,
    are_labels,
    count_answers,
    count_labels,
    mix,
    read_captions,
    read_catalog,
    read_classes,
)
from pipeline.data.text import Tokenizer, load_tokenizer, train_tokenizer
from pipeline.errors import Problem, UserError, raise_problems
from pipeline.evaluate.probe import HELD_BACK
from pipeline.evaluate.suite import Probed, RowSet, Suite, make_recipe, row_sets
from pipeline.tracking.tracker import check_reachable, tracking_uri
from pipeline.train.start import check_start
from pipeline.train.store import RunFolder, RunRecord
from pipeline.train.task import build_module

LOG = logging.getLogger(__name__)
LABELS = {"entailment": 3, "reasoning": 2}  # of these tasks
TOKENIZER_CAPTIONS = 100_000  # captions a tokenizer is trained on, at most
MOST_WARMUP = 1 / 3  # of the run: beyond, the rate is hardly ever at its peak
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A config with all that follows from it.

    `sizes`: config and plan by the number of workers; `config` and `plan` are those of the most.
    `began` is the plan of a continued run as it began, with another number of workers; `asked` is
    of a task with answers.
    """

    config: Config
    plan: Plan
    sizes: Mapping[int, tuple[Config, Plan]]
    began: Plan | None
    tokenizer: Tokenizer
    catalog: Catalog
    suite: Suite | None
    asked: Asked | None


class _Problems:
    """Collects problems; a part that raises `UserError` is noted and gives None."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def attempt(self, place: str, part: Callable[[], T]) -> T | None:
        try:
            return part()
        except UserError as error:
            where, separator, message = str(error).partition(": ")
            is_path = separator and " " not in where
            self.found.append(
                Problem(place=where, message=message)
                if is_path
                else Problem(place=place, message=str(error))
            )
            return None


def prepare(config: Config, record: RunRecord | None = None) -> Prepared:
    """Check `config` against the data, the model, the storage and the tracker, and plan it.

    `record` is that of a run which is continued: it has a tokenizer, and its number of workers may
    be another. Raises `UserError` with every problem found, not only the first.
    """
    problems = _Problems()
    problems.found.extend(_check_resources(config))
    tokenizer = None if record is None else record.tokenizer
    base = config if record is None else _as_it_began(config, record)
    contradictions = find_contradictions(base)
    problems.found.extend(contradictions)
    problems.attempt("cluster.storage", lambda: _check_places(config))
    problems.attempt("tracking.uri", lambda: _check_tracker(config))
    data = config.data
    catalog = problems.attempt("data.train", lambda: read_train(config))
    asked = None if record is None else record.asked
    if catalog is not None and has_answers(config) and asked is None:
        asked = problems.attempt("task.answers", lambda: _read_asked(config, catalog))
    val = problems.attempt("data.val", lambda: read_val(config))
    classes = problems.attempt("evaluate.zero_shot", lambda: _read_classes(config, val))
    probed = problems.attempt("evaluate.linear_probe", lambda: _read_probed(config))
    if val is not None and asked is not None:
        problems.attempt("data.val", lambda: _check_answers(config, val, asked))
    if val is not None and config.task is None and config.evaluate.retrieval:
        problems.attempt("data.val", lambda: _warn_of_labels(config, val))
    if data.synonyms is not None:
        problems.attempt("data.synonyms", lambda: read_synonyms(data.synonyms))
    if config.model.init is not None and record is None:
        tokenizer = problems.attempt("model.init", lambda: check_start(config))
    if catalog is not None and tokenizer is None:
        tokenizer = problems.attempt("data.tokenizer", lambda: _make_tokenizer(config, catalog))
    facts = began = None
    sizes: dict[int, tuple[Config, Plan]] = {}
    if catalog is not None and tokenizer is not None and (asked or not has_answers(config)):
        facts = problems.attempt(
            "model", lambda: _find_facts(config, catalog, val, tokenizer, asked)
        )
    if facts is not None and not contradictions:
        began, more = make_plan(base, facts)
        problems.found.extend(more)
        sizes, more = _plan_sizes(config, base, began, facts)
        problems.found.extend(more)
    raise_problems(problems.found, "This run cannot start")
    if began is not None and began.warmup_samples > MOST_WARMUP * began.samples:
        LOG.warning(
            "optim.warmup_samples: is %d of the run's %d samples; a tenth of them is usual",
            began.warmup_samples,
            began.samples,
        )
    assert catalog is not None
    assert tokenizer is not None
    assert began is not None
    suite = None
    if val is not None:
        suite = _suite(config, tokenizer, val, classes or (), probed or {}, asked)
    config, plan = sizes[config.cluster.max_workers]
    return Prepared(
        config=config,
        plan=plan,
        sizes=sizes,
        began=began if began.workers != plan.workers else None,
        tokenizer=tokenizer,
        catalog=catalog,
        suite=suite,
        asked=asked,
    )


def _as_it_began(config: Config, record: RunRecord) -> Config:
    """`config` with the number of workers that the run began with."""
    workers = parse_config(record.config, "the run's record").cluster.workers
    return _with_workers(config, workers)


def _plan_sizes(
    config: Config, base: Config, began: Plan, facts: Facts
) -> tuple[dict[int, tuple[Config, Plan]], list[Problem]]:
    """Config and plan for each number of workers that the run may have; the problems of the first.

    A run begins with the plan of `base`, for its most workers.
    """
    sizes: dict[int, tuple[Config, Plan]] = {}
    for workers in range(config.cluster.min_workers, config.cluster.max_workers + 1):
        if workers == began.workers:
            sizes[workers] = _with_workers(base, workers), began
            continue
        sized = resize(base, workers, began)
        if problems := find_contradictions(sized):
            return sizes, problems
        # Steps of another size end elsewhere; the schedule goes by the length that was planned.
        plan = replace(make_plan(sized, facts)[0], samples=began.samples)
        sizes[workers] = sized, plan
    return sizes, []


def _with_workers(config: Config, workers: int | WorkersRange) -> Config:
    return config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"workers": workers})}
    )


def prepare_evaluation(config: Config, record: RunRecord) -> Suite:
    """Check what an evaluation under `config` of a run needs: rows, classes, resources; no more.

    Raises `UserError` with every problem found.
    """
    problems = _Problems()
    problems.found.extend(_check_resources(config))
    if config.data.val is None:
        problems.found.append(
            Problem(place="data.val", message="missing; give the rows to evaluate: data.val=FOLDER")
        )
    val = problems.attempt("data.val", lambda: read_val(config))
    classes = problems.attempt("evaluate.zero_shot", lambda: _read_classes(config, val))
    probed = problems.attempt("evaluate.linear_probe", lambda: _read_probed(config))
    if val is not None and record.asked is not None:
        asked = record.asked
        problems.attempt("data.val", lambda: _check_answers(config, val, asked))
    raise_problems(problems.found, "This evaluation cannot start")
    assert val is not None
    return _suite(config, record.tokenizer, val, classes or (), probed or {}, record.asked)


def _suite(
    config: Config,
    tokenizer: Tokenizer,
    val: Catalog,
    classes: tuple[tuple[str, ...], ...],
    probed: dict[RowSet, Probed],
    asked: Asked | None,
) -> Suite:
    return Suite(
        config=config.evaluate,
        task=None if config.task is None else config.task.kind,
        catalog=val,
        recipe=make_recipe(config, tokenizer, train=False, asked=asked),
        classes=classes,
        probed=probed,
        val=_val(config),
        ingest_cpus=config.cluster.ingest_cpus,
    )


def _check_resources(config: Config) -> list[Problem]:
    """On this machine only; a remote cluster is asked when it is reached."""
    if config.cluster.address != "local" or "RAY_ADDRESS" in os.environ:
        return []
    return lacking_resources(config, os.cpu_count() or 1, torch.cuda.device_count())


def lacking_resources(config: Config, cpus: float, gpus: float) -> list[Problem]:
    """What `cluster` asks for, with its fewest workers, beyond `cpus` and `gpus`."""
    cluster = config.cluster
    workers = cluster.min_workers
    wanted = workers * cluster.cpus_per_worker
    problems = []
    if wanted + cluster.ingest_cpus > cpus:
        problems.append(
            Problem(
                place="cluster.workers",
                message=f"{workers} workers at {cluster.cpus_per_worker:g} CPUs take "
                f"{wanted:g} of {cpus:g} CPUs and leave fewer than cluster.ingest_cpus "
                f"{cluster.ingest_cpus} for reading data; lower cluster.workers or "
                "cluster.cpus_per_worker (shares such as 0.5 are fine)",
            )
        )
    if workers * cluster.gpus_per_worker > gpus:
        problems.append(
            Problem(
                place="cluster.gpus_per_worker",
                message=f"{workers} workers need as many GPUs; {gpus:g} found: lower "
                "cluster.workers, or set cluster.gpus_per_worker=0 to train on CPUs",
            )
        )
    return problems


def _check_places(config: Config) -> None:
    RunFolder.of(config.cluster.storage, config.name).check_writable()


def _check_tracker(config: Config) -> None:
    storage, uri = config.cluster.storage, config.tracking.uri
    if uri != "embedded" or "://" not in storage:  # or else it is a contradiction
        check_reachable(tracking_uri(uri, storage))


def has_answers(config: Config) -> bool:
    """Whether rows have answers: of every task but the one that makes its own of captions."""
    return config.task is not None and config.task.kind != "assignment"


def _answer_column(config: Config) -> str | None:
    return config.task.answer_column if config.task is not None and has_answers(config) else None


def _read_asked(config: Config, catalog: Catalog) -> Asked:
    """The closed list of answers, and how many pictures a row has. Raises `UserError`."""
    task = config.task
    assert task is not None, "it is asked for of tasks only"
    is_open = task.kind == "vqa"
    pictures = {source.columns.pictures for source in catalog.sources}
    if len(pictures) > 1 or (is_open and pictures != {1}):
        raise UserError(
            f"data.train: rows of {catalog.root} have {sorted(pictures)} pictures; all sources "
            "must have as many, of vqa one: leave a source out, or name another image column"
        )
    if task.answers is not None:
        names = _read_answer_file(task.answers)
        counts = Counter({name: len(names) - place for place, name in enumerate(names)})
        most = len(names)
    else:
        counts = count_answers(catalog)
        most = task.max_answers if is_open else len(counts)
    answers = AnswerList.of(counts, most, is_open=is_open)
    if len(answers.names) < 2:
        raise UserError(
            f"task.answers: {len(answers.names)} different answer(s) in "
            f"{task.answers or catalog.root}; a task needs two or more: name another column with "
            "task.answer_column=..."
        )
    wanted = LABELS.get(task.kind, len(answers.names))
    if len(answers.names) != wanted:
        listed = ", ".join(f"{name!r} {count:,}" for name, count in counts.most_common(8))
        raise UserError(
            f"task.answers: {task.kind} has {wanted} labels, and {len(answers.names)} are given "
            f"({listed}); list those that count in a file, task.answers=FILE: rows with another "
            "are dropped then, and counted"
        )
    if not is_open and task.answers is None and len(answers.names) > task.max_answers:
        raise UserError(
            f"task.answer_column: {catalog.root} has {len(answers.names):,} different labels, more "
            f"than task.max_answers {task.max_answers}; name the column of labels, or raise it"
        )
    return Asked(answers=answers, pictures=pictures.pop())


def _warn_of_labels(config: Config, val: Catalog) -> None:
    captions = read_captions(val, config.evaluate.max_rows)
    different = len(set(captions))
    if are_labels(different, len(captions)):
        LOG.warning(
            "data.val: %d captions of evaluation rows, %d different: these are labels, and recall "
            "says little, since another row with the same caption counts as a wrong answer; set "
            "evaluate.retrieval=false, and name a column in evaluate.zero_shot or linear_probe",
            len(captions),
            different,
        )


def _check_answers(config: Config, val: Catalog, asked: Asked) -> None:
    """Whether evaluation's rows are of the same kind. Raises `UserError`."""
    pictures = val.sources[0].columns.pictures
    if pictures != asked.pictures:
        raise UserError(
            f"data.val: its rows have {pictures} picture(s), training's {asked.pictures}; name "
            "another image column, or give other rows"
        )
    found = count_answers(val)
    listed = {name for name in found if asked.answers.numbers([name])[0] >= 0}
    unknown = sorted(set(found) - listed)
    if not listed or (unknown and not asked.answers.is_open and config.task and
                      config.task.answers is None):  # fmt: skip
        raise UserError(
            f"data.val: its answers {unknown[:5]} are not among {list(asked.answers.names[:8])}, "
            "those of the training rows: name another column with task.answer_column=..., or list "
            "those that count in a file, task.answers=FILE"
        )


def _read_answer_file(path: str) -> list[str]:
    if not path.endswith(".json"):
        return _read_class_file(path, "task.answers")
    try:
        names = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"task.answers: cannot read {path} as JSON ({error})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"task.answers: {path} must hold a list of texts, one for each answer")
    return names


def read_train(config: Config) -> Catalog:
    """All sources of training data. Raises `UserError`."""
    data = config.data
    catalogs = [
        read_catalog(
            source.path,
            "data.train",
            source.image_column or data.image_column,
            source.caption_column or data.caption_column,
            split=source.split or data.train_split,
            answer=_answer_column(config),
        )
        for source in data.train
    ]
    return mix(catalogs, [source.weight for source in data.train], "data.train")


def read_val(config: Config) -> Catalog | None:
    """The evaluation data, if there is any, with the columns of its tasks. Raises `UserError`."""
    data = config.data
    if data.val is None:
        return None
    labels = [task.column for task in config.evaluate.zero_shot]
    return read_catalog(
        data.val,
        "data.val",
        data.image_column,
        data.caption_column,
        labels,
        data.val_split,
        _answer_column(config),
    )


def _read_classes(config: Config, val: Catalog | None) -> tuple[tuple[str, ...], ...]:
    if val is None:
        return ()
    classes = []
    for index, task in enumerate(config.evaluate.zero_shot):
        place = f"evaluate.zero_shot.{index}.classes"
        present = read_classes(val, task.column)
        names = _read_class_file(task.classes, place) if task.classes else present
        unknown = sorted(set(present) - set(names))
        if unknown:
            raise UserError(
                f"{place}: column '{task.column}' of data.val holds {unknown[:5]}, which "
                f"{task.classes} does not list; add them, one class a line"
            )
        if len(names) < 2:
            raise UserError(
                f"{place}: column '{task.column}' of data.val has {len(names)} class(es); "
                "classification needs two or more"
            )
        classes.append(tuple(names))
    return tuple(classes)


def _val(config: Config) -> RowSet:
    return RowSet("val", config.data.val or "", config.data.val_split)


def _read_probed(config: Config) -> dict[RowSet, Probed]:
    """The sets that linear probes are fitted to and tested on, with their labels."""
    data, tasks, val = config.data, config.evaluate.linear_probe, _val(config)
    places: dict[RowSet, str] = {val: "data.val"}
    labels: dict[RowSet, list[str]] = {}
    for index, task in enumerate(tasks):
        for rows in row_sets(task, val):
            places.setdefault(rows, f"evaluate.linear_probe.{index}.{rows.role}")
            labels.setdefault(rows, []).append(task.column)
    probed = {}
    for rows, named in labels.items():
        columns = tuple(dict.fromkeys(named))
        catalog = read_catalog(
            rows.path, places[rows], data.image_column, data.caption_column, columns, rows.split
        )
        most = config.evaluate.max_rows if rows == val else catalog.num_rows
        probed[rows] = Probed(catalog=catalog, max_rows=most, labels=columns)
    for index, task in enumerate(tasks):
        train, test = (probed[rows].catalog for rows in row_sets(task, val))
        _check_probe(f"evaluate.linear_probe.{index}", task, train, test)
    return probed


def _check_probe(place: str, task: LinearProbeTask, train: Catalog, test: Catalog) -> None:
    """Whether there is enough to fit and to test, and nothing in both. Raises `UserError`."""
    fitted, tested = ({shard.path for shard in each.shards if any(shard.row_groups)}
                      for each in (train, test))  # fmt: skip
    splits = [set(each.sources[0].columns.split or ()) for each in (train, test)]
    shared = sorted(fitted & tested)
    if shared and (not all(splits) or splits[0] & splits[1]):
        raise UserError(
            f"{place}: it would be tested on rows that it is fitted to, those of {shared[0]}: name "
            "others with train and test, or a part of each with train_split and test_split"
        )
    known, asked = count_labels(train, task.column), count_labels(test, task.column)
    least = min(sum(min(count, shots) for count in known.values())
                for shots in (known.total(), *task.shots))  # fmt: skip
    if len(known) < 2 or least < HELD_BACK or not known.keys() & asked.keys():
        raise UserError(
            f"{place}: of column '{task.column}' there are {known.total():,} rows of {len(known)} "
            f"label(s) to fit to, {least:,} of them at the fewest shots, and {asked.total():,} of "
            f"{len(asked)} to test on, with {len(known.keys() & asked.keys())} label(s) in both; "
            f"two labels, {HELD_BACK} rows and one label in both are the least: name another "
            "column or other rows"
        )


def _read_class_file(path: str, place: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{place}: cannot read {path} as UTF-8 text ({error})") from error
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _make_tokenizer(config: Config, catalog: Catalog) -> Tokenizer:
    if config.data.tokenizer != "train":
        return load_tokenizer(config.data.tokenizer)
    captions = read_captions(catalog, TOKENIZER_CAPTIONS)
    if config.data.clean_captions:
        captions = clean_captions(captions)
    if not captions:
        raise UserError(
            f"data.train: the caption column of {catalog.root} holds no text; name another with "
            "data.caption_column=..."
        )
    return train_tokenizer(captions, config.data.vocab_size)


def _find_facts(
    config: Config,
    catalog: Catalog,
    val: Catalog | None,
    tokenizer: Tokenizer,
    asked: Asked | None,
) -> Facts:
    model = config.model
    if model.pretrained or model.image.pretrained or model.text.pretrained:
        module = build_module(config, tokenizer, asked)
    else:
        with torch.device("meta"):
            module = build_module(config, tokenizer, asked)
    return Facts(
        train_rows=catalog.num_rows,
        epoch_rows=catalog.rows_an_epoch,
        row_groups=sum(len(shard.row_groups) for shard in catalog.shards),
        val_rows=val.num_rows if val is not None else 0,
        vocab_size=tokenizer.vocab_size,
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        embed_dim=module.towers.embed_dim,
    )
