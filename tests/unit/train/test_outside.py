"""Starting from a CLIP model made elsewhere: what is taken, resized, and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from pipeline.cli.parcel import find_lost_paths
from pipeline.config.plan import find_contradictions
from pipeline.config.schema import Config
from pipeline.data.text import train_tokenizer
from pipeline.errors import RunStop, UserError
from pipeline.export.forms import Form, export_run
from pipeline.export.inputs import save_tokenizer
from pipeline.models.fusion import fit_places
from pipeline.train.module import build_pretraining
from pipeline.train.start import check_start, load_outside, load_start
from tests.tiny import CAPTIONS, FUSION, tiny_config, tiny_module, tiny_tokenizer
from tests.tiny_run import publish_module

IMAGE = {"size": 16, "patch": 8, "width": 16, "layers": 2, "heads": 2}
TEXT = {"context_length": 8, "width": 16, "layers": 2, "heads": 2}
PLACES = "vision_model.embeddings.position_embedding.weight"
FILES: dict[Form, str] = {
    "transformers": "model.safetensors",
    "openclip": "open_clip_model.safetensors",
}


def _elsewhere(folder: Path, form: Form, **sections: dict[str, Any]) -> Path:
    """A model that others have, by way of an export: what its form is, tests/unit/export says."""
    config = tiny_config(train={"seed": 5}, **sections)
    run = publish_module(folder / "run", config, tiny_module(config))
    export_run(*run, folder / form, form=form, dtype="fp32")
    return folder / form


def _config(init: object, **sections: Any) -> Config:
    return tiny_config(**{**sections, "model": {"init": str(init), **sections.get("model", {})}})


def _theirs(folder: Path, form: Form) -> dict[str, Tensor]:
    return load_file(folder / FILES[form])


@pytest.mark.parametrize("form", ["transformers", "openclip"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_import_then_export_gives_the_same_weights(
    tmp_path: Path, form: Form, activation: str
) -> None:
    sections = {"model": {"activation": activation}, "loss": {"kind": "sigmoid_local"}}
    given = _elsewhere(tmp_path, form, **sections)
    config = _config(given, **sections)
    tokenizer = check_start(config)
    assert (tokenizer.start, tokenizer.end, tokenizer.pad) == (1, 3, 0)
    module = build_pretraining(config, tokenizer)
    assert load_outside(module, str(given))
    run = publish_module(tmp_path / "again", config, module, tokenizer)
    export_run(*run, tmp_path / "out", form=form, dtype="fp32")
    expected, found = _theirs(given, form), _theirs(tmp_path / "out", form)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    for name in ("config.json", "open_clip_config.json", "tokenizer.json"):
        if (given / name).exists():
            assert (given / name).read_text() == (tmp_path / "out" / name).read_text(), name


@pytest.mark.parametrize("form", ["transformers", "openclip"])
def test_places_are_resized_texts_and_ids_cut(tmp_path: Path, form: Form) -> None:
    given = _elsewhere(tmp_path, form)
    theirs = tiny_module(tiny_config(train={"seed": 5})).towers.state_dict()
    config = _config(
        given, model={"image": {**IMAGE, "size": 32}, "text": {**TEXT, "context_length": 6}}
    )
    check_start(config)
    module = build_pretraining(config, tiny_tokenizer())
    assert load_outside(module, str(given))
    found = module.towers.state_dict()
    assert found[PLACES].shape == (17, 16)
    assert torch.equal(found[PLACES], fit_places(theirs[PLACES][None], 17)[0])
    words = "text_model.embeddings.position_embedding.weight"
    assert torch.equal(found[words], theirs[words][:6])
    for name in found.keys() - {PLACES, words}:
        assert torch.equal(found[name], theirs[name]), name


def test_a_two_tower_run_starts_larger_images_too(tmp_path: Path) -> None:
    first = tiny_config()
    module = tiny_module(first)
    run, _ = publish_module(tmp_path, first, module)
    config = _config(tmp_path / "tiny", model={"image": {**IMAGE, "size": 24}})
    assert check_start(config) == tiny_tokenizer()
    larger = build_pretraining(config, tiny_tokenizer())
    load_start(larger, Path(run.path) / "step-00000004")
    expected = fit_places(module.towers.state_dict()[PLACES][None], 10)[0]
    assert torch.equal(larger.towers.state_dict()[PLACES], expected)


def test_towers_apart_and_an_old_file_are_read_too(tmp_path: Path) -> None:
    """OpenCLIP's CustomTextCLIP calls its text tower `text`; old weights are pickled."""
    given = _elsewhere(tmp_path, "openclip")
    weights = _theirs(given, "openclip")
    (given / FILES["openclip"]).unlink()
    apart = {
        name if name.startswith(("visual.", "logit_")) else f"text.{name}": value
        for name, value in weights.items()
    }
    torch.save({"state_dict": apart}, given / "open_clip_pytorch_model.bin")
    config = _config(given)
    check_start(config)
    module = build_pretraining(config, tiny_tokenizer())
    assert load_outside(module, str(given))
    theirs = tiny_module(tiny_config(train={"seed": 5})).towers.state_dict()
    for name, value in module.towers.state_dict().items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("form", ["transformers", "openclip"])
