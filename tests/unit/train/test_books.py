"""What the driver writes of a run into MLflow, beside its metrics."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.text import Tokenizer
from pipeline.tracking.tracker import RunRef
from pipeline.train import driver
from pipeline.train.store import RunFolder, RunRecord
from tests.tiny import FUSION, tiny_config


def test_each_attempt_is_a_tag_and_in_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[dict[str, str]] = []
    is_up = False

    def set_tags(_: RunRef, tags: dict[str, str]) -> bool:
        taken.append(dict(tags))
        return is_up

    monkeypatch.setattr(driver.tracker, "set_tags", set_tags)
    folder = RunFolder.of(str(tmp_path), "tiny")
    record = RunRecord(
        name="tiny",
        config={},
        tokenizer=Tokenizer(json="", start=0, end=1, pad=1),
        data_digest="",
        mlflow_uri="",
        mlflow_run_id="",
        is_finished=False,
    )
    diary = driver._Diary(RunRef(uri="", run_id=""), folder, record)
    diary.begin(1, 4)
    is_up = True
    diary.begin(2, 3)
    diary.close()
    assert taken == [
        {"gammaray.attempt": "1", "gammaray.world_size": "4"},
        {"gammaray.attempt": "2", "gammaray.world_size": "3"},
    ]
    written = folder.read_record()
    assert written is not None
    assert written.attempts == 2


@pytest.mark.parametrize(
    ("sections", "tags"),
    [
        (
            {"loss": {"kind": "gamma", "prior": "queue"}},
            {"model": "two_tower", "loss": "gamma", "prior": "queue"},
        ),
        (
            {"loss": {"kind": "sigmoid_local", "prior": "queue"}},
            {"model": "two_tower", "loss": "sigmoid_local", "prior": "none"},
        ),
        (
            {"task": {"kind": "vqa"}, "model": FUSION},
            {"model": "fusion", "task": "vqa", "init": "none"},
        ),
    ],
)
def test_tags_say_what_kind_of_run_it_is(sections: dict[str, Any], tags: dict[str, str]) -> None:
    found = driver._kind_tags(tiny_config(**sections))
    assert found == {f"gammaray.{name}": value for name, value in tags.items()}


def test_a_submitted_run_has_the_commit_of_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    said = json.dumps({"runtime_env": {}, "metadata": {"commit": "abc-dirty"}})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON", said)
    assert driver._commit() == "abc-dirty"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON", json.dumps({"runtime_env": {}}))
    assert driver._commit() != "abc-dirty"
