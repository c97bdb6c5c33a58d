"""P2: under ZeRO 0-3 at world 1, 2, 4 the parameter gradients equal a single process's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.engine.zero import Engine
from pipeline.losses.contrastive import InfoNCEGathered
from pipeline.losses.gamma import GammaLoss
from tests.distributed.gloo import run_ranks
from tests.tiny import tiny_config, tiny_module, tiny_pairs

GLOBAL_BATCH = 8
STAGES = (0, 1, 2, 3)
KINDS = ("gamma", "gamma-prior", "gathered")
Case = tuple[int, str, int]  # ZeRO stage, loss, micro batches per step


def _make_loss(kind: str) -> Any:
    return InfoNCEGathered() if kind == "gathered" else GammaLoss(virtual_batch=GLOBAL_BATCH)


def _gradients(cases: list[Case]) -> list[dict[str, torch.Tensor]]:
    """This rank's full gradients after the backwards of one step, for each case."""
    return [_gradients_of(*case) for case in cases]


def _gradients_of(stage: int, kind: str, accumulation: int) -> dict[str, torch.Tensor]:
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    prior = "amortized" if kind == "gamma-prior" else "none"
    config = tiny_config(loss={"prior": prior}, engine={"zero_stage": stage})
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
    loss = _make_loss(kind)
    images, tokens = tiny_pairs(GLOBAL_BATCH)
    for index in range(accumulation):
        start = (rank * accumulation + index) * micro
        value = loss(*engine(images[start : start + micro], tokens[start : start + micro]))
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
    prior = "amortized" if kind == "gamma-prior" else "none"
    module = tiny_module(tiny_config(loss={"prior": prior}))
    images, tokens = tiny_pairs(GLOBAL_BATCH)
    outputs = [
        module(image, token)
        for image, token in zip(images.chunk(shards), tokens.chunk(shards), strict=True)
    ]
    if kind == "gathered":
        image = torch.cat([output.image for output in outputs])
        text = torch.cat([output.text for output in outputs])
        logits = outputs[0].logit_scale * image @ text.T
        labels = torch.arange(GLOBAL_BATCH)
        total = 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels))
    else:
        # Each worker measures its prior's evidence for itself.
        losses = [_make_loss(kind) for _ in outputs]
        values = [loss(*output).loss for loss, output in zip(losses, outputs, strict=True)]
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
    cases = [(stage, kind, 1) for kind in KINDS for stage in STAGES]
    references = {kind: _reference(kind, world_size) for kind in KINDS}
    for results in run_ranks(_gradients, world_size, cases):
        for (stage, kind, _), gradients in zip(cases, results, strict=True):
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
