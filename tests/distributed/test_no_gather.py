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

Case = tuple[int, str, int]  # ZeRO stage, loss, local batch
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


def _steps(cases: list[Case]) -> list[tuple[Record, Record]]:
    return [_one_step(*case) for case in cases]


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


@pytest.fixture(scope="module")
def two_workers() -> dict[Case, tuple[Record, Record]]:
    cases = [(stage, "gamma", batch) for stage in (0, 1, 2, 3) for batch in (4, 16)]
    cases += [(1, "gathered", 4), (1, "gathered", 16)]
    return dict(zip(cases, run_ranks(_steps, 2, cases)[0], strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_gamma_loss_calls_no_collective_and_the_step_ignores_the_batch(
    two_workers: dict[Case, tuple[Record, Record]], stage: int
) -> None:
    of_loss, step = two_workers[stage, "gamma", 4]
    of_larger_loss, larger_step = two_workers[stage, "gamma", 16]
    assert of_loss == of_larger_loss == {}
    assert step == larger_step
    assert step, "the recorder must see DeepSpeed's own collectives"


@pytest.mark.distributed
def test_the_recorder_sees_a_gather(two_workers: dict[Case, tuple[Record, Record]]) -> None:
    """The same on the comparator: collectives in the loss, growing with the batch."""
    of_loss, step = two_workers[1, "gathered", 4]
    of_larger_loss, larger_step = two_workers[1, "gathered", 16]
    assert any("allgather" in name for name, _ in of_loss)
    assert _elements(of_larger_loss) == 4 * _elements(of_loss) > 0
    assert step != larger_step


@pytest.mark.distributed
def test_nothing_grows_with_the_world(two_workers: dict[Case, tuple[Record, Record]]) -> None:
    """ZeRO-0's gradient all-reduce is the same at two workers and four."""
    four = run_ranks(_steps, 4, [(0, "gamma", 4)])[0][0]
    assert two_workers[0, "gamma", 4] == four


def _elements(record: Record) -> int:
    return sum(elements * calls for (_, elements), calls in record.items())
