"""A step with a loss that is not finite on one rank: every rank leaves it out, no weight moves."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from jobs.bench.ranks import run_ranks
from pipeline.config.schema import StructureConfig
from pipeline.engine.zero import Engine
from pipeline.losses.base import LossValue
from pipeline.losses.gamma import GammaLoss
from pipeline.train.module import Outputs
from pipeline.train.objective import Objective
from pipeline.train.step import train_step
from tests.tiny import tiny_batch, tiny_config, tiny_module, tiny_pairs

Case = tuple[int, int, tuple[bool, ...]]  # ZeRO stage, micro batches, which are bad on rank 1


class _SometimesBad(Objective):
    """The gamma loss, not finite on rank 1 for chosen micro batches; the module sees both views."""

    def __init__(self, structure: StructureConfig, bad: tuple[bool, ...]):
        super().__init__(
            GammaLoss(virtual_batch=8), structure, gathered_batch=8, in_modal={}, separation={}
        )
        self._bad, self._at = bad, 0

    def __call__(self, outputs: Outputs, keys: torch.Tensor, samples: int) -> LossValue:
        value = self.contrast(*outputs.contrast, keys=keys)
        is_bad = self._bad[self._at] and dist.get_rank() == 1
        self._at += 1
        return LossValue(loss=value.loss * float("nan"), metrics={}) if is_bad else value


def _steps(cases: list[Case]) -> list[tuple[bool, bool, bool]]:
    """Whether the step was finite, whether weights moved, whether they are finite; per case."""
    return [_step(*case) for case in cases]


def _step(stage: int, accumulation: int, bad: tuple[bool, ...]) -> tuple[bool, bool, bool]:
    from deepspeed.utils import safe_get_full_fp32_param

    # With views and independent features: all that a forward can be given.
    config = tiny_config(
        engine={"zero_stage": stage},
        optim={"weight_decay": 0.0},
        structure={"separation": {"weight": 1.0}},
    )
    engine = Engine(
        tiny_module(config),
        engine=config.engine,
        optim=config.optim,
        micro_batch=4,
        accumulation=accumulation,
        device=torch.device("cpu"),
    )

    def weights() -> torch.Tensor:
        parts = [
            safe_get_full_fp32_param(parameter) if stage else parameter.detach()
            for parameter in engine.module.parameters()
        ]
        return torch.cat([part.flatten().clone() for part in parts if part is not None])

    batch = tiny_batch(4, rows=4, seed=dist.get_rank(), views=True)
    before = weights()
    result = train_step(
        engine,
        None,
        _SometimesBad(config.structure, bad),
        iter([batch] * accumulation),
        accumulation=accumulation,
        lr_factor=1.0,
        samples=0,
    )
    after = weights()
    return result.is_finite, bool((before != after).any()), bool(after.isfinite().all())


@pytest.mark.distributed
def test_a_nonfinite_loss_on_one_rank_is_left_out_on_all() -> None:
    good = [(stage, 1, (False,)) for stage in (0, 1, 2, 3)]
    bad = [(stage, 1, (True,)) for stage in (0, 1, 2, 3)]
    half = [(stage, 2, (True, False)) for stage in (0, 1, 2, 3)]
    for results in run_ranks(_steps, 2, good + bad + half):
        assert results[:4] == [(True, True, True)] * 4
        assert results[4:8] == [(False, False, True)] * 4
        # The finite micro batch of the step still trains.
        assert results[8:] == [(False, True, True)] * 4


class _ExplodingGradient(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


def _explode(stage: int) -> tuple[bool, bool]:
    config = tiny_config(engine={"zero_stage": stage})
    engine = Engine(
        tiny_module(config),
        engine=config.engine,
        optim=config.optim,
        micro_batch=4,
        accumulation=1,
        device=torch.device("cpu"),
    )
    images, tokens = tiny_pairs(4)
    value = GammaLoss(virtual_batch=8)(*engine(images, tokens).contrast)
    engine.backward(_ExplodingGradient.apply(value.loss))
    norm = engine.step(1.0)
    finite = all(bool(parameter.isfinite().all()) for parameter in engine.module.parameters())
    return norm is not None and norm < float("inf"), finite


@pytest.mark.distributed
def test_an_infinite_gradient_moves_no_weight_where_nothing_is_partitioned() -> None:
    assert run_ranks(_explode, 2, 0) == [(False, True)] * 2
