from pipeline.compare.group import config_of, differing, group_runs
from tests.unit.compare.runs import tracked


def test_a_config_is_what_neither_seed_nor_name_nor_place_changes() -> None:
    run = tracked(
        "a",
        1,
        loss__kind="gamma",
        tracking__uri="embedded",
        cluster__storage="/runs",
        cluster__workers=2,
        names__x=1,
        tags={"gammaray.data_digest": "abc"},
    )
    assert config_of(run) == {
        "loss.kind": "gamma",
        "cluster.workers": "2",
        "names.x": "1",
        "data.digest": "abc",
    }


def test_runs_that_differ_in_the_seed_alone_are_one_group() -> None:
    runs = [
        tracked(f"{loss}-{seed}", seed, loss__kind=loss, optim__lr=0.1)
        for seed in range(3)
        for loss in ("gamma", "sigmoid_local")
    ]
    first, second = group_runs(runs)
    assert (first.title, second.title) == ("A: loss.kind=gamma", "B: loss.kind=sigmoid_local")
    assert [run.name for run in first.runs] == ["gamma-0", "gamma-1", "gamma-2"]
    assert [run.params["train.seed"] for run in second.runs] == ["0", "1", "2"]


def test_data_that_changed_under_its_path_makes_another_group() -> None:
    runs = [tracked(d, data__train="/d", tags={"gammaray.data_digest": d}) for d in ("aa", "bb")]
    assert [group.what for group in group_runs(runs)] == ["data.digest=aa", "data.digest=bb"]


def test_what_differs_begins_with_what_shapes_the_training() -> None:
    configs = [
        {"cluster.workers": "1", "train.global_batch": "8", "loss.kind": "a", "same": "1"},
        {"cluster.workers": "2", "train.global_batch": "9", "loss.kind": "b", "same": "1"},
        {"cluster.workers": "2", "train.global_batch": "9", "loss.kind": "b", "same": "1",
         "loss.new": "1"},
    ]  # fmt: skip
    assert differing(configs) == ["loss.kind", "loss.new", "train.global_batch", "cluster.workers"]
    assert differing(configs[:1]) == []


def test_names_of_groups_stay_short() -> None:
    runs = [
        tracked(str(n), a__a=n, b__b=n, c__c=n, d__d=n, data__train=f"/long/way/{'x' * 40}/{n}")
        for n in range(28)
    ]
    groups = group_runs(runs)
    assert groups[3].what == f"data.train=...{'x' * 23}/3, a.a=3, b.b=3 and 2 more"
    assert [groups[n].label for n in (0, 25, 26, 27)] == ["A", "Z", "AA", "AB"]
    assert group_runs(runs[:1])[0].what == "one config"


def test_names_tell_groups_apart_by_what_differs_between_all_of_them() -> None:
    runs = [
        tracked(str(n), loss__a=n > 0, loss__b=n > 0, loss__c=n > 0, optim__lr=n) for n in range(3)
    ]
    whats = [group.what for group in group_runs(runs)]
    assert whats[1] == "loss.a=True, loss.b=True, optim.lr=1 and 1 more"
    assert len(set(whats)) == 3
