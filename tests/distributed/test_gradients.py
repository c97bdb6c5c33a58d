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


def _make_loss(kind: str) -> Any:
    return InfoNCEGathered() if kind == "gathered" else GammaLoss(virtual_batch=GLOBAL_BATCH)


def _gradients(stage: int, kind: str, accumulation: int) -> dict[str, torch.Tensor]:
    """This rank's full gradients after the backwards of one step."""
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
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["gamma", "gamma-prior", "gathered"])
def test_gradients_equal_a_single_process(world_size: int, stage: int, kind: str) -> None:
    expected = _reference(kind, world_size)
    for gradients in run_ranks(_gradients, world_size, stage, kind, 1):
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient.float(), expected[name], rtol=1e-4, atol=2e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accumulation_is_exact_without_a_second_pass(stage: int) -> None:
    """Two micro batches on each of two workers: the mean over four complete local losses."""
    expected = _reference("gamma", 4)
    for gradients in run_ranks(_gradients, 2, stage, "gamma", 2):
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient.float(), expected[name], rtol=1e-4, atol=2e-6)
