"""Every comparator over real workers equals its definition on the whole batch in one process."""

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.bench.ranks import run_ranks
from pipeline.config.plan import make_plan
from pipeline.config.schema import LossKind
from pipeline.losses.base import Loss, State
from pipeline.train.objective import build_loss
from tests.dense_comparators import DenseFastCLIP, dense_infonce, dense_sigmoid
from tests.tiny import tiny_config, tiny_facts

GLOBAL_BATCH, DIM, ROWS, STEPS = 12, 6, 18, 4
GAMMA, RHO = 0.6, 0.8
FACTS = tiny_facts(ROWS, DIM)
KINDS = [kind for kind in get_args(LossKind) if kind != "gamma"]


def _build(kind: str, rank: int, world_size: int) -> Loss:
    config = tiny_config(
        loss={"kind": kind, "fastclip_gamma": GAMMA, "rho": RHO},
        train={"global_batch": GLOBAL_BATCH},
        cluster={"workers": world_size},
    )
    plan, _ = make_plan(config, FACTS)
    return build_loss(config, plan, embed_dim=DIM, rank=rank, world_size=world_size)


def _batch(step: int, kind: str) -> tuple[list[Tensor], Tensor]:
    """The global batch of a step: image, text, logit scale, logit bias; keys that come again."""
    generator = torch.Generator().manual_seed(step)
    image, text = torch.randn(2, GLOBAL_BATCH, DIM, generator=generator, dtype=torch.float64)
    keys = torch.randperm(ROWS, generator=generator)[:GLOBAL_BATCH]
    inputs = [
        F.normalize(image, dim=1),
        F.normalize(text, dim=1),
        torch.tensor(7.0 + step, dtype=torch.float64),
    ]
    if kind.startswith("sigmoid"):
        inputs.append(torch.tensor(-3.0, dtype=torch.float64))
    return [part.requires_grad_() for part in inputs], keys


def _results(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def _work(kind: str, steps: range, states: list[State]) -> tuple[list[list[Tensor]], State]:
    """Of this rank: value and gradients by its rows, scale and bias at each step; the state."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    loss = _build(kind, rank, world_size)
    if states:
        loss.load_state_dict(states, rank, world_size)
    results = []
    for step in steps:
        inputs, keys = _batch(step, kind)
        mine = [
            part.detach().chunk(world_size)[rank].requires_grad_() if part.ndim else part
            for part in inputs
        ]
        bias = mine[3] if len(mine) > 3 else None
        value = loss(*mine[:3], logit_bias=bias, keys=keys.chunk(world_size)[rank])
        results.append(_results(value.loss, mine))
    return results, loss.state_dict()


def _dense(kind: str, shards: int) -> list[list[Tensor]]:
    """The same in one process, by step: the mean over shards where each has a loss of its own."""
    memory = DenseFastCLIP(gamma=GAMMA, learns_scale=kind == "fastclip_v3", rho=RHO)
    results = []
    for step in range(STEPS):
        inputs, keys = _batch(step, kind)
        parts = [inputs]
        if kind.endswith("local"):
            halves = zip(*(part.chunk(shards) for part in inputs[:2]), strict=True)
            parts = [[*half, *inputs[2:]] for half in halves]
        if kind.startswith("fastclip"):
            losses = [memory(*inputs[:3], keys)]
        else:
            dense: Any = dense_sigmoid if kind.startswith("sigmoid") else dense_infonce
            losses = [dense(*part) for part in parts]
        results.append(_results(torch.stack(losses).mean(), inputs))
    return results


def _together(ranks: list[list[Tensor]]) -> list[Tensor]:
    """One step's results of all ranks as those of one process: gradients are averaged."""
    value, image, text, *scalars = zip(*ranks, strict=True)
    rows = [torch.cat(part) / len(ranks) for part in (image, text)]
    return [torch.stack(value).mean(), *rows, *(torch.stack(part).mean() for part in scalars)]


def _assert_equal(found: list[Tensor], expected: list[Tensor], case: str) -> None:
    tolerance = 2e-5 if "fastclip" in case else 1e-9  # u is kept in fp32
    for name, mine, theirs in zip(
        ("value", "image", "text", "logit_scale", "logit_bias"), found, expected, strict=False
    ):
        torch.testing.assert_close(
            mine,
            theirs,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, n=name: f"{case} {n} {text}",
        )


def _all_kinds() -> list[list[list[Tensor]]]:
    return [_work(kind, range(STEPS), [])[0] for kind in KINDS]


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_workers_mean_is_the_definition(world_size: int) -> None:
    """Values and gradients, over steps whose rows come again on another worker."""
    ranks = run_ranks(_all_kinds, world_size)
    for index, kind in enumerate(KINDS):
        expected = _dense(kind, world_size)
        for step in range(STEPS):
            found = _together([rank[index][step] for rank in ranks])
            _assert_equal(found, expected[step], f"{kind} at step {step}")


def _all_fastclip(steps: range, states: dict[str, list[State]]) -> dict[str, Any]:
    return {kind: _work(kind, steps, states[kind]) for kind in states}


@pytest.mark.distributed
def test_what_is_remembered_survives_another_number_of_workers() -> None:
    """2 -> 1 -> 4 workers: each goes on as if nothing had happened."""
    states: dict[str, list[State]] = {"fastclip_v1": [], "fastclip_v3": []}
    expected = {kind: _dense(kind, 1) for kind in states}
    for world_size, steps in ((2, range(2)), (1, range(2, 3)), (4, range(3, STEPS))):
        ranks = run_ranks(_all_fastclip, world_size, steps, states)
        for kind in states:
            for index, step in enumerate(steps):
                found = _together([rank[kind][0][index] for rank in ranks])
                _assert_equal(found, expected[kind][step], f"{kind} at step {step}")
            states[kind] = [rank[kind][1] for rank in ranks]
            rows = torch.cat([state["rows"] for state in states[kind]])
            assert len(rows) == len(rows.unique()), "a row is saved once"
