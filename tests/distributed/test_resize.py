"""A checkpoint read back by another number of workers: the same weights, the same moments."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jobs.bench.ranks import run_ranks
from pipeline.engine.zero import Engine
from tests.tiny import tiny_config, tiny_module, tiny_pairs

Case = tuple[int, str]  # ZeRO stage, precision
CASES: list[Case] = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
GLOBAL_BATCH = 12
Masters = dict[str, tuple[Tensor, ...]]  # of each parameter: fp32 weight and the two moments
Saved = tuple[Masters, list[dict[str, Any]], list[float]]  # with the settings, and losses to come


def _engine(case: Case, loads_universal: bool = False) -> Engine:
    stage, precision = case
    config = tiny_config(engine={"zero_stage": stage, "precision": precision})
    return Engine(
        tiny_module(config),
        engine=config.engine,
        optim=config.optim,
        micro_batch=GLOBAL_BATCH // dist.get_world_size(),
        accumulation=1,
        device=torch.device("cpu"),
        loads_universal=loads_universal,
    )


def _train(engine: Engine, steps: range) -> list[float]:
    """Steps on the same global batches; the losses. A loss of single pairs, so not of workers."""
    losses = []
    for step in steps:
        pairs = tiny_pairs(GLOBAL_BATCH, seed=step)
        mine = [part.chunk(dist.get_world_size())[dist.get_rank()] for part in pairs]
        image, text, logit_scale, *_ = engine(*mine)
        loss = (logit_scale * (image[:, :8] - text[:, 8:]).square().sum(1)).mean()
        engine.backward(loss)
        engine.step(1.0)
        losses.append(float(engine.sum(loss.detach().float()[None])) / dist.get_world_size())
    return losses


def _masters(engine: Engine) -> Masters:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_stage == 0:  # the optimiser holds whole tensors, in its own order
        optimizer = getattr(engine._optimizer, "optimizer", engine._optimizer)
        return {
            str(index): tuple(
                value.detach().clone() for value in (weight, state["exp_avg"], state["exp_avg_sq"])
            )
            for index, (weight, state) in enumerate(optimizer.state.items())
        }
    if engine.zero_stage < 3:
        # DeepSpeed links the moments when the first parameter group has some, and only then.
        optimizer = engine._engine.optimizer
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    found: Masters = {}
    for name, parameter in engine.module.named_parameters():
        values = (
            safe_get_full_fp32_param(parameter),
            safe_get_full_optimizer_state(parameter, "exp_avg"),
            safe_get_full_optimizer_state(parameter, "exp_avg_sq"),
        )
        found[name] = tuple(value.clone() for value in values if value is not None)
    return found


def _settings(engine: Engine) -> list[dict[str, Any]]:
    """Of each parameter group: its rate, decay, and so on."""
    groups = engine._optimizer.param_groups
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def _save(folder: str, cases: list[Case]) -> dict[Case, Saved]:
    saved = {}
    for case in cases:
        engine = _engine(case)
        _train(engine, range(3))
        engine.save(Path(folder) / f"{case}")
        saved[case] = _masters(engine), _settings(engine), _train(engine, range(3, 6))
    return saved


def _load(folder: str, cases: list[Case]) -> dict[Case, Saved]:
    loaded = {}
    for case in cases:
        engine = _engine(case, loads_universal=True)
        engine.load(Path(folder) / f"{case}")
        loaded[case] = _masters(engine), _settings(engine), _train(engine, range(3, 6))
    return loaded


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[Case, Any]]:
    """A folder with the checkpoints of all cases, what they hold, how the losses went on."""
    # A name that DeepSpeed would take for a pattern.
    folder = str(tmp_path_factory.mktemp("run (1)+[a]"))
    return folder, run_ranks(_save, 2, folder, CASES)[0]


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 3])
def test_another_number_of_workers_goes_on_from_the_same_state(
    saved_by_two: tuple[str, dict[Case, Any]], world_size: int
) -> None:
    folder, saved = saved_by_two
    for loaded in run_ranks(_load, world_size, folder, CASES):
        for case in CASES:
            masters, settings, losses = saved[case]
            found, found_settings, went_on = loaded[case]
            assert found_settings == settings, case
            assert masters.keys() == found.keys()
            for name, values in masters.items():
                assert len(values) == 3, (case, name)
                for value, other in zip(values, found[name], strict=True):
                    assert torch.equal(value, other), (case, name)
            tolerance = 1e-4 if case[1] == "fp32" else 0.05
            assert went_on == pytest.approx(losses, rel=tolerance), case
