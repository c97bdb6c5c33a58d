"""The fusion model under ZeRO 0-3: gradients of one process, one momentum model, exact resume."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from jobs.bench.ranks import run_ranks
from pipeline.config.plan import make_plan
from pipeline.config.schema import Config
from pipeline.data.answers import AnswerList
from pipeline.data.batches import Batch
from pipeline.data.decode import Asked
from pipeline.engine.momentum import Momentum
from pipeline.engine.zero import Engine
from pipeline.evaluate.embed import Forward, embed_rows
from pipeline.evaluate.rerank import Match, rerank
from pipeline.evaluate.retrieval import rank_by_contrast
from pipeline.losses.base import LossValue
from pipeline.train.module import TOWERS
from pipeline.train.objective import FusionObjective, Objective, build_momentum, build_objective
from pipeline.train.step import train_step
from pipeline.train.task import Module, TaskObjective, build_module, build_task_objective
from tests.tiny import (
    FUSION,
    tiny_batch,
    tiny_config,
    tiny_facts,
    tiny_module,
    tiny_pairs,
    tiny_tokenizer,
)

GLOBAL_BATCH = 8
STAGES = (0, 1, 2, 3)
DECAY = 0.75
CPU = torch.device("cpu")
ANSWERS = AnswerList(names=("red", "a large square"), is_open=True)
TERMS: dict[str, Any] = {
    "views": "momentum",
    "momentum": DECAY,
    "in_modal": 0.5,
    "separation": {"weight": 0.7},
    "bridge": {"weight": 0.7, "t": 0.3, "text": True},
    "consistency": {"weight": 0.1},
}


def _config(stage: int = 0, precision: str = "fp32") -> Config:
    return tiny_config(
        model=FUSION,
        loss={"prior": "queue", "queue_size": 16, "evidence": "counted", "virtual_batch": 24},
        structure=TERMS,
        engine={"zero_stage": stage, "precision": precision},
        optim={"lr": 0.02},
        train={"global_batch": GLOBAL_BATCH},
    )


def _objective(config: Config) -> Objective:
    plan, problems = make_plan(config, tiny_facts(GLOBAL_BATCH))
    assert not problems
    return build_objective(config, plan, tiny_tokenizer(), embed_dim=16, rank=0, world_size=1)


def _start(config: Config, micro: int) -> tuple[Momentum, Engine, Objective]:
    module = tiny_module(config)
    momentum = build_momentum(config, module, CPU)
    assert momentum is not None
    engine = Engine(
        module, engine=config.engine, optim=config.optim, micro_batch=micro, accumulation=1,
        device=CPU,
    )  # fmt: skip
    return momentum, engine, _objective(config)


def _shard(index: int, shards: int, seed: int = 0) -> Batch:
    whole = tiny_batch(GLOBAL_BATCH, rows=GLOBAL_BATCH, seed=seed)
    size = GLOBAL_BATCH // shards
    rows = slice(index * size, (index + 1) * size)
    return replace(
        whole, images=whole.images[rows], tokens=whole.tokens[rows], keys=whole.keys[rows]
    )


def _loss(
    model: Any, momentum: Momentum, objective: Objective, index: int, shards: int
) -> LossValue:
    """A shard's loss; what is drawn follows from its number."""
    torch.manual_seed(index)
    batch = _shard(index, shards)
    inputs = objective.inputs(batch)
    return objective.loss(model(*inputs), momentum(*objective.slow_inputs(inputs)), batch, 0)


