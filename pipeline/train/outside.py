"""A CLIP model from elsewhere, as `model.init` may name it: in transformers' form or OpenCLIP's.

Of transformers' also one of its towers alone. Enters: a folder, or hf-hub:ORG/NAME. Leaves: its
tokenizer and its weights by our names, once it is known to fit. Must not know: runs.
"""

import contextlib
import json
import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from pipeline.config.schema import HUB, Config
from pipeline.data.text import Tokenizer, load_tokenizer
from pipeline.errors import RunStop, UserError
from pipeline.models.open_clip import LEGACY_END, from_open_clip, read_config
from pipeline.models.two_tower import clip_sizes
from pipeline.train.module import TOWERS
from pipeline.train.publish import Gather

LOG = logging.getLogger(__name__)
# Of transformers' configurations: which tower it has, if but one.
KINDS = {"clip": None, "clip_vision_model": "image", "clip_text_model": "text"}
SECTIONS = {"image": "vision_config", "text": "text_config"}
PROJECTION = {"image": "visual_projection.weight", "text": "text_projection.weight"}
SCALARS = ("logit_scale", "logit_bias")  # of no place, or of one
# As transformers and OpenCLIP look for them.
CLIP_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
                     "open_clip_pytorch_model.bin")  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
CLIP_TOKENIZER = "openai/clip-vit-base-patch32"  # that of every OpenCLIP model that names none


@dataclass(frozen=True, kw_only=True, slots=True)
class OutsideModel:
    """A CLIP model in a folder or on the hub.

    `tower` is the only one it has, if it has but one; the rest of `clip` then says nothing. `mean`
    and `std` of its pixels, if it says; `words`: where its tokenizer is, if anywhere.
    """

    init: str
    clip: CLIPConfig
    tower: str | None
    is_open_clip: bool
    mean: list[float] | None
    std: list[float] | None
    words: str | None


def find_outside(init: str) -> OutsideModel | None:
    """The model at `init`, or None where there is none: it may be a run.

    Raises `UserError` for a model of another kind, a damaged configuration, or when the hub does
    not give it.
    """
    plain = _read(init, "config.json")
    if plain is not None and plain.get("model_type") in KINDS:
        tower = KINDS[plain["model_type"]]
        with _sound(init, "config.json"):
            clip = CLIPConfig.from_dict(plain if tower is None else _completed(plain, tower))
        with _sound(init, "preprocessor_config.json"):
            pictures = _read(init, "preprocessor_config.json")
            pictures = pictures or (_read(init, "processor_config.json") or {}).get(
                "image_processor"
            )
            pictures = pictures or {}
            mean, std = _three(pictures.get("image_mean")), _three(pictures.get("image_std"))
        return OutsideModel(
            init=init,
            clip=clip,
            tower=tower,
            is_open_clip=False,
            mean=mean,
            std=std,
            words=_find_words(init, None),
        )
    given = _read(init, "open_clip_config.json")
    if given is not None:
        with _sound(init, "open_clip_config.json"):
            config = given.get("model_cfg", given)
            clip = read_config(config)
            pictures = given.get("preprocess_cfg", {})
            mean, std = _three(pictures.get("mean")), _three(pictures.get("std"))
            named = config.get("text_cfg", {}).get("hf_tokenizer_name") or CLIP_TOKENIZER
        return OutsideModel(
            init=init,
            clip=clip,
            tower=None,
            is_open_clip=True,
            mean=mean,
            std=std,
            words=_find_words(init, named),
        )
    if plain is not None or init.startswith(HUB):
        kind = "no model" if plain is None else f"of type {plain.get('model_type')!r}"
        raise UserError(
            f"model.init: {init} is {kind}; give a CLIP model, that is a folder or repository with "
            f"config.json (model_type {', '.join(KINDS)}) or open_clip_config.json"
        )
    return None


