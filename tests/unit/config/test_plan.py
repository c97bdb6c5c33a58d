from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.plan import Facts, Plan, find_contradictions, make_plan, resize
from pipeline.config.schema import Config, LossKind
from tests.tiny import CONV, FUSION, tiny_config

FACTS = Facts(
    train_rows=1000,
    epoch_rows=1000,
    row_groups=1,
    val_rows=100,
    vocab_size=300,
    num_parameters=10_000,
    embed_dim=16,
)


def _places(config) -> list[str]:
    return [problem.place for problem in find_contradictions(config)]


def test_batches_steps_and_traffic() -> None:
    config = tiny_config(
        train={"global_batch": 64, "samples": None, "epochs": 2},
        cluster={"workers": 4, "cpus_per_worker": 0.1},
        engine={"micro_batch": 8},
    )
    plan, problems = make_plan(config, FACTS)
    assert not problems
    assert (plan.local_batch, plan.micro_batch, plan.accumulation) == (16, 8, 2)
    assert (plan.steps, plan.samples) == (31, 31 * 64)
    assert plan.virtual_batch == 64
    assert plan.loss_bytes_per_step == 0
    # 2 modalities, forward and backward, 3 other workers' 16 rows of 16 fp32 values.
    assert plan.all_gather_bytes_per_step == 4 * 3 * 16 * 16 * 4


@pytest.mark.parametrize(
    ("kind", "one_sides", "bytes_a_row", "contrasted"),
    [
        ("gamma", 0, 0, 16),
        ("infonce_local", 0, 0, 4),
        ("infonce_gathered", 4, 0, 16),
        ("sigmoid_local", 0, 0, 4),
        ("sigmoid_ring", 2, 0, 16),
        ("fastclip_v1", 2, 16, 16),
        ("fastclip_v3", 2, 16, 16),
    ],
)
def test_what_each_loss_moves_and_contrasts(
    kind: str, one_sides: int, bytes_a_row: int, contrasted: int
) -> None:
    """Received from 3 workers: features or gradients of one side, and what comes with a row."""
    config = tiny_config(
        loss={"kind": kind, "rho": 1.0},
        train={"global_batch": 16},
        cluster={"workers": 4, "cpus_per_worker": 0.1},
    )
    assert not find_contradictions(config)
    plan, _ = make_plan(config, FACTS)
    assert plan.loss_bytes_per_step == 3 * 4 * (one_sides * 16 * 4 + bytes_a_row)
    assert plan.all_gather_bytes_per_step == 4 * 3 * 4 * 16 * 4
    assert (plan.loss_kind, plan.virtual_batch) == (kind, contrasted)
    text = " ".join(plan.sentences())
    assert ("targets a virtual batch of 16" in text) == (kind == "gamma")
    assert (f"{kind} contrasts {contrasted} pairs at once" in text) == (kind != "gamma")


@pytest.mark.parametrize(
    ("stage", "precision", "per_parameter"),
    [
        (0, "fp32", 4 + 4 + 8),
        (1, "fp32", 4 + 4 + 12 / 4),
        (2, "fp32", 4 + 4 / 4 + 12 / 4),
        (3, "fp32", 4 / 4 + 4 / 4 + 12 / 4),
        (0, "bf16", 2 + 2 + 12),
        (3, "bf16", 2 / 4 + 2 / 4 + 12 / 4),
    ],
)
def test_zero_memory(stage: int, precision: str, per_parameter: float) -> None:
    config = tiny_config(
        engine={"zero_stage": stage, "precision": precision}, cluster={"workers": 4}
    )
    plan, _ = make_plan(config, FACTS)
    assert plan.state_bytes == pytest.approx(per_parameter * FACTS.num_parameters)


def test_sentences_name_the_numbers() -> None:
    text = " ".join(make_plan(tiny_config(), FACTS)[0].sentences())
    for part in ("8 pairs a step", "virtual batch of 8", "8 steps", "10,000 parameters", "0 bytes"):
        assert part in text


