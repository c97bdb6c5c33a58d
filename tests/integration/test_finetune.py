"""Pretraining, then fine-tuning from it, by the real command; bad rows, a killed worker."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import cli
from pipeline.data.demo import write_demo
from pipeline.data.order import union
from pipeline.data.questions import TASKS
from tests.integration.run_cli import (
    checkpoint_at,
    finish,
    kill_a_worker,
    mlflow_runs,
    newest_step,
    points,
    quarantined,
    run,
    start,
    used_rows,
    wait_for,
    write_run,
)

pytestmark = pytest.mark.integration

ROWS, BATCH, EPOCHS = 240, 16, 4
MODEL: dict[str, Any] = {"kind": "fusion", "fusion": {"layers": 1, "dropout": 0.1}}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A fusion model's run, with queues, every term, and re-ranking; and what it measured."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = write_run(
        folder,
        model=MODEL,
        loss={"prior": "queue", "queue_size": 64, "virtual_batch": 64},
        structure={"views": "momentum", "momentum": 0.9, "bridge": {"weight": 0.1}},
        engine={"zero_stage": 3, "precision": "bf16"},
        train={"global_batch": BATCH, "epochs": 2},
        evaluate={"rerank": 8},
    )
    run("train", str(config), "--json", str(folder / "facts.json"))
    return folder, json.loads((folder / "facts.json").read_text())["metrics"]


def _write(folder: Path, task: str, init: Path, **sections: dict[str, Any]) -> Path:
    """A config that fine-tunes for a task of the scenes."""
    write_demo(folder / task, ROWS, task=TASKS[task])
    kinds = {"statements": "reasoning", "pairs": "reasoning"}
    return write_run(
        folder,
        data={"train": str(folder / task / "train"), "val": str(folder / task / "val")},
        model={**MODEL, "init": str(init / "runs" / "tiny")},
        task={"kind": kinds.get(task, task), "decoder_layers": 1, "ranked": 8},
        train={"global_batch": BATCH, "epochs": EPOCHS, "checkpoint_every": 8, "log_every": 1},
        evaluate={"max_rows": 60, "zero_shot": []},
        **sections,
    )


def test_pretraining_learns_all_three_and_re_ranks(
    pretrained: tuple[Path, dict[str, float]],
) -> None:
    folder, metrics = pretrained
    for name in ("loss", "matching_loss", "masked_words_accuracy", "prior_batch_weight_text",
                 "structure/bridge_residual_image"):  # fmt: skip
        assert points(folder / "runs", f"train/{name}"), name
    assert metrics["retrieval_reranked/text_to_image_recall_at_10"] >= 0
    assert metrics["retrieval_reranked/image_to_text_chance_at_1"] == pytest.approx(1 / 60)
    (plan,) = (folder / "runs" / "mlartifacts").rglob("plan.txt")
    assert "two hard negatives each" in plan.read_text()


def _damage(shard: Path) -> None:
    """A missing second picture, an unknown label, an empty statement, a broken picture."""
    table = pq.read_table(shard)
    rows = table.to_pylist()
    rows[3]["images"] = rows[3]["images"][:1]
    rows[70]["label"] = None
    rows[100]["statement"] = " "
    rows[200]["images"] = [rows[200]["images"][0], b"\xff\xd8 no picture"]
    pq.write_table(pa.Table.from_pylist(rows), shard, row_group_size=40)


def test_two_pictures_with_bad_rows_through_a_killed_worker(
    pretrained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    """Resumed by itself: one run, each row once an epoch, each bad row named."""
    config = _write(tmp_path, "pairs", pretrained[0])
    _damage(tmp_path / "pairs" / "train" / "part-00000.parquet")
    facts = tmp_path / "facts.json"
    driver = start("finetune", str(config), "--json", str(facts))
    wait_for(lambda: checkpoint_at(tmp_path, 8), driver=driver)
    kill_a_worker(driver)
    output = finish(driver)
    assert "restarting" in output
    assert mlflow_runs(tmp_path / "runs") == ["FINISHED"]
    losses = points(tmp_path / "runs", "train/loss")
    assert len(losses) == len(dict(losses)), "no step is logged twice"
    used = {epoch: union(pairs) for epoch, pairs in used_rows(tmp_path / "runs" / "tiny").items()}
    assert all(used[epoch] == ((0, ROWS),) for epoch in range(EPOCHS - 1))
    found = json.loads(facts.read_text())
    assert found["bad_rows"] == 4
    reasons = {row["reason"] for path in (tmp_path / "runs" / "tiny" / "quarantine").glob("*")
               for row in pq.read_table(path).to_pylist()}  # fmt: skip
    assert reasons == {"not_two_images", "unlisted_answer", "empty_text", "corrupt_image"}
    assert len(quarantined(tmp_path / "runs" / "tiny")) == 4
    assert found["metrics"]["reasoning/questions"] == 60
    assert "statements, true or false" in output


def test_questions_are_answered_and_evaluated_again_without_the_training_data(
    pretrained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    config = _write(tmp_path, "vqa", pretrained[0])
    facts, again = tmp_path / "facts.json", tmp_path / "again.json"
    output = run("finetune", str(config), "--json", str(facts))
    assert "answers to questions" in output
    metrics = json.loads(facts.read_text())["metrics"]
    assert 0 <= metrics["vqa/accuracy"] <= 1
    artifacts = {path.name for path in (tmp_path / "runs" / "mlartifacts").rglob("*.*")}
    assert "answers.png" in artifacts
    folder = str(tmp_path / "runs" / "tiny")
    run("evaluate", folder, "data.train=/nowhere", "--json", str(again))
    assert json.loads(again.read_text())["metrics"] == pytest.approx(metrics, abs=1e-6)


def test_text_assignment_comes_before_two_pictures(
    pretrained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    """The second stack of the assignment's run is where the reasoning begins."""
    folder = pretrained[0]
    assign = write_run(
        tmp_path / "assign",
        model={**MODEL, "init": str(folder / "runs" / "tiny")},
        task={"kind": "assignment"},
        train={"global_batch": BATCH, "epochs": 1},
        evaluate={"max_rows": 60, "zero_shot": []},
    )
    assert "texts to pictures" in run("finetune", str(assign))
    config = _write(tmp_path / "pairs", "pairs", tmp_path / "assign")
    run("finetune", str(config), "train.epochs=1")
    assert newest_step(tmp_path / "pairs", after=0)


