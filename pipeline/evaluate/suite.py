"""All evaluations of a run in one call: metrics by name, and rows to look at."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.schema import Config, EvaluateConfig, LinearProbeTask
from pipeline.data.batches import Batch, eval_batches
from pipeline.data.decode import Asked, Recipe, View
from pipeline.data.layout import Catalog
from pipeline.data.text import Tokenizer
from pipeline.errors import RunStop
from pipeline.evaluate.embed import Embedded, Forward, Parts, embed_rows, gathered
from pipeline.evaluate.gallery import (
    ShownAnswer,
    ShownCaptions,
    ShownImages,
    classified_cases,
    retrieval_cases,
)
from pipeline.evaluate.probe import chance, few_shot, linear_probe
from pipeline.evaluate.rerank import Match, rerank
from pipeline.evaluate.retrieval import Ranks, rank_by_contrast, recalls
from pipeline.evaluate.tasks import Example, answer_rows, measure_answers, measure_assignment
from pipeline.evaluate.zero_shot import Confusion, class_embeddings, confusion, zero_shot
from pipeline.losses.structure import geometry, independent_geometry

GEOMETRY_ROWS = 1024  # the first of all
SAMPLE_ROWS = 400


class RowSet(NamedTuple):
    """Rows that a linear probe is fitted to (train) or tested on (test, or data.val's: val)."""

    role: str
    path: str
    split: str


def row_sets(task: LinearProbeTask, val: RowSet) -> tuple[RowSet, RowSet]:
    """What a probe is fitted to and what it is tested on; `val` is data.val."""
    test = val if task.test is None else RowSet("test", task.test, task.test_split)
    return RowSet("train", task.train, task.train_split), test


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """A set of rows of linear probes, how many of them are used, and the columns of labels."""

    catalog: Catalog
    max_rows: int
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """What is evaluated, on which rows; the same on every rank.

    `classes` gives the class names of each zero-shot task, in the order of `config.zero_shot`,
    `probed` the sets of the linear probes; `task` is the kind of a run that is measured by its
    answers alone.
    """

    config: EvaluateConfig
    catalog: Catalog
    recipe: Recipe
    classes: tuple[tuple[str, ...], ...]
    probed: Mapping[RowSet, Probed]
    val: RowSet
    ingest_cpus: float
    task: str | None = None


def make_recipe(
    config: Config, tokenizer: Tokenizer, *, train: bool, asked: Asked | None = None
) -> Recipe:
    """Give the data recipe of a config, for training or evaluation; `asked` of its task."""
    data = config.data
    second_view = None
    if train and config.structure.has_second_view:
        second = data.second_view
        second_view = View(
            crop_scale=second.crop_scale,
            flip=second.flip,
            augment_image=second.augment_image,
            augment_text=second.augment_text,
        )
    return Recipe(
        tokenizer=tokenizer,
        context_length=config.model.text.context_length,
        image_size=config.model.image.size,
        view=View(
            crop_scale=data.crop_scale,
            flip=data.flip,
            augment_image=data.augment_image,
            augment_text=data.augment_text,
        ),
        second_view=second_view,
        background=data.background,
        squeeze=data.squeeze,
        seed=config.train.seed,
        train=train,
        clean_captions=data.clean_captions,
        synonyms=data.synonyms,
        labels=() if train else tuple(task.column for task in config.evaluate.zero_shot),
        asked=asked,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Some matched pairs, to be drawn: embeddings [n, dim], and labels [n] of the first task.

    And right and wrong cases: `classified` of each zero-shot task's column, `images` and `captions`
    of retrieval; each empty where there is no such task. `confusions`, by column too, count all.
    """

    image: NDArray[np.float32]
    text: NDArray[np.float32]
    labels: list[str]
    classified: dict[str, list[ShownAnswer]]
    images: list[ShownImages]
    captions: list[ShownCaptions]
    confusions: dict[str, Confusion]


class TaskSample(NamedTuple):
    """Some answers of a task, right ones and wrong ones."""

    shown: list[ShownAnswer]


def run_suite(
    suite: Suite,
    model: Callable[..., Any],
    device: torch.device,
    world_size: int,
    rank: int,
    *,
    in_full: bool,
) -> tuple[dict[str, float], Sample | TaskSample]:
    """Give every metric, the same on all ranks, by names as retrieval/...; and some of the rows.

    `model` runs the forward of what is trained, which is a collective under ZeRO-3. `in_full`: with
    linear probes, which embed further sets, and with cases to be looked at.
    """
    side, batch = suite.recipe.image_size, suite.config.batch
    blank = (
        torch.zeros(batch, side, side, 3, dtype=torch.uint8),
        torch.full((batch, suite.recipe.context_length), suite.recipe.tokenizer.end).int(),
    )

    def read(catalog: Catalog, recipe: Recipe, max_rows: int) -> Iterator[Batch]:
        return eval_batches(
            catalog,
            recipe,
            max_rows=max_rows,
            world_size=world_size,
            rank=rank,
            batch_size=batch,
            ingest_cpus=suite.ingest_cpus,
        )

    if suite.task is not None:
        batches = read(suite.catalog, suite.recipe, suite.config.max_rows)
        return _run_task(suite, model, batches, blank, device)

    def forward(images: Tensor | None, tokens: Tensor | None) -> Parts:
        return model(images, tokens).parts

    def match(states: Tensor, tokens: Tensor) -> Tensor:
        return model(None, tokens, None, None, states).matching

    def embed(catalog: Catalog, labels: tuple[str, ...], max_rows: int, **keeps: bool) -> Embedded:
        batches = read(catalog, replace(suite.recipe, labels=labels), max_rows)
        return embed_rows(forward, batches, blank, device, **keeps)

    rows = embed(
        suite.catalog,
        suite.recipe.labels,
        suite.config.max_rows,
        keeps_states=suite.config.rerank is not None,
        keeps_pictures=in_full,
    )
    weights = _class_weights(suite, forward, device)
    ranks = rank_by_contrast(rows.image, rows.text, rows.owners) if suite.config.retrieval else None
    metrics = dict(_measure(suite, match, rows, weights, ranks, device))
    if in_full:
        found = {
            name: embed(each.catalog, each.labels, each.max_rows)
            for name, each in suite.probed.items()
        }
        metrics |= dict(_probe(suite, found, world_size, rank))
    return metrics, _sample(suite, rows, weights, ranks)


def _class_weights(suite: Suite, forward: Forward, device: torch.device) -> list[Tensor]:
    """The embeddings [classes, dim] of each zero-shot task's classes."""

    def embed_texts(tokens: Tensor) -> Tensor:
        found = forward(None, tokens).text
        assert found is not None, "it was given tokens"
        return found

    recipe = suite.recipe
    return [
        class_embeddings(
            embed_texts, classes, task.prompts, recipe.tokenizer, recipe.context_length, device
        )
        for task, classes in zip(suite.config.zero_shot, suite.classes, strict=True)
    ]


def _sample(suite: Suite, rows: Embedded, weights: list[Tensor], ranks: Ranks | None) -> Sample:
    """The first rows, and cases if pictures were kept."""
    tasks = suite.config.zero_shot
    labels = rows.labels[tasks[0].column] if tasks else [""] * len(rows.image)
    classified: dict[str, list[ShownAnswer]] = {}
    images: list[ShownImages] = []
    captions: list[ShownCaptions] = []
    confusions: dict[str, Confusion] = {}
    if rows.seen is not None:
        classified = {
            task.column: classified_cases(rows, rows.labels[task.column], classes, each)
            for task, classes, each in zip(tasks, suite.classes, weights, strict=True)
        }
        confusions = {
            task.column: confusion(rows.image, rows.labels[task.column], classes, each)
            for task, classes, each in zip(tasks, suite.classes, weights, strict=True)
        }
        if ranks is not None:
            images, captions = retrieval_cases(rows, ranks, suite.recipe.tokenizer)
    return Sample(
        image=rows.image[:SAMPLE_ROWS].numpy(),
        text=rows.text[rows.first_captions[:SAMPLE_ROWS]].numpy(),
        labels=labels[:SAMPLE_ROWS],
        classified=classified,
        images=images,
        captions=captions,
        confusions=confusions,
    )


def _run_task(
    suite: Suite,
    model: Callable[..., Any],
    batches: Iterator[Batch],
    blank: tuple[Tensor, Tensor],
    device: torch.device,
) -> tuple[dict[str, float], TaskSample]:
    """The metrics of a task, by its kind, and some answers, right and wrong."""
    recipe = suite.recipe
    if recipe.asked is None:
        metrics = measure_assignment(model, batches, blank, device)
        examples: list[Example] = []
        names: tuple[str, ...] = ()
    else:
        images, tokens = blank
        if recipe.pictures > 1:
            images = images[:, None].repeat(1, recipe.pictures, 1, 1, 1)
        found = answer_rows(
            lambda *inputs: model(*inputs).logits, batches, (images, tokens), device
        )
        metrics = measure_answers(found, recipe.asked.answers)
        examples, names = found.examples, recipe.asked.answers.names
    shown = [
        ShownAnswer(
            pictures=example.pictures.numpy(),
            text=recipe.tokenizer.decode(example.tokens.tolist()),
            said=names[example.said],
            answers=[names[number] if number >= 0 else "(unlisted)" for number in example.answers],
        )
        for example in examples
    ]
    return {f"{suite.task}/{name}": value for name, value in metrics}, TaskSample(shown)


def _probe(
    suite: Suite, found: Mapping[RowSet, Embedded], world_size: int, rank: int
) -> Iterator[tuple[str, float]]:
    """The metrics of all probes; each is fitted on one rank."""
    asked = [(task, shots) for task in suite.config.linear_probe for shots in (None, *task.shots)]
    mine: dict[int, list[tuple[str, float]] | RunStop] = {}
    for number in range(rank, len(asked), world_size):
        try:
            mine[number] = list(_fit_probe(suite, found, *asked[number]))
        except RunStop as stop:
            mine[number] = stop  # the other ranks wait for an answer
    answers = {number: each for part in gathered(mine) for number, each in part.items()}
    for number in range(len(asked)):
        answer = answers[number]
        if isinstance(answer, RunStop):
            raise answer
        yield from answer


def _fit_probe(
    suite: Suite, found: Mapping[RowSet, Embedded], task: LinearProbeTask, shots: int | None
) -> Iterator[tuple[str, float]]:
    def labelled(chosen: RowSet) -> tuple[Tensor, list[str]]:
        rows = found[chosen]
        image, text = rows.chosen(suite.config.embedding)
        features = image if task.modality == "image" else text[rows.first_captions]
        return features, rows.labels[task.column]

    train, test = row_sets(task, suite.val)
    sets = *labelled(train), *labelled(test)
    name = f"linear_probe/{task.column}"
    if shots is None:
        yield f"{name}/accuracy", linear_probe(*sets)
        yield f"{name}/chance", chance(sets[3])
        yield f"{name}/train_rows", sum(map(bool, sets[1]))
        yield f"{name}/test_rows", sum(map(bool, sets[3]))
    else:
        mean, spread = few_shot(*sets, shots=shots)
        yield f"{name}/{shots}_shots/accuracy", mean
        yield f"{name}/{shots}_shots/spread", spread


def _measure(
    suite: Suite,
    match: Match,
    rows: Embedded,
    weights: list[Tensor],
    ranks: Ranks | None,
    device: torch.device,
) -> Iterator[tuple[str, float]]:
    yield "rows", float(len(rows.image))
    yield "bad_rows", float(rows.bad_rows)
    if ranks is not None:
        for name, value in _retrieval(suite.config, match, rows, ranks, device):
            yield name, value
    for task, classes, each in zip(suite.config.zero_shot, suite.classes, weights, strict=True):
        for name, value in zero_shot(rows.image, rows.labels[task.column], classes, each):
            yield f"zero_shot/{task.column}/{name}", value
    for name, value in _geometry(rows):
        yield f"geometry/{name}", value


def _retrieval(
    config: EvaluateConfig, match: Match, rows: Embedded, ranks: Ranks, device: torch.device
) -> Iterator[tuple[str, float]]:
    """Retrieval by contrast and, if asked for, with its best ordered anew."""
    for name, value in recalls(ranks, rows.owners):
        yield f"retrieval/{name}", value
    if config.rerank is not None:
        ranks = rerank(match, rows, ranks, k=config.rerank, batch=config.batch, device=device)
        for name, value in recalls(ranks, rows.owners):
            yield f"retrieval_reranked/{name}", value


def _geometry(rows: Embedded) -> Iterator[tuple[str, float]]:
    """How the modalities lie to each other, and each one's two parts: pairwise, so of some rows."""
    chosen = rows.first_captions[:GEOMETRY_ROWS]
    image, text = rows.image[:GEOMETRY_ROWS], rows.text[chosen]
    yield from geometry(image, text).items()
    if rows.image_independent is None or rows.text_independent is None:
        return
    for side, shared, independent in (
        ("image", image, rows.image_independent[:GEOMETRY_ROWS]),
        ("text", text, rows.text_independent[chosen]),
    ):
        for name, value in independent_geometry(shared, independent).items():
            yield f"{name}_{side}", value
