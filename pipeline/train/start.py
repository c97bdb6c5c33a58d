"""Where a run starts from another: `model.init`. Its tokenizer, its sizes, its weights.

Enters: the folder of a run. Leaves: a tokenizer, a module with that run's weights.
"""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline.config.load import parse_config
from pipeline.config.schema import Config
from pipeline.data.text import Tokenizer, load_tokenizer
from pipeline.engine.zero import load_weights
from pipeline.errors import RunStop, UserError
from pipeline.models.fusion import IMAGE_PLACES, fit_places
from pipeline.train.checkpoint import read_meta
from pipeline.train.module import TOWERS
from pipeline.train.store import RunFolder, RunRecord

LOG = logging.getLogger(__name__)
SAME = ("kind", "embed_dim", "image.patch", "image.width", "image.layers", "image.heads",
        "text.width", "text.layers", "text.heads", "fusion.layers")  # fmt: skip
IMAGES_PLACES = f"{TOWERS}vision_model.{IMAGE_PLACES}"
TEXT_PLACES = f"{TOWERS}text_model.embeddings.position_embeddings.weight"
PARTS = (TOWERS, "second.")  # what a run starts with of another


def starting_run(config: Config) -> RunFolder:
    """The folder of the run that `model.init` names."""
    assert config.model.init is not None, "it is asked for where there is one"
    storage, _, name = config.model.init.rstrip("/").rpartition("/")
    return RunFolder.of(storage or ".", name)


def check_start(config: Config) -> Tokenizer:
    """Give the tokenizer of the run that `model.init` names.

    Raises `UserError` when there is no run with a checkpoint, or its model has other sizes. Images
    may be of another size, and texts shorter: places are fitted.
    """
    folder = starting_run(config)
    record = folder.read_record()
    if record is None or not folder.checkpoints():
        raise UserError(
            f"model.init: {config.model.init} is no run with a checkpoint; give the folder of one, "
            "such as runs/demo"
        )
    _check_sizes(config, record)
    given = config.data.tokenizer
    is_theirs = given in ("train", record.config["data"]["tokenizer"])
    if not is_theirs and load_tokenizer(given) != record.tokenizer:
        raise UserError(
            f"data.tokenizer: is {given}; the model at model.init came with "
            "another and knows its ids alone: leave it out"
        )
    return record.tokenizer


def _check_sizes(config: Config, record: RunRecord) -> None:
    theirs = parse_config(record.config, "the record at model.init").model.model_dump()
    ours = config.model.model_dump()
    is_fusion = config.model.kind == "fusion"
    for key in SAME if is_fusion else [*SAME[:-1], "image.size", "text.context_length"]:
        mine, other = _get(ours, key), _get(theirs, key)
        if mine != other:
            raise UserError(
                f"model.{key}: is {mine}; the model at model.init has {other}: set "
                f"model.{key}={other}"
            )
    length, most = config.model.text.context_length, theirs["text"]["context_length"]
    if length > most:
        raise UserError(
            f"model.text.context_length: is {length}; the model at model.init knows {most} places: "
            "set so many, or fewer"
        )


def _get(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def load_start(module: nn.Module, folder: Path) -> None:
    """Give `module`, not yet partitioned, the weights of the checkpoint in `folder`.

    Beside the model's those of a second stack of layers, which text assignment trains. Heads are
    new; those parts of a task that follow from the model begin as it is. Raises `RunStop` when a
    weight has another shape.
    """
    weights = load_weights(folder, read_meta(folder)["zero_stage"])
    own = module.state_dict()
    known = {
        name: _fitted(name, value, own[name])
        for name, value in weights.items()
        if name in own and name.startswith(PARTS)
    }
    module.load_state_dict(known, strict=False)
    begin = getattr(module, "begin", None)
    if begin is not None and all(name.startswith(TOWERS) for name in known):
        begin()
    LOG.info("%d of %d weights are those of %s", len(known), len(own), folder)


def _fitted(name: str, value: Tensor, own: Tensor) -> Tensor:
    """The value, fitted to the places of other images or of shorter texts."""
    if value.shape == own.shape:
        return value
    if name == TEXT_PLACES and len(value) > len(own):
        return value[: len(own)]
    if name != IMAGES_PLACES:
        raise RunStop(
            f"model.init: its {name} has shape {list(value.shape)}, this model's "
            f"{list(own.shape)}; give model and data.tokenizer the settings of that run"
        )
    return fit_places(value, own.shape[1])