@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": FUSION}, r"model.init: .* is a CLIP model, which has no fusion encoder: give"),
        (
            {"model": {"embed_dim": 8, "image": {**IMAGE, "layers": 3}}},
            r"model.embed_dim: is 8; .* has 16: set model.embed_dim=16 model.image.layers=2",
        ),
        (
            {"model": {"activation": "gelu"}},
            r"model.activation: is gelu; .* set model.activation=quick_gelu",
        ),
        (
            {"model": {"text": {**TEXT, "context_length": 9}}},
            r"model.text.context_length: is 9; .* knows 8 places",
        ),
        (
            {"data": {"image_mean": (0.5, 0.5, 0.5)}},
            r"data.image_mean: is \[0.5, .* was trained with \[0.48.*set data.image_mean so",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, form: Form, sections: dict[str, Any], message: str
) -> None:
    given = _elsewhere(tmp_path, form)
    sections = {**sections, "data": {"train": "nowhere", "vocab_size": 300,
                                     **sections.get("data", {})}}  # fmt: skip
    with pytest.raises(UserError, match=message):
        check_start(_config(given, **sections))


def test_another_tokenizer_is_refused_and_theirs_may_be_named(tmp_path: Path) -> None:
    given = _elsewhere(tmp_path, "transformers")
    data = {"train": "nowhere", "vocab_size": 300}
    check_start(_config(given, data={**data, "tokenizer": str(given)}))
    other = tmp_path / "other"
    _elsewhere(other, "transformers")
    values = json.loads((other / "transformers" / "tokenizer.json").read_text())
    values["normalizer"] = None
    (other / "transformers" / "tokenizer.json").write_text(json.dumps(values))
    config = _config(given, data={**data, "tokenizer": str(other / "transformers")})
    with pytest.raises(UserError, match=r"data.tokenizer: is .*other.*; .* leave it out"):
        check_start(config)
    larger = train_tokenizer([*CAPTIONS, "words that were never merged before"], 310)
    save_tokenizer(larger, 8, given)
    with pytest.raises(UserError, match=r"has 310 ids, its model knows 300: put the tokenizer"):
        check_start(_config(given))


