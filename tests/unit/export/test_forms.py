"""The forms of an export: what is in them, that others read them, what is refused."""

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from pipeline import cli
from pipeline.config.schema import Config
from pipeline.data.answers import AnswerList
from pipeline.data.decode import Asked
from pipeline.errors import UserError
from pipeline.export.card import CLEANED
from pipeline.export.forms import Form, export_run
from pipeline.tracking import tracker
from pipeline.tracking.tracker import MetricLog
from pipeline.train.store import RunFolder, RunRecord
from pipeline.train.task import build_module
from tests.tiny import CAPTIONS, CONV, FUSION, tiny_config, tiny_module, tiny_tokenizer
from tests.tiny_run import (
    STATE,
    in_fresh_process,
    largest_difference,
    publish_module,
    publish_run,
    tiny_inputs,
)

Run = tuple[RunFolder, RunRecord]
SIGMOID = {"loss": {"kind": "sigmoid_local"}, "structure": {"separation": {"weight": 1.0}}}
TOLERANCES = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}


def _run(folder: Path, **sections: dict[str, Any]) -> Run:
    config = tiny_config(**sections)
    return publish_module(folder, config, tiny_module(config))


def _export(run: Run, out: Path, form: Form, dtype: str = "fp32") -> Path:
    export_run(*run, out, form=form, dtype=dtype)
    return out


