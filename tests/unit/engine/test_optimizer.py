"""How parameters are put into groups."""

import pytest

from pipeline.engine.optimizer import ALIGNMENT, parameter_groups
from tests.tiny import tiny_config, tiny_module


@pytest.mark.parametrize(
    "loss", [{"kind": "sigmoid_local"}, {"kind": "gamma", "prior": "amortized"}]
)
def test_no_parameter_of_odd_length_lies_before_another(loss: dict[str, str]) -> None:
    """The logit scale, first in the module, would put all biases of bf16 on odd addresses."""
    config = tiny_config(loss=loss)
    module = tiny_module(config)
    groups = parameter_groups(module, config.optim)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert {id(each) for each in grouped} == {id(each) for each in module.parameters()}
    for group in groups:
        start = 0
        for parameter in group["params"]:
            is_odd = parameter.numel() % ALIGNMENT != 0
            assert is_odd or start % ALIGNMENT == 0
            start += parameter.numel()
