"""P2: under ZeRO 0-3 at world 1, 2, 4 the parameter gradients equal a single process's."""

from typing import Any

import pytest
import torch

from jobs.bench.ranks import run_ranks
from pipeline.config.plan import make_plan
from pipeline.config.schema import Config
from pipeline.engine.zero import Engine
from pipeline.train.objective import Objective, build_objective
from tests.dense_comparators import DenseFastCLIP, dense_infonce, dense_sigmoid
from tests.tiny import tiny_config, tiny_facts, tiny_module, tiny_pairs, tiny_tokenizer

GLOBAL_BATCH = 8
STAGES = (0, 1, 2, 3)
RHO = 0.8
VIEWS_FROM = 100  # seed
Case = tuple[int, str, int]  # ZeRO stage, loss, micro batches per step
LOSSES: dict[str, dict[str, Any]] = {
    "gamma": {"prior": "none"},
    "gamma-prior": {"prior": "amortized"},
    "infonce_gathered": {},
    "infonce_local": {},
    "sigmoid_local": {},
    "sigmoid_ring": {},
    "fastclip_v1": {},
    "fastclip_v3": {"rho": RHO},
    "gamma-separation": {},
    "gamma-bridge": {},
    "gamma-consistency": {},
    "gamma-everything": {"prior": "amortized"},
}
STRUCTURES: dict[str, dict[str, Any]] = {
    "gamma-separation": {"separation": {"weight": 0.7}},
    "gamma-bridge": {"in_modal": 0.5, "bridge": {"weight": 0.7, "t": [0.1, 0.6], "text": True}},
    "gamma-consistency": {"consistency": {"weight": 0.1}},
}
STRUCTURES["gamma-everything"] = {
    name: value for structure in STRUCTURES.values() for name, value in structure.items()
}
FACTS = tiny_facts(GLOBAL_BATCH)
CASES: list[Case] = [(stage, kind, 1) for kind in list(LOSSES)[:3] for stage in STAGES]
CASES += [(1, kind, 1) for kind in list(LOSSES)[3:-1]]
CASES += [(stage, "gamma-everything", 1) for stage in STAGES]
CASES += [(stage, kind, 1) for kind in ("sigmoid_ring", "fastclip_v1") for stage in (0, 2, 3)]


def _config(kind: str, **engine: Any) -> Config:
    loss = {"kind": kind.split("-")[0], **LOSSES[kind]}
    return tiny_config(
        loss=loss,
        structure=STRUCTURES.get(kind, {}),
        engine=engine,
        train={"global_batch": GLOBAL_BATCH},
    )


def _make_objective(kind: str) -> Objective:
    config = _config(kind)
    plan, _ = make_plan(config, FACTS)
    return build_objective(config, plan, tiny_tokenizer(), embed_dim=16, rank=0, world_size=1)


def _inputs(kind: str) -> list[torch.Tensor]:
    views = tiny_pairs(GLOBAL_BATCH, seed=VIEWS_FROM) if kind in STRUCTURES else ()
    return [*tiny_pairs(GLOBAL_BATCH), *views]


def _gradients(cases: list[Case]) -> list[dict[str, torch.Tensor]]:
    """This rank's full gradients after the backwards of one step, for each case."""
    return [_gradients_of(*case) for case in cases]


def _gradients_of(stage: int, kind: str, accumulation: int) -> dict[str, torch.Tensor]:
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    config = _config(kind, zero_stage=stage)
    rank, world = dist.get_rank(), dist.get_world_size()
    micro = GLOBAL_BATCH // world // accumulation
    engine = Engine(
        tiny_module(config),
        engine=config.engine,
        optim=config.optim,
        micro_batch=micro,
        accumulation=accumulation,
        device=torch.device("cpu"),
    )
    objective, inputs = _make_objective(kind), _inputs(kind)
    for index in range(accumulation):
        start = (rank * accumulation + index) * micro
        rows = slice(start, start + micro)
        keys = torch.arange(GLOBAL_BATCH)[rows]
        value = objective(engine(*(each[rows] for each in inputs)), keys, 0)
        engine.backward(value.loss)
        if index < accumulation - 1:
            engine.step(1.0)
    return {
        name: gradient.clone()
        for name, parameter in engine.module.named_parameters()
        if (gradient := safe_get_full_grad(parameter)) is not None
    }


def _reference(kind: str, shards: int) -> dict[str, torch.Tensor]:
    """The mean over shards of the loss, in one process without DeepSpeed."""
    module = tiny_module(_config(kind))
    parts = zip(*(each.chunk(shards) for each in _inputs(kind)), strict=True)
    outputs = [module(*part) for part in parts]
    image = torch.cat([output.image for output in outputs])
    text = torch.cat([output.text for output in outputs])
    scale, bias = outputs[0].logit_scale, outputs[0].logit_bias
    if kind == "infonce_gathered":
        total = dense_infonce(image, text, scale)
    elif kind == "sigmoid_ring":
        total = dense_sigmoid(image, text, scale, bias)
    elif kind.startswith("fastclip"):
        dense = DenseFastCLIP(gamma=0.8, learns_scale=kind == "fastclip_v3", rho=RHO)
        total = dense(image, text, scale, torch.arange(GLOBAL_BATCH))
    elif kind == "infonce_local":
        total = torch.stack([dense_infonce(*output[:3]) for output in outputs]).mean()
    elif kind == "sigmoid_local":
        values = [dense_sigmoid(*output[:3], output.logit_bias) for output in outputs]
        total = torch.stack(values).mean()
    else:
        # Each worker measures its prior's evidence for itself.
        keys = torch.arange(GLOBAL_BATCH).chunk(shards)
        values = [
            _make_objective(kind)(output, rows, 0).loss
            for output, rows in zip(outputs, keys, strict=True)
        ]
        total = torch.stack(values).mean()
    total.backward()
    return {
        name: parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_equal_a_single_process(world_size: int) -> None:
    """Every stage and loss in one set of processes: starting them is what takes time."""
    references = {kind: _reference(kind, world_size) for kind in LOSSES}
    assert "logit_bias" in references["sigmoid_ring"]
    for results in run_ranks(_gradients, world_size, CASES):
        for (stage, kind, _), gradients in zip(CASES, results, strict=True):
            _assert_equal(gradients, references[kind], f"{kind} at ZeRO-{stage}")


@pytest.mark.distributed
def test_accumulation_is_exact_without_a_second_pass() -> None:
    """Two micro batches on each of two workers: the mean over four complete local losses."""
    cases = [(stage, "gamma", 2) for stage in STAGES]
    expected = _reference("gamma", 4)
    for results in run_ranks(_gradients, 2, cases):
        for (stage, _, _), gradients in zip(cases, results, strict=True):
            _assert_equal(gradients, expected, f"accumulation at ZeRO-{stage}")


def _assert_equal(
    gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], case: str
) -> None:
    assert gradients.keys() == expected.keys(), case
    for name, gradient in gradients.items():
        difference = (gradient.float() - expected[name]).abs()
        allowed = 2e-6 + 1e-4 * expected[name].abs()
        assert (difference <= allowed).all(), f"{case}: {name} differs by {difference.max():.2e}"