def _gradients(stages: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    from deepspeed.utils import safe_get_full_grad

    found = []
    for stage in stages:
        rank, world = dist.get_rank(), dist.get_world_size()
        momentum, engine, objective = _start(_config(stage), GLOBAL_BATCH // world)
        engine.backward(_loss(engine, momentum, objective, rank, world).loss)
        found.append(
            {
                name: gradient.clone()
                for name, parameter in engine.module.named_parameters()
                if (gradient := safe_get_full_grad(parameter)) is not None
            }
        )
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_equal_a_single_process(world_size: int) -> None:
    """Contrast, matching, masked words and every term of the structure at once."""
    config = _config()
    module = tiny_module(config)
    momentum = build_momentum(config, module, CPU)
    assert momentum is not None
    parts = [
        _loss(module, momentum, _objective(config), index, world_size)
        for index in range(world_size)
    ]
    assert {"matching_loss", "masked_words_loss", "structure/bridge_residual_text"} <= set(
        parts[0].metrics
    )
    torch.stack([part.loss for part in parts]).mean().backward()
    expected = {name: p.grad for name, p in module.named_parameters()}
    lacking = [name for name, gradient in expected.items() if gradient is None]
    assert not lacking, "every parameter has a gradient"
    for rank in run_ranks(_gradients, world_size, STAGES):
        for stage, gradients in zip(STAGES, rank, strict=True):
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                theirs = expected[name]
                assert theirs is not None
                difference = (gradient.float() - theirs).abs().max()
                allowed = 5e-6 + 1e-4 * theirs.abs().max()
                assert difference <= allowed, f"{name} at ZeRO-{stage}: {difference:.2e}"


def _step(momentum: Momentum, engine: Engine, objective: Objective, step: int) -> float:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(100 * step + rank)
    result = train_step(
        engine, momentum, objective, iter([_shard(rank, world, seed=step)]), accumulation=1,
        lr_factor=1.0, samples=8 * step,
    )  # fmt: skip
    assert result.is_finite
    return float(result.metrics["loss"])


def _train(cases: list[tuple[int, str]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The momentum model after some steps, and the literal average of the weights after each."""
    import deepspeed

    found = []
    for stage, precision in cases:
        momentum, engine, objective = _start(_config(stage, precision), 4)
        literal = {name: value.clone() for name, value in momentum.state_dict().items()}
        for step in range(3):
            _step(momentum, engine, objective, step)
            for name, parameter in engine.module.named_parameters():
                mine = literal[name.removeprefix(TOWERS)]
                with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                    mine.copy_(DECAY * mine + (1 - DECAY) * parameter.detach().float())
        trained = {id(p) for group in engine._optimizer.param_groups for p in group["params"]}
        assert not trained & {id(value) for value in momentum.state_dict().values()}
        found.append((momentum.state_dict(), literal))
    return found


@pytest.mark.distributed
def test_the_momentum_model_is_the_literal_average_at_every_stage() -> None:
    cases = [(stage, precision) for precision in ("fp32", "bf16") for stage in STAGES]
    ranks = run_ranks(_train, 2, cases)
    for index, (stage, precision) in enumerate(cases):
        (copy, literal), (other, _) = ranks[0][index], ranks[1][index]
        for name, value in copy.items():
            case = f"{name} at ZeRO-{stage} in {precision}"
            assert torch.equal(value, other[name]), case
            torch.testing.assert_close(value, literal[name], rtol=1e-5, atol=1e-6, msg=case)
            if precision == "fp32":
                first = ranks[0][0][0][name]
                torch.testing.assert_close(value, first, rtol=1e-3, atol=2e-4, msg=case)


def _resumed(folder: str) -> list[tuple[list[float], list[float]]]:
    """Losses of steps 2 and 3 without a break, and after a load; for each stage."""
    found = []
    for stage in STAGES:
        momentum, engine, objective = _start(_config(stage), 4)
        for step in range(2):
            _step(momentum, engine, objective, step)
        path = Path(folder) / str(stage)
        engine.save(path)
        saved = momentum.state_dict(), objective.state_dict()
        saved = [
            {name: value.clone() for name, value in saved[0].items()},
            torch.load(_kept(path, saved[1]), weights_only=True),
        ]
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, saved[1])
        straight = [_step(momentum, engine, objective, step) for step in (2, 3)]
        momentum, engine, objective = _start(_config(stage), 4)
        engine.load(path)
        momentum.load_state_dict(saved[0])
        objective.load_state_dict(states, dist.get_rank(), dist.get_world_size())
        found.append((straight, [_step(momentum, engine, objective, step) for step in (2, 3)]))
    return found


def _kept(folder: Path, state: dict[str, Any]) -> Path:
    path = folder / f"objective-{dist.get_rank()}.pt"
    torch.save(state, path)
    return path


@pytest.mark.distributed
def test_a_resumed_run_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    """Weights, momentum model, queues: all that a step needs is kept."""
    for rank in run_ranks(_resumed, 2, str(tmp_path)):
        for stage, (straight, resumed) in zip(STAGES, rank, strict=True):
            assert straight == resumed, f"ZeRO-{stage}"


def _task(stage: int, kind: str) -> tuple[Momentum, Engine, TaskObjective]:
    config = _task_config(stage, kind)
    assert config.task is not None
    module = _module(kind, stage)
    momentum = build_momentum(config, module, CPU)
    assert momentum is not None
    engine = Engine(
        module, engine=config.engine, optim=config.optim, micro_batch=4, accumulation=1,
        device=CPU,
    )  # fmt: skip
    return momentum, engine, build_task_objective(config.task, module)


def _task_config(stage: int, kind: str) -> Config:
    return tiny_config(
        model=FUSION,
        task={"kind": kind, "decoder_layers": 1, "distillation": 0.4},
        structure={"momentum": DECAY},
        engine={"zero_stage": stage},
        optim={"lr": 0.02},
    )


def _distilled(kinds: tuple[str, ...]) -> list[tuple[dict[str, Any], dict[str, Any], list[float]]]:
    """Momentum model, its literal average, losses: of each kind at each stage."""
    import deepspeed

    found = []
    for kind in kinds:
        for stage in STAGES:
            momentum, engine, objective = _task(stage, kind)
            literal = {name: value.clone() for name, value in momentum.state_dict().items()}
            losses = []
            for step in range(3):
                batch = _shard(dist.get_rank(), 2, seed=step)
                batch.answers = torch.full((4, 1), step % 2, dtype=torch.int32)
                if kind == "reasoning":
                    batch.images = torch.stack([batch.images, batch.images.flip(0)], dim=1)
                result = train_step(
                    engine, momentum, objective, iter([batch]), accumulation=1, lr_factor=1.0,
                    samples=8 * step,
                )  # fmt: skip
                losses.append(float(result.metrics["loss"]))
                for name, parameter in engine.module.named_parameters():
                    with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                        literal[name].lerp_(parameter.detach().float(), 1 - DECAY)
            found.append((momentum.state_dict(), literal, losses))
    return found


@pytest.mark.distributed
def test_a_tasks_momentum_model_has_its_head_too() -> None:
    """The literal average at every stage; two pictures share modules by two names."""
    kinds = ("entailment", "reasoning", "vqa")
    ranks = run_ranks(_distilled, 2, kinds)
    for index, (kind, stage) in enumerate(itertools.product(kinds, STAGES)):
        (copy, literal, losses), (other, _, _) = ranks[0][index], ranks[1][index]
        names = {name for name, _ in _module(kind).named_parameters()}
        assert names <= copy.keys()
        assert any(not name.startswith(TOWERS) for name in names)
        for name in names:
            case = f"{name} of {kind} at ZeRO-{stage}"
            assert torch.equal(copy[name], other[name]), case
            torch.testing.assert_close(copy[name], literal[name], rtol=1e-5, atol=1e-6, msg=case)
        first = ranks[0][index - stage][2]
        assert losses == pytest.approx(first, rel=1e-3), f"{kind} at ZeRO-{stage}"


def _module(kind: str, stage: int = 0) -> Module:
    asked = Asked(answers=ANSWERS, pictures=2 if kind == "reasoning" else 1)
    return build_module(_task_config(stage, kind), tiny_tokenizer(), asked)


def test_what_is_masked_and_drawn_follows_from_torchs_seed() -> None:
    config = _config()
    objective = _objective(config)
    assert isinstance(objective, FusionObjective)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        _, tokens, masked, chosen = objective.inputs(_shard(0, 1))
        assert tokens is not None
        assert masked is not None
        assert chosen is not None
        assert torch.equal(masked[~chosen], tokens[~chosen])
        drawn.append((masked.tolist(), chosen.tolist()))
    assert drawn[0] == drawn[1] != drawn[2]


SHARES = {  # of evaluation rows: for each rank the rows of its batches of four
    "uneven": [[4, 4, 3], [2]],
    "one without": [[4, 1], []],
    "one without, the first": [[], [4, 4, 2]],
}


def _reranked(
    forward: Forward, match: Match, shares: list[list[int]], k: int
) -> tuple[list[tuple[int, int]], list[int]]:
    """Ranks of the rows of some shares, three captions an image; of texts with their owners.

    Those of an image are sorted: where its captions stand among all depends on the shares.
    """
    batches = [
        tiny_batch(4, rows=rows, seed=10 * (len(share) + rows) + index, captions=3)
        for share in shares
        for index, rows in enumerate(share)
    ]
    rows = embed_rows(forward, iter(batches), tiny_pairs(4), CPU, keeps_states=True)
    before = rank_by_contrast(rows.image, rows.text, rows.owners)
    ranks = rerank(match, rows, before, k=k, batch=4, device=CPU)
    owned = zip(rows.owners.tolist(), ranks.text.tolist(), strict=True)
    return sorted(owned), ranks.image.tolist()


def _spread(module: torch.nn.Module) -> torch.nn.Module:
    """As if trained: what the matching head says of pairs differs."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "fusion_encoder" in name or "match" in name:
                parameter.mul_(8)
    return module


def _evaluated(stages: tuple[int, ...], k: int) -> list[dict[str, Any]]:
    """Ranks at each stage; a step follows, since an evaluation is no end."""
    found = []
    for stage in stages:
        config = _config(stage)
        module = _spread(tiny_module(config))
        momentum = build_momentum(config, module, CPU)
        assert momentum is not None
        engine = Engine(
            module, engine=config.engine, optim=config.optim, micro_batch=4, accumulation=1,
            device=CPU,
        )  # fmt: skip
        engine.train(False)
        ranks = {
            name: _reranked(
                lambda images, tokens, engine=engine: engine(images, tokens).parts,
                lambda states, tokens, engine=engine: (
                    engine(None, tokens, None, None, states).matching
                ),
                [shares[dist.get_rank()]],
                k,
            )
            for name, shares in SHARES.items()
        }
        engine.train(True)
        _step(momentum, engine, _objective(config), 0)
        found.append(ranks)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("k", [3, 100])
def test_reranking_on_two_ranks_is_that_of_one_process(k: int) -> None:
    module = _spread(tiny_module(_config())).eval()
    expected = {
        name: _reranked(
            lambda images, tokens: module(images, tokens).parts,
            lambda states, tokens: module(None, tokens, None, None, states).matching,
            shares,
            k,
        )
        for name, shares in SHARES.items()
    }
    assert len({rank for _, rank in expected["uneven"][0]}) > 3
    stages = (1, 3)
    for rank in run_ranks(_evaluated, 2, stages, k):
        for stage, found in zip(stages, rank, strict=True):
            for name, ranks in found.items():
                assert ranks == expected[name], f"{name} at ZeRO-{stage}"
