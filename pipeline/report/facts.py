"""What a run shows, in words and numbers: measures beside chance, speed, rows, geometry.

Enters: a run's record. Leaves: rows of tables. Must not know: HTML.
"""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pipeline.evaluate.headline import headline
from pipeline.report.record import Record
from pipeline.report.spent import windows
from pipeline.tracking.artifacts import Reading

ERRORS = 3  # standard errors by which a measure must lie above chance
GEOMETRY = {
    "modality_gap": "distance of the two modalities' means: 0 where they share one place",
    "alignment": "mean squared distance of a pair: lower is closer",
    "uniformity_image": "of images: about -4 is spread out, 0 is one point",
    "uniformity_text": "of captions: about -4 is spread out, 0 is one point",
    "cross_modal_asymmetry": "image j to caption k against image k to caption j: 0 is symmetric",
    "in_modal_asymmetry": "distances among images against those among their captions: 0 is alike",
    "orthogonality_image": "mean squared cosine of shared and independent features of images",
    "orthogonality_text": "the same of captions",
    "independent_share_image": "share of the independent features in all variance of images",
    "independent_share_text": "the same of captions",
}
PANELS: tuple[tuple[str, dict[str, str], bool], ...] = (
    ("Loss", {"": "train/loss"}, False),
    ("Parts of the loss", {"contrast": "train/contrastive_loss", "matching": "train/matching_loss",
                           "masked words": "train/masked_words_loss"}, False),
    ("Evaluation: recall at 1", {
        "text to image": "eval/retrieval/text_to_image_recall_at_1",
        "image to text": "eval/retrieval/image_to_text_recall_at_1",
        "text to image, re-ranked": "eval/retrieval_reranked/text_to_image_recall_at_1",
        "image to text, re-ranked": "eval/retrieval_reranked/image_to_text_recall_at_1"}, True),
    ("Accuracy in training", {"task": "train/task_accuracy", "matching": "train/matching_accuracy",
                              "masked words": "train/masked_words_accuracy"}, True),
    ("Logit scale", {"": "train/logit_scale"}, False),
    ("Norm of the gradient", {"": "train/grad_norm"}, False),
    ("Learning rate", {"": "train/learning_rate"}, False),
    ("Effective negatives", {"of an image": "train/effective_negatives_image",
                             "of a caption": "train/effective_negatives_text"}, False),
    ("Error of the prior (log of the rate)", {"of an image": "train/prior_rmse_image",
                           "of a caption": "train/prior_rmse_text"}, False),
)  # fmt: skip
SPEED: tuple[tuple[str, dict[str, str], bool], ...] = (
    ("Samples per second", {"": "train/samples_per_s"}, False),
    ("Share of time waiting for data", {"": "train/data_wait_share"}, True),
)


class Measure(NamedTuple):
    """A share beside what chance gives."""

    label: str
    value: float
    chance: float


class Panel(NamedTuple):
    """A chart: lines by their labels."""

    title: str
    lines: dict[str, list[Reading]]
    is_share: bool


class Skipped(NamedTuple):
    """Rows of one reason: how many there are, and how often they were met in training."""

    reason: str
    rows: int | None
    times: int | None


def measures(record: Record) -> list[Measure]:
    """What a person looks at first."""
    return [Measure(*row) for row in headline(record.evaluated)]


def verdict(record: Record) -> str:
    """Whether it worked, in a sentence."""
    found = measures(record)
    if not found:
        why = (
            "its config names no data.val"
            if record.run.params.get("data.val") in (None, "None")
            else "it still runs, or was lost"
            if record.run.status == "RUNNING"
            else f"it ended before one, as {record.run.status}"
        )
        return f"Nothing says whether it learned: no evaluation was logged ({why})."
    rows = evaluated_rows(record) or 1
    low = [
        each.label
        for each in found
        if each.value - each.chance < ERRORS * math.sqrt(each.chance * (1 - each.chance) / rows)
    ]
    if not low:
        return "It learned: all measures lie clearly above chance."
    if len(low) == len(found):
        return "It did not learn: no measure lies clearly above chance."
    return f"It learned in part. Not clearly above chance: {'; '.join(low)}."


def evaluated_rows(record: Record) -> int | None:
    """On how many rows, or questions, it was measured."""
    for name, value in record.evaluated.items():
        if name == "rows" or name.endswith("/questions"):
            return int(value)
    return None


def panels(record: Record, wanted: tuple[tuple[str, dict[str, str], bool], ...]) -> list[Panel]:
    """Charts of what has at least two points."""
    found = []
    for title, metrics, is_share in wanted:
        lines = {label: list(record.curve(name)) for label, name in metrics.items()}
        lines = {label: points for label, points in lines.items() if len(points) > 1}
        if lines:
            found.append(Panel(title, lines, is_share))
    return found