def _edit(path: Path, *keys: str, value: Any) -> None:
    values = json.loads(path.read_text())
    inner = values
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("form", "file", "keys", "value", "message"),
    [
        ("transformers", "config.json", ("model_type",), "siglip", "is of type 'siglip'; give a"),
        ("transformers", "config.json", ("text_config", "eos_token_id"), 7, "pools at 7: put"),
        ("transformers", "config.json", ("text_config", "vocab_size"), 200,
         r"shape \[300, 16\], its configuration says \[200, 16\]: bring both here again"),
        ("transformers", "config.json", ("vision_config", "intermediate_size"), 65,
         "its image tower has MLPs 65 wide; only four times the width, 64"),
        ("transformers", "config.json", ("text_config", "layer_norm_eps"), 0.1,
         "its text tower has layer_norm_eps 0.1; only CLIP's"),
        ("transformers", "config.json", ("text_config", "hidden_act"), "gelu",
         "its towers have the activations quick_gelu and gelu"),
        ("openclip", "open_clip_config.json", ("model_cfg", "vision_cfg", "timm_model_name"), "vit",
         "cannot be trained here: its vision_cfg.timm_model_name is 'vit', which CLIP's towers"),
        ("openclip", "open_clip_config.json", ("model_cfg", "vision_cfg", "layers"), [3, 4, 6, 3],
         r"its vision_cfg.layers is \[3, 4, 6, 3\]; CLIP's towers have one number"),
        ("openclip", "open_clip_config.json", ("model_cfg", "text_cfg", "pool_type"), "last",
         "its text_cfg.pool_type is last; CLIP's is argmax or eos"),
        ("openclip", "open_clip_config.json", ("model_cfg", "text_cfg", "pool_type"), "argmax",
         "ends texts with id 3, its model pools at 299"),
        ("transformers", "config.json", ("vision_config", "hidden_size"), "wide",
         "config.json does not describe a CLIP model .*hidden_size"),
        ("transformers", "config.json", ("text_config", "num_attention_heads"), 0,
         "config.json does not describe a CLIP model .ZeroDivisionError"),
        ("transformers", "preprocessor_config.json", ("image_mean",), 0.5,
         "preprocessor_config.json does not describe a CLIP model .TypeError"),
        ("openclip", "open_clip_config.json", ("model_cfg", "embed_dim"), None,
         "its embed_dim is None; it must be a number"),
        ("openclip", "open_clip_config.json", ("model_cfg", "vision_cfg"), [1],
         "its vision_cfg is .1.; it must hold sizes"),
        ("openclip", "open_clip_config.json", ("model_cfg",), "x",
         "open_clip_config.json does not describe a CLIP model .AttributeError"),
        ("openclip", "open_clip_config.json", ("model_cfg", "vision_cfg", "head_width"), 0,
         "open_clip_config.json does not describe a CLIP model .ZeroDivisionError"),
    ],
)  # fmt: skip
def test_a_model_that_is_none_of_ours_or_damaged_is_refused(
    tmp_path: Path, form: Form, file: str, keys: tuple[str, ...], value: Any, message: str
) -> None:
    given = _elsewhere(tmp_path, form)
    _edit(given / file, *keys, value=value)
    with pytest.raises(UserError, match=f"^model.init: .*{message}"):
        check_start(_config(given))


