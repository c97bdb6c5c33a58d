"""What a loss costs, side by side in one run: bytes on the wire, peak memory, time.

Every worker is a gloo process on this machine; embeddings are random, of dimension 512, in fp32.
Bytes are counted at the operations of torch.distributed, memory is the process's peak resident
set over the loss and its backward, times are medians of five interleaved repetitions (25 of
the smallest batches, one call of the largest) with their range.

    python -m jobs.bench.loss_cost [--quick] [--json FILE] [--figure FILE]

Goals, or exit status 1: the gamma loss receives 0 bytes; its peak memory at the largest batch is
under an eighth of the dense form's; it takes at most 1.3 times the dense form's time where that
fits; a whole step takes no longer than with InfoNCE on local pairs.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from jobs.bench.dense import dense_gamma
from jobs.bench.ranks import Wire, run_ranks
from jobs.bench.report import arguments, conclude, show_table
from pipeline.config.load import load_config
from pipeline.engine.partners import PartnerExchange
from pipeline.losses.contrastive import FastCLIP, InfoNCEGathered, InfoNCELocal, SigmoidRing
from pipeline.losses.gamma import GammaLoss
from pipeline.models.two_tower import build_two_tower

DIM = 512
SMALL, LARGE = 256, 16_384
MEMORY_LIMIT = 12 * 2**30  # of all workers' losses together, by the estimate of `_floats`
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _losses(world_size: int, local: int) -> dict[str, Loss]:
    batch = world_size * local
    return {
        "gamma": _of(local, GammaLoss(virtual_batch=batch)),
        "gamma, one partner": _of(local, GammaLoss(virtual_batch=batch, reach=PartnerExchange(1))),
        "gamma, dense": lambda image, text, scale: dense_gamma(image, text, scale, batch - 1),
        "InfoNCE local": _of(local, InfoNCELocal()),
        "InfoNCE gathered": _of(local, InfoNCEGathered()),
        "sigmoid ring": _of(local, SigmoidRing(), torch.tensor(-10.0)),
        "FastCLIP v3": _of(local, FastCLIP(batch, gamma=0.8, learns_scale=True, rho=4.0)),
    }


def _of(local: int, loss: Any, bias: Tensor | None = None) -> Loss:
    rank = dist.get_rank() if dist.is_initialized() else 0
    keys = torch.arange(local) + rank * local

    def call(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return loss(image, text, scale, logit_bias=bias, keys=keys).loss

    return call


LOSSES = tuple(_losses(1, 2))
STEP_LOSSES = ("gamma", "InfoNCE local")


def _floats(name: str, world_size: int, local: int) -> int:
    """A low estimate of the fp32 numbers one worker's loss holds at its peak."""
    if name.startswith("gamma") and "dense" not in name:
        return 8 * local * DIM + 4 * local * 1024
    reach = world_size if name in ("InfoNCE gathered", "FastCLIP v3") else 1
    return 5 * local * local * reach


def _inputs(local: int) -> tuple[Tensor, Tensor, Tensor]:
    image, text = (F.normalize(torch.randn(local, DIM), dim=1).requires_grad_() for _ in range(2))
    return image, text, torch.tensor(50.0, requires_grad=True)


def _measure_all(
    sizes: list[tuple[str, int]], repetitions: int
) -> dict[tuple[str, int], dict[str, float]]:
    """On one rank: bytes received, peak memory, seconds of each loss and its backward."""
    torch.manual_seed(dist.get_rank())
    measured: dict[tuple[str, int], dict[str, float]] = {}
    for local in sorted({local for _, local in sizes}):
        names = [name for name, size in sizes if size == local]
        losses = {name: _losses(dist.get_world_size(), local)[name] for name in names}
        inputs = _inputs(local)
        times: dict[str, list[float]] = {name: [] for name in names}
        # A millisecond's work needs more repetitions; more than one of the largest is too long.
        often = repetitions * (5 if local <= SMALL else local < LARGE)
        for repetition in range(1 + often):
            for name, loss in losses.items():
                held = _peak_reset()
                dist.barrier()
                started = time.perf_counter()
                # Counting slows every operation down, so later calls do without.
                with Wire() if not repetition else nullcontext() as wire:
                    loss(*inputs).backward()
                times[name].append(time.perf_counter() - started)
                peak = _status("VmHWM") - held
                if wire is not None:
                    measured[name, local] = {"received": wire.received, "peak": peak}
        for name in names:
            # The first call warms up; the largest batches are called only once.
            kept = times[name][1:] or times[name]
            measured[name, local] |= {
                "seconds": statistics.median(kept),
                "fastest": min(kept),
                "slowest": max(kept),
            }
    return measured