def curves(record: Record) -> list[Panel]:
    """How training went, and its evaluations where there were several."""
    accuracies = {
        match[1].replace("_", " "): name
        for name in sorted(record.points)
        if (match := re.fullmatch(r"eval/(?:zero_shot/)?(.+)/accuracy", name))
        and not match[1].startswith("linear_probe")
    }
    first, *rest = PANELS
    evaluated = ("Evaluation: accuracy", accuracies, True)
    return panels(record, (first, evaluated, *rest))


def speed(record: Record) -> dict[str, str]:
    """Numbers of the whole run."""
    found: dict[str, str] = {}
    rates = [point.value for point in record.curve("train/samples_per_s")]
    if not rates:
        return found
    steps = [point.value for point in record.curve("train/step_s")]
    found["samples per second, median"] = f"{statistics.median(rates[1:] or rates):,.0f}"
    per_worker = [point.value for point in record.curve("train/samples_per_s_per_worker")]
    if per_worker:
        middle = statistics.median(per_worker[1:] or per_worker)
        found["the same, per worker"] = f"{middle:,.0f}"
    if steps:
        found["seconds a step, median"] = f"{statistics.median(steps[1:] or steps):.3g}"
    trained = windows(record)
    seconds = sum(window.seconds for window in trained)
    if seconds:
        waited = sum(window.seconds * window.waited for window in trained)
        found["of the steps' time, waiting for data"] = f"{waited / seconds:.1%}"
    return found


def rows(record: Record) -> dict[str, str]:
    """What is known of the data, by what it is."""
    last = record.run.metrics
    found = {f"{each.role} rows": f"{each.rows:,} in {each.source}, digest {each.digest}"
             for each in record.run.inputs}  # fmt: skip
    if not found and (first := record.text("plan.txt").partition("\n")[0]):
        found["training rows"] = first
    samples = max((points[-1].samples for points in record.points.values() if points), default=0)
    if samples:
        epochs = f", {last['train/epoch']:.2f} epochs" if "train/epoch" in last else ""
        found["rows trained on"] = f"{samples:,}{epochs}"
    for name, label in (
        ("data/cut_caption_share", "captions cut, too long for the model"),
        ("data/cleaned_caption_share", "captions mended by data.clean_captions"),
    ):
        if name in last:
            found[label] = f"{last[name]:.1%}"
    if questions := last.get("data/skipped_questions"):
        found["questions skipped"] = f"{questions:,.0f}"
    if (bad := _evaluation_bad(record.evaluated)) is not None:
        found["evaluation rows skipped"] = f"{bad:,.0f}"
    return found


def _evaluation_bad(evaluated: Mapping[str, float]) -> float | None:
    return next((value for name, value in evaluated.items()
                 if name.rpartition("/")[2] == "bad_rows"), None)  # fmt: skip


def skipped(record: Record) -> list[Skipped]:
    """Training rows that could not be used, by reason, the commonest first."""
    listed = Counter(
        line.partition("\t")[2] for line in record.text("dropped_rows.tsv").splitlines()
    )
    met = {
        name.removeprefix("data/bad_rows/"): int(value)
        for name, value in record.run.metrics.items()
        if name.startswith("data/bad_rows/") and not name.endswith("/all")
    }
    reasons = sorted(listed.keys() | met, key=lambda reason: (-listed[reason], reason))
    return [Skipped(reason, listed.get(reason), met.get(reason)) for reason in reasons]


def named_rows(record: Record, most: int = 5) -> list[str]:
    """The first of the rows that were skipped, as path:row group:row."""
    lines = record.text("dropped_rows.tsv").splitlines()[:most]
    return [line.replace("\t", "  ") for line in lines]


def geometry(record: Record) -> list[tuple[str, float, str]]:
    """How the modalities lie to each other: name, value, meaning."""
    return [
        (name.replace("_", " "), record.evaluated[f"geometry/{name}"], meaning)
        for name, meaning in GEOMETRY.items()
        if f"geometry/{name}" in record.evaluated
    ]


def all_measures(record: Record) -> list[tuple[str, float]]:
    """Every metric of the last evaluation but the geometry, and of `gammaray evaluate`."""
    return [
        (name, value)
        for name, value in sorted(record.run.metrics.items())
        if name.startswith(("eval/", "suite/")) and "/geometry/" not in name
    ]


def suite(record: Record) -> Iterator[tuple[str, str, str, str, float]]:
    """What `gammaray evaluate --suite all` found: model, task, data, metric, value."""
    for path in sorted(record.files):
        if path.startswith("suite/") and path.endswith(".json") and "confusion_" not in path:
            found = json.loads(record.text(path))
            shots = found["metrics"].get("fewshot_k", -1)
            few = f", {shots} shots" if shots > 0 else ""
            for name, value in found["metrics"].items():
                if name != "fewshot_k" and 0 <= value <= 1:
                    task = found["task"].replace("_", " ") + few
                    yield found["model"], task, found["dataset"], name, value
