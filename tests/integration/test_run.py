"""The real command on a real local Ray: to the end, through kills, and with bad rows."""

import json
import random
import signal
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.order import union
from tests.integration.run_cli import (
    checkpoint_at,
    events,
    kill_group,
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

ROWS, STEPS, BATCH = 300, 37, 16  # two epochs of 300 rows


def _damage_three_images(shard: Path) -> None:
    table = pq.read_table(shard)
    images = table["image"].to_pylist()
    images[3], images[70], images[299] = b"\xff\xd8 no picture", None, images[299][:200]
    index = table.schema.get_field_index("image")
    pq.write_table(table.set_column(index, "image", pa.array(images)), shard, row_group_size=50)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict]:
    """One uninterrupted run, with three damaged images in the training data."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_run(folder, tracking={"system_metrics_seconds": 1})
    _damage_three_images(folder / "data" / "train" / "part-00000.parquet")
    output = run("train", str(config), "--json", str(folder / "facts.json"))
    return folder, output, json.loads((folder / "facts.json").read_text())


def test_a_run_ends_with_a_table_and_facts(finished: tuple[Path, str, dict]) -> None:
    _, output, facts = finished
    for part in ("text to image R@1 of 60", "zero-shot accuracy, shape", "samples/s", "mlflow ui"):
        assert part in output
    assert facts["metrics"]["rows"] == 60
    assert facts["metrics"]["retrieval/text_to_image_chance_at_1"] == pytest.approx(1 / 60)
    assert facts["samples_per_s"] > 0


def test_noise_goes_to_the_named_log(finished: tuple[Path, str, dict]) -> None:
    folder, output, _ = finished
    (log,) = (folder / "runs" / "logs").glob("*.log")
    assert str(log) in output.replace("\n", "")
    assert "RayTrainWorker" in log.read_text()
    assert "RayTrainWorker" not in output


def test_the_tracker_has_one_finished_run_with_every_point_once(
    finished: tuple[Path, str, dict],
) -> None:
    folder, _, _ = finished
    assert mlflow_runs(folder / "runs") == ["FINISHED"]
    steps = [step for step, _ in points(folder / "runs", "train/loss")]
    assert steps == [BATCH * (step + 1) for step in range(STEPS)]
    for name in ("train/logit_scale", "train/grad_norm", "train/data_wait_share",
                 "train/samples_per_s", "eval/retrieval/text_to_image_recall_at_1",
                 "system/cpu_utilization_percentage"):  # fmt: skip
        assert points(folder / "runs", name), name
    artifacts = {path.name for path in (folder / "runs" / "mlartifacts").rglob("*.*")}
    assert {"config.yaml", "plan.txt", "curves.png", "dropped_rows.tsv", "contact_sheet.png",
            "confusion_shape.json", "report.html"} <= artifacts  # fmt: skip


def test_the_report_at_the_end_is_that_of_the_command(
    finished: tuple[Path, str, dict], tmp_path: Path
) -> None:
    folder, output, _ = finished
    assert "no report of the run" not in output
    (kept,) = (folder / "runs" / "mlartifacts").rglob("report.html")
    text = kept.read_text()
    for part in ("zero-shot accuracy, shape", "corrupt_image", 'alt="Pairs of the training data"',
                 "Captions and the images found for them", "is \\ taken for", "modality gap",
                 "gammaray evaluate", ">finished<", "computing steps"):  # fmt: skip
        assert part in text, part
    again = tmp_path / "again.html"
    run("report", str(folder / "runs" / "tiny"), "--out", str(again))
    assert again.read_text() == text


def test_bad_rows_are_counted_and_named(finished: tuple[Path, str, dict]) -> None:
    folder, output, facts = finished
    assert facts["bad_rows"] == 3
    assert "unusable rows" in output
    (listing,) = (folder / "runs" / "mlartifacts").rglob("dropped_rows.tsv")
    rows = {line.split("/")[-1] for line in listing.read_text().splitlines()}
    assert rows == {
        "part-00000.parquet:0:3\tcorrupt_image",
        "part-00000.parquet:1:20\tnull_image",
        "part-00000.parquet:5:49\tcorrupt_image",
    }
    assert points(folder / "runs", "data/bad_rows/null_image")[-1][1] >= 1


def test_every_row_is_used_once_an_epoch(finished: tuple[Path, str, dict]) -> None:
    folder, _, _ = finished
    used = used_rows(folder / "runs" / "tiny")
    assert union(used[0]) == ((0, ROWS),)
    total = sum(end - start for pairs in used.values() for start, end in pairs)
    settled = sum(end - start for pairs in used.values() for start, end in union(pairs))
    assert total == settled, "a row was used twice in an epoch"
    assert STEPS * BATCH + 3 <= total <= STEPS * BATCH + 6


def test_a_checkpoint_is_evaluated_again_to_the_same_numbers(
    finished: tuple[Path, str, dict], tmp_path: Path
) -> None:
    folder, _, facts = finished
    """It needs neither the training data nor the tracker, which may be gone by then."""
    output = tmp_path / "again.json"
    gone = ["data.train=/nowhere", "tracking.uri=http://127.0.0.1:9"]
    run("evaluate", str(folder / "runs" / "tiny"), *gone, "--json", str(output))
    again = json.loads(output.read_text())["metrics"]
    assert again == pytest.approx(facts["metrics"], abs=1e-6)


def test_a_finished_run_is_left_alone(finished: tuple[Path, str, dict]) -> None:
    folder, _, _ = finished
    output = run("train", str(folder / "run.yaml"), "train.epochs=0.2", "data.val=null",
                 "evaluate.zero_shot=[]", "loss.kind=infonce_gathered")  # fmt: skip
    assert "'tiny' is finished: this run is 'tiny-2'" in output
    assert (folder / "runs" / "tiny-2" / "run.json").exists()


def test_five_kills_and_three_numbers_of_workers_lose_no_row_and_repeat_none(
    tmp_path: Path,
) -> None:
    config = write_run(
        tmp_path,
        train={"checkpoint_every": 2, "epochs": 3},
        cluster={"cpus_per_worker": 0.3},
        data={"val": None},
        evaluate={"zero_shot": []},
    )
    _damage_three_images(tmp_path / "data" / "train" / "part-00000.parquet")
    at, draw = 0, random.Random(0)
    for workers in (2, 1, 3, 2, 1):
        driver = start("train", str(config), f"cluster.workers={workers}")
        at = wait_for(lambda at=at: newest_step(tmp_path, after=at))
        time.sleep(draw.uniform(0.0, 0.5))
        kill_group(driver)
    refused = start("train", str(config), "optim.lr=0.1")
    output, _ = refused.communicate(timeout=60)
    assert refused.returncode == 2
    assert "optim.lr was 0.0005, is now 0.1" in output
    output = run("train", str(config), "cluster.workers=3")
    assert "Run 'tiny' is unfinished: going on with it." in output
    assert "It began with 2 worker(s) and a global batch of 16; it goes on with 3 and 15." in output
    assert mlflow_runs(tmp_path / "runs") == ["FINISHED"]
    losses = points(tmp_path / "runs", "train/loss")
    assert len(losses) == len(dict(losses)), "no step is logged twice"
    assert points(tmp_path / "runs", "train/world_size")[-1][1] == 3
    samples = points(tmp_path / "runs", "train/loss")[-1][0]
    planned = 3 * ROWS // BATCH * BATCH
    assert planned - 15 < samples <= planned
    used = {epoch: union(pairs) for epoch, pairs in used_rows(tmp_path / "runs" / "tiny").items()}
    assert used[0] == used[1] == ((0, ROWS),)
    bad = points(tmp_path / "runs", "data/bad_rows/all")[-1][1]
    assert sum(end - start for pairs in used.values() for start, end in pairs) == samples + bad
    assert len(quarantined(tmp_path / "runs" / "tiny")) == 3


def test_ctrl_c_ends_the_run_as_killed_and_its_kept_config_goes_on(tmp_path: Path) -> None:
    config = write_run(tmp_path, train={"checkpoint_every": 3})
    driver = start("train", str(config))
    wait_for(lambda: checkpoint_at(tmp_path, 3))
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 130, output
    assert "The same command goes on with this run." in output
    assert mlflow_runs(tmp_path / "runs") == ["KILLED"]
    run("train", str(tmp_path / "runs" / "tiny" / "config.yaml"))
    assert mlflow_runs(tmp_path / "runs") == ["FINISHED"]
    befell = [event.partition(":")[0] for event in events(tmp_path / "runs")]
    assert befell == ["stopped", "resumed", "started"]
    assert json.loads((tmp_path / "runs" / "tiny" / "run.json").read_text())["attempts"] == 2
    assert points(tmp_path / "runs", "train/attempt")[-1][1] == 2
    steps = [step for step, _ in points(tmp_path / "runs", "train/loss")]
    assert steps == [BATCH * (step + 1) for step in range(STEPS)]
    used = used_rows(tmp_path / "runs" / "tiny")
    assert union(used[0]) == ((0, ROWS),)
    assert sum(end - start for pairs in used.values() for start, end in union(pairs)) == (
        STEPS * BATCH
    ), "as many rows as samples: none was used a second time in its epoch"
    record = json.loads((tmp_path / "runs" / "tiny" / "run.json").read_text())
    left = Path(tempfile.gettempdir()).glob(f"gammaray-{record['mlflow_run_id']}-*")
    assert not list(left), "workers leave nothing behind"


def test_zero_3_in_bf16_with_accumulation_and_every_structure(tmp_path: Path) -> None:
    """The far corner of the engine: partitioned weights, bf16, evaluation between steps, views."""
    engine = {"zero_stage": 3, "precision": "bf16"}
    structure = {
        "in_modal": 0.5,
        "separation": {"weight": 0.5},
        "bridge": {"weight": 0.5, "start_samples": 32},
        "consistency": {"weight": 0.1},
    }
    probe = {"column": "shape", "train": str(tmp_path / "data" / "train"), "modality": "text",
             "shots": [5]}  # fmt: skip
    evaluate = {"every": 3, "max_rows": 21, "embedding": "both", "linear_probe": [probe]}
    config = write_run(tmp_path, engine=engine, evaluate=evaluate, structure=structure)
    facts = tmp_path / "facts.json"
    output = run(
        "train", str(config), "train.epochs=0.5", "engine.micro_batch=4", "--json", str(facts)
    )
    assert "in 2 micro batches of 4" in output
    assert len(points(tmp_path / "runs", "eval/retrieval/text_to_image_recall_at_1")) == 3
    again = tmp_path / "again.json"
    run("evaluate", str(tmp_path / "runs" / "tiny"), "engine.precision=fp32", "--json", str(again))
    first, second = (json.loads(path.read_text())["metrics"] for path in (facts, again))
    assert first.keys() == second.keys()
    assert "geometry/orthogonality_image" in first
    assert first["linear_probe/shape/accuracy"] > 0
    shapes = pq.read_table(tmp_path / "data" / "train", columns=["shape"]).column("shape")
    labelled = len(shapes) - shapes.null_count
    assert first["linear_probe/shape/train_rows"] == labelled > 21
    assert 0 < first["linear_probe/shape/test_rows"] <= 21
    assert "linear probe, shape, 5 shots" in output
    assert len(points(tmp_path / "runs", "eval/linear_probe/shape/chance")) == 1, "at the end only"
    assert "a second, augmented view" in output
    runs = tmp_path / "runs"
    for name in ("bridge_residual_image", "uniformity_text", "cross_modal_asymmetry",
                 "in_modal_loss_image", "bridge_residual_at_0.250"):  # fmt: skip
        assert points(runs, f"train/structure/{name}"), name
    drawn = {path.name for path in (runs / "mlartifacts").rglob("*.png")}
    assert drawn == {
        "curves.png", "bridge.png", "projection.png", "similarities.png", "zero_shot_shape.png",
        "text_to_image.png", "image_to_text.png", "contact_sheet.png",
    }  # fmt: skip


def test_a_run_of_bad_rows_stops_early_and_says_why(tmp_path: Path) -> None:
    config = write_run(tmp_path, data={"max_bad_fraction": 0.1})
    shard = tmp_path / "data" / "train" / "part-00000.parquet"
    table = pq.read_table(shard)
    images = [
        b"broken" if row % 2 else image for row, image in enumerate(table["image"].to_pylist())
    ]
    index = table.schema.get_field_index("image")
    pq.write_table(table.set_column(index, "image", pa.array(images)), shard)
    driver = start("train", str(config))
    output, _ = driver.communicate(timeout=240)
    assert driver.returncode == 1
    assert "corrupt_image" in output
    assert "more than data.max_bad_fraction 0.1" in output.replace("\n", " ")
    assert "The same command goes on" not in output
    assert mlflow_runs(tmp_path / "runs") == ["FAILED"]
    assert list((tmp_path / "runs" / "mlartifacts").rglob("dropped_rows.tsv"))