@contextlib.contextmanager
def _sound(init: str, name: str) -> Iterator[None]:
    """Whatever a damaged configuration makes others raise is a `UserError` that names the file."""
    try:
        yield
    except UserError as error:
        text = str(error)
        if not text.startswith("model.init"):
            text = f"model.init: {init} cannot be trained here: {text}"
        raise UserError(text) from error
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError,
            StrictDataclassError) as error:  # fmt: skip
        raise UserError(
            f"model.init: {init}: {name} does not describe a CLIP model ({_said(error)}); bring it "
            "here again"
        ) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _completed(plain: dict[str, Any], tower: str) -> dict[str, Any]:
    """The configuration of a tower alone as one of both: the other is as like as need be."""
    other = {"hidden_act": plain.get("hidden_act", "quick_gelu")}
    sections = {SECTIONS[each]: plain if each == tower else other for each in SECTIONS}
    return {**sections, "projection_dim": plain.get("projection_dim", 512)}


def _three(values: Any) -> list[float] | None:
    """A value for each colour; None where there are none."""
    if values is None:
        return None
    red, green, blue = values
    return [float(red), float(green), float(blue)]


def _find_words(init: str, named: str | None) -> str | None:
    """Where the tokenizer is: with the model, or as its configuration names it."""
    has_files = any(_file(init, name) for name in TOKENIZER_FILES)
    return init.removeprefix(HUB) if has_files else named


def check_outside(config: Config, outside: OutsideModel) -> Tokenizer | None:
    """Give the tokenizer of the model; None where it has no text tower.

    Raises `UserError` unless the run can start from it: its weights are looked at too.
    """
    if config.model.kind != "two_tower":
        raise UserError(
            f"model.init: {outside.init} is a CLIP model, which has no fusion encoder: give a run, "
            "or a ViT as model.image.pretrained and a BERT as model.text.pretrained"
        )
    weights = _find_weights(outside)
    _check_sizes(config, outside, weights)
    _check_weights(outside, weights)
    if outside.tower is not None:
        other = "text" if outside.tower == "image" else "image"
        more = "" if PROJECTION[outside.tower] in weights else ", and both projections"
        LOG.warning(
            "model.init: %s has the %s tower alone: the %s tower begins with random weights%s",
            outside.init,
            outside.tower,
            other,
            more,
        )
    if outside.tower != "text":
        _check_pixels(config, outside)
    return None if outside.tower == "image" else _find_tokenizer(config, outside)


def _check_sizes(config: Config, outside: OutsideModel, weights: Mapping[str, Tensor]) -> None:
    try:
        sizes = clip_sizes(outside.clip)
    except UserError as error:
        raise UserError(f"model.init: {outside.init}: {error}") from error
    if outside.tower is not None:
        sizes = {key: size for key, size in sizes.items() if _says(outside.tower, key, weights)}
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
    if outside.tower != "image" and length > most:
        raise UserError(
            f"model.text.context_length: is {length}; the model at model.init knows {most} places: "
            "set so many, or fewer"
        )


