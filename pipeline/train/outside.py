"""A CLIP model from elsewhere, as `model.init` may name it: in transformers' form or OpenCLIP's.

Enters: a folder, or hf-hub:ORG/NAME. Leaves: its tokenizer and its weights by our names, once it is
known to fit. Must not know: runs.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from pipeline.config.schema import HUB, Config
from pipeline.data.text import Tokenizer, load_tokenizer
from pipeline.errors import UserError
from pipeline.models.open_clip import LEGACY_END, from_open_clip, read_config
from pipeline.models.towers import load_pretrained
from pipeline.models.two_tower import clip_sizes
from pipeline.train.module import TOWERS

# As OpenCLIP looks for them.
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
                     "open_clip_pytorch_model.bin")  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
CLIP_TOKENIZER = "openai/clip-vit-base-patch32"  # that of every OpenCLIP model that names none


@dataclass(frozen=True, kw_only=True, slots=True)
class OutsideModel:
    """A CLIP model somewhere else; `where` is a folder, or its id on the hub.

    `mean` and `std` of its pixels, if it says; `words`: where its tokenizer is, if anywhere.
    """

    init: str
    clip: CLIPConfig
    is_open_clip: bool
    mean: list[float] | None
    std: list[float] | None
    words: str | None

    @property
    def where(self) -> str:
        """As transformers takes it."""
        return self.init.removeprefix(HUB)


def find_outside(init: str) -> OutsideModel | None:
    """The model at `init`, or None where there is none: it may be a run.

    Raises `UserError` for a model of another kind, or when the hub does not give it.
    """
    plain = _read(init, "config.json")
    if plain is not None and plain.get("model_type") == "clip":
        pictures = _read(init, "preprocessor_config.json")
        pictures = pictures or (_read(init, "processor_config.json") or {}).get("image_processor")
        pictures = pictures or {}
        return OutsideModel(
            init=init,
            clip=CLIPConfig.from_dict(plain),
            is_open_clip=False,
            mean=pictures.get("image_mean"),
            std=pictures.get("image_std"),
            words=_find_words(init, None),
        )
    given = _read(init, "open_clip_config.json")
    if given is not None:
        config = given.get("model_cfg", given)
        try:
            clip = read_config(config)
        except (UserError, KeyError, TypeError) as error:
            raise UserError(f"model.init: {init} cannot be trained here: {error}") from error
        pictures = given.get("preprocess_cfg", {})
        named = config.get("text_cfg", {}).get("hf_tokenizer_name") or CLIP_TOKENIZER
        return OutsideModel(
            init=init,
            clip=clip,
            is_open_clip=True,
            mean=pictures.get("mean"),
            std=pictures.get("std"),
            words=_find_words(init, named),
        )
    if plain is not None or init.startswith(HUB):
        kind = "no model" if plain is None else f"of type {plain.get('model_type')!r}"
        raise UserError(
            f"model.init: {init} is {kind}; give a CLIP model, that is a folder or repository with "
            "config.json (model_type clip) or open_clip_config.json"
        )
    return None


def _find_words(init: str, named: str | None) -> str | None:
    """Where the tokenizer is: with the model, or as its configuration names it."""
    has_files = any(_file(init, name) for name in TOKENIZER_FILES)
    return init.removeprefix(HUB) if has_files else named


def check_outside(config: Config, outside: OutsideModel) -> Tokenizer:
    """Give the tokenizer of the model. Raises `UserError` unless the run can start from it."""
    if config.model.kind != "two_tower":
        raise UserError(
            f"model.init: {outside.init} is a CLIP model, which has no fusion encoder: give a run, "
            "or a ViT as model.image.pretrained and a BERT as model.text.pretrained"
        )
    _check_sizes(config, outside)
    _check_pixels(config, outside)
    if outside.is_open_clip:
        _weights_file(outside)
    return _find_tokenizer(config, outside)


def _check_sizes(config: Config, outside: OutsideModel) -> None:
    try:
        sizes = clip_sizes(outside.clip)
    except UserError as error:
        raise UserError(f"model.init: {outside.init}: {error}") from error
    wrong = {}
    for key, theirs in sizes.items():
        mine: Any = config.model
        for part in key.split("."):
            mine = getattr(mine, part)
        if mine != theirs:
            wrong[key] = (mine, theirs)
    if wrong:
        key, (mine, theirs) = next(iter(wrong.items()))
        settings = " ".join(f"model.{each}={value}" for each, (_, value) in wrong.items())
        raise UserError(
            f"model.{key}: is {mine}; the model at model.init has {theirs}: set {settings}"
        )
    text: Any = outside.clip.text_config
    length, most = config.model.text.context_length, text.max_position_embeddings
    if length > most:
        raise UserError(
            f"model.text.context_length: is {length}; the model at model.init knows {most} places: "
            "set so many, or fewer"
        )


def _check_pixels(config: Config, outside: OutsideModel) -> None:
    for key, mine, theirs in (
        ("image_mean", config.data.image_mean, outside.mean),
        ("image_std", config.data.image_std, outside.std),
    ):
        if theirs is not None and any(
            abs(one - other) > 1e-3 for one, other in zip(mine, theirs, strict=True)
        ):
            raise UserError(
                f"data.{key}: is {list(mine)}; the model at model.init was trained with "
                f"{list(theirs)}: set data.{key} so"
            )


def _find_tokenizer(config: Config, outside: OutsideModel) -> Tokenizer:
    given = config.data.tokenizer
    if outside.words is None:  # transformers would make an empty one
        raise UserError(
            f"model.init: {outside.init} has no tokenizer; put the files of the one it was trained "
            "with there (tokenizer.json, tokenizer_config.json)"
        )
    try:
        theirs = load_tokenizer(outside.words)
    except UserError as error:
        raise UserError(
            f"model.init: {outside.init} came with the tokenizer {outside.words}, which cannot be "
            f"loaded: put its files into that folder ({error})"
        ) from error
    if given not in ("train", outside.words) and load_tokenizer(given) != theirs:
        raise UserError(
            f"data.tokenizer: is {given}; the model at model.init came with another and knows its "
            "ids alone: leave it out"
        )
    text: Any = outside.clip.text_config
    if theirs.vocab_size > text.vocab_size:
        raise UserError(
            f"model.init: the tokenizer of {outside.init} has {theirs.vocab_size} ids, its model "
            f"knows {text.vocab_size}: put the tokenizer there that it was trained with"
        )
    pooled = text.eos_token_id
    end = theirs.vocab_size - 1 if pooled == LEGACY_END else pooled
    if theirs.end != end:
        raise UserError(
            f"model.init: the tokenizer of {outside.init} ends texts with id {theirs.end}, its "
            f"model pools at {end}: put the tokenizer there that it was trained with"
        )
    return theirs


def read_weights(outside: OutsideModel) -> dict[str, Tensor]:
    """All weights of the model by our names, fp32. Raises `UserError` where some are not there."""
    if outside.is_open_clip:
        found = from_open_clip(_load(_weights_file(outside)))
    else:
        model, info = load_pretrained(
            CLIPModel, outside.where, "model.init", "a CLIP model", output_loading_info=True
        )
        if info["missing_keys"]:
            raise UserError(
                f"model.init: {outside.init} lacks {sorted(info['missing_keys'])[:3]}; bring it "
                "here again"
            )
        found = model.state_dict()
    bias = found.pop("logit_bias", None)
    weights = {f"{TOWERS}{name}": value for name, value in found.items()}
    scale = f"{TOWERS}logit_scale"
    weights[scale] = weights[scale].reshape(1)
    return weights if bias is None else {**weights, "logit_bias": bias.reshape(1)}


def _load(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        weights = load_file(path)
    else:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        weights = weights.get("state_dict", weights)
    return {name.removeprefix("module."): value.float() for name, value in weights.items()}


def _weights_file(outside: OutsideModel) -> Path:
    for name in OPEN_CLIP_WEIGHTS:
        path = _file(outside.init, name)
        if path is not None:
            return path
    raise UserError(
        f"model.init: {outside.init} has open_clip_config.json and none of "
        f"{list(OPEN_CLIP_WEIGHTS)}; put its weights there"
    )


def _read(init: str, name: str) -> dict[str, Any] | None:
    path = _file(init, name)
    if path is None:
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"model.init: {init}: {name} cannot be read as JSON ({error}); bring it here again"
        ) from error


def _file(init: str, name: str) -> Path | None:
    """A file of the model, brought here from the hub; None where it has no such file."""
    if not init.startswith(HUB):
        path = Path(init) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(init.removeprefix(HUB), name))
    except (OSError, ValueError, EntryNotFoundError) as error:
        is_absent = isinstance(error, EntryNotFoundError)
        if is_absent and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise UserError(
            f"model.init: the hub does not give {init} ({' '.join(str(error).split())[:300]}); "
            "mind the spelling, or bring the model here and give its folder"
        ) from error
