"""What a sweep runs, what it refuses, and how its runs tell Tune of themselves."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.load import parse_config
from pipeline.config.space import make_variants, read_axes
from pipeline.errors import UserError
from pipeline.tracking import search, tracker
from pipeline.train import driver, sweep, trials
from pipeline.train.lease import Lease
from pipeline.train.loop import Wish
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
    assert "tiny-kind_gamma-global_batch_minus1-embed_dim_16 (and 3 more): train.global" in text
    assert "no_such" in text


def test_a_sign_stays_in_a_name() -> None:
    variants = make_variants("s", read_axes(["a.b=1,-1,[-1, 2],[1, 2],1.0e-5,x-1"]))
    names = [variant.name for variant in variants]
    assert names == ["s-b_1", "s-b_minus1", "s-b_minus1-2", "s-b_1-2", "s-b_1e-05", "s-b_x-1"]


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
    for damaged in (b"{}", b"\xff", b"[1"):
        Path(folder.path, "sweep.json").write_bytes(damaged)
        with pytest.raises(UserError, match="not a sweep's record"):
            _plan(values)


def test_what_a_run_is_told_does_not_depend_on_where_it_is(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values["tracking"] = {"uri": "sqlite:///books.db"}
    values["evaluate"] = {"zero_shot": [{"column": "label", "classes": "classes.txt"}]}
    config = parse_config(values, "tiny")
    assert config.tracking.uri == f"sqlite:///{tmp_path}/books.db"
    assert config.evaluate.zero_shot[0].classes == f"{tmp_path}/classes.txt"


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

    def __call__(
        self, asked: list[Trial], *, stop: Any, is_lost: Any, **rest: Any
    ) -> dict[str, str]:
        self.asked.append([trial.name for trial in asked])
        assert not is_lost()
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


def test_runs_are_looked_for_where_the_tracker_is_now(
    values: dict[str, Any], fake: _Trials, tmp_path: Path
) -> None:
    fake.finish = {"tiny-seed_0", "tiny-seed_1"}
    _run(_plan(values), tmp_path)
    moved = tmp_path / "moved.db"
    (tmp_path / "runs" / "mlflow.db").rename(moved)
    values["tracking"] = {"uri": f"sqlite:///{moved}"}
    ended = _run(_plan(values), tmp_path)
    assert {run.uri for run in (ended.run, *ended.runs)} == {f"sqlite:///{moved}"}


def test_a_sweep_that_another_driver_has_is_left_to_it(
    values: dict[str, Any], fake: _Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Any] = []
    monkeypatch.setattr(tracker, "close_run", lambda *given: closed.append(given))

    def lose(asked: Any, *, is_lost: Any, **rest: Any) -> dict[str, str]:
        assert not is_lost()
        leases[0].is_lost = True
        assert is_lost()
        return {}

    leases: list[Lease] = []
    monkeypatch.setattr(Lease, "renew", lambda lease: leases.append(lease))
    monkeypatch.setattr(sweep, "run_trials", lose)
    with pytest.raises(UserError, match="tiny: another driver has taken this sweep over; leave"):
        _run(_plan(values), tmp_path)
    assert not closed, "its run in MLflow is the other's"


class _Board:
    """Stands for the board of a sweep."""

    def __init__(self) -> None:
        self.wished = Wish.NONE

    def wish(self) -> Wish:
        return self.wished


def _actor(
    values: dict[str, Any],
    metric: str | None,
    *,
    is_over: bool = False,
    board: _Board | None = None,
) -> Any:
    actor = object.__new__(trials._Run)
    config = parse_config(values, "tiny")
    task = trials._Task(config=config, is_over=is_over)
    given = {"tasks": {"tiny": task}, "parent": "the parent", "metric": metric}
    given |= {"log_folder": Path("logs"), "board": board or _Board()}
    actor.setup({"trial": "tiny"}, **given)
    return actor


def test_a_run_tells_of_its_evaluations_and_its_end(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tags: list[Any] = []
    monkeypatch.setattr(tracker, "set_tags", lambda *given: tags.append(given))

    def train(config: Any, listen: Any, log_path: Path, **rest: Any) -> None:
        plan = SimpleNamespace(global_batch=8, samples=50)
        name = RECALL.removeprefix("eval/")
        assert not tags, "a run that is killed before it is recorded is nobody's child"
        _begin(values, "tiny", is_finished=False)
        listen({"kind": "started", "step": 3, "samples": 24, "plan": plan})
        listen({"kind": "evaluation", "step": 5, "metrics": {name: 0.5}})
        listen({"kind": "evaluation", "step": 6, "metrics": {name: 0.4}})

    monkeypatch.setattr(driver, "train", train)
    actor = _actor(values, RECALL)
    assert actor.step() == {"samples": 40, RECALL: 0.5}
    ended = {"samples": 48, RECALL: 0.4, "done": True, "failure": ""}
    assert actor.step() == ended, "the last one comes with the end"
    ((run, given),) = tags
    assert (run.run_id, given) == ("abc", {"mlflow.parentRunId": "the parent"})


def test_a_run_says_again_and_again_where_it_is(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """160 of 800 samples in 80 s: the other 640 take 320 s more."""
    seconds = [100.0]
    is_seen, may_end = threading.Event(), threading.Event()

    def train(config: Any, listen: Any, log_path: Path, **rest: Any) -> None:
        plan = SimpleNamespace(global_batch=8, samples=8_000)
        _begin(values, "tiny", is_finished=False)
        listen({"kind": "started", "step": 900, "samples": 7_200, "plan": plan})
        seconds[0] += 80
        point = {"train/samples_per_s": 2345.6}
        listen({"kind": "step", "step": 920, "samples": 7_360, "metrics": point})
        is_seen.set()
        assert may_end.wait(10)
        listen({"kind": "evaluation", "step": 1000, "metrics": {RECALL.removeprefix("eval/"): 0.4}})

    monkeypatch.setattr(driver, "train", train)
    monkeypatch.setattr(tracker, "set_tags", lambda *_: None)
    monkeypatch.setattr(trials, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(trials, "time", SimpleNamespace(
        monotonic=lambda: seconds[0], strftime=lambda _: "now"))  # fmt: skip
    actor = _actor(values, RECALL)
    assert is_seen.wait(10)
    line = {"progress": "step 920/1,000, 2,346 samples/s, ETA 0:05:20"}
    assert actor.step() == line, "and no metric, which would count in the race"
    threading.Timer(0.1, may_end.set).start()
    assert "done" in actor.step(), "not before another minute is over"


def test_a_run_whose_workers_still_start_says_so(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun, may_end = threading.Event(), threading.Event()

    def train(config: Any, listen: Any, log_path: Path, **rest: Any) -> None:
        listen({"kind": "phase", "text": "Starting 2 worker(s)"})
        has_begun.set()
        assert may_end.wait(10)

    monkeypatch.setattr(driver, "train", train)
    monkeypatch.setattr(trials, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(trials, "LINE_SECONDS", 0.0)
    actor = _actor(values, None)
    assert has_begun.wait(10)
    assert actor.step() == {"progress": "Starting 2 worker(s)"}
    may_end.set()


def test_a_metric_that_does_not_come_is_told_of_with_those_that_do(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: Any, listen: Any, log_path: Path, **rest: Any) -> None:
        listen({"kind": "evaluation", "step": 5, "metrics": {"a/accuracy": 0.5, "rows": 20.0}})

    monkeypatch.setattr(driver, "train", train)
    actor = _actor(values, RECALL)
    (warning,) = actor.step().values()
    assert warning.startswith(f"--asha: the evaluation has no {RECALL}, so the run is not stopped")
    assert "it has eval/a/accuracy: interrupt" in warning
    assert actor.step() == {"done": True, "failure": ""}


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


def test_a_wish_to_end_has_a_run_save_and_no_other_begin(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = threading.Event()
    begun: list[str] = []

    def train(config: Any, *_: Any, stop: threading.Event, **rest: Any) -> None:
        begun.append(config.name)
        assert stop.wait(10)
        saved.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "train", train)
    monkeypatch.setattr(trials, "POLL_SECONDS", 0.01)
    board = _Board()
    actor = _actor(values, None, board=board)
    board.wished = Wish.STOP
    assert actor.step() == {"done": True, "failure": trials.INTERRUPTED}
    assert saved.is_set()
    assert actor.reset_config({"trial": "tiny"})
    assert actor.step() == {"done": True, "failure": trials.INTERRUPTED}
    assert begun == ["tiny"]


def test_a_history_that_cannot_be_read_is_a_failure_with_a_remedy(values: dict[str, Any]) -> None:
    folder = _begin(values, "tiny", is_finished=True)
    Path(values["cluster"]["storage"], "mlflow.db").write_text("no database")
    failure = _actor(values, RECALL, is_over=True).step()["failure"]
    assert f"mlflow.db: cannot read {RECALL} of run abc (" in failure
    assert "; mend the tracker, or sweep without --asha" in failure
    folder.write_text("run.json", "{")
    assert "not a run's record" in _actor(values, None).step()["failure"]


def test_a_finished_run_tells_the_race_how_it_went(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _begin(values, "tiny", is_finished=True)
    points = {RECALL: [(16, 0.1), (32, 0.2)]}
    monkeypatch.setattr(tracker, "read_history", lambda run, names: points)
    actor = _actor(values, RECALL, is_over=True)
    assert [actor.step()["samples"] for _ in range(2)] == [16, 32]
    assert actor.step()["done"]


def test_the_watcher_tells_stopped_from_finished_from_failed(values: dict[str, Any]) -> None:
    config = parse_config(values, "tiny")
    tasks = {name: trials._Task(config=config, is_over=name == "old") for name in
             ("old", "good", "slow", "bad", "late", "lost")}  # fmt: skip
    said: list[str] = []
    stopped: list[str] = []
    watcher = trials._Watcher(tasks, said.append, stopped.append, lambda: None, lambda: None)

    watcher.on_trial_start(0, [], _trial("old"))
    watcher.on_trial_start(0, [], _trial("good"))
    for name in ("good", "slow"):
        watcher.on_trial_result(0, [], _trial(name), {"warning": "no such metric"})
        watcher.on_trial_result(0, [], _trial(name), {"progress": "step 1/4"})
    watcher.on_trial_complete(0, [], _trial("old", samples=8, failure="no points"))
    watcher.on_trial_complete(0, [], _trial("good", failure=""))
    watcher.on_trial_complete(0, [], _trial("slow", samples=1024))
    watcher.on_trial_complete(0, [], _trial("bad", failure="no disk"))
    watcher.on_trial_complete(0, [], _trial("late", failure=trials.INTERRUPTED))
    watcher.on_trial_error(0, [], _trial("lost"))
    assert stopped == ["slow"]
    assert watcher.failures == {"bad": "no disk", "lost": "its driver was lost"}
    assert said == [
        "good begins",
        "good: no such metric",
        "good: step 1/4",
        "slow: step 1/4",
        "old takes no part in the race: no points",
        "good is finished (2 of 6)",
        "slow is stopped early, at 1,024 samples (3 of 6)",
        "bad failed: no disk (4 of 6)",
        "late is stopped; the same command goes on with it",
        "lost failed: its driver was lost (5 of 6)",
    ]


def _trial(name: str, actor: Any = None, **result: Any) -> Any:
    """Stands for one of Ray Tune's, that has ended."""
    return SimpleNamespace(
        config={"trial": name},
        last_result=result,
        get_error=lambda: None,
        is_finished=lambda: True,
        temporary_state=SimpleNamespace(ray_actor=actor),
    )


