"""What a sweep varies, as typed."""

import pytest

from pipeline.config.load import override_values
from pipeline.config.space import Axis, make_variants, read_axes
from pipeline.errors import UserError


def test_values_are_what_yaml_makes_of_them() -> None:
    axes = read_axes(["loss.kind=gamma, infonce_local", "optim.lr=1e-3,5.0e-4", "x.y=[1, 2],[3]"])
    assert axes == [
        Axis(key="loss.kind", values=("gamma", "infonce_local")),
        Axis(key="optim.lr", values=("1e-3", 0.0005)),
        Axis(key="x.y", values=([1, 2], [3])),
    ]


def test_variants_are_all_combinations_with_names_that_read() -> None:
    variants = make_variants(
        "losses", read_axes(["loss.kind=gamma,sigmoid_ring", "train.seed=0,1"])
    )
    assert [variant.name for variant in variants] == [
        "losses-kind_gamma-seed_0",
        "losses-kind_gamma-seed_1",
        "losses-kind_sigmoid-ring-seed_0",
        "losses-kind_sigmoid-ring-seed_1",
    ]
    values = override_values({"loss": {"kind": "x"}}, variants[3].overrides)
    assert values == {"loss": {"kind": "sigmoid_ring"}, "train": {"seed": 1}}


def test_an_override_gives_the_very_value() -> None:
    axes = read_axes(["a.b=1e-3,true,null,'1',[1, x]"])
    found = [override_values({}, each.overrides)["a"]["b"] for each in make_variants("s", axes)]
    assert found == [0.001, True, None, "1", [1, "x"]]


def test_keys_that_end_alike_are_named_whole() -> None:
    (variant,) = make_variants("s", read_axes(["model.image.width=8", "model.text.width=16"]))
    assert variant.name == "s-model.image.width_8-model.text.width_16"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], "--over: missing; say what to vary"),
        (["train.seed"], "has no values to take; write it as section.key=value,value"),
        (["train.seed="], "has no values to take"),
        (["=1,2"], "has no values to take"),
        (["train.seed=[1"], "has no values to take"),
        (["train.seed=1", "train.seed=2"], "train.seed is varied twice"),
        (["train.seed=1,1"], "has a value twice"),
        (["x.y=2026-01-01"], "has a value that no config takes"),
        (["name=a,b"], "name is one for all runs of a sweep"),
        (["tracking.uri=a,b"], "tracking.uri is one for all runs"),
        (["cluster.storage=a,b"], "cluster.storage is one for all runs"),
    ],
)
def test_refusals(asked: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"This sweep cannot start: 1 problem\n.*{message}"):
        read_axes(asked)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(UserError, match="2 problems"):
        read_axes(["name=a,b", "train.seed"])


def test_runs_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match=r"would both be called s-path_a-b; sweep one of them"):
        make_variants("s", read_axes(["data.path=a/b,a_b"]))
