"""P1: with the gamma loss a step moves DeepSpeed's parameters and gradients, and no feature."""

import collections
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.engine.zero import Engine
from pipeline.losses.contrastive import InfoNCEGathered
from pipeline.losses.gamma import GammaLoss
from tests.distributed.gloo import run_ranks
from tests.tiny import tiny_config, tiny_module, tiny_pairs

Record = dict[tuple[str, int], int]  # (collective, elements) -> calls


class _Recorder(TorchDispatchMode):
    """Notes every c10d operation that runs under it, with the elements it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[tuple[str, int]] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.calls[func.name(), sum(tensor.numel() for tensor in tensors)] += 1
        return func(*args, **(kwargs or {}))


def _one_step(stage: int, kind: str, local_batch: int) -> tuple[Record, Record]:
    """What the loss alone calls, and what a whole step calls."""
    config = tiny_config(engine={"zero_stage": stage})
    engine = Engine(
        tiny_module(config),
        engine=config.engine,
        optim=config.optim,
        micro_batch=local_batch,
        accumulation=1,
        device=torch.device("cpu"),
    )
    loss = InfoNCEGathered() if kind == "gathered" else GammaLoss(virtual_batch=64)
    images, tokens = tiny_pairs(local_batch)
    with _Recorder() as step:
        outputs = engine(images, tokens)
        with _Recorder() as of_loss:
            value = loss(*outputs)
        engine.backward(value.loss)
        engine.step(1.0)
    return dict(of_loss.calls), dict(step.calls)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_gamma_loss_calls_no_collective_and_the_step_ignores_the_batch(stage: int) -> None:
    small = run_ranks(_one_step, 2, stage, "gamma", 4)
    large = run_ranks(_one_step, 2, stage, "gamma", 16)
    for (of_loss, step), (_, step_large) in zip(small, large, strict=True):
        assert of_loss == {}
        assert step == step_large
        assert step, "the recorder must see DeepSpeed's own collectives"


@pytest.mark.distributed
def test_the_recorder_sees_a_gather() -> None:
    """The same test on the comparator: collectives in the loss, growing with the batch."""
    small = run_ranks(_one_step, 2, 1, "gathered", 4)[0]
    large = run_ranks(_one_step, 2, 1, "gathered", 16)[0]
    names = {name for name, _ in small[0]}
    assert any("allgather" in name for name in names)
    assert sum(e * n for (_, e), n in large[0].items()) == 4 * sum(
        e * n for (_, e), n in small[0].items()
    )
    assert small[1] != large[1]


@pytest.mark.distributed
def test_bytes_do_not_grow_with_the_world() -> None:
    """Beside ZeRO-0's gradient all-reduce nothing is sent, at two workers or four."""
    two = run_ranks(_one_step, 2, 0, "gamma", 4)[0][1]
    four = run_ranks(_one_step, 4, 0, "gamma", 4)[0][1]
    assert two == four