def test_those_that_save_are_waited_for_at_the_end(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[Any] = []

    def wait(answers: list[Any], *, num_returns: int, timeout: float) -> None:
        assert (num_returns, timeout) == (len(answers), trials.STOP_SECONDS)
        waited.extend(answers)

    monkeypatch.setattr(trials.ray, "wait", wait)
    task = trials._Task(config=parse_config(values, "tiny"), is_over=False)
    watcher = trials._Watcher({"slow": task}, print, print, lambda: None, lambda: None)
    actor = SimpleNamespace(wait=SimpleNamespace(remote=lambda: "the answer"))
    slow = _trial("slow", actor, samples=8)
    watcher.on_trial_complete(0, [], slow)
    watcher.on_step_end(0, [SimpleNamespace(is_finished=lambda: False), slow])
    assert not waited, "others run"
    watcher.on_step_end(0, [slow])
    assert waited == ["the answer"]


def test_an_end_is_asked_for_once() -> None:
    why: list[str] = []
    asked: list[str] = []
    watcher = trials._Watcher({}, asked.append, print, lambda: why[0] if why else None,
                              lambda: asked.append("end"))  # fmt: skip
    watcher.on_step_begin(0, [])
    why.append("enough")
    watcher.on_step_begin(0, [])
    watcher.on_step_begin(0, [])
    assert asked == ["enough", "end"]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_interrupts(kind: int) -> None:
    before = signal.getsignal(kind)
    heard: list[int] = []
    with trials._signals(heard):
        os.kill(os.getpid(), kind)
        assert heard == [kind]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), kind)
    assert signal.getsignal(kind) is before


