"""What a checkpoint holds, written by all ranks and read back by all.

state/            DeepSpeed's shards: weights, optimiser state
part-R.json       rank R: rows used since the run began, counts, undelivered metrics
momentum.pt       the slow copy of the towers, if there is one; the same on all ranks
loss-R.pt         rank R: the running state of the objective's parts
meta.json         progress, world size, ZeRO stage, config, architecture, plan, tokenizer, versions
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.config.plan import Plan
from pipeline.config.schema import Config
from pipeline.data.batches import Tally
from pipeline.data.order import Cursor
from pipeline.data.text import Tokenizer
from pipeline.engine.momentum import Momentum
from pipeline.engine.zero import Engine
from pipeline.errors import RunStop
from pipeline.losses.base import Stateful
from pipeline.tracking.tracker import Point
from pipeline.train.loop import Progress
from pipeline.train.module import architecture
from pipeline.train.store import META

MOMENTUM = "momentum.pt"


@dataclass(kw_only=True, slots=True)
class State:
    """Everything besides the engine's own state that training changes; of one worker.

    `points` are metrics the tracker has not taken yet; rank 0 has them.
    """

    progress: Progress
    cursor: Cursor
    tally: Tally
    points: list[Point] = field(default_factory=list)


def save_checkpoint(
    folder: Path,
    engine: Engine,
    momentum: Momentum | None,
    objective: Stateful,
    state: State,
    *,
    rank: int,
    world_size: int,
    config: Config,
    plan: Plan,
    tokenizer: Tokenizer,
    versions: dict[str, str],
) -> None:
    """Write this rank's part under `folder`; rank 0 also the meta file."""
    engine.save(folder)
    part = {
        "cursor": state.cursor.to_json(),
        "points": state.points,
        "tally": {
            "rows": state.tally.rows,
            "cut": state.tally.cut,
            "cleaned": state.tally.cleaned,
            "skipped": state.tally.skipped,
            "bad": dict(state.tally.bad),
        },
    }
    (folder / f"part-{rank:05d}.json").write_text(json.dumps(part))
    if momentum is not None and rank == 0:
        torch.save(momentum.state_dict(), folder / MOMENTUM)
    torch.save(objective.state_dict(), folder / f"loss-{rank:05d}.pt")
    if rank == 0:
        meta = {
            "progress": asdict(state.progress),
            "world_size": world_size,
            "zero_stage": engine.zero_stage,
            "layout": engine.layout,
            "config": config.model_dump(mode="json"),
            "architecture": architecture(engine.module),
            "plan": plan.to_json(),
            "tokenizer": asdict(tokenizer),
            "versions": versions,
        }
        (folder / META).write_text(json.dumps(meta))


def read_meta(folder: Path) -> dict[str, Any]:
    """Read the meta file of a fetched checkpoint."""
    return json.loads((folder / META).read_text())


def load_checkpoint(
    folder: Path,
    engine: Engine,
    momentum: Momentum | None,
    objective: Stateful,
    *,
    rank: int,
    world_size: int,
) -> State:
    """Restore engine and objective in place and give the rest; the cursor is that of all ranks.

    Counts of all ranks go to rank 0, so that their sum over ranks stays right. The workers that
    saved may have been of another number. Raises `RunStop` when the parameters lie in another
    order, as another version of this package may have laid them.
    """
    meta = read_meta(folder)
    if not engine.loads_by_name and meta.get("layout") != engine.layout:
        raise RunStop(
            f"the checkpoint of step {meta['progress']['step']} was saved by gammaray "
            f"{meta['versions'].get('gammaray')} with its parameters in another order, and would "
            "be read as other weights: go on with the version that began the run, or start a new "
            "run with name=..."
        )
    engine.load(folder)
    savers = range(meta["world_size"])
    parts = [json.loads((folder / f"part-{saver:05d}.json").read_text()) for saver in savers]
    states = [torch.load(folder / f"loss-{saver:05d}.pt", weights_only=True) for saver in savers]
    if momentum is not None:
        momentum.load_state_dict(
            torch.load(folder / MOMENTUM, map_location="cpu", weights_only=True)
        )
    objective.load_state_dict(states, rank, world_size)
    cursor = Cursor.from_json(parts[0]["cursor"])
    tally = Tally()
    for part in parts:
        cursor.merge(Cursor.from_json(part["cursor"]))
        if rank == 0:
            _add(tally, part["tally"])
    points = [(step, time, values) for step, time, values in parts[0]["points"]]
    return State(progress=Progress(**meta["progress"]), cursor=cursor, tally=tally, points=points)


def _add(tally: Tally, saved: dict[str, Any]) -> None:
    tally.rows += saved["rows"]
    tally.cut += saved["cut"]
    tally.cleaned += saved["cleaned"]
    tally.skipped += saved.get("skipped", 0)  # older checkpoints have none
    tally.bad.update(saved["bad"])
