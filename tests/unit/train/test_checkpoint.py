"""What a checkpoint refuses."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import RunStop
from pipeline.train.checkpoint import load_checkpoint
from pipeline.train.store import META


@pytest.mark.parametrize("layout", [[["weight", "bias"]], None])
def test_parameters_in_another_order_are_not_read_as_others(
    tmp_path: Path, layout: list[list[str]] | None
) -> None:
    meta = {"progress": {"step": 7}, "versions": {"gammaray": "0.0.9"}, "layout": layout}
    (tmp_path / META).write_text(json.dumps(meta))
    engine: Any = SimpleNamespace(layout=[["bias", "weight"]], loads_by_name=False)
    loss: Any = None
    with pytest.raises(RunStop, match=r"step 7 .* gammaray 0\.0\.9 .* new run with name=") as said:
        load_checkpoint(tmp_path, engine, None, loss, rank=0, world_size=1)
    assert "another order" in str(said.value)
