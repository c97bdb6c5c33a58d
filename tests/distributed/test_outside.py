"""A model from elsewhere that is not on every node: all ranks stop alike, and none waits."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from jobs.bench.ranks import run_ranks
from pipeline.errors import RunStop
from pipeline.export.forms import export_run
from pipeline.train import worker
from tests.tiny import tiny_config, tiny_module, tiny_tokenizer
from tests.tiny_run import publish_module


def _start(root: str, names: list[str]) -> str:
    """What rank r says, whose node has under the same path what `names[r]` is."""
    rank = dist.get_rank()
    init = Path(root) / "nodes" / str(rank) / "clip"
    init.parent.mkdir(parents=True)
    if names[rank]:
        init.symlink_to(Path(root) / names[rank])
    config = tiny_config(model={"init": str(init)})
    job = SimpleNamespace(tokenizer=tiny_tokenizer(), asked=None)
    this: Any = SimpleNamespace(config=config, rank=rank, job=job)
    address: Any = lambda: f"10.0.0.{rank}"  # noqa: E731
    worker.ray.util.get_node_ip_address = address
    try:
        worker._Trainer._start(this)
    except RunStop as stop:
        return re.sub(r"\S+/nodes/\d/clip", "clip", str(stop))  # on nodes it would be one path
    return "started"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("", "clip is a CLIP model for rank 0 on 10.0.0.0, and there is none for rank 1 on "
         "10.0.0.1; put it on every node"),
        ("damaged", "cannot be read as weights (SafetensorError"),
        ("whole", "started"),
    ],
)  # fmt: skip
def test_all_ranks_say_the_same(tmp_path: Path, second: str, message: str) -> None:
    run = publish_module(tmp_path / "run", tiny_config(), tiny_module(tiny_config()))
    for name in ("whole", "damaged"):
        export_run(*run, tmp_path / name, form="transformers", dtype="fp32")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    said = run_ranks(_start, 2, str(tmp_path), ["whole", second])
    assert said[0] == said[1]
    assert message in said[0]
    assert second != "damaged" or said[0].endswith("(rank 1 on 10.0.0.1)")