def _says(tower: str, key: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether a tower alone has that size."""
    if key == "embed_dim":
        return PROJECTION[tower] in weights
    return "." not in key or key.startswith(f"{tower}.")


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
    except Exception as error:  # of a damaged file tokenizers raises a bare one
        raise UserError(
            f"model.init: {outside.init} came with the tokenizer {outside.words}, which cannot be "
            f"loaded: put its files into that folder ({_said(error)})"
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
    """The weights of the model by our names, fp32. Raises `UserError` where some are not there."""
    found = _find_weights(outside)
    _check_weights(outside, found)
    weights = {
        name: value.float().reshape(1) if name in SCALARS else value.float()
        for name, value in found.items()
    }
    return {
        name if name == "logit_bias" else f"{TOWERS}{name}": value
        for name, value in weights.items()
    }


def load_on_all(load: Callable[[], bool], init: str, gather: Gather, place: str) -> bool:
    """Call `load` on every rank: whether it found a model from elsewhere at `init`.

    `place` says which rank this is. Raises `RunStop`, alike on all, where one of them fails, or
    finds something else there than the others.
    """
    found, failure = False, None
    try:
        found = load()
    except RunStop as stop:
        failure = str(stop)
    said = gather((place, found, failure))
    for where, _, why in said:
        if why is not None:
            raise RunStop(f"{why} ({where})")
    there = [where for where, has, _ in said if has]
    lacking = [where for where, has, _ in said if not has]
    if there and lacking:
        raise RunStop(
            f"model.init: {init} is a CLIP model for {there[0]}, and there is none for "
            f"{lacking[0]}; put it on every node under that path, or give a hub id"
        )
    return found


# ---- files ---------------------------------------------------------------------------------------


def _find_weights(outside: OutsideModel) -> dict[str, Tensor]:
    """What the files hold of its towers, by the names of transformers' CLIPModel."""
    found: dict[str, Tensor] = {}
    for path in _weights_files(outside):
        found |= _load(outside.init, path)
    if outside.is_open_clip:
        try:
            return from_open_clip(found)
        except (UserError, ValueError, RuntimeError, LookupError) as error:
            raise UserError(
                f"model.init: {outside.init}: {error}; give a model of OpenCLIP's plain CLIP, or "
                "bring its weights here again"
            ) from error
    if outside.tower is None:
        return found
    own = _names(outside.tower)  # a model without projection leaves its prefix out
    return {name if name.startswith(own) else own[0] + name: found[name] for name in found}


def _names(tower: str) -> tuple[str, str]:
    """How the names of a tower's weights begin."""
    return f"{'vision' if tower == 'image' else 'text'}_model.", PROJECTION[tower]


def _check_weights(outside: OutsideModel, found: dict[str, Tensor]) -> None:
    """Whether all that the configuration speaks of is there; what it does not know is taken out."""
    with torch.device("meta"):
        wanted = CLIPModel(outside.clip).state_dict()
    if outside.tower is not None:
        prefix, projection = _names(outside.tower)
        own = (prefix, projection) if projection in found else (prefix,)
        wanted = {name: wanted[name] for name in wanted if name.startswith(own)}
    for name in found.keys() - wanted.keys() - {"logit_bias"}:
        del found[name]
    lacking = [name for name in wanted if name not in found]
    if lacking:
        raise UserError(f"model.init: {outside.init} lacks {lacking[:3]}; bring it here again")
    for name, value in found.items():
        theirs = 1 if name in SCALARS else list(wanted[name].shape)
        if (value.numel() if name in SCALARS else list(value.shape)) != theirs:
            raise UserError(
                f"model.init: {outside.init}: its {name} has shape {list(value.shape)}, its "
                f"configuration says {theirs}: bring both here again, from one model"
            )


def _load(init: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a file, which stay there until they are used."""
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            is_zip = zipfile.is_zipfile(path)  # or else it is of a kind that cannot be mapped
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
            weights = weights.get("state_dict", weights)
        return {
            name.removeprefix("module."): value
            for name, value in weights.items()
            if isinstance(value, Tensor)
        }
    except Exception as error:  # whatever a damaged file makes its readers raise
        raise UserError(
            f"model.init: {init}: {path.name} cannot be read as weights ({_said(error)}); bring it "
            "here again, or save it as safetensors"
        ) from error


def _weights_files(outside: OutsideModel) -> list[Path]:
    names = OPEN_CLIP_WEIGHTS if outside.is_open_clip else CLIP_WEIGHTS
    for name in names:
        if (path := _file(outside.init, name)) is not None:
            return [path]
        if not outside.is_open_clip and (index := _read(outside.init, f"{name}.index.json")):
            with _sound(outside.init, f"{name}.index.json"):
                return [
                    _part(outside.init, part) for part in sorted({*index["weight_map"].values()})
                ]
    config = "open_clip_config.json" if outside.is_open_clip else "config.json"
    raise UserError(
        f"model.init: {outside.init} has {config} and none of {list(names)}; put its weights there"
    )


def _part(init: str, name: str) -> Path:
    path = _file(init, name)
    if path is None:
        raise UserError(
            f"model.init: {init}: {name}, a part of its weights, is not there; bring it here again"
        )
    return path


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
