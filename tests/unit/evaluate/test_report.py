"""Results of a suite: hand-made metrics, as a table has them and as CLIP_benchmark writes them."""

import csv
import io
from typing import Any

import pytest

from pipeline.evaluate.report import Line, results, subjects
from tests.tiny import tiny_config

RETRIEVAL = {f"{way}_recall_at_{k}": k / 100 + plus
             for way, plus in (("text_to_image", 0.0), ("image_to_text", 0.5))
             for k in (1, 5, 10)} | {f"{way}_chance_at_{k}": k / 1000
             for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}  # fmt: skip


def _metrics(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def test_features_are_measured_by_retrieval_classification_and_probes() -> None:
    config = tiny_config(
        data={"val": "/sets/scenes/val"},
        evaluate={
            "zero_shot": [{"column": "shape"}],
            "linear_probe": [
                {
                    "column": "shape",
                    "train": "/t",
                    "shots": [20, 5],
                    "test": "s3://b/o/test?region=x",
                }
            ],
        },
    )
    metrics = {
        "rows": 60.0,
        **_metrics("retrieval", RETRIEVAL),
        **_metrics("retrieval_reranked", RETRIEVAL),
        **_metrics("zero_shot/shape", {"accuracy": 0.5, "mean_class_accuracy": 0.4,
                                       "top_5_accuracy": 0.9, "chance": 0.25}),
        **_metrics("linear_probe/shape", {
            "accuracy": 0.8, "chance": 0.3, "5_shots/accuracy": 0.6, "5_shots/spread": 0.02,
            "20_shots/accuracy": 0.7, "20_shots/spread": 0.01}),
    }  # fmt: skip
    found = results(config, metrics)
    assert [(each.task, each.dataset, each.metrics.get("fewshot_k")) for each in found] == [
        ("zeroshot_retrieval", "scenes/val", None),
        ("reranked_retrieval", "scenes/val", None),
        ("zeroshot_classification", "scenes/val:shape", None),
        ("linear_probe", "o/test:shape", 5),
        ("linear_probe", "o/test:shape", 20),
        ("linear_probe", "o/test:shape", -1),
    ]
    assert found[0].metrics["image_retrieval_recall@5"] == 0.05, "of images, by texts"
    assert found[0].metrics["text_retrieval_recall@5"] == 0.55
    assert found[0].lines[0] == Line("text to image R@1", 0.01, chance=0.001)
    assert found[0].lines[5] == Line("image to text R@10", 0.6, chance=0.01)
    assert found[2].metrics == {"acc1": 0.5, "acc5": 0.9, "mean_per_class_recall": 0.4}
    assert found[3].metrics == {"lp_acc1": 0.6, "lp_acc1_std": 0.02, "fewshot_k": 5}
    assert found[3].lines == (Line("accuracy, 5 shots", 0.6, 0.02, 0.3),)
    assert found[5].lines == (Line("accuracy, all rows", 0.8, None, 0.3),)


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ({}, ["retrieval of scenes/val"]),
        ({"retrieval": False}, ["how the modalities lie"]),
        (
            {
                "zero_shot": [{"column": "shape"}],
                "linear_probe": [
                    {"column": "shape", "train": "/t", "shots": [20, 5]},
                    {"column": "color", "train": "/t"},
                ],
            },
            [
                "retrieval of scenes/val",
                "zero-shot of shape",
                "probe of shape (5 shots, 20 shots, all rows)",
                "probe of color (all rows)",
            ],
        ),
    ],
)
def test_what_will_be_measured_is_told(evaluate: dict[str, Any], said: list[str]) -> None:
    config = tiny_config(data={"val": "/sets/scenes/val"}, evaluate=evaluate)
    assert subjects(config) == said


def test_what_will_be_measured_of_a_fusion_model_is_told() -> None:
    fusion: dict[str, Any] = {"data": {"val": "/sets/val"}, "model": {"kind": "fusion"}}
    config = tiny_config(**fusion, evaluate={"rerank": 16})
    assert subjects(config) == ["retrieval of sets/val, the best 16 re-ranked"]
    fusion["model"]["init"] = "/runs/pre"
    assert subjects(tiny_config(**fusion, task={"kind": "vqa"})) == ["vqa of sets/val"]


def test_a_task_is_measured_by_its_answers() -> None:
    config = tiny_config(
        data={"val": "/sets/snli/test"},
        model={"kind": "fusion", "init": "/runs/pre"},
        task={"kind": "entailment"},
    )
    metrics = _metrics("entailment", {"accuracy": 0.7, "chance": 0.34, "recall/neutral": 0.6})
    (found,) = results(config, metrics)
    assert (found.task, found.dataset) == ("entailment", "snli/test")
    assert found.lines == (Line("accuracy", 0.7, chance=0.34), Line("recall/neutral", 0.6))


def test_a_result_is_what_clip_benchmark_builds_its_table_of() -> None:
    """`clip_benchmark build` puts metrics and keys of each file into a row of a CSV."""
    config = tiny_config(data={"val": "val"}, evaluate={"zero_shot": [{"column": "shape"}]})
    metrics = _metrics(
        "zero_shot/shape", {"accuracy": 0.5, "mean_class_accuracy": 0.4, "chance": 0.25}
    )
    (found,) = results(config, metrics)
    record = found.to_json("demo", "step-00000312")
    assert list(record) == ["dataset", "model", "pretrained", "task", "metrics", "language"]
    row = {**record.pop("metrics"), **record}
    assert f"{row['model']} {row['pretrained']}" == "demo step-00000312"
    file = io.StringIO()
    csv.DictWriter(file, row.keys()).writerow(row)
    assert file.getvalue().startswith("0.5,0.4,")
    assert row["dataset"].endswith("/val:shape")
