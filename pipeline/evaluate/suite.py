"""All evaluations of a run in one call, yielding (name, value)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pipeline.config.schema import Config, EvaluateConfig
from pipeline.data.batches import eval_batches
from pipeline.data.decode import Recipe, View
from pipeline.data.layout import Catalog
from pipeline.data.text import Tokenizer
from pipeline.evaluate.embed import Forward, embed_rows
from pipeline.evaluate.retrieval import retrieval
from pipeline.evaluate.zero_shot import class_embeddings, zero_shot


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """What is evaluated, on which rows; the same on every rank.

    `classes` gives the class names of each zero-shot task, in the order of `config.zero_shot`.
    """

    config: EvaluateConfig
    catalog: Catalog
    recipe: Recipe
    classes: tuple[tuple[str, ...], ...]
    ingest_cpus: float


def make_recipe(config: Config, tokenizer: Tokenizer, *, train: bool) -> Recipe:
    """Give the data recipe of a config, for training or evaluation."""
    data = config.data
    second_view = None
    if train and config.structure.needs_views:
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
        seed=config.train.seed,
        train=train,
        clean_captions=data.clean_captions,
        synonyms=data.synonyms,
        labels=() if train else tuple(task.column for task in config.evaluate.zero_shot),
    )


def run_suite(
    suite: Suite, forward: Forward, device: torch.device, world_size: int, rank: int
) -> Iterator[tuple[str, float]]:
    """Yield every metric, the same on all ranks; names are paths such as retrieval/..."""
    batches = eval_batches(
        suite.catalog,
        suite.recipe,
        max_rows=suite.config.max_rows,
        world_size=world_size,
        rank=rank,
        batch_size=suite.config.batch,
        ingest_cpus=suite.ingest_cpus,
    )
    side, batch = suite.recipe.image_size, suite.config.batch
    blank = (
        torch.zeros(batch, side, side, 3, dtype=torch.uint8),
        torch.full((batch, suite.recipe.context_length), suite.recipe.tokenizer.end).int(),
    )
    rows = embed_rows(forward, batches, blank, device)
    yield "rows", float(len(rows.image))
    yield "bad_rows", float(rows.bad_rows)
    if suite.config.retrieval:
        for name, value in retrieval(rows.image, rows.text, rows.owners):
            yield f"retrieval/{name}", value
    for task, classes in zip(suite.config.zero_shot, suite.classes, strict=True):
        weights = class_embeddings(
            forward,
            classes,
            task.prompts,
            suite.recipe.tokenizer,
            suite.recipe.context_length,
            device,
        )
        for name, value in zero_shot(rows.image, rows.labels[task.column], classes, weights):
            yield f"zero_shot/{task.column}/{name}", value
