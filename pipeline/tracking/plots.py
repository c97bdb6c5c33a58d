"""Figures of a run, from its metric points and some of its embeddings."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Points = Sequence[tuple[int, float]]
Rows = NDArray[np.float32]

MOST = 10  # labels with a colour of their own: as many as the colours that tell apart
SHOWN = 200  # pairs in a matrix of cosines

PANELS = {
    "train/loss": "loss (bound)",
    "train/logit_scale": "logit scale",
    "train/samples_per_s": "samples per second",
    "train/data_wait_share": "share of time waiting for data",
}


def plot_curves(history: Mapping[str, Points], path: Path) -> bool:
    """Draw one panel per metric with points, against samples seen; give whether there were any."""
    from matplotlib.figure import Figure

    names = [name for name, points in history.items() if points]
    if not names:
        return False
    columns = 2 if len(names) > 1 else 1
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.2 * rows), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, index + 1)
        steps, values = zip(*history[name], strict=True)
        axes.plot(steps, values, marker="o" if len(steps) < 3 else None, linewidth=1.4)
        axes.set_title(PANELS.get(name, name), fontsize=10)
        axes.set_xlabel("samples seen", fontsize=9)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return True


def plot_bridge(history: Mapping[str, Points], path: Path) -> bool:
    """Draw the residual of augmented images along the bridge at the start, half-way and last.

    `history` holds the metrics `train/structure/bridge_residual_at_T`; give whether there were any.
    """
    from matplotlib.figure import Figure

    curves = {
        float(name.rsplit("_", 1)[1]): points
        for name, points in sorted(history.items())
        if points and "bridge_residual_at_" in name
    }
    if not curves:
        return False
    axes = (figure := Figure(figsize=(5.5, 3.8), layout="constrained")).add_subplot()
    moments = sorted({step for points in curves.values() for step, _ in points})
    for step in dict.fromkeys((moments[0], moments[len(moments) // 2], moments[-1])):
        drawn = [(t, dict(points)[step]) for t, points in curves.items() if step in dict(points)]
        axes.plot(*zip(*drawn, strict=True), marker="o", label=f"{step:,} samples")
    axes.set(
        xlabel="t: 0 is the caption, 1 the image itself",
        ylabel="mean squared distance of the view",
        title="Augmented images along the bridge",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return True


def plot_projection(image: Rows, text: Rows, labels: Sequence[str], path: Path) -> None:
    """Draw both modalities on the two directions of their largest common variance.

    image, text [n, dim], row i of both is a pair; coloured by label where it has one.
    """
    from matplotlib.figure import Figure

    both = np.concatenate([image, text])
    centred = both - both.mean(0)
    *_, directions = np.linalg.svd(centred, full_matrices=False)
    places = centred @ directions[:2].T
    share = places.var(0) / max(centred.var(0).sum(), 1e-12)
    names = [name for name, _ in Counter(label for label in labels if label).most_common(MOST)]
    axes = (figure := Figure(figsize=(6.5, 5), layout="constrained")).add_subplot()
    of_name = {name: f"C{index}" for index, name in enumerate(names)}
    colours = [of_name.get(label, "lightgray") for label in labels]
    for marker, side, part in (
        ("o", "image", places[: len(image)]),
        ("^", "caption", places[len(image) :]),
    ):
        axes.scatter(part[:, 0], part[:, 1], c=colours, marker=marker, s=14, alpha=0.7)
        axes.scatter([], [], c="black", marker=marker, s=20, label=side)
    for name, colour in of_name.items():
        # A dollar sign would begin a formula.
        axes.scatter([], [], c=colour, marker="s", s=20, label=name.replace("$", r"\$"))
    axes.set(
        xlabel=f"first direction, {share[0]:.0%} of the variance",
        ylabel=f"second, {share[1]:.0%}",
        title="Images and captions in one plane",
    )
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def plot_similarities(image: Rows, text: Rows, labels: Sequence[str], path: Path) -> None:
    """Draw the cosines in and across the modalities of some pairs, sorted by label."""
    from matplotlib.figure import Figure

    order = sorted(range(len(labels)), key=lambda row: (labels[row] == "", labels[row]))[:SHOWN]
    v, t = image[order], text[order]
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    drawn = []
    for axes, name, cosines in zip(
        panels,
        ("image and image", "caption and caption", "image and caption"),
        (v @ v.T, t @ t.T, v @ t.T),
        strict=True,
    ):
        drawn.append(axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest"))
        axes.set_title(name, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    panels[0].set_ylabel(f"{len(order)} pairs" + (", by class" if any(labels) else ""))
    figure.colorbar(drawn[-1], ax=panels, label="cosine", shrink=0.8)
    figure.savefig(path, dpi=110)