def _peak_reset() -> int:
    """Forget this process's peak of memory; give what it holds now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _step_seconds(local: int, repetitions: int) -> dict[str, float]:
    """Median seconds of a whole step of the demo's towers with each local loss, interleaved."""
    config = load_config("configs/demo.yaml")
    towers = build_two_tower(config.model, vocab_size=400, start=1, end=3, pad=0,
                             mean=config.data.image_mean, std=config.data.image_std)  # fmt: skip
    optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-4)
    side, length = config.model.image.size, config.model.text.context_length
    images = torch.randint(0, 256, (local, side, side, 3), dtype=torch.uint8)
    tokens = torch.randint(4, 400, (local, length), dtype=torch.int32)
    tokens[:, 0], tokens[:, -1] = 1, 3
    times: dict[str, list[float]] = {name: [] for name in STEP_LOSSES}
    for _ in range(repetitions + 1):
        for name in STEP_LOSSES:
            loss = _losses(1, local)[name]
            started = time.perf_counter()
            loss(*towers(images, tokens)).backward()
            optimizer.step()
            optimizer.zero_grad()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def measure_cells(worlds: list[int], locals_: list[int], repetitions: int) -> list[dict[str, Any]]:
    """Every loss at every size that fits; those that do not are listed too."""
    cells: list[dict[str, Any]] = []
    for world_size in worlds:
        sizes = [(name, local) for local in locals_ for name in LOSSES]
        fitting = [
            (name, local)
            for name, local in sizes
            if 4 * world_size * _floats(name, world_size, local) <= MEMORY_LIMIT
        ]
        ranks = run_ranks(_measure_all, world_size, fitting, repetitions)
        for name, local in sizes:
            cell: dict[str, Any] = {"loss": name, "world_size": world_size, "local": local}
            cell["fits"] = (name, local) in fitting
            if cell["fits"]:
                found = [rank[name, local] for rank in ranks]
                cell |= {key: max(rank[key] for rank in found) for key in found[0]}
            cells.append(cell)
    return cells


def _missed(cells: list[dict[str, Any]], step: dict[str, float]) -> list[str]:
    fitting = {
        (cell["loss"], cell["world_size"], cell["local"]): cell for cell in cells if cell["fits"]
    }
    missed = [
        f"gamma received {cell['received']} bytes at W={key[1]}, b={key[2]}; 0 are allowed"
        for key, cell in fitting.items()
        if key[0] == "gamma" and cell["received"]
    ]
    pairs = [
        (key, cell, fitting["gamma, dense", *key[1:]])
        for key, cell in fitting.items()
        if key[0] == "gamma" and key[1] == 1 and ("gamma, dense", *key[1:]) in fitting
    ]
    for key, blocked, dense in pairs:
        if blocked["seconds"] > 1.3 * dense["seconds"]:
            missed.append(
                f"gamma takes {blocked['seconds'] / dense['seconds']:.2f} times the dense form's "
                f"time at b={key[2]}; 1.3 are allowed"
            )
    key, blocked, dense = max(pairs, key=lambda pair: pair[0][2])
    if blocked["peak"] * 8 >= dense["peak"] and key[2] >= 16_384:
        missed.append(
            f"gamma's peak memory at b={key[2]} is 1/{dense['peak'] / blocked['peak']:.1f} of the "
            "dense form's; less than 1/8 is asked"
        )
    if step["gamma"] > 1.05 * step["InfoNCE local"]:
        missed.append(
            f"a whole step takes {step['gamma'] / step['InfoNCE local']:.2f} times that with "
            "InfoNCE local; 1.0 (and 5 % of noise) is allowed"
        )
    return missed


