"""What the gamma loss costs on a GPU at very large local batches, beside a dense form.

Embeddings are random, of dimension 512, in fp32, with products in bf16 as training in bf16 has
them. Times are medians with their range, after two calls that compile; memory is the peak over
what the inputs hold. The dense form is CLIP's cross-entropy on all pairs at once, eager and
compiled, with bf16 products: the plainest code for the same pairs.

    python -m jobs.bench.loss_gpu [--quick] [--json FILE] [--figure FILE]

Goals, or exit status 1: from 32,768 pairs on, where the eager dense form fits, the gamma loss is
faster and its peak memory is under an eighth; where it does not fit, the logits alone would take
more than the loss does. Exit status 2 without a GPU.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.bench.report import arguments, conclude, show_table
from pipeline.losses.gamma import GammaLoss

DIM = 512
SIZES = (4_096, 32_768, 131_072)
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def _cross_entropy(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = (image.bfloat16() @ text.bfloat16().T).float() * scale
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _forms(local: int) -> dict[str, Call]:
    def gamma(precision: torch.dtype) -> Call:
        loss = GammaLoss(virtual_batch=local, precision=precision)
        return lambda image, text, scale: loss(image, text, scale).loss

    return {
        "gamma, bf16 products": gamma(torch.bfloat16),
        "gamma, fp32 products": gamma(torch.float32),
        "dense cross-entropy": _cross_entropy,
        "dense cross-entropy, compiled": torch.compile(_cross_entropy, dynamic=False),
    }


def _inputs(local: int) -> tuple[Tensor, Tensor, Tensor]:
    shared = torch.randn(local, DIM, device="cuda")
    image, text = (
        F.normalize(shared + 1.5 * torch.randn_like(shared), dim=1).requires_grad_()
        for _ in range(2)
    )
    return image, text, torch.tensor(50.0, device="cuda", requires_grad=True)


def _measure(call: Call, inputs: tuple[Tensor, Tensor, Tensor], often: int) -> dict[str, float]:
    """Milliseconds and peak bytes of the loss and its backward."""
    times: list[float] = []
    held = torch.cuda.memory_allocated()
    for repetition in range(often + 2):
        torch.cuda.synchronize()
        if repetition == 2:
            torch.cuda.reset_peak_memory_stats()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.autograd.grad(call(*inputs), inputs)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    kept = times[2:]
    return {
        "ms": statistics.median(kept),
        "fastest": min(kept),
        "slowest": max(kept),
        "peak": torch.cuda.max_memory_allocated() - held,
    }


def measure_cells(sizes: tuple[int, ...], often: int) -> list[dict[str, Any]]:
    """Every form at every size; one that does not fit into the memory is listed too."""
    cells: list[dict[str, Any]] = []
    for local in sizes:
        torch.manual_seed(0)
        inputs = _inputs(local)
        for name, call in _forms(local).items():
            cell: dict[str, Any] = {"form": name, "local": local}
            try:
                cell |= _measure(call, inputs, often)
            except torch.OutOfMemoryError:
                cell["peak"] = None
            torch.cuda.empty_cache()
            cells.append(cell)
    return cells


def _missed(cells: list[dict[str, Any]]) -> list[str]:
    found = {(cell["form"], cell["local"]): cell for cell in cells}
    missed = []
    for (form, local), cell in found.items():
        if form != "gamma, bf16 products":
            continue
        dense = found["dense cross-entropy", local]
        if dense["peak"] is None:
            if cell["peak"] >= 4 * local**2:
                missed.append(f"gamma takes {cell['peak'] / 1e9:.1f} GB at b={local}")
            continue
        if cell["ms"] > dense["ms"] and local >= 32_768:
            missed.append(
                f"gamma takes {cell['ms'] / dense['ms']:.2f} times the eager dense form's time at "
                f"b={local}"
            )
        if cell["peak"] * 8 >= dense["peak"] and local >= 32_768:
            missed.append(
                f"gamma's peak memory at b={local} is 1/{dense['peak'] / cell['peak']:.1f} of the "
                "eager dense form's; less than 1/8 is asked"
            )
    return missed


def main() -> None:
    """Measure, print, draw."""
    options = arguments(__doc__).parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a GPU; without one: python -m jobs.bench.loss_cost")
        sys.exit(2)
    cells = measure_cells(SIZES[:2] if options.quick else SIZES, 5 if options.quick else 15)
    show_table(
        f"Cost of a loss and its backward on {torch.cuda.get_device_name()}",
        ["form", "b", "time", "range", "peak memory"],
        [
            [cell["form"], f"{cell['local']:,}", "", "", "does not fit"]
            if cell["peak"] is None
            else [
                cell["form"],
                f"{cell['local']:,}",
                f"{cell['ms']:,.1f} ms",
                f"{cell['fastest']:,.1f}-{cell['slowest']:,.1f}",
                f"{cell['peak'] / 1e9:,.2f} GB",
            ]
            for cell in cells
        ],
    )
    if options.figure is not None:
        draw(cells, options.figure)
    results = {"gpu": torch.cuda.get_device_name(), "cells": cells}
    conclude(results, _missed(cells), options.json)


def draw(cells: list[dict[str, Any]], file: Path) -> None:
    """Draw time and memory against the local batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for name in dict.fromkeys(cell["form"] for cell in cells):
        mine = [cell for cell in cells if cell["form"] == name and cell["peak"] is not None]
        for panel, key, unit in zip(panels, ("ms", "peak"), (1, 1e9), strict=True):
            places = [cell["local"] for cell in mine]
            panel.plot(places, [cell[key] / unit for cell in mine], marker="o", label=name)
    for panel, label in zip(panels, ("time (ms)", "peak memory (GB)"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="local batch (pairs)", ylabel=label)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