def test_files_that_lack_something_are_refused(tmp_path: Path) -> None:
    given = _elsewhere(tmp_path, "openclip")
    weights = _theirs(given, "openclip")
    module = build_pretraining(_config(given), tiny_tokenizer())
    save_file({"visual.trunk.x": torch.ones(1), **weights}, given / FILES["openclip"])
    with pytest.raises(RunStop, match=r"its weight visual.trunk.x has no place in CLIP's towers"):
        load_outside(module, str(given))
    save_file({name: weights[name] for name in weights if name != "visual.proj"},
              given / FILES["openclip"])  # fmt: skip
    with pytest.raises(RunStop, match=r"lacks \['visual_projection.weight'\]; bring it here again"):
        load_outside(module, str(given))
    with pytest.raises(
        UserError, match=r"lacks \['visual_projection.weight'\]; bring it here again"
    ):
        check_start(_config(given))
    (given / FILES["openclip"]).unlink()
    with pytest.raises(UserError, match=r"has open_clip_config.json and none of .*put its weights"):
        check_start(_config(given))
    (given / "open_clip_config.json").write_text("{")
    with pytest.raises(UserError, match=r"open_clip_config.json cannot be read as JSON"):
        check_start(_config(given))
    other = _elsewhere(tmp_path / "other", "transformers")
    weights = _theirs(other, "transformers")
    weights.pop("visual_projection.weight")
    save_file(weights, other / FILES["transformers"], metadata={"format": "pt"})
    with pytest.raises(RunStop, match=r"lacks \['visual_projection.weight'\]; bring it"):
        load_outside(module, str(other))
    bare = _elsewhere(tmp_path / "nothing", "transformers")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    with pytest.raises(UserError, match=r"has no tokenizer; put the files of the one it was"):
        check_start(_config(bare))
    bare = _elsewhere(tmp_path / "bare", "openclip")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    _edit(bare / "open_clip_config.json", "model_cfg", "text_cfg", "hf_tokenizer_name",
          value=str(tmp_path / "nowhere"))  # fmt: skip
    with pytest.raises(UserError, match=r"came with the tokenizer .*put its files into that"):
        check_start(_config(bare))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _pickled(path: Path, name: str) -> Path:
    """The same weights in an older file, beside no other."""
    weights = load_file(path)
    path.unlink()
    torch.save(weights, path.with_name(name))
    return path.with_name(name)


def _damage(folder: Path, form: Form, how: str) -> None:
    weights = folder / FILES[form]
    name = {"transformers": "pytorch_model.bin", "openclip": "open_clip_pytorch_model.bin"}[form]
    config = {"transformers": "config.json", "openclip": "open_clip_config.json"}[form]
    match how:
        case "cut":
            _cut(weights)
        case "empty":
            weights.write_bytes(b"")
        case "cut pickle":
            _cut(_pickled(weights, name))
        case "no pickle":
            _pickled(weights, name).write_bytes(b"<html>not found</html>")
        case "empty pickle":
            _pickled(weights, name).write_bytes(b"")
        case "shape":
            tensors = load_file(weights)
            first = next(each for each in tensors if each.endswith("class_embedding"))
            save_file({**tensors, first: torch.ones(3)}, weights, metadata={"format": "pt"})
        case "list":
            (folder / config).write_text("[1]")
        case "tokenizer":
            (folder / "tokenizer.json").write_text('{"model"')
        case _:
            weights.unlink()


