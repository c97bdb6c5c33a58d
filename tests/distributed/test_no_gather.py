"""P1: with the gamma loss a step moves DeepSpeed's parameters and gradients, and no feature."""

import collections
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jobs.bench.ranks import run_ranks
from pipeline.config.plan import loss_bytes, make_plan
from pipeline.config.schema import LossKind
from pipeline.engine.zero import Engine
from pipeline.losses.contrastive import InfoNCEGathered
from pipeline.train.objective import build_loss, build_momentum, build_objective
from tests.tiny import tiny_config, tiny_facts, tiny_module, tiny_pairs, tiny_tokenizer

Case = tuple[int, str, int]  # ZeRO stage, loss, local batch
LOCAL, DIM = 3, 10
FACTS = tiny_facts(embed_dim=DIM)
EVERY_TERM = {
    "in_modal": 0.5,
    "separation": {"weight": 1.0},
    "bridge": {"weight": 1.0, "t": "sampled", "text": True},
    "consistency": {"weight": 1.0},
}
Record = dict[tuple[str, int], int]  # (collective, elements) -> calls


class _Recorder(TorchDispatchMode):
    """Notes every c10d operation that runs under it, with the elements it is given.

    `received` are the bytes that operations of the kinds a loss may call bring to this worker.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[tuple[str, int]] = collections.Counter()
        self.received = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.calls[func.name(), sum(tensor.numel() for tensor in tensors)] += 1
            self.received += _received(func.name(), args)
        return func(*args, **(kwargs or {}))


def _received(name: str, args: Any) -> int:
    """What is one's own in an all-gather or a reduce-scatter does not travel."""
    if name == "c10d::recv_":
        return _bytes(args[0])
    if name == "c10d::allgather_":
        return _bytes(args[0]) - _bytes(args[1])
    if name == "c10d::reduce_scatter_":
        return _bytes(args[1]) - _bytes(args[0])
    return 0


def _bytes(tensors: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor))


def _steps(cases: list[Case]) -> list[tuple[Record, Record]]:
    return [_one_step(*case) for case in cases]


def _one_step(stage: int, kind: str, local_batch: int) -> tuple[Record, Record]:
    """What the loss alone calls, and what a whole step calls.

    `kind`: gathered, gamma, or a gamma loss with every term of the structure on augmented views, or
    on those of slow towers.
    """
    structure = {} if kind in ("gamma", "gathered") else {**EVERY_TERM, "views": kind}
    config = tiny_config(
        engine={"zero_stage": stage}, loss={"prior": "amortized"}, structure=structure
    )
    module, device = tiny_module(config), torch.device("cpu")
    momentum = build_momentum(config, module, device)
    engine = Engine(
        module,
        engine=config.engine,
        optim=config.optim,
        micro_batch=local_batch,
        accumulation=1,
        device=device,
    )
    plan, _ = make_plan(config, FACTS)
    objective = build_objective(
        config,
        plan,
        tiny_tokenizer(),
        embed_dim=16,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )
    if kind == "gathered":
        objective.contrast = InfoNCEGathered()
    inputs = list(tiny_pairs(local_batch))
    if kind == "augmented":
        inputs += tiny_pairs(local_batch, seed=1)
    with _Recorder() as step:
        outputs = engine(*inputs)
        if momentum is not None:
            outputs = outputs.seen_by(momentum(*inputs))
        with _Recorder() as of_loss:
            value = objective(outputs, torch.arange(local_batch), 0)
        engine.backward(value.loss)
        engine.step(1.0)
        if momentum is not None:
            momentum.update(engine)
    return dict(of_loss.calls), dict(step.calls)


@pytest.fixture(scope="module")
def two_workers() -> dict[Case, tuple[Record, Record]]:
    cases = [
        (stage, kind, batch)
        for kind in ("gamma", "augmented", "momentum")
        for stage in (0, 1, 2, 3)
        for batch in (4, 16)
    ]
    cases += [(1, "gathered", 4), (1, "gathered", 16)]
    return dict(zip(cases, run_ranks(_steps, 2, cases)[0], strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["gamma", "augmented", "momentum"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_gamma_loss_calls_no_collective_and_the_step_ignores_the_batch(
    two_workers: dict[Case, tuple[Record, Record]], stage: int, kind: str
) -> None:
    """Nor does any term of the structure; slow towers follow by the parameters' own collectives."""
    of_loss, step = two_workers[stage, kind, 4]
    of_larger_loss, larger_step = two_workers[stage, kind, 16]
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


def _bytes_of_losses() -> dict[str, tuple[int, set[str]]]:
    """Bytes received in a loss and its backward, and what was called; by kind of loss."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = {}
    for kind in get_args(LossKind):
        config = tiny_config(
            loss={"kind": kind, "rho": 0.5},
            train={"global_batch": LOCAL * world_size},
            cluster={"workers": world_size},
        )
        plan, _ = make_plan(config, FACTS)
        loss = build_loss(config, plan, embed_dim=DIM, rank=rank, world_size=world_size)
        image, text = torch.randn(2, LOCAL, DIM).requires_grad_()
        scale, bias = torch.tensor([9.0, -9.0]).requires_grad_()
        keys = torch.arange(LOCAL) + rank * LOCAL
        with _Recorder() as recorder:
            loss(image, text, scale, logit_bias=bias, keys=keys).loss.backward()
        found[kind] = recorder.received, {name for name, _ in recorder.calls}
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_each_loss_receives_the_bytes_it_is_planned_with(world_size: int) -> None:
    others = (world_size - 1) * LOCAL
    one_side = 4 * others * DIM  # features, or gradients, of one side in fp32
    expected = {
        "gamma": 0,
        "infonce_local": 0,
        "infonce_gathered": 4 * one_side,
        "sigmoid_local": 0,
        "sigmoid_ring": 2 * one_side,
        "fastclip_v1": 2 * one_side + 16 * others,
        "fastclip_v3": 2 * one_side + 16 * others,
    }
    for rank in run_ranks(_bytes_of_losses, world_size):
        assert {kind: received for kind, (received, _) in rank.items()} == expected
        silent = {kind for kind, (_, calls) in rank.items() if not calls}
        assert silent == {"gamma", "infonce_local", "sigmoid_local"}
        known = {"c10d::allgather_", "c10d::reduce_scatter_", "c10d::send", "c10d::recv_"}
        assert set().union(*(calls for _, calls in rank.values())) <= known
    planned = {kind: loss_bytes(kind, world_size, LOCAL, DIM) for kind in get_args(LossKind)}
    assert planned == expected


def _elements(record: Record) -> int:
    return sum(elements * calls for (_, elements), calls in record.items())
