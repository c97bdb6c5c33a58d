"""Runs in a copy of the sources that the guide has extended: a step of each, an evaluation."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import pipeline
from pipeline.config.plan import make_plan
from pipeline.config.schema import Config
from pipeline.data.batches import Batch
from pipeline.engine.zero import Engine
from pipeline.evaluate import suite
from pipeline.train.module import build_pretraining
from pipeline.train.objective import build_objective
from pipeline.train.step import train_step
from tests.tiny import tiny_batch, tiny_config, tiny_facts, tiny_tokenizer

CPU = torch.device("cpu")
STEPS = 8


def _train(config: Config) -> list[float]:
    """The loss at each step on one batch, by the real step under ZeRO."""
    plan, problems = make_plan(config, tiny_facts(64))
    assert not problems, problems
    engine = Engine(
        build_pretraining(config, tiny_tokenizer()),
        engine=config.engine,
        optim=config.optim,
        micro_batch=plan.micro_batch,
        accumulation=1,
        device=CPU,
    )
    objective = build_objective(config, plan, tiny_tokenizer(), embed_dim=16, rank=0, world_size=1)
    losses = []
    for step in range(STEPS):
        batches: Iterator[Batch] = iter([tiny_batch(8, rows=8)])
        result = train_step(
            engine, None, objective, batches, accumulation=1, lr_factor=1.0, samples=8 * step
        )
        assert result.is_finite
        losses.append(result.metrics["loss"].item())
    return losses


def _evaluate(config: Config) -> dict[str, float]:
    """The metrics of rows that need no files."""
    module = build_pretraining(config, tiny_tokenizer()).eval()
    batches = [tiny_batch(4, rows=4, seed=seed) for seed in range(3)]
    suite.eval_batches = lambda *_, **__: iter(batches)
    anything: Any = None
    what = suite.Suite(
        config=config.evaluate,
        catalog=anything,
        recipe=suite.make_recipe(config, tiny_tokenizer(), train=False),
        classes=(),
        probed={},
        val=suite.RowSet("val", "", "auto"),
        ingest_cpus=1,
    )
    return suite.run_suite(what, module, CPU, 1, 0, in_full=False)[0]


def main(root: Path, out: Path) -> None:
    """Train and evaluate; write what came of it."""
    assert root in Path(pipeline.__file__).parents
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=0, world_size=1)
    engine, optim = {"zero_stage": 1}, {"lr": 0.01}
    bag = tiny_config(model={"kind": "bag"}, engine=engine, optim=optim, evaluate={"batch": 4})
    loss = tiny_config(loss={"kind": "decoupled_local"}, engine=engine, optim=optim)
    found = {"loss": _train(loss), "model": _train(bag), "evaluation": _evaluate(bag)}
    dist.destroy_process_group()
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
