"""A model in the registry of a real sqlite tracker: its files, its run, its evaluations."""

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pipeline.cli import export as cli_export
from pipeline.errors import UserError
from pipeline.export import forms
from pipeline.export.forms import Exported
from pipeline.tracking import registry
from pipeline.tracking.registry import check_name, register
from pipeline.tracking.tracker import RunRef, connect, log_metrics, open_run, read_history
from pipeline.train.store import RunFolder, RunRecord
from tests.tiny import tiny_tokenizer

RECALL = "eval/retrieval/text_to_image_recall_at_1"


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> RunRef:
    uri = f"sqlite:///{tmp_path_factory.mktemp('runs')}/mlflow.db"
    tags = {"mlflow.source.git.commit": "abc"}
    ref = open_run(uri, "tests", "a-run", params={}, tags=tags, run_id=None)
    log_metrics(ref, 8, {RECALL: 0.25, "train/loss": 3.0})
    log_metrics(ref, 16, {RECALL: 0.5, "train/loss": 2.0})
    log_metrics(ref, 16, {"suite/vqa/accuracy": 0.75})
    log_metrics(ref, 24, {RECALL: 0.125})
    return ref


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model" / "inner").mkdir(parents=True)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "model" / "inner" / "config.json").write_text("{}")
    return tmp_path / "model"


def test_a_version_has_the_files_the_run_and_what_was_measured(
    ref: RunRef, folder: Path, tmp_path: Path
) -> None:
    import mlflow

    tags = {"gammaray.step": "2", "gammaray.format": "openclip"}
    first = register(ref, folder, "scenes", samples=16, tags=tags)
    again = register(ref, folder, "scenes", samples=8, tags=tags)
    assert (first.version, first.metrics) == ("1", 2)
    assert (again.version, again.metrics) == ("2", 1)
    client = connect(ref.uri)
    version = client.get_model_version("scenes", "1")
    assert version.run_id == ref.run_id
    tied = {"gammaray.logged_model": first.model_id}
    assert version.tags == {**tags, "gammaray.commit": "abc", **tied}
    model = client.get_logged_model(first.model_id)
    assert (model.source_run_id, str(model.status)) == (ref.run_id, "READY")
    assert tags.items() <= model.tags.items()
    (link,) = json.loads(model.tags["mlflow.modelVersions"])
    assert (link["name"], int(link["version"])) == ("scenes", 1)
    assert {each.key: (each.step, each.value) for each in model.metrics or []} == {
        RECALL: (16, 0.5),
        "suite/vqa/accuracy": (16, 0.75),
    }
    # The run has each point once, as before.
    assert read_history(ref, [RECALL])[RECALL] == [(8, 0.25), (16, 0.5), (24, 0.125)]
    there = mlflow.artifacts.download_artifacts(
        artifact_uri=client.get_model_version_download_uri("scenes", "1"),
        dst_path=str(tmp_path / "got"),
    )
    files = [path for path in Path(there).rglob("*") if path.is_file()]
    assert {str(path.relative_to(there)): path.read_bytes() for path in files} == {
        "model.safetensors": b"weights",
        "inner/config.json": b"{}",
    }


def test_what_cannot_be_uploaded_is_marked_and_not_registered(
    ref: RunRef, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(MlflowClient, "log_model_artifacts", fail)
    with pytest.raises(UserError, match=r"cannot register .*/model as full \(No space left"):
        register(ref, folder, "full", samples=16, tags={})
    client = connect(ref.uri)
    assert not client.search_model_versions("name='full'")
    experiment = client.get_run(ref.run_id).info.experiment_id
    (model,) = client.search_logged_models([experiment], "name = 'full'")
    assert str(model.status) == "FAILED"


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", "v1.5", "it's"])
def test_a_name_that_mlflow_would_refuse_is_refused_before(ref: RunRef, name: str) -> None:
    with pytest.raises(UserError, match=r"--register: .* is no name of a model; give one without"):
        check_name(ref, name)


def test_a_run_that_is_not_there_is_told_before(ref: RunRef, tmp_path: Path) -> None:
    check_name(ref, "fine-1")
    with pytest.raises(UserError, match="cannot give run 0000"):
        check_name(RunRef(uri=ref.uri, run_id="0" * 32), "fine")
    with pytest.raises(UserError, match="no tracker there"):
        check_name(RunRef(uri=f"sqlite:///{tmp_path}/none.db", run_id="0"), "fine")


def test_an_upload_has_time(ref: RunRef, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    seen = []
    monkeypatch.setattr(
        MlflowClient,
        "log_model_artifacts",
        lambda *_: seen.append(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]),
    )
    register(ref, folder, "slow", samples=0, tags={})
    assert seen == [registry.UPLOAD_SECONDS]
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] != registry.UPLOAD_SECONDS


def test_the_command_registers_what_it_has_exported(
    ref: RunRef, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"name": "a-run", "config": {}, "data_digest": "", "is_finished": True}
    record = RunRecord(
        **values, tokenizer=tiny_tokenizer(), mlflow_uri=ref.uri, mlflow_run_id=ref.run_id
    )
    run = RunFolder.of(str(tmp_path), "a-run")
    run.write_record(record)
    (tmp_path / "a-run" / "step-00000002").mkdir()
    run.write_text("step-00000002/meta.json", json.dumps({"progress": {"samples": 16}}))
    done = Exported(checkpoint="step-00000002", files={"a": 1}, lack=None)
    monkeypatch.setattr(forms, "export_run", lambda *_, **__: done)
    console, facts = Console(file=io.StringIO(), width=200), tmp_path / "facts.json"
    context: Any = SimpleNamespace(obj=console)
    with pytest.raises(UserError, match="--register: 'no/name' is no name of a model"):
        cli_export.export(context, run.url, folder, register="no/name", json=facts)
    assert not facts.exists()
    cli_export.export(context, run.url, folder, register="told", json=facts)
    said = json.loads(facts.read_text())["registered"]
    assert (said["name"], said["version"], said["metrics"]) == ("told", "1", 2)
    assert f"Registered as version 1 of told in {ref.uri}" in console.file.getvalue()  # pyright: ignore
    version = connect(ref.uri).get_model_version("told", "1")
    assert version.tags["gammaray.step"] == "2"
    assert version.tags["gammaray.format"] == "transformers"
