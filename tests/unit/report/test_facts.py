"""What a report says of a run, section by section."""

import json

import pytest

from pipeline.report import facts
from pipeline.report.advice import next_steps
from pipeline.report.confusion import confusions
from pipeline.report.events import events, stalls
from pipeline.report.record import Record
from pipeline.tracking.tracker import Input
from tests.unit.report.runs import BEGAN, curve, record, trained

FAILED = "gammaray.event.20231114T221330Z.failed"


def _advice(run: Record) -> list[str]:
    return [step.what for step in next_steps(run)]


def test_measures_stand_beside_chance() -> None:
    assert facts.measures(trained()) == [("zero-shot accuracy, shape", 0.9, 0.5)]
    assert facts.verdict(trained()).startswith("It learned: all")


@pytest.mark.parametrize(("value", "verdict"), [(0.5, "did not learn"), (0.56, "It learned: all")])
def test_what_chance_may_bring_is_no_success(value: float, verdict: str) -> None:
    """Of 1,000 rows at a chance of a half three standard errors are 0.047."""
    assert verdict in facts.verdict(trained(metrics={"eval/zero_shot/shape/accuracy": value}))


def test_few_shots_are_said_and_a_probe_without_its_chance_is_left_out() -> None:
    probes = {"a/b/accuracy": 0.9, "a/b/5_shots/accuracy": 0.8, "a/b/chance": 0.5,
              "old/accuracy": 0.9}  # fmt: skip
    probes = {f"eval/linear_probe/{name}": value for name, value in probes.items()}
    assert facts.measures(record(metrics=probes)) == [
        ("linear probe, a/b", 0.9, 0.5), ("linear probe, a/b, 5 shots", 0.8, 0.5),
    ]  # fmt: skip


def test_some_measures_at_chance_are_named() -> None:
    low = {"eval/zero_shot/a/b/accuracy": 0.1, "eval/zero_shot/a/b/chance": 0.1}
    said = facts.verdict(trained(metrics=low))
    assert said == "It learned in part. Not clearly above chance: zero-shot accuracy, a/b."


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (record(params={"data.val": "None"}), "its config names no data.val"),
        (record(status="FAILED"), "it ended before one, as FAILED"),
        (record(status="RUNNING"), "it still runs, or was lost"),
    ],
)
def test_without_an_evaluation_the_reason_is_said(run: Record, why: str) -> None:
    assert why in facts.verdict(run)


def test_curves_have_two_points_or_are_left_out() -> None:
    assert [panel.title for panel in facts.curves(trained())] == ["Loss"]
    more = {"eval/zero_shot/shape/accuracy": curve((100, 33, 0.6), (200, 90, 0.9))}
    panels = facts.curves(trained(points=more))
    assert [panel.title for panel in panels] == ["Loss", "Evaluation: accuracy"]
    assert list(panels[1].lines) == ["shape"]


def test_speed_leaves_the_first_window_out_of_medians() -> None:
    found = facts.speed(trained())
    assert found["samples per second, median"] == "50"
    assert found["of the steps' time, waiting for data"] == "6.7%", "2 of 30 seconds"
    assert facts.speed(record()) == {}


def test_rows_come_from_the_inputs_or_from_the_plan() -> None:
    inputs = (Input(role="training", source="s3://b/train", digest="ab12", rows=5000),)
    found = facts.rows(trained(inputs=inputs))
    assert found["training rows"] == "5,000 in s3://b/train, digest ab12"
    assert found["rows trained on"] == "200"
    assert found["evaluation rows skipped"] == "4"
    plan = {"plan.txt": "77 rows in 1 Parquet shard(s)\nOrder: ..."}
    assert facts.rows(record(files=plan)) == {"training rows": "77 rows in 1 Parquet shard(s)"}


def test_skipped_rows_are_counted_by_reason() -> None:
    listed = "a.parquet:0:1\tnull_image\na.parquet:0:7\tcorrupt_image\nb.parquet:1:1\tnull_image\n"
    met = {"data/bad_rows/null_image": 4.0, "data/bad_rows/empty_caption": 1.0,
           "data/bad_rows/all": 5.0}  # fmt: skip
    run = record(files={"dropped_rows.tsv": listed}, metrics=met)
    assert facts.skipped(run) == [
        ("null_image", 2, 4), ("corrupt_image", 1, None), ("empty_caption", None, 1),
    ]  # fmt: skip
    assert facts.named_rows(run, 1) == ["a.parquet:0:1  null_image"]


def test_events_are_in_order_with_stacks_of_stalls() -> None:
    tags = {FAILED: "worker 1 died", "gammaray.event.20231114T221325Z.resizing": "to 4 workers",
            "gammaray.name": "tiny"}  # fmt: skip
    files = {"stalls/step-00000012-rank-00003.txt": "worker 3 did nothing\n\nFile ..."}
    run = record(tags=tags, files=files)
    assert events(run) == [
        (BEGAN + 5, "resizing", "to 4 workers"), (BEGAN + 10, "failed", "worker 1 died"),
    ]  # fmt: skip
    assert stalls(run) == [("worker 3 did nothing", "File ...")]


