"""How good the order's shuffle is, beside a full shuffle of the same rows. Arithmetic, no files.

An epoch permutes row groups, packs them into windows of `data.shuffle_window` rows or more, and
permutes the rows of a window: what reads whole row groups can do no more without holding the
epoch. Here each row has its number in file order, as in files that are sorted by anything.

    python -m jobs.bench.shuffle [--quick] [--json FILE] [--figure FILE]

- correlation: rank correlation (Spearman's) of position and file order, and of a row's positions in
  two epochs; the mean of its absolute value over seeds. A full shuffle of n things has a standard
  deviation of 1 / sqrt(n - 1), so one of row groups has more than one of rows.
- distance: how far apart in file order neighbours are, as a share of a full shuffle's.
- of a batch of 256 (of one worker): the share of rows with a batch-mate of their own row group,
  how many such mates a row has, and the row groups it is worth, 1 / sum of squared shares.
- met again: the share of a row's batch-mates that are its batch-mates in the next epoch too.

Goals, or exit status 1, at the default window and row groups of 1,000: both correlations are, to
three standard errors, no more than a full shuffle of the row groups has; neighbours are at least
0.75 as far apart as after a full shuffle; a batch is worth at least four row groups; at most 2 % of
batch-mates are met again.
"""

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.bench.report import arguments, conclude, show_table
from pipeline.config.schema import DataConfig
from pipeline.data.order import Order, RowGroup, Source, permutation

ROWS = 1_000_000
BATCH = 256
GROUP_ROWS = (100, 1_000, 10_000)
DEFAULT = int(DataConfig.model_fields["shuffle_window"].default)
WINDOWS = (1_024, DEFAULT, 16_384)
JUDGED = 1_000  # rows of a row group, where the goals hold
LEAST_DISTANCE, LEAST_WORTH, MOST_AGAIN, MOST_ERRORS = 0.75, 4.0, 0.02, 3.0
Rows = NDArray[np.int64]


def make_order(rows: int, group_rows: int, window_rows: int, seed: int) -> Order:
    """Give the order of one source of equal row groups, all in one file."""
    groups = tuple(
        RowGroup(shard=0, index=index, rows=min(group_rows, rows - start))
        for index, start in enumerate(range(0, rows, group_rows))
    )
    return Order(sources=(Source(row_groups=groups),), window_rows=window_rows, seed=seed)


def lay_out(order: Order, epoch: int) -> Rows:
    """Give the number in file order of the row at each position of an epoch."""
    (source,) = order.sources
    starts = np.cumsum([0, *(group.rows for group in source.row_groups)])
    found: list[Rows] = []
    for window in order.windows(epoch):
        rows = np.concatenate(
            [starts[visit.group.index] + visit.chosen(order.seed) for visit in window.visits]
        )
        found.append(rows[permutation(order.seed, epoch, window, order.shuffle)])
    return np.concatenate(found)


def correlate(first: Rows, second: Rows) -> float:
    """Spearman's correlation of two permutations of 0..n-1."""
    centre = (len(first) - 1) / 2
    variance = (len(first) ** 2 - 1) / 12
    return float(np.mean((first - centre) * (second - centre)) / variance)


def neighbours_apart(rows: Rows) -> float:
    """How far apart in file order neighbours are, on the mean."""
    return float(np.mean(np.abs(np.diff(rows))))


