"""What was measured, task by task: lines of a table, and results in the form of CLIP_benchmark.

Enters: metrics by name. Leaves: `Result`s. Must not know: how they were measured, where they go.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.config.schema import Config, LinearProbeTask
from pipeline.evaluate.retrieval import KS

LANGUAGE = "en"  # CLIP_benchmark's default: the data do not say theirs
WAYS = {"text_to_image": "image_retrieval", "image_to_text": "text_retrieval"}


class Line(NamedTuple):
    """A measure: a share, its standard deviation over draws, and what chance gives."""

    metric: str
    value: float
    spread: float | None = None
    chance: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One task on one set: `metrics` by CLIP_benchmark's names, `lines` for people."""

    task: str
    dataset: str
    metrics: dict[str, float]
    lines: tuple[Line, ...]

    def to_json(self, model: str, checkpoint: str) -> dict[str, Any]:
        """Give it as CLIP_benchmark's `eval` writes it, and its `build` reads it."""
        return {
            "dataset": self.dataset,
            "model": model,
            "pretrained": checkpoint,
            "task": self.task,
            "metrics": self.metrics,
            "language": LANGUAGE,
        }


def subjects(config: Config) -> list[str]:
    """Say what `config` has measured, in words, in the order of `results`."""
    val, evaluate = _name(config.data.val or ""), config.evaluate
    if config.task is not None:
        return [f"{config.task.kind} of {val}"]
    found = []
    if evaluate.retrieval:
        anew = "" if evaluate.rerank is None else f", the best {evaluate.rerank} re-ranked"
        found.append(f"retrieval of {val}{anew}")
    found += [f"zero-shot of {task.column}" for task in evaluate.zero_shot]
    for task in evaluate.linear_probe:
        shots = "".join(f"{count} shots, " for count in sorted(task.shots))
        found.append(f"probe of {task.column} ({shots}all rows)")
    return found or ["how the modalities lie"]


def results(config: Config, metrics: Mapping[str, float]) -> list[Result]:
    """Give the results of a suite, by the config it was measured under.

    Classification is named by the set and its column, few-shot also by the rows a class.
    """
    return list(_results(config, metrics))


def _results(config: Config, metrics: Mapping[str, float]) -> Iterator[Result]:
    val = _name(config.data.val or "")
    if config.task is not None:
        yield _task(config.task.kind, val, metrics)
        return
    for kind, task in (("retrieval", "zeroshot_retrieval"),
                       ("retrieval_reranked", "reranked_retrieval")):  # fmt: skip
        if f"{kind}/text_to_image_chance_at_1" in metrics:
            yield _retrieval(task, val, _under(kind, metrics))
    for task in config.evaluate.zero_shot:
        found = _under(f"zero_shot/{task.column}", metrics)
        if found:
            yield _zero_shot(f"{val}:{task.column}", found)
    for task in config.evaluate.linear_probe:
        found = _under(f"linear_probe/{task.column}", metrics)
        if found:
            dataset = f"{_name(task.test) if task.test else val}:{task.column}"
            yield from _probes(task, dataset, found)


def _name(path: str) -> str:
    """The last two parts of a path or URL: what people call the set."""
    return "/".join(path.partition("?")[0].rstrip("/").split("/")[-2:])


def _under(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics below a prefix, by the rest of their names."""
    return {
        name.removeprefix(f"{prefix}/"): value
        for name, value in metrics.items()
        if name.startswith(f"{prefix}/")
    }


def _task(kind: str, dataset: str, metrics: Mapping[str, float]) -> Result:
    found = _under(kind, metrics)
    lines = [Line("accuracy", found["accuracy"], chance=found["chance"])]
    lines += [Line(name, value) for name, value in found.items() if name.startswith("recall/")]
    return Result(task=kind, dataset=dataset, metrics=found, lines=tuple(lines))


def _retrieval(task: str, dataset: str, found: Mapping[str, float]) -> Result:
    metrics = {
        f"{theirs}_recall@{k}": found[f"{way}_recall_at_{k}"]
        for way, theirs in WAYS.items()
        for k in KS
    }
    lines = [
        Line(
            f"{way.replace('_', ' ')} R@{k}",
            found[f"{way}_recall_at_{k}"],
            chance=found[f"{way}_chance_at_{k}"],
        )
        for way in WAYS
        for k in KS
    ]
    return Result(task=task, dataset=dataset, metrics=metrics, lines=tuple(lines))


def _zero_shot(dataset: str, found: Mapping[str, float]) -> Result:
    metrics = {"acc1": found["accuracy"]}
    if "top_5_accuracy" in found:
        metrics["acc5"] = found["top_5_accuracy"]
    metrics["mean_per_class_recall"] = found["mean_class_accuracy"]
    lines = (
        Line("accuracy", found["accuracy"], chance=found["chance"]),
        Line("mean class accuracy", found["mean_class_accuracy"], chance=found["chance"]),
    )
    return Result(task="zeroshot_classification", dataset=dataset, metrics=metrics, lines=lines)


def _probes(task: LinearProbeTask, dataset: str, found: Mapping[str, float]) -> Iterator[Result]:
    """The few-shot probes, fewest first, and the full one, whose `fewshot_k` is -1."""
    for shots in sorted(task.shots):
        value, spread = (found[f"{shots}_shots/{name}"] for name in ("accuracy", "spread"))
        yield Result(
            task="linear_probe",
            dataset=dataset,
            metrics={"lp_acc1": value, "lp_acc1_std": spread, "fewshot_k": shots},
            lines=(Line(f"accuracy, {shots} shots", value, spread, found["chance"]),),
        )
    yield Result(
        task="linear_probe",
        dataset=dataset,
        metrics={"lp_acc1": found["accuracy"], "fewshot_k": -1},
        lines=(Line("accuracy, all rows", found["accuracy"], chance=found["chance"]),),
    )