@pytest.mark.parametrize("form", ["transformers", "openclip"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", r"model.safetensors cannot be read as weights \(SafetensorError: .*bring it here"),
        ("empty", r"model.safetensors cannot be read as weights \(SafetensorError"),
        ("cut pickle", r"pytorch_model.bin cannot be read as weights \(RuntimeError: "),
        (
            "no pickle",
            r"pytorch_model.bin cannot be read as weights \(\w+: .*save it as safetensors",
        ),
        ("empty pickle", r"pytorch_model.bin cannot be read as weights \(EOFError: "),
        ("shape", r"class_embedding has shape \[3\], its configuration says \[16\]: bring both"),
        ("list", r"config.json cannot be read as JSON"),
        ("tokenizer", r"came with the tokenizer .*put its files into that folder \(\w+: "),
        ("gone", r"has (open_clip_)?config.json and none of \[.*; put its weights there"),
    ],
)
def test_damaged_files_are_named_before_the_first_step(
    tmp_path: Path, form: Form, how: str, message: str
) -> None:
    given = _elsewhere(tmp_path, form)
    _damage(given, form, how)
    with pytest.raises(UserError, match=rf"^model.init: .*{message}"):
        check_start(_config(given))


def test_weights_in_parts_are_read_and_a_lost_part_is_named(tmp_path: Path) -> None:
    given = _elsewhere(tmp_path, "transformers")
    whole = _theirs(given, "transformers")
    CLIPModel.from_pretrained(given).save_pretrained(given, max_shard_size="20KB")
    (given / FILES["transformers"]).unlink(missing_ok=True)
    config = _config(given)
    check_start(config)
    module = build_pretraining(config, tiny_tokenizer())
    assert load_outside(module, str(given))
    for name, value in module.towers.state_dict().items():
        assert torch.equal(value.reshape(whole[name].shape), whole[name]), name
    lost = min(given.glob("model-*.safetensors"))
    lost.unlink()
    with pytest.raises(UserError, match=rf"{lost.name}, a part of its weights, is not there"):
        check_start(config)


# ---- a tower alone -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tower", "projection"),
    [
        (CLIPVisionModel, "vision_model.", ""),
        (CLIPVisionModelWithProjection, "vision_model.", "visual_projection."),
        (CLIPTextModel, "text_model.", ""),
        (CLIPTextModelWithProjection, "text_model.", "text_projection."),
    ],
)
def test_a_tower_alone_is_taken_and_the_other_is_new(
    tmp_path: Path, kind: Any, tower: str, projection: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = _elsewhere(tmp_path, "transformers")
    alone = tmp_path / "alone"
    kind.from_pretrained(given).save_pretrained(alone)
    is_image = tower == "vision_model."
    if not is_image:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (alone / name).write_bytes((given / name).read_bytes())
    sizes = {"text": {**TEXT, "width": 32}} if is_image else {"image": {**IMAGE, "layers": 1}}
    config = _config(alone, model={**sizes, **({} if projection else {"embed_dim": 8})})
    tokenizer = check_start(config)
    assert (tokenizer is None) == is_image, "the run trains its own"
    one, other = ("image", "text") if is_image else ("text", "image")
    said = f"has the {one} tower alone: the {other} tower begins with random weights"
    assert said in caplog.text
    assert ("and both projections" in caplog.text) == (not projection)
    module = build_pretraining(config, tiny_tokenizer())
    before = {name: value.clone() for name, value in module.towers.state_dict().items()}
    assert load_outside(module, str(alone))
    whole = _theirs(given, "transformers")
    for name, value in module.towers.state_dict().items():
        is_theirs = name.startswith((tower, projection) if projection else tower)
        assert torch.equal(value, whole[name] if is_theirs else before[name]), name
    with pytest.raises(UserError, match=rf"^model.{one}.width: is 24; .* set model.{one}.width=16"):
        check_start(_config(alone, model={one: {**(IMAGE if is_image else TEXT), "width": 24}}))


def test_a_hub_that_does_not_answer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(repository: str, name: str) -> str:
        raise ConnectionError(f"{repository}/{name}: no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(
        UserError, match=r"model.init: the hub does not give hf-hub:org/name \(org/name/config.json"
    ):
        check_start(_config("hf-hub:org/name"))


def test_a_model_on_the_hub_is_brought_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    from pipeline.train import outside

    given = _elsewhere(tmp_path, "openclip")

    def download(repository: str, name: str) -> str:
        assert repository == "org/name"
        if not (given / name).exists():
            raise EntryNotFoundError(name)
        return str(given / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    words = outside.load_tokenizer
    monkeypatch.setattr(
        outside, "load_tokenizer", lambda path: words({"org/name": str(given)}[path])
    )
    config = _config("hf-hub:org/name")
    assert config.model.init == "hf-hub:org/name", "it is no path"
    assert not [each for each in find_lost_paths(config.model_dump(), {}) if "init" in each.place]
    assert check_start(config).end == 3
    assert load_outside(build_pretraining(config, tiny_tokenizer()), "hf-hub:org/name")


def test_the_activation_is_of_two_tower() -> None:
    config = tiny_config(model={**FUSION, "activation": "gelu"})
    assert [str(each) for each in find_contradictions(config) if "activation" in each.place] == [
        "model.activation: is gelu, which is of two_tower; a ViT and a BERT have their own: leave "
        "it out"
    ]
