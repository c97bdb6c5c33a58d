import pytest

from pipeline.config.plan import Facts, find_contradictions, make_plan
from tests.tiny import tiny_config

FACTS = Facts(train_rows=1000, val_rows=100, vocab_size=300, num_parameters=10_000, embed_dim=16)


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


def test_gathered_loss_moves_what_an_all_gather_moves() -> None:
    config = tiny_config(loss={"kind": "infonce_gathered"}, cluster={"workers": 2})
    plan, _ = make_plan(config, FACTS)
    assert plan.loss_bytes_per_step == plan.all_gather_bytes_per_step > 0


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
    gathered = tiny_config(loss={"kind": "infonce_gathered"}, engine={"micro_batch": 4})
    assert _places(gathered) == ["engine.micro_batch"]


def test_what_contradicts_the_data() -> None:
    def messages(**sections) -> str:
        return str([str(problem) for problem in make_plan(tiny_config(**sections), FACTS)[1]])

    assert "more than the 1000 rows" in messages(train={"global_batch": 2000})
    assert "less than one global batch" in messages(train={"samples": 4})
    assert "more than the run's 64 samples" in messages(optim={"warmup_samples": 100})
