"""One optimiser step: micro batches in, one update out."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.batches import Batch
from pipeline.engine.momentum import Momentum
from pipeline.engine.zero import Engine
from pipeline.train.objective import Objective
from pipeline.train.task import TaskObjective


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Of one step on this worker: metrics (detached scalars), what it used, how long it waited.

    `diagnose` gives the costlier metrics of the step's last micro batch.
    """

    metrics: dict[str, Tensor]
    diagnose: Callable[[], dict[str, Tensor]]
    batches: list[Batch]
    grad_norm: float
    is_finite: bool
    waited: float


def train_step(
    engine: Engine,
    momentum: Momentum | None,
    objective: Objective | TaskObjective,
    batches: Iterator[Batch],
    *,
    accumulation: int,
    lr_factor: float,
    samples: int,
) -> StepResult:
    """Run `accumulation` micro batches forward and backward, and update the weights once.

    `samples` have been seen before the step. Each micro batch has its own complete loss, so
    accumulation needs no second pass. When the loss is not finite on any rank, all ranks leave that
    micro batch out of the gradient. `momentum` is a slow copy of the model, which sees the same
    rows.
    """
    used: list[Batch] = []
    metrics: list[dict[str, Tensor]] = []
    diagnose: Callable[[], dict[str, Tensor]] = dict
    waited, grad_norm, is_finite = 0.0, None, True
    for _ in range(accumulation):
        started = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - started
        used.append(batch)
        inputs = [
            None if each is None else each.to(engine.device, non_blocking=True)
            for each in objective.inputs(batch)
        ]
        outputs = engine(*inputs)
        slow = None if momentum is None else momentum(*objective.slow_inputs(inputs))
        value = objective.loss(outputs, slow, batch, samples)
        if engine.any(not bool(value.loss.isfinite())):
            is_finite = False
            if accumulation == 1:
                break
            _backward_nothing(engine, inputs)
        else:
            metrics.append(value.metrics)
            diagnose = value.diagnose
            engine.backward(value.loss)
        grad_norm = engine.step(lr_factor)
    if grad_norm is None:
        grad_norm = float("nan")
    is_finite = is_finite and math.isfinite(grad_norm)
    if momentum is not None and is_finite:
        momentum.update(engine)
    return StepResult(
        metrics=_mean(metrics),
        diagnose=diagnose,
        batches=used,
        grad_norm=grad_norm,
        is_finite=is_finite,
        waited=waited,
    )


def _backward_nothing(engine: Engine, inputs: Sequence[Tensor | None]) -> None:
    """A backward that adds zero, in place of a micro batch whose loss is not finite.

    The accumulated gradient of the step's other micro batches stays; every rank still takes part
    in the collectives of this backward.
    """
    # Black pictures, and of the tokens the first row again and again: ids must be some that exist.
    blank = [
        None
        if each is None
        else torch.zeros_like(each)
        if each.dtype == torch.uint8
        else each[:1].expand_as(each)
        for each in inputs
    ]
    outputs = engine(*blank)
    parts = [part for part in outputs if part is not None and part.is_floating_point()]
    sums = torch.stack([part.sum() for part in parts])
    engine.backward(sums.sum() * 0.0)


def _mean(metrics: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if not metrics:
        return {}
    return {name: torch.stack([item[name] for item in metrics]).mean() for name in metrics[0]}
