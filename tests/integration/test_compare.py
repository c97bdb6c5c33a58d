"""`gammaray compare` on a real MLflow server and on sqlite: two losses x three seeds on scenes.

The runs are opened by the driver's own code, train towers on decoded scenes with the package's
losses, and log through its tracker; only Ray and DeepSpeed are left out, which would take minutes.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.data.image import decode_eval
from pipeline.data.text import Tokenizer
from pipeline.evaluate.retrieval import retrieval
from pipeline.tracking.tracker import MetricLog, RunRef, close_run
from pipeline.train import driver
from pipeline.train.module import build_pretraining
from pipeline.train.objective import build_loss
from pipeline.train.preflight import prepare
from pipeline.train.store import RunFolder
from tests.integration.mlflow_server import Server
from tests.integration.run_cli import finish, start, write_run

pytestmark = pytest.mark.integration

LOSSES = ("gamma", "sigmoid_local")
SEEDS = (0, 1, 2)
RECALL = "eval/retrieval/text_to_image_recall_at_1"
BATCH, STEPS = 16, 24


@dataclass(frozen=True)
class _Scenes:
    """Decoded pairs: images [n, 32, 32, 3], tokens [n, 16]."""

    images: Tensor
    tokens: Tensor

    @staticmethod
    def read(folder: str, tokenizer: Tokenizer) -> "_Scenes":
        rows = pq.read_table(folder, columns=["image", "caption"]).to_pylist()
        images = [decode_eval(row["image"], (255, 255, 255), 32) for row in rows]
        tokens, _ = tokenizer.encode([row["caption"] for row in rows], 16)
        return _Scenes(torch.stack([torch.tensor(i) for i in images]), torch.from_numpy(tokens))


def _train(config: Config) -> RunRef:
    """A run as the driver opens it and the worker logs it, in this process."""
    prepared = prepare(config)
    folder = RunFolder.of(config.cluster.storage, config.name)
    record = driver._new_record(prepared, folder, config.name)
    run = RunRef(uri=record.mlflow_uri, run_id=record.mlflow_run_id)
    assert config.data.val is not None
    train = _Scenes.read(config.data.train[0].path, prepared.tokenizer)
    val = _Scenes.read(config.data.val, prepared.tokenizer)
    torch.manual_seed(config.train.seed)
    module = build_pretraining(config, prepared.tokenizer)
    loss = build_loss(config, prepared.plan, embed_dim=16, rank=0, world_size=1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    log = MetricLog(run, system_metrics_seconds=60)
    started = time.perf_counter()
    for step in range(1, STEPS + 1):
        rows = torch.randint(len(train.images), (BATCH,))
        outputs = module(train.images[rows], train.tokens[rows])
        value = loss(*outputs.contrast, keys=rows)
        optimizer.zero_grad()
        value.loss.backward()
        optimizer.step()
        point = {"loss": float(value.loss.detach()), "step": step, "world_size": 1}
        point["step_s"] = time.perf_counter() - started
        log.log(BATCH * step, {f"train/{name}": each for name, each in point.items()})
        if step % 6 == 0:
            with torch.no_grad():
                found = module(val.images, val.tokens)
            measures = retrieval(found.image, found.text, torch.arange(len(val.images)))
            log.log(BATCH * step, {f"eval/retrieval/{name}": each for name, each in measures})
        started = time.perf_counter()
    log.close()
    close_run(run, "FINISHED")
    folder.write_record(replace(record, is_finished=True))
    return run


def _train_six(tmp_path: Path, uri: str) -> None:
    config = load_config(write_run(tmp_path, tracking={"uri": uri, "experiment": "losses"}))
    for loss in LOSSES:
        for seed in SEEDS:
            _train(
                config.model_copy(
                    update={
                        "name": f"{loss}-s{seed}",
                        "loss": config.loss.model_copy(update={"kind": loss}),
                        "train": config.train.model_copy(update={"seed": seed}),
                    }
                )
            )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def test_six_runs_of_two_losses_on_a_server(server: Server, tmp_path: Path) -> None:
    import mlflow

    _train_six(tmp_path, server.uri)
    environment = {**os.environ, "MLFLOW_TRACKING_URI": server.uri}
    asked = ["compare", "--experiment", "losses", "--out", str(tmp_path / "out")]
    output = finish(start(*asked, env=environment))
    assert "6 run(s) of 2 config(s), seeds apart:" in output
    assert "A: loss.kind=gamma: gamma-s0, gamma-s1, gamma-s2." in output
    facts = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert facts["differs"] == {"loss.kind": list(LOSSES)}
    assert facts["warnings"] == []

    mlflow.set_tracking_uri(server.uri)
    table = mlflow.search_runs(experiment_names=["losses"])
    runs = table[table["tags.gammaray.compared"].isna()]  # pyright: ignore
    assert len(runs) == 6
    for group, loss in zip(facts["groups"], LOSSES, strict=True):
        its = runs[runs["params.loss.kind"] == loss]
        assert {run["run_id"] for run in group["runs"]} == set(its["run_id"])
        assert sorted(run["seed"] for run in group["runs"]) == ["0", "1", "2"]
        for metric in (RECALL, "eval/retrieval/image_to_text_recall_at_1"):
            final = its[f"metrics.{metric}"]
            assert group["metrics"][metric]["final"] == {
                "mean": pytest.approx(final.mean(), rel=1e-12),
                "sd": pytest.approx(final.std(), rel=1e-12),
                "n": 3,
            }

    (kept,) = table[table["tags.gammaray.compared"].notna()]["run_id"]  # pyright: ignore
    client = mlflow.MlflowClient()
    files = {item.path for item in client.list_artifacts(kept)}
    assert files == {"comparison.md", "comparison.json", "curves.png", "pareto.png"}
    assert client.get_run(kept).info.status == "FINISHED"
    again = finish(start(*asked, "--where", "params.`train.seed` != '2'", env=environment))
    assert "4 run(s) of 2 config(s), seeds apart:" in again
    (first,) = client.get_run(facts["groups"][0]["runs"][0]["run_id"]).inputs.dataset_inputs[:1]
    assert (
        first.dataset.digest
        == client.get_run(facts["groups"][0]["runs"][0]["run_id"]).data.tags["gammaray.data_digest"]
    )


def test_runs_of_folders_with_their_own_sqlite(tmp_path: Path) -> None:
    _train_six(tmp_path, "embedded")
    folders = [str(tmp_path / "runs" / f"{loss}-s{seed}") for loss in LOSSES for seed in SEEDS]
    output = finish(start("compare", *folders, "sigmoid_local-s1", "--out", str(tmp_path / "out")))
    assert "6 run(s) of 2 config(s), seeds apart:" in output
    assert f"in sqlite:///{tmp_path}/runs/mlflow.db has them too." in output
    facts = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [group["metrics"][RECALL]["final"]["n"] for group in facts["groups"]] == [3, 3]
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
