"""What to do next, from what a run has shown.

Enters: a run's record. Leaves: `Step`s, the most pressing first. Must not know: pages.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline.report.events import events
from pipeline.report.record import Record
from pipeline.tracking.artifacts import Reading

WAITED = 0.1  # share of the steps' time
BAD, CUT = 0.01, 0.05  # shares of rows, of captions
FIRST = re.compile(r"recall_at_1$|/accuracy$")  # what a person looks at first
RISING = 0.02  # of a measure's value, between its last two evaluations


class Step(NamedTuple):
    """What to do, why, and the command that does it, if one does."""

    what: str
    why: str
    command: str = ""


def next_steps(record: Record) -> list[Step]:
    """What to run or mend."""
    return [*_to_end(record), *_to_mend(record), *_to_learn_more(record), *_to_use(record)]


def _to_end(record: Record) -> Iterator[Step]:
    status = record.run.status
    if status == "FINISHED":
        return
    failures = [event.text for event in events(record) if event.kind == "failed"]
    why = f"The last failure: {failures[-1]}" if failures else "Nothing failed: it was stopped."
    if status == "RUNNING":
        yield Step(
            "See whether it still runs",
            "It is not closed: it is training, or its driver was killed. "
            + (why if failures else "The same command goes on with it."),
        )
    else:
        yield Step(
            "Go on with it: give the same command again",
            f"It ended as {status}. {why}",
            f"gammaray {_verb(record)} {_config(record)}",
        )


def _to_mend(record: Record) -> Iterator[Step]:
    last, params = record.run.metrics, record.run.params
    if skipped := last.get("train/nonfinite_steps", 0):
        yield Step(
            "Lower the learning rate, or warm up for longer",
            f"{skipped:,.0f} steps had a loss or gradient that was not finite.",
            _again(record, "calmer", f"optim.lr={_scaled(params.get('optim.lr'), 0.5)}"),
        )
    waited = [point.value for point in record.curve("train/data_wait_share")[1:]]
    share = sum(waited) / len(waited) if waited else 0.0
    if share >= WAITED:
        yield Step(
            "Feed the workers faster",
            f"They waited for data in {share:.0%} of the time of their steps. More cores "
            "for reading, or smaller pictures (gammaray data prepare), make it less.",
            _again(
                record,
                "faster",
                f"cluster.ingest_cpus={_scaled(params.get('cluster.ingest_cpus'), 2)}",
            ),
        )
    rows, bad = _samples(record), last.get("data/bad_rows/all", 0.0)
    if rows and bad / (rows + bad) >= BAD:
        source = next(
            (each.source for each in record.run.inputs if each.role == "training"), "PATH"
        )
        yield Step(
            "Look at the rows that were skipped",
            f"{bad:,.0f} of {rows + bad:,.0f} rows were unusable.",
            f"gammaray data inspect {shlex.quote(source)} --sheet sheet.png",
        )
    if (cut := last.get("data/cut_caption_share", 0.0)) >= CUT:
        yield Step(
            "Let captions be longer",
            f"{cut:.0%} of them were cut to {params.get('model.text.context_length')} tokens.",
            _again(
                record,
                "longer",
                f"model.text.context_length={_scaled(params.get('model.text.context_length'), 2)}",
            ),
        )
    yield from _to_enlarge(record)


def _to_enlarge(record: Record) -> Iterator[Step]:
    """The noise that local negatives add is (1 + rho/(b-1)) of the whole batch's, about."""
    last = record.run.metrics
    ratio = max(last.get(f"train/variance_ratio_{side}", 0.0) for side in ("image", "text"))
    workers = last.get("train/world_size", 1)
    try:
        local = int(record.run.params["train.global_batch"]) / workers
    except (KeyError, ValueError):
        return
    if workers > 1 and ratio > local - 1:
        yield Step(
            "Raise the local batch, or use loss.exchange",
            f"The ratio of variances is {ratio:.0f} and the local batch {local:.0f}: local "
            "negatives are a large part of the gradient's noise.",
            _again(
                record,
                "larger",
                f"train.global_batch={_scaled(record.run.params['train.global_batch'], 2)}",
            ),
        )


