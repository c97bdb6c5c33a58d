"""Bad input: one clear message, exit status 2, before a cluster is asked for (P6)."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import cli
from tests.integration.run_cli import write_run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input")
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").write_text("no Parquet")
    (folder / "text").mkdir()
    pq.write_table(pa.table({"caption": ["a"]}), folder / "text" / "a.parquet")
    (folder / "links").mkdir()
    pq.write_table(pa.table({"URL": ["http://x"], "TEXT": ["a"]}), folder / "links" / "a.parquet")
    (folder / "file").write_text("a file, no folder")
    return write_run(folder)


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gammaray", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train={here}/nowhere", "data.train: {here}/nowhere does not exist"),
        ("data.train={here}/empty", "no .parquet file under {here}/empty; found 1 file(s)"),
        ("data.train={here}/text", "data.train: no image column in {here}/text/a.parquet"),
        ("data.train={here}/links", "holds links (column 'URL') but no pixels"),
        ("train.globalbatch=8", "train.globalbatch: unknown key; did you mean train.global_batch?"),
        ("train.global_batch=lots", "train.global_batch: is 'lots'"),
        ("cluster.workers=512", "512 workers at 0.5 CPUs take 256"),
        ("cluster.cpus_per_worker=4096", "cluster.ingest_cpus 1 for reading data"),
        ("cluster.gpus_per_worker=1", "cluster.gpus_per_worker: 2 workers need as many GPUs"),
        ("train.global_batch=400", "is 400, more than the 300 rows"),
        ("cluster.storage={here}/file/runs", "cluster.storage: cannot write to {here}/file/runs"),
        ("tracking.uri=http://127.0.0.1:9", "no MLflow server answers at http://127.0.0.1:9"),
        ("data.tokenizer={here}/nowhere", "cannot be loaded as a tokenizer"),
        ("evaluate.zero_shot=[{{column: nothing}}]", "has no column 'nothing'"),
        ("evaluate.zero_shot=[{{column: split}}]", "has 1 class(es); classification needs two"),
        ("data.val=null", "data.val: missing; evaluate.zero_shot needs rows"),
    ],
)
def test_train_refuses(
    config: Path,
    override: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    here = str(config.parent)
    if "gpus" in override:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert _main(monkeypatch, "train", str(config), override.format(here=here)) == 2
    output = capfd.readouterr().out
    flat = "".join(output.split())
    assert "".join(message.format(here=here).split()) in flat
    assert "Traceback" not in output
    assert not (config.parent / "runs" / "tiny").exists()


def test_all_problems_are_listed_at_once(
    config: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = ["data.train=/nowhere", "cluster.workers=512", "tracking.uri=http://127.0.0.1:9"]
    assert _main(monkeypatch, "plan", str(config), *overrides, "engine.micro_batch=5") == 2
    output = capfd.readouterr().out
    for place in ("data.train", "cluster.workers", "tracking.uri"):
        assert f". {place}: " in output


def test_tokenizer_and_model_that_disagree(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from transformers import CLIPModel

    from pipeline.models.two_tower import clip_config
    from tests.tiny import tiny_config

    CLIPModel(clip_config(tiny_config().model, 300, 1, 3, 0)).save_pretrained(tmp_path)
    sizes = ["model.image={size: 16, patch: 8}", "model.text={context_length: 8}"]
    overrides = [f"model.pretrained={tmp_path}", "data.vocab_size=2000", *sizes]
    assert _main(monkeypatch, "plan", str(config), *overrides) == 2
    assert "ids, model.pretrained" in capfd.readouterr().out


def test_plan_writes_facts_and_says_them(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    facts = tmp_path / "plan.json"
    assert _main(monkeypatch, "plan", str(config), "--json", str(facts)) == 0
    output = " ".join(capfd.readouterr().out.split())
    assert "16 pairs a step on 2 worker(s), 8 each" in output
    assert "Traffic of the loss: 0 bytes" in output
    assert json.loads(facts.read_text())["plan"]["steps"] == 37


@pytest.mark.parametrize("facts", ["none/plan.json", "."])
def test_facts_that_cannot_be_written_are_refused_before_the_work(
    config: Path,
    facts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert _main(monkeypatch, "plan", str(config), "--json", str(tmp_path / facts)) == 2
    said = capfd.readouterr()
    assert "cannot be written" in " ".join(said.err.replace("│", " ").split())
    assert "pairs a step" not in said.out


def test_evaluate_without_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _main(monkeypatch, "evaluate", str(tmp_path / "none")) == 2
    assert "no run there" in " ".join(capfd.readouterr().out.split())


def test_doctor_reports_and_writes_facts(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    facts = tmp_path / "doctor.json"
    assert _main(monkeypatch, "doctor", str(config), "--json", str(facts)) in (0, 1)
    found = {finding["name"]: finding for finding in json.loads(facts.read_text())}
    assert {"python", "ray", "torch", "GPUs", "shared memory", "storage", "tracker"} <= set(found)
    assert found["storage"]["is_ok"]
    assert found["data.train"]["found"].startswith("300 rows")
    assert _main(monkeypatch, "doctor", str(config), "tracking.uri=http://127.0.0.1:9") == 1
    assert "no MLflow server answers" in " ".join(capfd.readouterr().out.split())
