"""Fusion models read back by another number of workers: tied words, shared keys and values.

DeepSpeed's converted checkpoints go by names; a parameter that has two, or is used in two places,
must come back as one.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jobs.bench.ranks import run_ranks
from pipeline.data.answers import AnswerList
from pipeline.data.decode import Asked
from pipeline.engine.zero import Engine
from pipeline.train.task import build_module
from tests.tiny import FUSION, tiny_config, tiny_pairs, tiny_tokenizer

Case = tuple[str, int]  # what is trained, ZeRO stage
CASES: list[Case] = [(kind, stage) for kind in ("pretraining", "pairs", "vqa") for stage in (1, 3)]
GLOBAL_BATCH = 12
ANSWERS = AnswerList(names=("a red cat", "yes", "no"), is_open=True)


def _engine(case: Case, loads_universal: bool = False) -> Engine:
    kind, stage = case
    task = {"pretraining": {}, "pairs": {"task": {"kind": "reasoning"}},
            "vqa": {"task": {"kind": "vqa", "decoder_layers": 1}}}[kind]  # fmt: skip
    config = tiny_config(model=FUSION, engine={"zero_stage": stage}, optim={"lr": 0.01}, **task)
    asked = Asked(answers=ANSWERS, pictures=2 if kind == "pairs" else 1)
    return Engine(
        build_module(config, tiny_tokenizer(), asked if task else None),
        engine=config.engine,
        optim=config.optim,
        micro_batch=GLOBAL_BATCH // dist.get_world_size(),
        accumulation=1,
        device=torch.device("cpu"),
        loads_universal=loads_universal,
    )


def _inputs(kind: str, step: int) -> list[Tensor]:
    """Of the whole batch: each row's share of the loss is its own."""
    images, tokens = tiny_pairs(GLOBAL_BATCH, seed=step)
    if kind == "pairs":
        return [torch.stack([images, images.flip(0)], dim=1), tokens]
    if kind == "vqa":
        return [images, tokens]
    chosen = torch.zeros_like(tokens, dtype=torch.bool)
    chosen[:, 2] = True
    return [images, tokens, tokens, chosen]


def _loss(kind: str, outputs: Any) -> Tensor:
    if kind == "pairs":
        return outputs.logits.log_softmax(1)[:, 0].neg().mean()
    if kind == "vqa":
        return outputs.answer_losses.mean()
    features = (outputs.image - outputs.text).square().sum(1) * outputs.logit_scale
    return features.mean() + outputs.masked_logits.log_softmax(1)[:, 5].neg().mean()


def _train(engine: Engine, kind: str, steps: range) -> list[float]:
    losses = []
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in steps:
        mine = [part.chunk(world)[rank] for part in _inputs(kind, step)]
        if kind == "vqa":
            rows = torch.arange(len(mine[0]))
            mine += [rows, torch.zeros_like(rows)]
        loss = _loss(kind, engine(*mine))
        engine.backward(loss)
        engine.step(1.0)
        losses.append(float(engine.sum(loss.detach().float()[None])) / world)
    return losses


def _save(folder: str) -> list[list[float]]:
    went_on = []
    for case in CASES:
        engine = _engine(case)
        _train(engine, case[0], range(3))
        engine.save(Path(folder) / f"{case[0]}-{case[1]}")
        went_on.append(_train(engine, case[0], range(3, 6)))
    return went_on


def _load(folder: str) -> list[list[float]]:
    went_on = []
    for case in CASES:
        engine = _engine(case, loads_universal=True)
        engine.load(Path(folder) / f"{case[0]}-{case[1]}")
        went_on.append(_train(engine, case[0], range(3, 6)))
    return went_on


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[float]]]:
    folder = str(tmp_path_factory.mktemp("fusion"))
    return folder, run_ranks(_save, 2, folder)[0]


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 3])
def test_another_number_of_workers_goes_on(
    saved_by_two: tuple[str, list[list[float]]], world_size: int
) -> None:
    folder, saved = saved_by_two
    for rank in run_ranks(_load, world_size, folder):
        for case, losses, went_on in zip(CASES, saved, rank, strict=True):
            assert losses[0] != pytest.approx(losses[1], rel=1e-4), "it trains"
            assert went_on == pytest.approx(losses, rel=2e-4), case