def _embeddings(**sections: dict[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        found = tiny_module(tiny_config(**sections)).eval()(*tiny_inputs())
    return {"image": found.image, "text": found.text}


def test_each_dtype_in_a_fresh_process(tmp_path: Path) -> None:
    """Two-tower and fusion, beside what is fp32 to rounding in tests/distributed."""
    expected, folders = {}, []
    for kind, model in (("two_tower", {}), ("fusion", FUSION)):
        run = _run(tmp_path / kind, model=model)
        for dtype in TOLERANCES:
            folders.append(_export(run, tmp_path / f"{kind}-{dtype}", "transformers", dtype))
            expected[folders[-1]] = _embeddings(model=model)
    found = in_fresh_process(tmp_path / "work", folders)
    for folder in folders:
        tolerance = TOLERANCES[folder.name.split("-")[1]]
        assert largest_difference(found[folder], expected[folder]) < tolerance, folder
    weights = load_file(tmp_path / "two_tower-bf16" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    for path in (tmp_path / "fusion-bf16").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


# ---- OpenCLIP ------------------------------------------------------------------------------------


def _open_clip(
    weights: dict[str, Tensor], config: dict[str, Any], pixels: Tensor, tokens: Tensor
) -> dict[str, Tensor]:
    """What open_clip's model gives, written out from its source: names, places, order of parts."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    images = F.conv2d(pixels, weights["visual.conv1.weight"], stride=vision["patch_size"])
    images = images.flatten(2).transpose(1, 2)
    first = weights["visual.class_embedding"].expand(len(images), 1, -1)
    images = torch.cat([first, images], dim=1) + weights["visual.positional_embedding"]
    images = _norm(weights, "visual.ln_pre", images)
    heads = vision["width"] // vision["head_width"]
    images = _blocks(weights, "visual.", images, vision["layers"], heads, config, None)
    image = _norm(weights, "visual.ln_post", images[:, 0]) @ weights["visual.proj"]
    length = tokens.shape[1]
    texts = weights["token_embedding.weight"][tokens] + weights["positional_embedding"][:length]
    later = torch.full((length, length), -torch.inf).triu(1)
    texts = _blocks(weights, "", texts, text["layers"], text["heads"], config, later)
    texts = _norm(weights, "ln_final", texts)
    assert text["pool_type"] == "eos"
    ends = (tokens == text["eos_id"]).int().argmax(dim=1)
    chosen = texts[torch.arange(len(texts)), ends] @ weights["text_projection"]
    return {"image": F.normalize(image, dim=-1), "text": F.normalize(chosen, dim=-1)}


def _blocks(
    weights: dict[str, Tensor],
    tower: str,
    states: Tensor,
    layers: int,
    heads: int,
    config: dict[str, Any],
    mask: Tensor | None,
) -> Tensor:
    width = states.shape[2]
    for layer in range(layers):
        name = f"{tower}transformer.resblocks.{layer}"
        attention = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        prefix = f"{name}.attn."
        attention.load_state_dict(
            {key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)}
        )
        plain = _norm(weights, f"{name}.ln_1", states)
        states = states + attention(plain, plain, plain, need_weights=False, attn_mask=mask)[0]
        inner = _linear(weights, f"{name}.mlp.c_fc", _norm(weights, f"{name}.ln_2", states))
        inner = inner * torch.sigmoid(1.702 * inner) if config["quick_gelu"] else F.gelu(inner)
        states = states + _linear(weights, f"{name}.mlp.c_proj", inner)
    return states


def _norm(weights: dict[str, Tensor], name: str, states: Tensor) -> Tensor:
    return F.layer_norm(
        states, states.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"]
    )


def _linear(weights: dict[str, Tensor], name: str, states: Tensor) -> Tensor:
    return F.linear(states, weights[f"{name}.weight"], weights[f"{name}.bias"])


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_open_clip_form_is_the_same_model(tmp_path: Path, activation: str) -> None:
    sections = {"model": {"activation": activation}, **SIGMOID}
    out = _export(_run(tmp_path, **sections), tmp_path / "out", "openclip")
    given = json.loads((out / "open_clip_config.json").read_text())
    weights = load_file(out / "open_clip_model.safetensors")
    images, tokens = tiny_inputs()
    pictures = given["preprocess_cfg"]
    assert pictures["resize_mode"] == "shortest"
    mean, std = (torch.tensor(pictures[name]).view(3, 1, 1) for name in ("mean", "std"))
    pixels = (images.permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        found = _open_clip(weights, given["model_cfg"], pixels, tokens.long())
    assert largest_difference(found, _embeddings(**sections)) < 1e-5
    assert weights["logit_scale"].item() == pytest.approx(math.log(1 / 0.07), rel=1e-5)
    assert weights["logit_bias"].item() == -10.0
    assert given["model_cfg"]["init_logit_bias"] is not None
    assert given["model_cfg"]["quick_gelu"] == (activation == "quick_gelu")
    assert weights.keys() == _open_clip_names(layers=2), "open_clip loads strictly"


def _open_clip_names(layers: int) -> set[str]:
    """Of open_clip's CLIP with a logit bias."""
    norms = ["visual.ln_pre", "visual.ln_post", "ln_final"]
    names = {"logit_scale", "logit_bias", "token_embedding.weight", "positional_embedding",
             "text_projection", "visual.proj", "visual.class_embedding", "visual.conv1.weight",
             "visual.positional_embedding"}  # fmt: skip
    for tower in ("visual.", ""):
        for layer in range(layers):
            block = f"{tower}transformer.resblocks.{layer}"
            parts = ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
            norms += [f"{block}.{part}" for part in parts]
            names |= {f"{block}.attn.in_proj_weight", f"{block}.attn.in_proj_bias"}
    return names | {f"{name}.{kind}" for name in norms for kind in ("weight", "bias")}


# ---- safetensors, tokenizer, card ----------------------------------------------------------------


def test_safetensors_form_holds_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(model=FUSION, task={"kind": "classification"})
    asked = Asked(answers=AnswerList(names=("no", "yes"), is_open=False))
    module = build_module(config, tiny_tokenizer(), asked)
    run, record = publish_module(tmp_path, config, module)
    record = RunRecord(**{**_fields(record), "asked": asked})
    out = _export((run, record), tmp_path / "out", "safetensors")
    weights = load_file(out / "model.safetensors")
    assert weights.keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        assert torch.equal(weights[name], value), name
    assert {"config.yaml", "tokenizer.json", "README.md"} <= {path.name for path in out.iterdir()}
    use = (out / "README.md").read_text().split("```python")[1].split("```")[0]
    monkeypatch.chdir(out)
    given: dict[str, Any] = {}
    exec(use, given)  # the card's own words
    assert given["weights"].keys() == weights.keys()
    assert given["config"]["model"]["kind"] == "fusion"


def _fields(record: RunRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in RunRecord.__slots__}


def test_the_tokenizer_gives_our_ids(tmp_path: Path) -> None:
    """Names of special tokens in a text, long texts, empty ones; padded to all places or less."""
    from transformers import AutoTokenizer

    out = _export(_run(tmp_path), tmp_path / "out", "transformers")
    texts = [*CAPTIONS, "", "An <|endoftext|> in <|pad|>", "x " * 40, "Größe 3"]
    words = AutoTokenizer.from_pretrained(out)
    found = words(texts, padding="max_length", truncation=True, return_tensors="pt")
    expected, _ = tiny_tokenizer().encode(texts, 8)
    assert found.input_ids.tolist() == expected.tolist()
    assert set(found) == {"input_ids", "attention_mask"}, "CLIPModel takes no others"
    assert words(["a"], padding=True).input_ids == [[1, *words.encode("a")[1:-1], 3]]


@pytest.mark.parametrize("squeeze", [False, True])
def test_preprocessing_is_that_of_evaluation(tmp_path: Path, squeeze: bool) -> None:
    """The same square of a picture, but for the filter that shrinks it."""
    import io

    import numpy as np
    from PIL import Image
    from transformers import AutoImageProcessor

    from pipeline.data.image import decode_eval

    sections = {"data": {"train": "nowhere", "vocab_size": 300, "squeeze": squeeze,
                         "image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}}  # fmt: skip
    out = _export(_run(tmp_path, **sections), tmp_path / "out", "transformers")
    rows, columns = np.mgrid[0:64, 0:128]
    pixels = np.stack([2 * columns, 4 * rows, 255 - columns], axis=2).astype(np.uint8)
    picture = Image.fromarray(pixels)
    file = io.BytesIO()
    picture.save(file, "PNG")
    ours = decode_eval(file.getvalue(), (255, 255, 255), 16, squeeze=squeeze)
    theirs = AutoImageProcessor.from_pretrained(out)(picture, return_tensors="np").pixel_values
    assert np.abs(theirs[0].transpose(1, 2, 0) * 255 - ours).mean() < 1.0


def test_what_the_card_says_of_pictures(tmp_path: Path) -> None:
    """Those of the model's size are the same, but for three kinds; its Python mends one."""
    import io

    import numpy as np
    from PIL import Image, ImageOps
    from transformers import AutoImageProcessor

    from pipeline.data.image import decode_eval

    data = {"train": "nowhere", "vocab_size": 300, "background": (0, 255, 0),
            "image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}  # fmt: skip
    out = _export(_run(tmp_path, data=data), tmp_path / "out", "transformers")
    processor = AutoImageProcessor.from_pretrained(out)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    plain, turned = Image.fromarray(pixels), Image.Exif()
    turned[0x0112] = 6

    def differ(image: Image.Image, kind: str, mend: Any = lambda image: image, **more: Any) -> bool:
        file = io.BytesIO()
        image.save(file, kind, **more)
        ours = decode_eval(file.getvalue(), (0, 255, 0), 16)
        given = mend(Image.open(file))
        theirs = processor(given, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
        return not np.array_equal((theirs * 255).round(), ours)

    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        assert not differ(plain, kind), kind
    assert not differ(plain.convert("P"), "PNG")
    assert not differ(plain.convert("L"), "JPEG")
    assert not differ(plain.convert("CMYK"), "JPEG")
    assert differ(plain, "JPEG", exif=turned)
    assert not differ(plain, "JPEG", mend=ImageOps.exif_transpose, exif=turned)
    clear = plain.copy()
    clear.putalpha(128)
    assert differ(clear, "PNG")
    deep = np.asarray(plain.convert("L")).astype(np.uint16) * 257
    assert differ(Image.fromarray(deep), "PNG")
    theirs = processor(Image.fromarray(deep), return_tensors="np").pixel_values[0, 0] * 255
    assert np.array_equal(theirs.round(), deep.clip(0, 255)), "it cuts off what is above"
    card = (out / "README.md").read_text()
    for said in ("Turned by EXIF", "training shows 0, 255, 0 (RGB", "Of 16 bits a channel"):
        assert said in card, said


@pytest.mark.parametrize("form", ["transformers", "openclip", "safetensors"])
@pytest.mark.parametrize("cleaned", [False, True])
def test_what_the_card_says_of_texts(tmp_path: Path, form: Form, cleaned: bool) -> None:
    from transformers import AutoTokenizer

    from pipeline.data.layout import as_captions

    data = {"train": "nowhere", "vocab_size": 300, "clean_captions": cleaned}
    out = _export(_run(tmp_path, data=data), tmp_path / "out", form)
    card = (out / "README.md").read_text()
    assert "training makes one blank of each run of blanks" in card
    assert (CLEANED in card) == cleaned
    assert ("OpenCLIP's tokenizer does the first too" in card) == (form == "openclip")
    assert ('give it `" ".join(text.split())`' in card) == (form != "openclip")
    text = " a  red\ncircle "
    assert as_captions(text) == [" ".join(text.split())] == ["a red circle"]
    words = AutoTokenizer.from_pretrained(out)
    assert words(text).input_ids != words("a red circle").input_ids


# ---- from the checkpoint alone -------------------------------------------------------------------


def _begun_with(folder: Path, kind: str) -> tuple[Config, list[Path]]:
    """A run's config, and the pretrained models it names, whose sizes it does not say."""
    from transformers import BertConfig, BertModel, CLIPModel, ViTConfig, ViTModel

    from pipeline.models.two_tower import clip_config

    torch.manual_seed(7)
    if kind == "two_tower":
        theirs = tiny_config(model={"embed_dim": 24, "activation": "gelu", "image": {
            "size": 16, "patch": 4, "width": 32, "layers": 3, "heads": 4}})  # fmt: skip
        clip = CLIPModel(clip_config(theirs.model, 320, 1, 3, 0))
        clip.save_pretrained(folder / "clip")
        return tiny_config(model={"pretrained": str(folder / "clip")}), [folder / "clip"]
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, num_hidden_layers=2, image_size=32, patch_size=8)).save_pretrained(
        folder / "vit"
    )
    BertModel(
        BertConfig(**sizes, num_hidden_layers=5, vocab_size=310, max_position_embeddings=20,
                   hidden_act="relu", layer_norm_eps=1e-3)
    ).save_pretrained(folder / "bert")  # fmt: skip
    model = {
        **FUSION,
        "image": {"size": 16, "patch": 8, "width": 16, "layers": 2, "heads": 2,
                  "pretrained": str(folder / "vit")},
        "text": {"context_length": 8, "width": 16, "layers": 2, "heads": 2,
                 "pretrained": str(folder / "bert")},
    }  # fmt: skip
    return tiny_config(model=model), [folder / "vit", folder / "bert"]


@pytest.mark.parametrize("kind", ["two_tower", "fusion"])
def test_what_the_run_began_with_is_not_needed(tmp_path: Path, kind: str) -> None:
    from pipeline.embed.encoder import read_encoder

    config, models = _begun_with(tmp_path, kind)
    module = tiny_module(config)
    run = publish_module(tmp_path / "runs", config, module)
    with torch.no_grad():
        outputs = module.eval()(*tiny_inputs())
    for folder in models:
        folder.rename(folder.with_name(f"{folder.name}-gone"))
    out = _export(run, tmp_path / "out", "transformers")
    found = in_fresh_process(tmp_path / "work", [out])[out]
    assert largest_difference(found, {"image": outputs.image, "text": outputs.text}) < 1e-5
    texts = torch.from_numpy(read_encoder(run[0].url).texts(CAPTIONS))
    assert torch.allclose(texts, outputs.text, atol=1e-5)
    card = (out / "README.md").read_text()
    assert ("3 layers, width 32, 4 heads, patches of 4" in card) == (kind == "two_tower")
    assert str(models[0]) in card, "where it started from is told"


def test_a_checkpoint_of_an_older_version_asks_for_it(tmp_path: Path) -> None:
    config, (folder,) = _begun_with(tmp_path, "two_tower")
    saved = tmp_path / "saved" / STATE
    saved.parent.mkdir(parents=True)
    torch.save({"module": tiny_module(config).state_dict()}, saved)
    run = publish_run(tmp_path / "runs", config, tmp_path / "saved", zero_stage=0)
    folder.rename(folder.with_name("gone"))
    with pytest.raises(UserError, match=r"^model.pretrained: .* cannot be loaded as a CLIP model"):
        _export(run, tmp_path / "out", "transformers")
    folder.with_name("gone").rename(folder)
    _export(run, tmp_path / "out", "transformers")


def test_the_card_tells_the_facts(tmp_path: Path) -> None:
    run, record = _run(tmp_path, **SIGMOID)
    ref = tracker.open_run(
        f"sqlite:///{tmp_path}/mlflow.db", "tests", "tiny", params={}, tags={}, run_id=None
    )
    log = MetricLog(ref, 60)
    for samples, value in ((16, 0.25), (32, 0.5), (48, 0.75)):
        recalls = {f"eval/retrieval/text_to_image_recall_at_{k}": value for k in (1, 5)}
        chance = {"eval/rows": 60.0, "eval/retrieval/text_to_image_chance_at_1": 1 / 60}
        probe = {"eval/linear_probe/shape/5_shots/accuracy": value,
                 "eval/linear_probe/shape/chance": 0.25}  # fmt: skip
        log.log(samples, {**recalls, **chance, **probe, "train/loss": 1.0})
    log.close()
    found = {**_fields(record), "mlflow_uri": ref.uri, "mlflow_run_id": ref.run_id}
    record = RunRecord(**found)
    done = export_run(run, record, tmp_path / "out", form="transformers", dtype="fp32")
    assert done.lack is None
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "checkpoint step-00000004", "| text to image R@1 of 60 | 50.0 %, by chance 1.67 % |",
        "| text to image R@5 of 60 | 50.0 % |", "| linear probe, shape, 5 shots | 50.0 %, by",
        "32 pairs in 4 steps, of 64 planned", "nowhere; 99 rows, digest 0123456789abcdef",
        "sigmoid_local", "library_name: transformers", "its bias is -10.0000"[4:],
        "The second projections", ref.run_id, "gammaray 0.1.0",
    ):  # fmt: skip
        assert fact in card, fact
    assert "train/loss" not in card
    assert "chance |" not in card


def test_a_tracker_that_is_gone_costs_only_the_measures(tmp_path: Path) -> None:
    run = _run(tmp_path)
    done = export_run(*run, tmp_path / "out", form="transformers", dtype="fp32")
    assert done.lack is not None
    assert "none.db: no tracker there" in done.lack
    assert "None are known" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "none.db").exists()


# ---- the command ---------------------------------------------------------------------------------


def _command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gammaray", "export", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run, _ = _run(tmp_path)
    out, facts = tmp_path / "out", tmp_path / "facts.json"
    options = ["--format", "openclip", "--dtype", "bf16", "--json", str(facts)]
    assert _command(monkeypatch, run.url, str(out), *options) == 0
    assert "step-00000004 of" in capfd.readouterr().out
    found = json.loads(facts.read_text())
    assert found["dtype"] == "bf16"
    assert "pip install open_clip_torch" in (out / "README.md").read_text()
    assert found["files"].keys() == {path.name for path in out.iterdir()}
    assert _command(monkeypatch, run.url, str(out)) == 2
    assert "is there already; give a new folder" in capfd.readouterr().out
    assert _command(monkeypatch, str(tmp_path / "none"), str(tmp_path / "new")) == 2
    assert "no run there" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("sections", "form", "options", "message"),
    [
        ({"model": FUSION}, "openclip", {}, r"--format: is openclip; .* no such model: take trans"),
        (
            {"model": FUSION, "task": {"kind": "vqa"}},
            "transformers",
            {},
            r"--format: is transformers; the run is fine-tuned for vqa, .* take safetensors",
        ),
        (
            {"model": {**FUSION, "image": CONV}},
            "transformers",
            {},
            r"--format: is transformers; the run's model.image.stem is conv, .* take safetensors",
        ),
        ({}, "transformers", {"checkpoint": "step-1"}, r"--checkpoint: .* has no 'step-1'; it has"),
        ({}, "transformers", {"out": Path("s3://bucket/out")}, r"OUT: .* is a URL; give a local"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, sections: dict[str, Any], form: Form, options: dict[str, Any], message: str
) -> None:
    config = tiny_config(**sections)
    run = publish_module(tmp_path, config, torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match=message):
        export_run(*run, **{"out": tmp_path / "out", "form": form, "dtype": "fp32", **options})
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("form", ["transformers", "openclip", "safetensors"])
@pytest.mark.parametrize("what", ["a file above", "no such device", "full", "full midway"])
def test_an_out_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Form, what: str
) -> None:
    run = _run(tmp_path)
    out = tmp_path / "out"
    if what == "a file above":
        (tmp_path / "file").write_text("")
        out = tmp_path / "file" / "out"
    elif what == "no such device":
        out = Path("/proc/none/out")
    elif what == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))
    else:
        monkeypatch.setattr("pipeline.export.forms.write_card", _full)
    try:
        with pytest.raises(
            UserError, match=r"^OUT: .*out cannot be written \(.*; give a folder on"
        ):
            export_run(*run, out, form=form, dtype="fp32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    assert not list(tmp_path.glob("*out*")), "nothing is left that could pass for whole"


def _full(*_: Any, **__: Any) -> str:
    raise OSError(28, "No space left on device")


def test_a_run_without_a_checkpoint_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    run, record = _run(tmp_path)
    shard = tmp_path / "tiny" / "step-00000004" / "state" / "mp_rank_00_model_states.pt"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"step-00000004: is damaged \(.*mp_rank_00.* --checkpoint"):
        export_run(run, record, tmp_path / "out", form="transformers", dtype="fp32")
    run.remove("step-00000004")
    with pytest.raises(UserError, match="it has no checkpoint yet"):
        export_run(run, record, tmp_path / "out", form="transformers", dtype="fp32")
