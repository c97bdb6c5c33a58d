"""A run of the real command, exported by it, and a run that starts from what was exported."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.export.forms import export_run
from pipeline.models.fusion import fit_places
from tests.integration.run_cli import run, write_run
from tests.tiny import tiny_config, tiny_module
from tests.tiny_run import publish_module

pytestmark = pytest.mark.integration
PLACES = "vision_model.embeddings.position_embedding.weight"


def test_train_export_and_start_from_it(tmp_path: Path) -> None:
    """The second run's images are larger; with a rate of nearly 0 its weights stay those given."""
    config = write_run(tmp_path, engine={"zero_stage": 3, "precision": "bf16"})
    run("train", str(config), "train.epochs=1")
    given, facts = tmp_path / "given", tmp_path / "facts.json"
    out = run("export", f"{tmp_path}/runs/tiny", str(given), "--json", str(facts))
    assert out.startswith("Wrote "), "nothing of what DeepSpeed or transformers print"
    assert "model.safetensors" in json.loads(facts.read_text())["files"]
    card = (given / "README.md").read_text()
    assert "| text to image R@1 of " in card
    assert "| zero-shot accuracy, shape |" in card
    said = run(
        "train", str(config), "name=second", f"model.init={given}", "train.epochs=1",
        "model.image.size=64", "engine.precision=fp32", "optim.lr=1e-12", "cluster.workers=1",
    )  # fmt: skip
    assert "Run 'second'" in said
    again = tmp_path / "again"
    run("export", f"{tmp_path}/runs/second", str(again))
    first, second = (load_file(folder / "model.safetensors") for folder in (given, again))
    assert first.keys() == second.keys()
    for name, value in first.items():
        expected = fit_places(value[None], 17)[0] if name == PLACES else value
        torch.testing.assert_close(second[name], expected, rtol=0, atol=1e-6)
    assert (given / "tokenizer.json").read_text() == (again / "tokenizer.json").read_text()


def test_a_run_from_pretrained_weights_is_exported_without_them(tmp_path: Path) -> None:
    first = tiny_config(model={"activation": "gelu"})
    given, out = tmp_path / "given", tmp_path / "out"
    export_run(*publish_module(tmp_path / "first", first, tiny_module(first)), given,
               form="transformers", dtype="fp32")  # fmt: skip
    config = write_run(tmp_path)
    run(
        "train", str(config), "train.epochs=1", f"model.pretrained={given}", "optim.lr=1e-12",
        f"data.tokenizer={given}", "model.image.size=16", "model.text.context_length=8",
        "cluster.workers=1",
    )  # fmt: skip
    given.rename(tmp_path / "gone")
    run("export", f"{tmp_path}/runs/tiny", str(out))
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "gone", out))
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    assert json.loads((out / "config.json").read_text())["text_config"]["hidden_act"] == "gelu"