def test_confusion_is_a_matrix_of_shares_and_the_commonest_mistakes() -> None:
    counts = {"column": "animal", "classes": ["cat", "dog", "emu"],
              "counts": [[0, 0, 3], [0, 1, 1], [1, 0, 2]]}  # fmt: skip
    later = {**counts, "counts": [[0, 0, 1]]}
    files = {"confusion_animal.json": json.dumps(counts),
             "suite/confusion_animal.json": json.dumps(later)}  # fmt: skip
    (found,) = confusions(record(files=files))
    assert found.shares == [[0.75, 0.25, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert found.mistakes == [("dog", "cat", 2, 1.0), ("cat", "dog", 1, 0.25)]
    names = [str(number) for number in range(1000)]
    many = {"column": "x", "classes": names, "counts": [[999, 0, 5]]}
    (found,) = confusions(record(files={"confusion_x.json": json.dumps(many)}))
    assert found.shares is None
    assert found.mistakes == [("999", "0", 5, 1.0)]


def test_results_of_the_suite_are_lines() -> None:
    metrics = {"lp_acc1": 0.5, "lp_acc1_std": 0.1, "fewshot_k": 5}
    result = {"model": "tiny", "task": "linear_probe", "dataset": "val:shape", "metrics": metrics}
    run = record(files={"suite/a.json": json.dumps(result), "suite/confusion_x.json": "{}"})
    assert list(facts.suite(run)) == [
        ("tiny", "linear probe, 5 shots", "val:shape", "lp_acc1", 0.5),
        ("tiny", "linear probe, 5 shots", "val:shape", "lp_acc1_std", 0.1),
    ]


def test_a_failed_run_is_to_go_on_first_of_all() -> None:
    run = record(status="FAILED", tags={FAILED: "worker 1 died"})
    (first,) = next_steps(run)
    assert first.what.startswith("Go on with it")
    assert first.why == "It ended as FAILED. The last failure: worker 1 died"
    assert first.command == "gammaray train runs/tiny/config.yaml"


def test_a_fine_tuned_run_goes_on_with_finetune() -> None:
    (first,) = next_steps(record(status="KILLED", tags={"gammaray.task": "vqa"}))
    assert first.command == "gammaray finetune runs/tiny/config.yaml"
    assert "it was stopped" in first.why


def test_a_run_at_a_url_is_begun_by_what_was_given() -> None:
    (first,) = next_steps(record(status="KILLED", tags={"gammaray.storage": "s3://runs/tiny"}))
    assert first.command == "gammaray train CONFIG"


def test_a_fine_tuned_run_has_its_own_export_and_no_suite() -> None:
    steps = next_steps(trained(tags={"gammaray.task": "vqa"}, params={"model.kind": "fusion"}))
    commands = [step.command for step in steps]
    assert commands[-1] == "gammaray export runs/tiny OUT --format safetensors"
    assert not [command for command in commands if "--suite" in command or "init" in command]


def test_what_hurts_is_mended_before_more_is_measured() -> None:
    params = {"optim.lr": "0.001", "cluster.ingest_cpus": "2", "train.seed": "3",
              "train.global_batch": "8", "model.text.context_length": "16"}  # fmt: skip
    hurt = {"train/nonfinite_steps": 2.0, "data/bad_rows/all": 50.0, "data/cut_caption_share": 0.2,
            "train/variance_ratio_text": 9.0}  # fmt: skip
    wait = {"train/data_wait_share": curve((100, 30, 0.9), (200, 55, 0.4))}
    steps = next_steps(trained(params=params, metrics=hurt, points=wait))
    assert [step.command for step in steps[:5]] == [
        "gammaray train runs/tiny/config.yaml name=calmer optim.lr=0.0005",
        "gammaray train runs/tiny/config.yaml name=faster cluster.ingest_cpus=4",
        "gammaray data inspect PATH --sheet sheet.png",
        "gammaray train runs/tiny/config.yaml name=longer model.text.context_length=32",
        "gammaray train runs/tiny/config.yaml name=larger train.global_batch=16",
    ]
    assert "50 of 250 rows were unusable" in steps[2].why
    assert steps[6].command == (
        "gammaray train runs/tiny/config.yaml name=tiny-s4 train.seed=4; "
        "gammaray compare runs/tiny runs/tiny-s4"
    )


def test_a_whole_number_is_advised_with_all_its_digits() -> None:
    points = {"eval/zero_shot/shape/accuracy": curve((100, 33, 0.8), (200, 90, 0.9))}
    for key, other in (("train.epochs", "train.samples"), ("train.samples", "train.epochs")):
        params = {key: "524288", other: "None"}
        commands = [step.command for step in next_steps(trained(points=points, params=params))]
        assert f"gammaray train runs/tiny/config.yaml name=longer {key}=1048576" in commands


def test_probes_that_are_there_are_not_said_to_lack() -> None:
    probes = {"eval/linear_probe/shape/5_shots/accuracy": 0.9}
    for metrics, lacks in (({}, True), (probes, False)):
        steps = next_steps(trained(metrics=metrics))
        (suite,) = [step for step in steps if step.command.endswith("--suite all")]
        assert ("no probes of few rows" in suite.why) == lacks


def test_a_measure_that_still_rises_asks_for_more() -> None:
    def rises(to: float) -> Record:
        points = {"eval/zero_shot/shape/accuracy": curve((100, 33, 0.8), (200, 90, to))}
        return trained(points=points, params={"train.epochs": "2"})

    assert "Train longer" in _advice(rises(0.9))
    assert "Train longer" not in _advice(rises(0.81))
    assert "Evaluate on the way" in _advice(trained())
    assert "Evaluate on the way" not in _advice(rises(0.9))


def test_a_fusion_model_can_be_tuned_and_a_run_that_was_not_measured_is_to_be() -> None:
    fusion = _advice(trained(params={"model.kind": "fusion"}))
    assert fusion[-1] == "Fine-tune it for a task"
    assert _advice(record(params={"data.val": "None"}))[0] == "Measure it"