def test_the_whole_suite_measures_a_run_and_what_was_tuned_from_it(
    pretrained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    """One table, a result a file in the form of CLIP_benchmark, metrics and pictures in MLflow."""
    folder, metrics = pretrained
    runs, facts = folder / "runs", tmp_path / "facts.json"
    config = _write(tmp_path, "vqa", folder)
    run("finetune", str(config), f"cluster.storage={runs}", "name=answers", "train.epochs=1")
    output = run("evaluate", str(runs / "tiny"), "--suite", "all", "--json", str(facts))
    rows = [[cell.strip() for cell in line.split("│")] for line in output.splitlines()]
    table = [row for row in rows if len(row) == 7]
    assert [row[1:4:2] for row in table if row[0] == "tiny" and row[1] != "re-ranked"] == [
        *(["retrieval", f"{way} R@{k}"] for way in ("text to image", "image to text")
          for k in (1, 5, 10)),
        ["zero-shot", "accuracy"], ["zero-shot", "mean class accuracy"],
        *(["linear probe", f"accuracy, {shots} shots"] for shots in (5, 20, 50)),
        ["linear probe", "accuracy, all rows"],
    ]  # fmt: skip
    assert [row[:2] for row in table if row[0] == "answers"] == [["answers", "vqa"]]
    found = json.loads(facts.read_text())
    assert found["metrics"].keys() > metrics.keys()
    paths = list((runs / "tiny" / "suite").iterdir())
    files = [json.loads(path.read_text()) for path in paths]
    assert len(files) == len(found["results"]) == 8
    assert all(each in found["results"] for each in files)
    for each in files:
        assert list(each) == ["dataset", "model", "pretrained", "task", "metrics", "language"]
        assert (runs / each["model"] / each["pretrained"]).is_dir()
    assert {each["task"] for each in files} == {
        "zeroshot_retrieval", "reranked_retrieval", "zeroshot_classification", "linear_probe",
        "vqa",
    }  # fmt: skip
    artifacts = {path.name for path in (runs / "mlartifacts").glob("*/artifacts/suite/*")}
    drawn = {"zero_shot_shape.png", "text_to_image.png", "image_to_text.png", "answers.png"}
    assert artifacts > drawn | {path.name for path in paths}
    for name in ("linear_probe/shape/20_shots/spread", "vqa/accuracy"):
        assert len(points(runs, f"suite/{name}")) == 1
    assert not list(runs.glob("*/evaluate-*"))


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        ("train", [], "is for vqa, a fine-tuning: run gammaray finetune"),
        ("finetune", ["task=null"], "it is a pretraining: run gammaray train"),
        ("finetune", ["model.kind=two_tower"], "task vqa needs the fusion encoder: set model.kind"),
        ("finetune", ["task.answer_column=words"], "task.answer_column: 'words' is not in"),
        ("finetune", ["task.answers={here}/none.txt"], "task.answers: cannot read"),
        ("finetune", ["task.answers={here}/one.json"], "a task needs two or more"),
        ("finetune", ["model.init={here}/none"], "none is no run with a checkpoint"),
        ("finetune", ["model.fusion.layers=2"], "model.fusion.layers: is 2; the model at"),
        ("finetune", ["evaluate.rerank=4"], "evaluate.rerank: is set; a run of task vqa"),
        ("finetune", ["structure.in_modal=0.5"], "structure: has terms with a weight"),
        ("finetune", ["task.kind=entailment"], "entailment has 3 labels, and"),
        ("finetune", ["data.val={here}/other"], "data.val: its answers ['perhaps'] are not among"),
        ("finetune", ["data.val={here}/two"], "data.val: its rows have 2 picture(s), training's 1"),
        ("finetune", ["model.image.pretrained={here}"], "is to be loaded too: leave one out"),
    ],
)  # fmt: skip
def test_what_cannot_be_fine_tuned_is_refused(
    pretrained: tuple[Path, dict[str, float]],
    tmp_path: Path,
    command: str,
    overrides: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = _write(tmp_path, "vqa", pretrained[0])
    (tmp_path / "one.json").write_text('["yes"]')
    text = {"question": ["what"], "answer": ["perhaps"]}
    for name, pictures in (("other", {"image": [b"x"]}), ("two", {"images": [[b"x", b"y"]]})):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({**pictures, **text}), tmp_path / name / "part.parquet")
    given = [override.format(here=tmp_path) for override in overrides]
    monkeypatch.setattr(sys, "argv", ["gammaray", command, str(config), *given])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    output = capfd.readouterr().out
    assert stopped.value.code == 2, output
    assert "".join(message.split()) in "".join(output.split())
    assert not (tmp_path / "runs" / "tiny").exists()
