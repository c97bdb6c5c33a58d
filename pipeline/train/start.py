"""Where a run starts from another, or from a model made elsewhere: `model.init`.

Enters: the folder of a run, or where such a model is. Leaves: a tokenizer, a module with those
weights.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline.config.load import parse_config
from pipeline.config.schema import Config
from pipeline.data.decode import Asked
from pipeline.data.text import Tokenizer, load_tokenizer
from pipeline.engine.zero import load_weights
from pipeline.errors import RunStop, UserError
from pipeline.models.fusion import IMAGE_PLACES, fit_places
from pipeline.train.checkpoint import read_meta
from pipeline.train.module import TOWERS
from pipeline.train.outside import check_outside, find_outside, read_weights
from pipeline.train.store import RunFolder, RunRecord
from pipeline.train.task import Module, build_as

LOG = logging.getLogger(__name__)
SAME = ("kind", "embed_dim", "image.patch", "image.stem", "image.width", "image.layers",
        "image.heads", "text.width", "text.layers", "text.heads")  # fmt: skip
VIT_PLACES = f"{TOWERS}vision_model.{IMAGE_PLACES}"
CLIP_PLACES = f"{TOWERS}vision_model.embeddings.position_embedding.weight"
CUT = tuple(  # rows at the end that no text reaches: places, ids
    f"{TOWERS}text_model.embeddings.{name}.weight"
    for name in ("position_embeddings", "position_embedding", "token_embedding")
)
PARTS = (TOWERS, "second.")  # what a run starts with of another


def starting_run(config: Config) -> RunFolder:
    """The folder of the run that `model.init` names."""
    assert config.model.init is not None, "it is asked for where there is one"
    storage, _, name = config.model.init.rstrip("/").rpartition("/")
    return RunFolder.of(storage or ".", name)


def check_start(config: Config) -> Tokenizer | None:
    """Give the tokenizer of the run, or the model from elsewhere, that `model.init` names.

    None for one without a text tower. Raises `UserError` when there is neither, or the model has
    other sizes. Images may be of another size, and texts shorter: places are fitted.
    """
    assert config.model.init is not None, "it is asked for where there is one"
    outside = find_outside(config.model.init)
    if outside is not None:
        return check_outside(config, outside)
    folder = starting_run(config)
    record = folder.read_record()
    if record is None or not folder.checkpoints():
        raise UserError(
            f"model.init: {config.model.init} is no run with a checkpoint, nor a CLIP model; give "
            "the folder of one, such as runs/demo, or of a model on the hub hf-hub:ORG/NAME"
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
    for key in (*SAME, "fusion.layers" if config.model.kind == "fusion" else "activation"):
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


def build_start(config: Config, tokenizer: Tokenizer, asked: Asked | None, folder: Path) -> Module:
    """Build a run's module to begin as the checkpoint in `folder`: see `load_start`.

    Of a fusion model what a pretrained ViT or BERT had decided there (activations, vocabulary)
    holds here too. Of two towers `check_start` has compared it. Raises `RunStop` as `load_start`.
    """
    is_fusion = config.model.kind == "fusion"
    meta = read_meta(folder) if is_fusion else {}
    module = build_as(config, tokenizer, asked, meta)
    load_start(module, folder)
    return module


def load_start(module: nn.Module, folder: Path) -> None:
    """Give `module`, not yet partitioned, the weights of the checkpoint in `folder`.

    Beside the model's those of a second stack of layers, which text assignment trains. Heads are
    new; those parts of a task that follow from the model begin as it is. Raises `RunStop` when a
    weight has another shape.
    """
    weights = load_weights(folder, read_meta(folder)["zero_stage"])
    known = _take(module, {name: weights[name] for name in weights if name.startswith(PARTS)})
    begin = getattr(module, "begin", None)
    if begin is not None and all(name.startswith(TOWERS) for name in known):
        begin()
    LOG.info("%d weights are those of %s", len(known), folder)


def load_outside(module: nn.Module, init: str) -> bool:
    """Give `module`, not yet partitioned, the weights of the model from elsewhere at `init`.

    False where there is none: it is a run. Raises `RunStop` when some are missing or do not fit.
    """
    try:
        outside = find_outside(init)
        if outside is None:
            return False
        weights = read_weights(outside)
    except UserError as error:
        raise RunStop(str(error)) from error
    known = _take(module, weights)
    LOG.info("%d weights are those of %s", len(known), init)
    return True


def _take(module: nn.Module, weights: Mapping[str, Tensor]) -> set[str]:
    """Load those weights that the module has; their names."""
    own = module.state_dict()
    known = {name: _fitted(name, weights[name], own[name]) for name in weights if name in own}
    module.load_state_dict(known, strict=False)
    return set(known)


def _fitted(name: str, value: Tensor, own: Tensor) -> Tensor:
    """The value, fitted to the places of other images or of shorter texts, or to fewer ids."""
    if value.shape == own.shape:
        return value
    if name in CUT and len(value) > len(own):
        return value[: len(own)]
    if name == CLIP_PLACES:
        return fit_places(value[None], len(own))[0]
    if name != VIT_PLACES:
        raise RunStop(
            f"model.init: its {name} has shape {list(value.shape)}, this model's "
            f"{list(own.shape)}; give model and data.tokenizer the settings of that run"
        )
    return fit_places(value, own.shape[1])
