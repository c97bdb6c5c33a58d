"""What a sweep runs, what it refuses, and how its runs tell Tune of themselves."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.load import parse_config
from pipeline.config.space import read_axes
from pipeline.errors import UserError
from pipeline.tracking import search
from pipeline.train import driver, sweep, trials
from pipeline.train.store import RunFolder, RunRecord
from pipeline.train.sweep import Sweep, close_sweep, plan_sweep
from pipeline.train.sweep_record import SweepRecord, open_sweep, read_sweep, write_sweep
from pipeline.train.trials import Race, Trial
from tests.tiny import tiny_tokenizer, tiny_values
from tests.tiny_data import write_pairs

RECALL = "eval/retrieval/text_to_image_recall_at_1"
SEEDS = ("train.seed=0,1",)


@pytest.fixture(autouse=True)
def _no_ray_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    train = write_pairs(tmp_path / "train", 64)
    data = {"train": str(train), "val": str(write_pairs(tmp_path / "val", 12))}
    return tiny_values(data=data, cluster={"storage": str(tmp_path / "runs")})


def _plan(values: dict[str, Any], *over: str, metric: str | None = None) -> Sweep:
    return plan_sweep(values, "tiny", read_axes(over or SEEDS), metric)


def _begin(values: dict[str, Any], name: str, *, is_finished: bool, **train: Any) -> RunFolder:
    """The folder of a run of the sweep."""
    config = parse_config(
        {**values, "name": name, "train": {**values["train"], **train}}, "the run"
    )
    folder = RunFolder.of(config.cluster.storage, name)
    record = RunRecord(
        name=name,
        config=config.model_dump(mode="json"),
        tokenizer=tiny_tokenizer(),
        data_digest="0123456789ab",
        mlflow_uri=f"sqlite:///{config.cluster.storage}/mlflow.db",
        mlflow_run_id="abc",
        is_finished=is_finished,
    )
    folder.write_record(record)
    return folder


def test_every_run_is_planned(values: dict[str, Any]) -> None:
    planned = _plan(values, "train.global_batch=8,16", "train.seed=0,1")
    assert [trial.name for trial in planned.trials] == [
        "tiny-global_batch_8-seed_0",
        "tiny-global_batch_8-seed_1",
        "tiny-global_batch_16-seed_0",
        "tiny-global_batch_16-seed_1",
    ]
    assert {trial.samples for trial in planned.trials} == {64}
    assert not any(trial.is_finished for trial in planned.trials)
    assert planned.race is None


def test_problems_of_all_runs_are_found_before_the_first_starts(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="This sweep cannot start: 3 problems") as caught:
        _plan(values, "loss.kind=gamma,no_such", "train.global_batch=8,-1", "model.embed_dim=16,x")
    text = str(caught.value)
    assert "tiny-kind_gamma-global_batch_8-embed_dim_x (and 3 more): model.embed_dim" in text
    assert "tiny-kind_gamma-global_batch_-1" not in text
    assert "no_such" in text


def test_a_problem_of_the_data_is_told_once(values: dict[str, Any]) -> None:
    values["data"]["train"] = "/nowhere"
    with pytest.raises(UserError, match=r"1 problem\n  1\. tiny-seed_0 \(and 1 more\): data.train"):
        _plan(values)


def test_finished_runs_are_known_by_their_folders(values: dict[str, Any]) -> None:
    _begin(values, "tiny-seed_0", is_finished=True, seed=0)
    _begin(values, "tiny-seed_1", is_finished=False, seed=1)
    assert [trial.is_finished for trial in _plan(values).trials] == [True, False]


def test_a_run_of_another_config_is_refused(values: dict[str, Any]) -> None:
    _begin(values, "tiny-seed_0", is_finished=True, seed=0, samples=32)
    with pytest.raises(UserError, match=r"train.samples was 32, is now 64; go on with the old"):
        _plan(values)


def test_a_sweep_takes_no_runs_folder_and_keeps_its_keys(values: dict[str, Any]) -> None:
    folder = _begin(values, "tiny", is_finished=True)
    with pytest.raises(UserError, match="is a run, not a sweep; name the sweep otherwise"):
        _plan(values)
    folder.remove("")
    record = SweepRecord(keys=["optim.lr"], mlflow_uri="u", mlflow_run_id="1", stopped=[])
    write_sweep(folder, record)
    assert open_sweep(folder.url) == record
    with pytest.raises(UserError, match=r"varies optim\.lr, now it is to vary train\.seed; vary"):
        _plan(values)
    folder.write_text("sweep.json", "{}")
    with pytest.raises(UserError, match="not a sweep's record"):
        _plan(values)


@pytest.mark.parametrize(
    ("metric", "every", "message"),
    [
        ("train/loss", 2, "'train/loss' is no metric of an evaluation"),
        ("eval/rows", 2, "'eval/rows' is no metric of an evaluation"),
        (RECALL, "end", "the runs are evaluated at their end only"),
    ],
)
def test_asha_needs_evaluations_on_the_way(
    values: dict[str, Any], metric: str, every: Any, message: str
) -> None:
    values["evaluate"] = {"every": every}
    with pytest.raises(UserError, match=f"--asha: .*{message}"):
        _plan(values, metric=metric)


def test_a_race_begins_where_all_have_been_evaluated(values: dict[str, Any]) -> None:
    values["evaluate"] = {"every": 2}
    planned = _plan(values, "train.global_batch=8,16", metric=RECALL)
    assert planned.race == Race(metric=RECALL, better="higher", first=32, longest=64)
    assert planned.race is not None
    assert trials._asha(planned.race) is not None


class _Trials:
    """Stands for Ray Tune: `finish` the runs of these names, stop, fail or leave the others."""

    def __init__(self, values: dict[str, Any]):
        self.values, self.asked = values, []
        self.finish: set[str] = set()
        self.stop: set[str] = set()
        self.failures: dict[str, str] = {}

    def __call__(self, asked: list[Trial], *, stop: Any, **rest: Any) -> dict[str, str]:
        self.asked.append([trial.name for trial in asked])
        for trial in asked:
            if trial.name in self.finish:
                _begin(self.values, trial.name, is_finished=True, seed=int(trial.name[-1]))
            if trial.name in self.stop:
                stop(trial.name)
        return self.failures


@pytest.fixture
def fake(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> _Trials:
    fake = _Trials(values)
    monkeypatch.setattr(sweep, "run_trials", fake)

    @contextlib.contextmanager
    def session(*_: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(driver, "session", session)
    return fake


def _run(planned: Sweep, tmp_path: Path) -> sweep.Ended:
    return sweep.run_sweep(planned, lambda event: None, tmp_path / "x.log")


def test_what_is_finished_is_not_run_again(
    values: dict[str, Any], fake: _Trials, tmp_path: Path
) -> None:
    fake.finish = {"tiny-seed_0"}
    with pytest.raises(KeyboardInterrupt):
        _run(_plan(values), tmp_path)
    fake.finish = {"tiny-seed_1"}
    ended = _run(_plan(values), tmp_path)
    close_sweep(ended)
    assert _run(_plan(values), tmp_path).run == ended.run
    assert fake.asked == [["tiny-seed_0", "tiny-seed_1"], ["tiny-seed_1"]]
    assert len(ended.runs) == 2
    assert not ended.failures
    (parent,) = search.get_runs(ended.run.uri, ended.run.run_id)
    assert (parent.name, parent.status) == ("tiny", "RUNNING")
    assert parent.params == {"train.seed": "[0, 1]"}


def test_what_asha_stopped_stays_stopped(
    values: dict[str, Any], fake: _Trials, tmp_path: Path
) -> None:
    fake.stop, fake.finish = {"tiny-seed_0"}, {"tiny-seed_1"}
    values["evaluate"] = {**values.get("evaluate", {}), "every": 1}
    planned = _plan(values, metric=RECALL)
    _run(planned, tmp_path)
    record = read_sweep(planned.folder)
    assert record is not None
    assert record.stopped == ["tiny-seed_0"]
    _run(_plan(values, metric=RECALL), tmp_path)
    assert len(fake.asked) == 1
    _run(_plan(values), tmp_path)
    assert fake.asked[1:] == [["tiny-seed_0"]], "without a race nobody has lost it"


def test_a_failure_is_told_and_tried_again(
    values: dict[str, Any], fake: _Trials, tmp_path: Path
) -> None:
    fake.finish, fake.failures = {"tiny-seed_0"}, {"tiny-seed_1": "the disk is full"}
    ended = _run(_plan(values), tmp_path)
    close_sweep(ended)
    assert ended.failures == {"tiny-seed_1": "the disk is full"}
    (parent,) = search.get_runs(ended.run.uri, ended.run.run_id)
    assert parent.status == "FAILED"
    _run(_plan(values), tmp_path)
    assert fake.asked[1] == ["tiny-seed_1"]


def _actor(values: dict[str, Any], metric: str | None, *, is_over: bool = False) -> Any:
    actor = object.__new__(trials._Run)
    config = parse_config(values, "tiny")
    task = trials._Task(config=config, is_over=is_over)
    given = {"tasks": {"tiny": task}, "parent": "the parent", "metric": metric}
    actor.setup({"trial": "tiny"}, log_folder=Path("logs"), **given)
    return actor


def test_a_run_tells_of_its_evaluations_and_its_end(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def train(config: Any, listen: Any, log_path: Path, **rest: Any) -> None:
        seen.update(rest)
        plan = SimpleNamespace(global_batch=8, samples=50)
        name = RECALL.removeprefix("eval/")
        listen({"kind": "started", "step": 3, "samples": 24, "plan": plan})
        listen({"kind": "evaluation", "step": 5, "metrics": {name: 0.5}})
        listen({"kind": "evaluation", "step": 6, "metrics": {name: 0.4}})

    monkeypatch.setattr(driver, "train", train)
    actor = _actor(values, RECALL)
    assert actor.step() == {"samples": 40, RECALL: 0.5}
    ended = {"samples": 48, RECALL: 0.4, "done": True, "failure": ""}
    assert actor.step() == ended, "the last one comes with the end"
    assert seen["tags"] == {"mlflow.parentRunId": "the parent"}


def test_a_run_that_fails_says_why(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any, **rest: Any) -> None:
        raise driver.RunFailed("worker 0:\n it is gone", can_go_on=True)

    monkeypatch.setattr(driver, "train", train)
    ended = _actor(values, None).step()
    assert ended["failure"].startswith("worker 0: it is gone (log: logs/tiny-")


def test_a_run_that_is_stopped_saves_first(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = threading.Event()

    def train(*_: Any, stop: threading.Event, **rest: Any) -> None:
        assert stop.wait(10)
        saved.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "train", train)
    actor = _actor(values, None)
    assert actor.reset_config({"trial": "tiny"})
    assert saved.is_set()
    actor.cleanup()


def test_a_finished_run_tells_the_race_how_it_went(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _begin(values, "tiny", is_finished=True)
    monkeypatch.setattr(trials, "read_history", lambda run, names: {RECALL: [(16, 0.1), (32, 0.2)]})
    actor = _actor(values, RECALL, is_over=True)
    assert [actor.step()["samples"] for _ in range(2)] == [16, 32]
    assert actor.step()["done"]


def test_the_watcher_tells_stopped_from_finished_from_failed(values: dict[str, Any]) -> None:
    config = parse_config(values, "tiny")
    tasks = {name: trials._Task(config=config, is_over=name == "old") for name in
             ("old", "good", "slow", "bad", "lost")}  # fmt: skip
    said: list[str] = []
    stopped: list[str] = []
    watcher = trials._Watcher(tasks, said.append, stopped.append)

    def trial(name: str, **result: Any) -> Any:
        return SimpleNamespace(config={"trial": name}, last_result=result, get_error=lambda: None)

    watcher.on_trial_start(0, [], trial("old"))
    watcher.on_trial_start(0, [], trial("good"))
    watcher.on_trial_complete(0, [], trial("old", samples=8))
    watcher.on_trial_complete(0, [], trial("good", failure=""))
    watcher.on_trial_complete(0, [], trial("slow", samples=1024))
    watcher.on_trial_complete(0, [], trial("bad", failure="no disk"))
    watcher.on_trial_error(0, [], trial("lost"))
    assert stopped == ["slow"]
    assert watcher.failures == {"bad": "no disk", "lost": "its driver was lost"}
    assert said == [
        "good begins",
        "good is finished (2 of 5)",
        "slow is stopped early, at 1,024 samples (3 of 5)",
        "bad failed: no disk (4 of 5)",
        "lost failed: its driver was lost (5 of 5)",
    ]


def test_as_many_at_a_time_as_there_is_room_for(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = _plan(values)
    (one, two) = planned.trials
    cluster = one.config.cluster
    need = cluster.max_workers * cluster.cpus_per_worker + cluster.ingest_cpus
    for cpus, room in ((need / 2, 1), (need, 1), (3 * need, 3)):
        monkeypatch.setattr(trials.ray, "cluster_resources", lambda cpus=cpus: {"CPU": cpus})
        assert trials._room([one, two]) == room
    gpus = cluster.model_copy(update={"gpus_per_worker": 1})
    large = replace(two, config=two.config.model_copy(update={"cluster": gpus}))
    monkeypatch.setattr(trials.ray, "cluster_resources", lambda: {"CPU": 9 * need, "GPU": 2})
    assert trials._room([one, large]) == 2
