import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.optimizer import parameter_groups
from pipeline.engine.schedule import lr_factor
from tests.tiny import tiny_config, tiny_module


def test_warm_up_peak_and_end() -> None:
    def at(samples: int) -> float:
        return lr_factor(samples, warmup=100, total=1100, schedule="cosine")

    assert 0 < at(0) < 0.02
    assert at(50) == pytest.approx(0.505, abs=0.01)
    assert at(100) == 1.0
    assert at(600) == pytest.approx(0.5)
    assert at(1100) == pytest.approx(0.0)
    assert lr_factor(900, warmup=100, total=1100, schedule="constant") == 1.0


def test_a_cosine_ends_at_the_least_rate() -> None:
    def at(samples: int) -> float:
        return lr_factor(samples, warmup=100, total=1100, schedule="cosine", least=0.1)

    assert at(50) == pytest.approx(0.505, abs=0.01)
    assert (at(100), at(600), at(1100)) == pytest.approx((1.0, 0.55, 0.1))


@given(st.integers(0, 2000), st.integers(0, 1000), st.integers(1, 2000), st.floats(0, 1))
def test_always_a_share(samples: int, warmup: int, total: int, least: float) -> None:
    factor = lr_factor(samples, warmup=warmup, total=total, schedule="cosine", least=least)
    assert 0 <= factor <= 1
    assert math.isfinite(factor)
    assert samples < warmup or factor >= least * (1 - 1e-12)


def test_norms_biases_and_logit_scale_do_not_decay() -> None:
    config = tiny_config()
    module = tiny_module(config)
    groups = parameter_groups(module, config.optim)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    rate = {id(p): group["peak_lr"] for group in groups for p in group["params"]}
    names = dict(module.named_parameters())
    assert set(decay) == {id(parameter) for parameter in names.values()}
    assert decay[id(names["towers.logit_scale"])] == 0
    for name, parameter in names.items():
        is_matrix = parameter.ndim >= 2 and not name.startswith("prior.")
        assert decay[id(parameter)] == (config.optim.weight_decay if is_matrix else 0), name
        expected = config.optim.prior_lr if name.startswith("prior.") else config.optim.lr
        assert rate[id(parameter)] == expected
