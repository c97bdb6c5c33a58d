"""The figures of a run: its curves, and what an evaluation gave to be looked at.

Enters: metric points, samples of rows. Leaves: pictures in a folder. None may stand between a run
and its end: one that cannot be drawn is warned of.
"""

import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.data.inspect import draw_sheet, inspect
from pipeline.data.layout import Catalog
from pipeline.evaluate.suite import Sample, TaskSample
from pipeline.tracking import tracker
from pipeline.tracking.galleries import plot_answers, plot_found_captions, plot_found_images
from pipeline.tracking.plots import (
    PANELS,
    plot_bridge,
    plot_curves,
    plot_projection,
    plot_similarities,
)
from pipeline.train.objective import BRIDGE_CURVE

LOG = logging.getLogger(__name__)
Draw = Callable[[], object]
PAIRS = 24  # rows read for the contact sheet: some may be unusable,
PAIR_GROUPS = 4  # and the row groups they come from


def draw_run(
    run: tracker.RunRef, config: Config, sample: Sample | TaskSample | None, folder: Path
) -> None:
    """Draw the run's curves and its last evaluation's sample."""
    _draw(_of_run(run, config, folder))
    draw_sample(sample, folder)


def draw_pairs(catalog: Catalog, folder: Path) -> None:
    """Draw a contact sheet of training pairs."""

    def draw() -> None:
        found = inspect(catalog, rows=PAIRS, groups=PAIR_GROUPS)
        draw_sheet(found, folder / "contact_sheet.png")

    _draw(iter([draw]))


def draw_sample(sample: Sample | TaskSample | None, folder: Path) -> None:
    """Draw what an evaluation gave to be looked at."""
    if isinstance(sample, TaskSample):
        _draw(_of_task(sample, folder))
    if isinstance(sample, Sample):
        _draw(_of_features(sample, folder))


def _draw(figures: Iterator[Draw]) -> None:
    for draw in figures:
        try:
            draw()
        except Exception as error:  # noqa: BLE001  no figure may stand between a run and its end
            LOG.warning("a figure could not be drawn: %s", error)


def _of_run(run: tracker.RunRef, config: Config, folder: Path) -> Iterator[Draw]:
    yield lambda: plot_curves(tracker.read_history(run, list(PANELS)), folder / "curves.png")
    if config.structure.needs_views:
        curve = [f"train/{name}" for name in BRIDGE_CURVE]
        yield lambda: plot_bridge(tracker.read_history(run, curve), folder / "bridge.png")


def _of_task(sample: TaskSample, folder: Path) -> Iterator[Draw]:
    if sample.shown:
        yield partial(plot_answers, sample.shown, folder / "answers.png")


def _of_features(sample: Sample, folder: Path) -> Iterator[Draw]:
    rows = sample.image, sample.text, sample.labels
    yield partial(plot_projection, *rows, folder / "projection.png")
    yield partial(plot_similarities, *rows, folder / "similarities.png")
    for column, shown in sample.classified.items():
        if shown:
            name = tracker.metric_name(column).replace("/", "_")
            yield partial(plot_answers, shown, folder / f"zero_shot_{name}.png")
    for column, counted in sample.confusions.items():
        name = tracker.metric_name(column).replace("/", "_")
        text = json.dumps({"column": column, **counted._asdict()})
        yield partial((folder / f"confusion_{name}.json").write_text, text, encoding="utf-8")
    if sample.images:
        yield partial(plot_found_images, sample.images, folder / "text_to_image.png")
    if sample.captions:
        yield partial(plot_found_captions, sample.captions, folder / "image_to_text.png")