def test_as_many_at_a_time_as_there_is_room_for(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = _plan(values)
    (cluster, other) = (trial.config.cluster for trial in planned.trials)
    need = cluster.max_workers * cluster.cpus_per_worker + cluster.ingest_cpus
    for cpus, room in ((need / 2, 1), (need, 1), (3 * need, 3)):
        monkeypatch.setattr(trials.ray, "cluster_resources", lambda cpus=cpus: {"CPU": cpus})
        assert trials._room([cluster, other]) == room
    large = other.model_copy(update={"gpus_per_worker": 1})
    monkeypatch.setattr(trials.ray, "cluster_resources", lambda: {"CPU": 9 * need, "GPU": 2})
    assert trials._room([cluster, large]) == 2


class _Group:
    """Stands for one of Ray's placement groups."""

    is_there = False

    def wait(self, seconds: float) -> bool:
        return self.is_there


def test_what_waits_for_room_has_the_cluster_make_it(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = _plan(values)
    cluster = planned.trials[0].config.cluster
    need = cluster.max_workers * cluster.cpus_per_worker + cluster.ingest_cpus
    has = {"CPU": need}
    asked: list[Any] = []
    removed: list[Any] = []
    group = _Group()
    monkeypatch.setattr(trials.ray, "cluster_resources", lambda: has)
    monkeypatch.setattr(
        trials, "placement_group", lambda bundles: (asked.append(bundles), group)[1]
    )
    monkeypatch.setattr(trials, "remove_placement_group", removed.append)
    waiting = trials._Waiting([cluster] * 3)
    waiting._trial_iter = iter([SimpleNamespace(trial_id=name) for name in "abc"])
    assert waiting.next_trial().trial_id == "a"
    assert [waiting.next_trial() for _ in range(3)] == [None] * 3
    (bundles,) = asked
    assert sum(bundle["CPU"] for bundle in bundles) == need
    group.is_there = True
    has["CPU"] = 2 * need
    assert waiting.next_trial().trial_id == "b", "the room is looked at anew"
    assert waiting.next_trial() is None
    assert removed == [group]
    monkeypatch.setattr(trials, "ROOM_SECONDS", 0.0)
    assert waiting.next_trial() is None
    assert len(asked) == 2
    waiting.on_trial_complete("a")
    assert removed == [group] * 2, "who saves at its end may need it, and Tune waits for that"
    assert waiting.next_trial().trial_id == "c"
    assert waiting.next_trial() is None
    assert len(asked) == 2