def compare(rows: Rows, following: Rows, group_rows: int) -> dict[str, float]:
    """Measure an epoch's rows in their order, and the next epoch's."""
    positions = np.arange(len(rows))
    place, next_place = np.empty_like(rows), np.empty_like(rows)
    place[rows], next_place[following] = positions, positions
    batches = len(rows) // BATCH
    whole = rows[: batches * BATCH]
    _, counts = np.unique(
        np.repeat(np.arange(batches), BATCH) * len(rows) + whole // group_rows, return_counts=True
    )
    shared = np.unique((place // BATCH) * len(rows) + next_place // BATCH, return_counts=True)[1]
    return {
        "correlation": correlate(positions, rows),
        "epochs": correlate(place, next_place),
        "distance": neighbours_apart(rows),
        "with_mate": float(counts[counts > 1].sum() / counts.sum()),
        "mates": float(np.mean(counts * (counts - 1)) * len(counts) / counts.sum()),
        "worth": BATCH**2 * batches / float(np.sum(counts**2)),
        "again": float(np.sum(shared * (shared - 1)) / (len(rows) * (BATCH - 1))),
    }


def measure(group_rows: int, window_rows: int | None, seeds: int) -> dict[str, Any]:
    """Give the means over seeds; without a window, those of a full shuffle."""
    found: list[dict[str, float]] = []
    for seed in range(seeds):
        if window_rows is None:
            rng = np.random.default_rng(seed)
            pair = rng.permutation(ROWS), rng.permutation(ROWS)
        else:
            order = make_order(ROWS, group_rows, window_rows, seed)
            pair = lay_out(order, 0), lay_out(order, 1)
        found.append(compare(*pair, group_rows))
    values = {name: [one[name] for one in found] for name in found[0]}
    values["distance"] = [value / ((ROWS + 1) / 3) for value in values["distance"]]
    for name in ("correlation", "epochs"):
        values[name] = [abs(value) for value in values[name]]
    return {
        "group_rows": group_rows,
        "window_rows": window_rows,
        "seeds": seeds,
        **{name: statistics.mean(each) for name, each in values.items()},
        "range": {name: (min(each), max(each)) for name, each in values.items()},
    }  # fmt: skip


def chance_correlation(group_rows: int, seeds: int) -> float:
    """Mean absolute correlation of fully shuffled row groups, and three standard errors more."""
    deviation = 1 / math.sqrt(ROWS / group_rows - 1)
    mean = math.sqrt(2 / math.pi)  # of |x|, x normal
    return deviation * (mean + MOST_ERRORS * math.sqrt((1 - mean**2) / seeds))


def find_missed(cell: dict[str, Any]) -> list[str]:
    """What of the goals a cell misses, in sentences."""
    most = chance_correlation(cell["group_rows"], cell["seeds"])
    missed = [
        f"rank correlation {what} is {cell[name]:.4f}; {most:.4f} is what chance allows"
        for name, what in (("correlation", "with file order"), ("epochs", "of two epochs"))
        if cell[name] > most
    ]
    return missed + find_too_small(cell)


def find_too_small(cell: dict[str, Any]) -> list[str]:
    """What is missed that a larger window mends."""
    missed: list[str] = []
    if cell["distance"] < LEAST_DISTANCE:
        missed.append(
            f"neighbours are {cell['distance']:.2f} as far apart as after a full shuffle; "
            f"{LEAST_DISTANCE} is asked"
        )
    if cell["worth"] < LEAST_WORTH:
        missed.append(f"a batch is worth {cell['worth']:.1f} row groups; {LEAST_WORTH} are asked")
    if cell["again"] > MOST_AGAIN:
        missed.append(
            f"{cell['again']:.1%} of batch-mates are met again in the next epoch; "
            f"{MOST_AGAIN:.0%} are allowed"
        )
    return missed


def least_window(group_rows: int) -> dict[str, Any]:
    """Find the smallest window, in steps of a row group, that is not too small by one seed."""
    groups = 1
    while find_too_small(cell := measure(group_rows, groups * group_rows, seeds=1)):
        groups += 1
    return cell


def main() -> None:
    """Measure, print, draw."""
    options = arguments(__doc__).parse_args()
    seeds = 5 if options.quick else 20
    cells = [
        measure(group_rows, window_rows, seeds)
        for group_rows in GROUP_ROWS
        for window_rows in (*WINDOWS, None)
    ]
    show_table(
        f"{ROWS:,} rows, batches of {BATCH}, means over {seeds} seeds",
        ["rows of a row group", "window", "correlation", "of two epochs", "distance", "with a mate",
         "mates", "worth row groups", "met again", "goals"],
        [
            [
                f"{cell['group_rows']:,}",
                "full shuffle" if cell["window_rows"] is None else f"{cell['window_rows']:,}",
                f"{cell['correlation']:.4f}",
                f"{cell['epochs']:.4f}",
                f"{cell['distance']:.3f}",
                f"{cell['with_mate']:.1%}",
                f"{cell['mates']:.2f}",
                f"{cell['worth']:.1f}",
                f"{cell['again']:.3%}",
                "missed" if find_missed(cell) else "met",
            ]
            for cell in cells
        ],
    )  # fmt: skip
    least = [least_window(group_rows) for group_rows in GROUP_ROWS]
    show_table(
        "The smallest window that is large enough",
        ["rows of a row group", "window", "distance", "worth row groups", "met again"],
        [
            [
                f"{cell['group_rows']:,}",
                f"{cell['window_rows']:,}",
                f"{cell['distance']:.3f}",
                f"{cell['worth']:.1f}",
                f"{cell['again']:.3%}",
            ]
            for cell in least
        ],
    )
    if options.figure is not None:
        draw(options.figure)
    (judged,) = [
        cell for cell in cells
        if cell["group_rows"] == JUDGED and cell["window_rows"] == DEFAULT
    ]  # fmt: skip
    conclude({"cells": cells, "least": least}, find_missed(judged), options.json)


def draw(file: Path) -> None:
    """Draw distance and worth of a batch against the row groups of a window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    distance, worth = figure.subplots(1, 2)
    held = (1, 2, 3, 4, 5, 8, 16, 32, 64)
    for group_rows in GROUP_ROWS:
        cells = [measure(group_rows, groups * group_rows, seeds=1) for groups in held]
        label = f"row groups of {group_rows:,}"
        for panel, name in ((distance, "distance"), (worth, "worth")):
            panel.plot(held, [cell[name] for cell in cells], marker="o", markersize=3, label=label)
    for panel, least, title in (
        (distance, LEAST_DISTANCE, "Neighbours' distance, of a full shuffle's"),
        (worth, LEAST_WORTH, f"Row groups that a batch of {BATCH} is worth"),
    ):
        panel.axhline(least, color="black", linewidth=0.8, linestyle="--", label="goal")
        panel.set(xscale="log", xlabel="row groups in a window", title=title)
        panel.set_xticks(held, [f"{groups}" for groups in held])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    worth.set_yscale("log", base=2)
    worth.yaxis.set_major_formatter("{x:.0f}")
    distance.legend(fontsize=8, loc="lower right")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