@pytest.mark.parametrize(
    ("row_groups", "window", "advice"),
    [
        (10, 400, None),
        (10, 301, None),
        (10, 300, 400),
        (10, 50, 400),
        (3, 1000, None),
        (1, 5, None),
    ],
)
def test_a_window_of_few_row_groups_is_said(
    row_groups: int, window: int, advice: int | None
) -> None:
    config = tiny_config(data={"train": "nowhere", "shuffle_window": window})
    facts = replace(FACTS, row_groups=row_groups)
    sentence = make_plan(config, facts)[0].sentences()[1]
    assert sentence.startswith("Order: shuffled in windows of")
    assert ("data.shuffle_window=" in sentence) == (advice is not None)
    assert advice is None or f"data.shuffle_window={advice} " in sentence


def test_contradictions_are_all_found() -> None:
    config = tiny_config(
        engine={"micro_batch": 3},
        loss={"virtual_batch": 2},
        evaluate={"zero_shot": [{"column": "a"}, {"column": "a"}]},
    )
    assert _places(config) == [
        "engine.micro_batch",
        "loss.virtual_batch",
        "data.val",
        "evaluate.zero_shot",
    ]
    assert _places(tiny_config(cluster={"workers": 3})) == ["train.global_batch"]
    assert _places(tiny_config(engine={"micro_batch": 1})) == ["engine.micro_batch"]


@pytest.mark.parametrize("kind", get_args(LossKind))
def test_a_comparator_that_needs_the_whole_batch_refuses_to_accumulate(kind: str) -> None:
    whole = {"infonce_gathered", "sigmoid_ring", "fastclip_v1", "fastclip_v3"}
    problems = find_contradictions(
        tiny_config(loss={"kind": kind, "rho": 1.0}, engine={"micro_batch": 4})
    )
    assert [str(problem) for problem in problems] == (
        [
            f"engine.micro_batch: is 4, fewer than the local batch 8: {kind} would miss negatives "
            "of the other micro batches; use auto, or loss.kind=gamma"
        ]
        if kind in whole
        else []
    )


@pytest.mark.parametrize("kind", get_args(LossKind))
def test_a_pair_alone_and_a_virtual_batch_without_gamma_are_refused(kind: str) -> None:
    one_each = tiny_config(
        loss={"kind": kind, "rho": 1.0}, cluster={"workers": 8, "cpus_per_worker": 0.1}
    )
    is_local = kind in ("gamma", "infonce_local", "sigmoid_local")
    assert _places(one_each) == (["engine.micro_batch"] if is_local else [])
    alone = tiny_config(loss={"kind": kind}, train={"global_batch": 1})
    assert _places(alone) == ["engine.micro_batch" if is_local else "train.global_batch"]
    virtual = tiny_config(loss={"kind": kind, "rho": 1.0, "virtual_batch": 64})
    assert _places(virtual) == ([] if kind == "gamma" else ["loss.virtual_batch"])


@pytest.mark.parametrize(
    ("loss", "suggestion"),
    [
        ({"scale_rule": "rho", "rho": 1.0}, "3 negatives diverge by less than ln 3 = 1.10"),
        ({"scale_rule": "rho", "rho": 1.2, "exchange": 1}, "ln 7 = 1.95"),
        ({"kind": "fastclip_v3", "rho": 1.9}, "ln 7 = 1.95"),
    ],
)
def test_a_divergence_that_cannot_be_reached_is_refused(
    loss: dict[str, Any], suggestion: str
) -> None:
    """rho beyond the log of the negatives at hand only drives the scale up (LOSS D.9)."""
    sizes: dict[str, Any] = {"cluster": {"workers": 2}, "train": {"global_batch": 8}}
    assert find_contradictions(tiny_config(loss=loss, **sizes)) == []
    problems = find_contradictions(tiny_config(loss=loss | {"rho": 2.0}, **sizes))
    assert [problem.place for problem in problems] == ["loss.rho"]
    assert suggestion in str(problems[0])
    assert "lower it, e.g. to" in str(problems[0])


