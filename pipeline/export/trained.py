"""A checkpoint as one model: the weights of all workers put together, and the facts of its run.

Enters: the folder of a run, the name of a checkpoint. Leaves: `Trained`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.config.load import parse_config
from pipeline.config.schema import Config
from pipeline.engine.zero import load_weights
from pipeline.errors import UserError
from pipeline.train.checkpoint import read_meta
from pipeline.train.publish import Damaged, fetched
from pipeline.train.store import RunFolder, RunRecord
from pipeline.train.task import Module, build_as


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A module with the weights of a checkpoint, fp32; `meta` is what the checkpoint says."""

    url: str
    checkpoint: str
    record: RunRecord
    config: Config
    meta: dict[str, Any]
    module: Module

    def weights(self, dtype: torch.dtype, prefix: str = "") -> dict[str, Tensor]:
        """Weights whose names begin with `prefix`, by the rest of their names."""
        return {
            name.removeprefix(prefix): value.detach().to(dtype).contiguous().clone()
            for name, value in self.module.state_dict().items()
            if name.startswith(prefix)
        }


def read_trained(folder: RunFolder, record: RunRecord, checkpoint: str | None) -> Trained:
    """Read a checkpoint of a run: the newest, or the named one; of any ZeRO stage and world size.

    What the run began with (`model.pretrained` and the like) is not needed. Raises `UserError` when
    there is no such checkpoint, or it is not what its manifest says.
    """
    name = folder.checkpoint(checkpoint)
    config = parse_config(record.config, f"the record of {folder.url}")
    try:
        with fetched(folder, name) as files:
            meta = read_meta(files)
            module = build_as(config, record.tokenizer, record.asked, meta)
            module.load_state_dict(load_weights(files, meta["zero_stage"]))
    except Damaged as damage:
        raise UserError(
            f"{folder.url}/{name}: is damaged ({damage}); put its files back, or take another with "
            f"--checkpoint: {folder.checkpoints()}"
        ) from damage
    return Trained(
        url=folder.url,
        checkpoint=name,
        record=record,
        config=config,
        meta=meta,
        module=module.float().eval(),
    )