def main() -> None:
    """Measure, print, draw."""
    options = arguments(__doc__).parse_args()
    worlds = [1, 2] if options.quick else [1, 2, 4, 8]
    locals_ = [64, 1024] if options.quick else [64, 256, 1024, 4096, 16_384]
    cells = measure_cells(worlds, locals_, repetitions=5)
    step = _step_seconds(256, 5 if options.quick else 15)
    columns = ["loss", "W", "b", "bytes received", "peak memory", "time", "range", "of dense"]
    dense = {
        (cell["world_size"], cell["local"]): cell["seconds"]
        for cell in cells
        if cell["loss"] == "gamma, dense" and cell["fits"]
    }
    rows = []
    for cell in cells:
        size = cell["world_size"], cell["local"]
        row = [cell["loss"], f"{size[0]}", f"{size[1]:,}"]
        if not cell["fits"]:
            rows.append([*row, "", "does not fit", "", "", ""])
            continue
        of_dense = f"{cell['seconds'] / dense[size]:.2f}" if size in dense else ""
        rows.append([*row, f"{cell['received']:,}", f"{cell['peak'] / 1e6:,.0f} MB",
                     f"{1000 * cell['seconds']:,.1f} ms",
                     f"{1000 * cell['fastest']:,.1f}-{1000 * cell['slowest']:,.1f}",
                     of_dense])  # fmt: skip
    show_table("Cost of a loss and its backward, per worker", columns, rows)
    show_table(
        "A whole step of the demo's towers at b=256, one worker",
        ["loss", "median", "of InfoNCE local"],
        [[name, f"{1000 * value:,.1f} ms", f"{value / step['InfoNCE local']:.2f}"]
         for name, value in step.items()],
    )  # fmt: skip
    if options.figure is not None:
        draw(cells, options.figure)
    conclude({"cells": cells, "step_seconds": step}, _missed(cells, step), options.json)


def draw(cells: list[dict[str, Any]], file: Path) -> None:
    """Draw bytes at the most workers; memory and time, beside the dense form's, of one worker."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    wire, memory, duration = figure.subplots(1, 3)
    most = max(cell["world_size"] for cell in cells)
    fitting = [cell for cell in cells if cell["fits"]]
    dense = {
        cell["local"]: cell["seconds"]
        for cell in fitting
        if cell["loss"] == "gamma, dense" and cell["world_size"] == 1
    }
    for name in LOSSES:
        mine = [cell for cell in fitting if cell["loss"] == name]
        alone = [cell for cell in mine if cell["world_size"] == 1]
        # Of less the peak is the allocator's whim.
        large = [cell for cell in alone if cell["local"] >= 1024]
        for panel, chosen, height in (
            (
                wire,
                [cell for cell in mine if cell["world_size"] == most],
                lambda cell: cell["received"] / 1e6,
            ),
            (memory, large, lambda cell: cell["peak"] / 1e6),
            (duration, alone, lambda cell: cell["seconds"] / dense[cell["local"]]),
        ):
            places = [cell["local"] for cell in chosen]
            panel.plot(
                places, [height(cell) for cell in chosen], marker="o", markersize=3, label=name
            )
    wire.set(ylabel="received per step (MB)", title=f"On the wire, {most} workers")
    wire.set_yscale("symlog")
    wire.set_ylim(bottom=-0.1)
    memory.set(
        ylabel="peak memory (MB)", yscale="log", title="Memory of loss and backward, one worker"
    )
    duration.set(
        ylabel="time, of the dense gamma loss's", title="Time of loss and backward, one worker"
    )
    duration.set_ylim(bottom=0)
    for panel in (wire, memory, duration):
        panel.set(xscale="log", xlabel="local batch (pairs)")
        panel.grid(alpha=0.3)
    figure.legend(*wire.get_legend_handles_labels(), loc="outside lower center", ncols=len(LOSSES))
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