def test_the_structure_says_what_it_costs() -> None:
    plain, _ = make_plan(tiny_config(), FACTS)
    assert (plain.second_view, plain.momentum, plain.structure) == (False, False, ())
    assert not any("Structure" in sentence for sentence in plain.sentences())
    consistency = {"weight": 0.25, "views": False}
    alone, _ = make_plan(tiny_config(structure={"consistency": consistency}), FACTS)
    assert (alone.second_view, alone.structure) == (False, ("consistency 0.25",))
    assert any("no view of the pairs" in sentence for sentence in alone.sentences())
    every = {
        "in_modal": 0.5,
        "separation": {"weight": 1.0},
        "bridge": {"weight": 2.0},
        "consistency": {"weight": 0.25},
    }
    plan, _ = make_plan(tiny_config(structure=every), FACTS)
    (sentence,) = (each for each in plan.sentences() if each.startswith("Structure"))
    assert "in-modal contrast 0.5, separation 1, bridge 2, consistency 0.25" in sentence
    assert "16 images and captions for 8 pairs" in sentence
    assert plan.loss_bytes_per_step == 0
    images_alone = tiny_config(structure={"bridge": {"weight": 1.0}}).structure
    assert images_alone.needs_views
    assert not images_alone.needs_text_views
    without_contrast = {"separation": {"weight": 1.0, "contrast": 0.0}}
    assert not make_plan(tiny_config(structure=without_contrast), FACTS)[0].second_view
    for term in every:
        assert make_plan(tiny_config(structure={term: every[term]}), FACTS)[0].second_view
    slow, _ = make_plan(tiny_config(structure={**every, "views": "momentum"}), FACTS)
    assert (slow.second_view, slow.momentum) == (False, True)
    assert slow.state_bytes == plan.state_bytes + 40_000
    assert slow.checkpoint_bytes == plan.checkpoint_bytes + 40_000
    assert any("moving averages" in sentence for sentence in slow.sentences())


def test_independent_features_must_be_made_to_be_used() -> None:
    evaluate: dict[str, Any] = {"embedding": "both"}
    assert _places(tiny_config(evaluate=evaluate)) == ["evaluate.embedding"]
    separation = {"separation": {"weight": 1.0}}
    assert _places(tiny_config(evaluate=evaluate, structure=separation)) == []


def test_a_probe_needs_rows_to_be_tested_on_and_a_column_of_its_own() -> None:
    probe = {"column": "shape", "train": "somewhere"}
    config = tiny_config(evaluate={"linear_probe": [probe, {**probe, "test": "elsewhere"}]})
    assert _places(config) == ["evaluate.linear_probe", "evaluate.linear_probe.0.test"]


def test_a_term_rises_from_its_start() -> None:
    term = tiny_config(
        structure={"bridge": {"weight": 2.0, "start_samples": 100, "ramp_samples": 99}}
    ).structure.bridge
    assert [term.at(samples) for samples in (0, 99, 149, 199, 5000)] == [0, 0, 1, 2, 2]
    assert tiny_config(structure={"bridge": {"weight": 2.0}}).structure.bridge.at(0) == 2


def test_evidence_is_counted_only_of_a_prior() -> None:
    assert _places(tiny_config(loss={"evidence": "counted"})) == ["loss.evidence"]
    assert _places(tiny_config(loss={"evidence": "counted", "prior": "queue"})) == []


def test_what_contradicts_the_data() -> None:
    def messages(**sections) -> str:
        return str([str(problem) for problem in make_plan(tiny_config(**sections), FACTS)[1]])

    assert "more than the 1000 rows" in messages(train={"global_batch": 2000})
    assert "less than one global batch" in messages(train={"samples": 4})
    assert "more than the run's 64 samples" in messages(optim={"warmup_samples": 100})


@pytest.mark.parametrize(
    ("loss", "place"),
    [
        ({"exchange": 4}, "loss.exchange"),
        ({"kind": "infonce_local", "exchange": 1}, "loss.exchange"),
        ({"exchange": 1, "virtual_batch": 3}, "loss.virtual_batch"),
        ({"exchange": 3}, None),
    ],
)
def test_exchange_needs_other_workers(loss: dict[str, Any], place: str | None) -> None:
    config = tiny_config(loss=loss, cluster={"workers": 4}, train={"global_batch": 8})
    assert _places(config) == ([place] if place else [])


