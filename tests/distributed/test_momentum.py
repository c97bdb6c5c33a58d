"""The slow copy of the towers: the literal moving average, at every ZeRO stage, on every rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from jobs.bench.ranks import run_ranks
from pipeline.config.plan import make_plan
from pipeline.config.schema import Config
from pipeline.engine.momentum import Momentum
from pipeline.engine.zero import Engine
from pipeline.losses.base import LossValue
from pipeline.train.module import TOWERS, Outputs
from pipeline.train.objective import Objective, build_momentum, build_objective
from pipeline.train.step import train_step
from tests.tiny import tiny_batch, tiny_config, tiny_facts, tiny_module, tiny_tokenizer

DECAY, STEPS = 0.9, 3
FACTS = tiny_facts()
Case = tuple[int, str]  # ZeRO stage, precision
CASES: list[Case] = [(stage, "fp32") for stage in (0, 1, 2, 3)] + [(1, "bf16"), (3, "bf16")]


def _config(stage: int, precision: str) -> Config:
    return tiny_config(
        engine={"zero_stage": stage, "precision": precision},
        optim={"lr": 0.05},
        structure={
            "views": "momentum",
            "momentum": DECAY,
            "in_modal": 0.5,
            "separation": {"weight": 1.0},
        },
    )


def _start(config: Config) -> tuple[Momentum, Engine]:
    module, device = tiny_module(config), torch.device("cpu")
    momentum = build_momentum(config, module, device)
    assert momentum is not None
    engine = Engine(
        module,
        engine=config.engine,
        optim=config.optim,
        micro_batch=4,
        accumulation=1,
        device=device,
    )
    return momentum, engine


def _train(cases: list[Case]) -> list[tuple[dict[str, Any], dict[str, Any], list[float]]]:
    return [_train_one(*case) for case in cases]


def _train_one(stage: int, precision: str) -> tuple[dict[str, Any], dict[str, Any], list[float]]:
    """The copy after some steps, the literal average of the weights after each, the losses."""
    config = _config(stage, precision)
    plan, _ = make_plan(config, FACTS)
    momentum, engine = _start(config)
    literal = {name: value.clone() for name, value in momentum.state_dict().items()}
    objective = build_objective(config, plan, tiny_tokenizer(), embed_dim=16, rank=0, world_size=1)
    losses = []
    for step in range(STEPS):
        batch = tiny_batch(4, rows=4, seed=10 * step + dist.get_rank())
        result = train_step(
            engine, momentum, objective, iter([batch]), accumulation=1, lr_factor=1.0, samples=0
        )
        losses.append(float(result.metrics["loss"]))
        for name, parameter in _whole(engine, stage):
            mine = literal[name.removeprefix(TOWERS)]
            mine.copy_(DECAY * mine + (1 - DECAY) * parameter)
    return momentum.state_dict(), literal, losses


def _whole(engine: Engine, stage: int) -> list[tuple[str, torch.Tensor]]:
    """What the forward uses, in fp32, without the code under test."""
    import deepspeed

    found = []
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            if name.startswith(TOWERS):
                found.append((name, parameter.detach().float().clone()))
    return found


@pytest.mark.distributed
def test_the_copy_is_the_literal_average_and_the_same_everywhere() -> None:
    ranks = run_ranks(_train, 2, CASES)
    for index, (stage, precision) in enumerate(CASES):
        copies, literals, losses = zip(*(rank[index] for rank in ranks), strict=True)
        for name, value in copies[0].items():
            assert value.dtype == torch.float32
            case = f"{name} at ZeRO-{stage} in {precision}"
            assert torch.equal(value, copies[1][name]), case
            torch.testing.assert_close(value, literals[0][name], rtol=1e-5, atol=1e-6, msg=case)
        assert all(torch.tensor(losses).isfinite().flatten())
        if precision == "fp32" and stage:
            first = ranks[0][0][0]
            for name, value in copies[0].items():
                torch.testing.assert_close(value, first[name], rtol=1e-3, atol=1e-4)


class _NotFinite(Objective):
    """An objective of a step that is skipped."""

    def __call__(self, outputs: Outputs, keys: torch.Tensor, samples: int) -> LossValue:
        return LossValue(loss=outputs.image.sum() * float("nan"), metrics={})  # pyright: ignore


def _views(path: str) -> tuple[bool, bool, bool]:
    """Of the copy: that it begins as the towers and stays so over a skipped step; that its views
    carry a gradient; that it is read back as it was."""
    config = _config(3, "fp32")
    momentum, engine = _start(config)
    batch = tiny_batch(4, rows=4)
    outputs = engine(batch.images, batch.tokens)
    seen = outputs.seen_by(momentum(batch.images, batch.tokens))
    same = torch.allclose(seen.image_view, outputs.image, atol=1e-6) and torch.allclose(
        seen.text_view_independent, outputs.text_independent, atol=1e-6
    )
    before = {name: value.clone() for name, value in momentum.state_dict().items()}
    train_step(
        engine,
        momentum,
        _NotFinite(None, config.structure, gathered_batch=4, in_modal={}, separation={}),
        iter([batch]),
        accumulation=1,
        lr_factor=1.0,
        samples=0,
    )
    same &= all(torch.equal(value, before[name]) for name, value in momentum.state_dict().items())
    with torch.no_grad():
        momentum.state_dict()["logit_scale"].add_(1.0)
    if dist.get_rank() == 0:
        torch.save(momentum.state_dict(), path)
    dist.barrier()
    other, _ = _start(config)
    other.load_state_dict(torch.load(path, weights_only=True))
    states = zip(other.state_dict().values(), momentum.state_dict().values(), strict=True)
    return same, seen.image_view.requires_grad, all(torch.equal(*pair) for pair in states)


@pytest.mark.distributed
def test_views_begin_as_the_embeddings_and_carry_no_gradient(tmp_path: Path) -> None:
    assert run_ranks(_views, 2, str(tmp_path / "momentum.pt")) == [(True, False, True)] * 2