def _to_learn_more(record: Record) -> Iterator[Step]:
    folder, has_ended = _folder(record), record.run.status == "FINISHED"
    if not record.evaluated:
        if not has_ended and _is_given(record, "data.val"):
            return  # it will be, at its end
        yield Step(
            "Measure it",
            "No evaluation was logged, so nothing says whether it learned.",
            f"gammaray evaluate {folder} data.val=FOLDER",
        )
        return
    curves = _evaluated(record)
    rising = sum(points[-1].value > (1 + RISING) * points[-2].value for points in curves)
    if rising > len(curves) / 2:
        key = "train.samples" if _is_given(record, "train.samples") else "train.epochs"
        length = _scaled(record.run.params.get(key), 2)
        yield Step(
            "Train longer",
            f"{rising} of {len(curves)} measures rose by more than {RISING:.0%} between "
            "the last two evaluations.",
            _again(record, "longer", f"{key}={length}"),
        )
    has_suite = any(name.startswith("suite/") for name in record.run.metrics)
    if has_ended and not has_suite and "gammaray.task" not in record.run.tags:
        has_probes = any("_shots/" in name for name in record.run.metrics)
        lacking = "" if has_probes else "no probes of few rows, "
        yield Step(
            "Measure it by all it can be measured by",
            f"Only what its config names was measured: {lacking}none of the runs tuned from it.",
            f"gammaray evaluate {folder} --suite all",
        )
    if has_ended:
        seed = record.run.params.get("train.seed", "0")
        other = str(int(seed) + 1) if seed.isdigit() else "1"
        yield Step(
            "Learn how far seeds are apart",
            "One run does not say which differences are chance.",
            _again(record, f"{shlex.quote(record.run.name)}-s{other}", f"train.seed={other}; ")
            + f"gammaray compare {folder} {folder}-s{other}",
        )
    if not curves:
        yield Step(
            "Evaluate on the way",
            "It was evaluated once, so nothing says whether it still improved at its end.",
            _again(record, "watched", "evaluate.every=STEPS"),
        )


def _evaluated(record: Record) -> list[Sequence[Reading]]:
    """The curves of what a person looks at first, that have more than one point."""
    return [
        points
        for name, points in sorted(record.points.items())
        if name.startswith("eval/") and FIRST.search(name) and len(points) > 1
    ]


def _to_use(record: Record) -> Iterator[Step]:
    if record.run.status != "FINISHED":
        return
    folder = _folder(record)
    if "gammaray.task" in record.run.tags:
        yield Step(
            "Take its weights along",
            "Those of a fine-tuned run have one form.",
            f"gammaray export {folder} OUT --format safetensors",
        )
        return
    yield Step(
        "Use it in other libraries",
        "Weights, tokenizer and a model card.",
        f"gammaray export {folder} OUT",
    )
    if record.run.params.get("model.kind") == "fusion":
        yield Step(
            "Fine-tune it for a task",
            "A fusion model answers questions once it is tuned.",
            f"gammaray finetune CONFIG model.init={folder}",
        )


def _samples(record: Record) -> int:
    return max((points[-1].samples for points in record.points.values() if points), default=0)


def _folder(record: Record) -> str:
    return shlex.quote(record.run.tags.get("gammaray.storage", f"RUNS/{record.run.name}"))


def _verb(record: Record) -> str:
    return "finetune" if "gammaray.task" in record.run.tags else "train"


def _again(record: Record, name: str, change: str) -> str:
    """The command that makes such a run with something changed."""
    return f"gammaray {_verb(record)} {_config(record)} name={name} {change}"


def _config(record: Record) -> str:
    """The file with the run's whole config; of a folder at a URL, what was given to begin it."""
    folder = record.run.tags.get("gammaray.storage", "://")
    return "CONFIG" if "://" in folder else shlex.quote(f"{folder}/config.yaml")


def _is_given(record: Record, key: str) -> bool:
    return record.run.params.get(key, "None") != "None"


def _scaled(value: str | None, factor: float) -> str:
    try:
        found = float(value or "") * factor
    except ValueError:
        return "VALUE"
    return f"{found:.0f}" if found.is_integer() else f"{found:g}"
