"""Figures of a run, from its metric points."""

from collections.abc import Mapping, Sequence
from pathlib import Path

Points = Sequence[tuple[int, float]]

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
