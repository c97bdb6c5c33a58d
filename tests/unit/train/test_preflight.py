import os
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import Config, flatten
from pipeline.data.rows import BadRow
from pipeline.errors import UserError
from pipeline.train.preflight import Prepared, lacking_resources, prepare
from pipeline.train.store import RunFolder, RunRecord, changed_keys, find_run
from tests.tiny import tiny_config, tiny_tokenizer
from tests.tiny_data import LABELS, write_pairs

DEAD = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _no_ray_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Values of `data`: 64 rows to train on, 12 to evaluate on."""
    folder = tmp_path_factory.mktemp("pairs")
    train = write_pairs(folder / "train", 64, shards=2)
    return {"train": str(train), "val": str(write_pairs(folder / "val", 12))}


def _config(pairs: dict[str, str], tmp_path: Path, **sections: dict) -> Config:
    data = {**pairs, **sections.pop("data", {})}
    cluster = {"storage": str(tmp_path / "runs"), **sections.pop("cluster", {})}
    return tiny_config(data=data, cluster=cluster, **sections)


def _zero_shot(**task: str) -> dict:
    return {"zero_shot": [{"column": "shape", **task}]}


def _record(name: str = "tiny", *, is_finished: bool = False) -> RunRecord:
    return RunRecord(
        name=name,
        config=tiny_config().model_dump(mode="json"),
        tokenizer=tiny_tokenizer(),
        data_digest="0123456789ab",
        mlflow_uri="sqlite:////a/mlflow.db",
        mlflow_run_id="abc",
        is_finished=is_finished,
    )


def test_a_good_config_is_planned(pairs: dict[str, str], tmp_path: Path) -> None:
    prepared = prepare(_config(pairs, tmp_path, train={"global_batch": 8, "samples": 100}))
    plan = prepared.plan
    assert (plan.train_rows, plan.val_rows) == (64, 12)
    assert (plan.steps, plan.samples, plan.local_batch) == (12, 96, 8)
    assert plan.vocab_size == prepared.tokenizer.vocab_size <= 300
    assert plan.num_parameters > plan.vocab_size * 16
    assert len(prepared.catalog.shards) == 2
    assert prepared.suite is not None
    assert prepared.suite.classes == ()
    assert not list((tmp_path / "runs").glob("*"))  # the probe leaves nothing behind


def test_no_evaluation_without_rows_for_it(pairs: dict[str, str], tmp_path: Path) -> None:
    prepared = prepare(_config(pairs, tmp_path, data={"val": None}))
    assert prepared.suite is None
    assert prepared.plan.val_rows == 0


def test_the_tokenizer_of_a_continued_run_is_kept(pairs: dict[str, str], tmp_path: Path) -> None:
    record = _record()
    prepared = prepare(_config(pairs, tmp_path), record)
    assert prepared.tokenizer is record.tokenizer
    assert prepared.began is None
    assert prepare(_config(pairs, tmp_path)).tokenizer != record.tokenizer


def test_a_continued_run_keeps_its_length_at_another_number_of_workers(
    pairs: dict[str, str], tmp_path: Path
) -> None:
    config = _config(pairs, tmp_path, train={"global_batch": 8, "samples": 100})
    prepared = prepare(_with_workers(config, 3), _record())
    assert prepared.began is not None
    assert (prepared.began.workers, prepared.began.samples) == (1, 96)
    assert (prepared.plan.workers, prepared.plan.global_batch) == (3, 9)
    assert prepared.plan.samples == 96
    assert prepared.config.loss.virtual_batch == 8


def _with_workers(config: Config, workers: int) -> Config:
    cluster = {"workers": workers, "cpus_per_worker": 0.1, "ingest_cpus": 1}
    return config.model_copy(update={"cluster": config.cluster.model_copy(update=cluster)})


def _classes(prepared: Prepared) -> tuple[tuple[str, ...], ...]:
    assert prepared.suite is not None
    return prepared.suite.classes


def test_classes_come_from_the_column_or_from_a_file(pairs: dict[str, str], tmp_path: Path) -> None:
    found = prepare(_config(pairs, tmp_path, evaluate=_zero_shot()))
    assert _classes(found) == (("circle", "cross", "star"),)
    file = tmp_path / "classes.txt"
    file.write_text("star\n\n square \ncross\ncircle\n")
    given = prepare(_config(pairs, tmp_path, evaluate=_zero_shot(classes=str(file))))
    assert _classes(given) == (("star", "square", "cross", "circle"),)


def test_a_class_file_must_list_every_label(pairs: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("circle\nsquare\n")
    with pytest.raises(
        UserError, match=r"zero_shot.0.classes: column 'shape' .* holds \['cross', 'star'\], which"
    ):
        prepare(_config(pairs, tmp_path, evaluate=_zero_shot(classes=str(file))))
    with pytest.raises(
        UserError, match=r"zero_shot.0.classes: cannot read .*none.txt as UTF-8 text \("
    ):
        prepare(_config(pairs, tmp_path, evaluate=_zero_shot(classes=str(tmp_path / "none.txt"))))


def test_one_class_is_no_classification(pairs: dict[str, str], tmp_path: Path) -> None:
    val = write_pairs(tmp_path / "val", 4, shape=[LABELS[0]] * 4)
    with pytest.raises(UserError, match=r"has 1 class\(es\); classification needs two or more"):
        prepare(_config(pairs, tmp_path, data={"val": str(val)}, evaluate=_zero_shot()))


def _probe(**task: object) -> dict:
    return {"linear_probe": [{"column": "shape", **task}]}


def _probed(prepared: Prepared) -> dict[str, tuple[int, int]]:
    """Of each set of a probe, by its role, the rows that are there and the most that are used."""
    assert prepared.suite is not None
    found = prepared.suite.probed.items()
    return {rows.role: (each.catalog.num_rows, each.max_rows) for rows, each in found}


def test_a_probe_uses_all_its_rows_and_of_data_val_what_is_measured(
    pairs: dict[str, str], tmp_path: Path
) -> None:
    probe = _probe(train=pairs["train"])
    found = prepare(_config(pairs, tmp_path, evaluate={**probe, "max_rows": 5}))
    assert _probed(found) == {"train": (64, 64), "val": (12, 5)}
    other = str(write_pairs(tmp_path / "other", 9))
    probe = _probe(train=pairs["train"], test=other)
    found = prepare(_config(pairs, tmp_path, evaluate={**probe, "max_rows": 5}))
    assert _probed(found) == {"train": (64, 64), "test": (9, 9)}


def test_a_probe_takes_its_parts_of_one_folder(pairs: dict[str, str], tmp_path: Path) -> None:
    split = ["train"] * 20 + ["val"] * 6 + ["test"] * 4
    path = str(write_pairs(tmp_path / "all", 30, split=split))
    found = prepare(_config(pairs, tmp_path, data={"val": path}, evaluate=_probe(train=path)))
    assert _probed(found) == {"train": (20, 20), "val": (6, 10_000)}
    probe = _probe(train=path, test=path)
    assert _probed(prepare(_config(pairs, tmp_path, evaluate=probe))) == {
        "train": (20, 20),
        "test": (4, 4),
    }
    alone = write_pairs(Path(path), 8, split=["test"] * 8) / "part-0.parquet"  # no row for training
    write_pairs(tmp_path / "more", 9, split=["train"] * 9)
    (tmp_path / "more" / "part-0.parquet").rename(Path(path) / "part-1.parquet")
    probe = _probe(train=path, test=str(alone))
    assert _probed(prepare(_config(pairs, tmp_path, evaluate=probe))) == {
        "train": (9, 9),
        "test": (8, 8),
    }


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"train": "VAL"}, r"linear_probe.0: it would be tested on rows that it is fitted to, th"),
        ({"train": "VAL/*.parquet"}, "tested on rows that it is fitted to"),
        ({"train": "VAL/part-0.parquet"}, "tested on rows that it is fitted to"),
        ({"train": "TRAIN", "test": "TRAIN"}, "tested on rows that it is fitted to"),
        ({"train": "SPLIT", "train_split": "all", "test": "SPLIT"}, "tested on rows that it is"),
        ({"train": "SPLIT", "test": "SPLIT", "test_split": "train"}, "tested on rows that it is"),
        ({"train": "SPLIT", "test": "SPLIT", "test_split": "odd"},
         r"linear_probe.0.test_split: is odd; column 'split' holds \['test', 'train', 'val'\]"),
        ({"train": "ONE"}, r"probe.0: of column 'shape' there are 8 rows of 1 label\(s\) to fit"),
        ({"train": "TRAIN", "shots": [5, 1]}, "there are 64 rows of 3 .* 3 of them at the fewest"),
        ({"train": "OTHERS"}, r"12 of 3 to test on, with 0 label\(s\) in both; two labels, 5 rows"),
    ],
)  # fmt: skip
def test_a_probe_that_says_nothing_is_refused_first(
    pairs: dict[str, str], tmp_path: Path, task: dict, said: str
) -> None:
    split = ["train"] * 20 + ["val"] * 6 + ["test"] * 4
    sets = {
        "TRAIN": pairs["train"],
        "VAL": pairs["val"],
        "SPLIT": str(write_pairs(tmp_path / "all", 30, split=split)),
        "ONE": str(write_pairs(tmp_path / "one", 8, shape=["star"] * 8)),
        "OTHERS": str(write_pairs(tmp_path / "others", 8, shape=["a", "b"] * 4)),
    }
    named = {
        key: re.sub("[A-Z]+", lambda found: sets[found[0]], value)
        if key in {"train", "test"}
        else value
        for key, value in task.items()
    }
    with pytest.raises(UserError, match=said):
        prepare(_config(pairs, tmp_path, evaluate=_probe(**named)))


def test_an_empty_label_is_no_class(pairs: dict[str, str], tmp_path: Path) -> None:
    shape = ["star", "", "cross", None] * 3
    val = str(write_pairs(tmp_path / "val", 12, shape=shape))
    found = prepare(_config(pairs, tmp_path, data={"val": val}, evaluate=_zero_shot()))
    assert _classes(found) == (("cross", "star"),)


def test_every_problem_is_told_at_once(pairs: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    cpus = os.cpu_count() or 1
    config = _config(
        pairs,
        tmp_path,
        data={"train": str(tmp_path / "none")},
        tracking={"uri": DEAD},
        cluster={"workers": 2 * cpus, "storage": str(tmp_path / "file" / "runs")},
        train={"global_batch": 4 * cpus},
    )
    with pytest.raises(UserError) as caught:
        prepare(config)
    text = str(caught.value)
    assert text.startswith("This run cannot start: 4 problems\n")
    assert f". cluster.workers: {2 * cpus} workers at 1 CPUs take {2 * cpus} of {cpus} " in text
    assert f". cluster.storage: cannot write to {tmp_path}/file/runs/tiny (" in text
    assert f". tracking.uri: no MLflow server answers at {DEAD} (" in text
    assert f". data.train: {tmp_path}/none does not exist" in text


def test_contradictions_and_data_are_told_together(pairs: dict[str, str], tmp_path: Path) -> None:
    config = _config(
        pairs, tmp_path, data={"val": str(tmp_path / "none")}, engine={"micro_batch": 3}
    )
    with pytest.raises(UserError, match=r"(?s)2 problems.*engine.micro_batch: is 3.*data.val: "):
        prepare(config)


def test_more_workers_than_cpus_and_none_left_for_data() -> None:
    config = tiny_config(cluster={"workers": 4}, train={"global_batch": 8})
    assert lacking_resources(config, cpus=5, gpus=0) == []
    for cpus in (4, 3):
        (problem,) = lacking_resources(config, cpus=cpus, gpus=0)
        assert str(problem).startswith(
            f"cluster.workers: 4 workers at 1 CPUs take 4 of {cpus} CPUs and leave fewer than "
            "cluster.ingest_cpus 1"
        )
    shares = tiny_config(cluster={"workers": 4, "cpus_per_worker": 0.5, "ingest_cpus": 2})
    assert lacking_resources(shares, cpus=4, gpus=0) == []
    assert len(lacking_resources(shares, cpus=3, gpus=0)) == 1


def test_workers_need_a_gpu_each_when_they_ask_for_it() -> None:
    config = tiny_config(cluster={"workers": 2, "gpus_per_worker": 1})
    assert lacking_resources(config, cpus=8, gpus=2) == []
    (problem,) = lacking_resources(config, cpus=8, gpus=1)
    assert "2 workers need as many GPUs; 1 found" in str(problem)


@pytest.mark.parametrize("where", ["RAY_ADDRESS", "address"])
def test_another_machine_is_not_measured_by_this_one(
    pairs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    workers = 2 * (os.cpu_count() or 1)
    cluster = {"workers": workers, "address": "auto" if where == "address" else "local"}
    if where == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    data = {"train": str(write_pairs(tmp_path / "train", 2 * workers))}
    config = _config(
        pairs, tmp_path, data=data, cluster=cluster, train={"global_batch": 2 * workers}
    )
    assert prepare(config).plan.workers == workers


def test_a_batch_larger_than_the_data(pairs: dict[str, str], tmp_path: Path) -> None:
    config = _config(pairs, tmp_path, train={"global_batch": 65, "samples": 130})
    with pytest.raises(UserError, match=r"train.global_batch: is 65, more than the 64 rows of"):
        prepare(config)
    assert prepare(_config(pairs, tmp_path, train={"global_batch": 64})).plan.steps == 1


def test_captions_without_text(pairs: dict[str, str], tmp_path: Path) -> None:
    train = write_pairs(tmp_path / "train", 8, caption=["", None] * 4)
    with pytest.raises(UserError, match=r"data.train: the caption column of .* holds no text"):
        prepare(_config(pairs, tmp_path, data={"train": str(train)}))


def test_a_tokenizer_is_trained_on_cleaned_captions(tmp_path: Path) -> None:
    found = write_pairs(tmp_path / "found", 4, caption=["<b>schÃ¶n</b>", "a &amp; b", "<br>", "c"])
    meant = write_pairs(tmp_path / "meant", 4, caption=["schön", "a & b", "", "c"])
    tokenizers = [
        prepare(
            _config(
                {"train": str(folder)}, tmp_path, data={"clean_captions": is_clean},
                train={"global_batch": 2, "samples": 4},
            )
        ).tokenizer
        for folder, is_clean in ((found, True), (meant, False), (found, False))
    ]  # fmt: skip
    assert tokenizers[0] == tokenizers[1] != tokenizers[2]


@pytest.mark.parametrize(("warmup", "is_told"), [(33, False), (40, True)])
def test_a_warm_up_that_fills_the_run_is_told_of(
    warmup: int, is_told: bool, pairs: dict[str, str], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    train, optim = {"global_batch": 4, "samples": 100}, {"warmup_samples": warmup}
    prepare(_config(pairs, tmp_path, train=train, optim=optim))
    assert (f"is {warmup} of the run's 100 samples" in caplog.text) == is_told


@pytest.mark.parametrize(("different", "is_told"), [(3, True), (64, False)])
def test_captions_that_are_labels_are_told_of(
    different: int, is_told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_pairs(tmp_path / "labels", 64)
    path = next(folder.glob("*.parquet"))
    table = pq.read_table(path)
    captions = pa.array([f"caption {row % different}" for row in range(64)])
    place = table.schema.get_field_index("caption")
    pq.write_table(table.set_column(place, "caption", captions), path)
    prepare(_config({"train": str(folder), "val": str(folder)}, tmp_path))
    assert ("64 captions of evaluation rows, 3 different" in caplog.text) == is_told


def test_as_many_labels_as_are_allowed_and_one_more(pairs: dict[str, str], tmp_path: Path) -> None:
    fusion = {"kind": "fusion", "fusion": {"layers": 1}}

    def planned(most: int) -> Prepared:
        task = {"kind": "classification", "answer_column": "shape", "max_answers": most}
        return prepare(_config(pairs, tmp_path, model=fusion, task=task))

    asked = planned(len(LABELS)).asked
    assert asked is not None
    assert set(asked.answers.names) == set(LABELS)
    with pytest.raises(UserError, match=rf"{len(LABELS)} different labels, more than task.max_ans"):
        planned(len(LABELS) - 1)


def test_synonyms_that_cannot_be_read(pairs: dict[str, str], tmp_path: Path) -> None:
    config = _config(pairs, tmp_path, data={"synonyms": str(tmp_path / "none.txt")})
    with pytest.raises(UserError, match=r"1\. data\.synonyms: cannot read .*none\.txt"):
        prepare(config)


def test_a_given_column_of_the_wrong_type_is_told_under_its_own_key(
    pairs: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"\d\. data.image_column: 'caption' holds text.*'a circle"):
        prepare(_config(pairs, tmp_path, data={"image_column": "caption"}))


def test_trackers_that_cannot_be_used(pairs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracking.uri: 'mlruns' is no tracker; give embedded, "):
        prepare(_config(pairs, tmp_path, tracking={"uri": "mlruns"}))
    storage = (tmp_path / "runs").as_uri()
    with pytest.raises(UserError, match=r"tracking.uri: embedded needs local storage, .* file://"):
        prepare(_config(pairs, tmp_path, cluster={"storage": storage}))
    apart = {"tracking": {"uri": f"sqlite:///{tmp_path}/a.db"}, "cluster": {"storage": storage}}
    assert prepare(_config(pairs, tmp_path, **apart)).plan.steps == 8


def test_a_folder_in_use_survives_the_probe(tmp_path: Path) -> None:
    folder = RunFolder.of(str(tmp_path), "tiny")
    folder.write_record(_record())
    folder.check_writable()
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == ["run.json"]


def test_record_round_trip(tmp_path: Path) -> None:
    folder = RunFolder.of(str(tmp_path / "runs"), "tiny")
    assert folder.read_record() is None
    folder.write_record(_record())
    assert folder.read_record() == _record()
    assert (tmp_path / "runs/tiny/run.json").is_file()
    folder.write_record(replace(_record(), is_finished=True))
    assert RunFolder.of(str(tmp_path / "runs"), "tiny").read_record() == _record(is_finished=True)


def test_a_finished_run_keeps_its_folder_and_the_next_gets_a_number(tmp_path: Path) -> None:
    def found() -> tuple[str, bool]:
        folder, record = find_run(str(tmp_path), "tiny")
        return Path(folder.path).name, record is not None

    assert found() == ("tiny", False)
    for name, following in (("tiny", "tiny-2"), ("tiny-2", "tiny-3")):
        folder = RunFolder.of(str(tmp_path), name)
        folder.write_record(_record(name))
        assert found() == (name, True)
        folder.write_record(_record(name, is_finished=True))
        assert found() == (following, False)


def test_a_folder_without_a_record_is_used(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    assert find_run(str(tmp_path), "tiny")[1] is None


def test_changed_keys_names_what_makes_another_run() -> None:
    before = flatten(tiny_config())
    free = tiny_config(
        cluster={"workers": 2, "storage": "/elsewhere"},
        tracking={"uri": DEAD},
        evaluate={"max_rows": 5},
        data={"val": "there", "max_bad_fraction": 0.1},
        train={"log_every": 3, "checkpoint_every": 7, "keep": 9, "max_nonfinite": 1},
    )
    assert changed_keys(before, flatten(free.model_copy(update={"name": "other"}))) == []
    other = tiny_config(optim={"lr": 0.1}, train={"seed": 4}, data={"train": "there"})
    changes = changed_keys(before, flatten(other))
    assert changes[0].startswith("data.train was '")
    assert changes[1:] == ["optim.lr was 0.0005, is now 0.1", "train.seed was 0, is now 4"]
    assert changed_keys({"a": 1}, {"b": 2}) == ["a was 1, is now None", "b was None, is now 2"]


def test_quarantine_gives_every_row_once_and_in_order(tmp_path: Path) -> None:
    def bad(row: int, path: str = "/a.parquet") -> BadRow:
        return BadRow(path=path, row_group=0, row=row, reason="corrupt_image")

    folder = RunFolder.of(str(tmp_path), "tiny")
    assert folder.read_quarantine() == []
    folder.write_quarantine("step-1-0", [])
    assert not (tmp_path / "tiny").exists()
    folder.write_quarantine("step-1-0", [bad(9), bad(2)])
    folder.write_quarantine("step-1-1", [bad(1, "/b.parquet")])
    folder.write_quarantine("step-2-0", [bad(2), bad(5)])
    assert folder.read_quarantine() == [bad(2), bad(5), bad(9), bad(1, "/b.parquet")]


def test_checkpoints_are_whole_and_in_order(tmp_path: Path) -> None:
    folder = RunFolder.of(str(tmp_path), "tiny")
    assert folder.checkpoints() == []
    for name in ("step-00000100", "step-00000020", "other"):
        (tmp_path / "tiny" / name).mkdir(parents=True)
        (tmp_path / "tiny" / name / "manifest.json").write_text("{}")
    (tmp_path / "tiny" / "step-00000300").mkdir()  # sending was cut off
    (tmp_path / "tiny" / "step-00000900").write_text("a file")
    assert folder.checkpoints() == ["step-00000020", "step-00000100"]
    assert folder.attempted() == ["step-00000020", "step-00000100", "step-00000300"]