def test_exchanged_bytes_do_not_depend_on_the_number_of_workers() -> None:
    for workers in (2, 4, 8):
        config = tiny_config(
            loss={"exchange": 1},
            cluster={"workers": workers},
            train={"global_batch": 2 * workers, "samples": 64},
        )
        plan, _ = make_plan(config, FACTS)
        assert plan.loss_bytes_per_step == 2 * 4 * (2 * 16 + 2)


def _planned(workers: int, micro: int, accumulation: int, **loss: Any) -> tuple[Config, Plan]:
    config = tiny_config(
        train={"global_batch": workers * micro * accumulation, "samples": 1000},
        engine={"micro_batch": micro},
        cluster={"workers": workers},
        loss=loss,
    )
    plan, problems = make_plan(config, FACTS)
    assert not problems
    return config, plan


@given(
    before=st.integers(1, 8), now=st.integers(1, 8), micro=st.integers(4, 16),
    accumulation=st.integers(1, 3), exchange=st.integers(0, 2),
)  # fmt: skip
def test_another_number_of_workers_keeps_objective_and_length(
    before: int, now: int, micro: int, accumulation: int, exchange: int
) -> None:
    exchange = min(exchange, before - 1)
    config, plan = _planned(before, micro, accumulation, exchange=exchange)
    resized = resize(config, now, plan)
    assert not find_contradictions(resized)
    again, _ = make_plan(resized, FACTS)
    assert (again.workers, again.virtual_batch) == (now, plan.virtual_batch)
    assert plan.samples - again.global_batch < again.samples <= plan.samples
    assert 2 <= again.micro_batch <= micro
    # A worker's micro batch is rounded to whole pairs, and has two at least.
    parts = now * again.accumulation
    assert abs(again.global_batch - plan.global_batch) <= max(
        parts / 2, 2 * now - plan.global_batch
    )
    if before % now == 0:
        assert again.global_batch == plan.global_batch
        assert again.micro_batch == micro


@pytest.mark.parametrize(
    ("workers", "global_batch", "micro", "accumulation"),
    [(1, 16, 8, 2), (2, 16, 8, 1), (3, 15, 5, 1), (4, 16, 4, 1), (8, 16, 2, 1), (10, 20, 2, 1)],
)
def test_the_batch_at_another_number_of_workers(
    workers: int, global_batch: int, micro: int, accumulation: int
) -> None:
    config, plan = _planned(2, 8, 1)
    again, _ = make_plan(resize(config, workers, plan), FACTS)
    found = (again.global_batch, again.micro_batch, again.accumulation)
    assert found == (global_batch, micro, accumulation)


def test_a_comparator_that_needs_the_whole_batch_is_never_accumulated() -> None:
    config, plan = _planned(2, 8, 1, kind="infonce_gathered")
    for workers, expected in ((1, (16, 16)), (3, (15, 5))):
        resized = resize(config, workers, plan)
        assert not find_contradictions(resized)
        again, _ = make_plan(resized, FACTS)
        assert (again.global_batch, again.micro_batch) == expected


def test_a_tasks_momentum_model_is_planned_for_and_assignment_has_none() -> None:
    def config(kind: str, share: float) -> Config:
        return tiny_config(model=FUSION, task={"kind": kind, "distillation": share})

    (plain, _), (slow, problems) = (make_plan(config("vqa", s), FACTS) for s in (0.0, 0.4))
    assert not problems
    assert (plain.task, plain.momentum) == ("fine-tuned for vqa", False)
    assert slow.task == "fine-tuned for vqa, 40% of the targets by a momentum model"
    assert slow.momentum
    assert slow.checkpoint_bytes == plain.checkpoint_bytes + 4 * FACTS.num_parameters
    assert _places(config("assignment", 0.4)) == ["task.distillation"]


def test_a_stem_of_convolutions_is_of_a_fusion_model() -> None:
    (problem,) = find_contradictions(tiny_config(model={"image": CONV}))
    assert problem.place == "model.image.stem"
    assert find_contradictions(tiny_config(model={**FUSION, "image": CONV})) == []
