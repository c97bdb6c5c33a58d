"""How a worker sets PyTorch up."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from pipeline.train.worker import _set_up_torch
from tests.tiny import tiny_config


@pytest.fixture
def restored() -> Iterator[None]:
    threads, is_fused = torch.get_num_threads(), torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.enable_flash_sdp(is_fused)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    ("device", "precision", "is_fused"),
    [("cpu", "bf16", False), ("cpu", "fp32", True), ("cuda", "bf16", True)],
)
def test_attention_is_plain_on_cpus_in_bf16(device: str, precision: str, is_fused: bool) -> None:
    """By what PyTorch calls on this CPU, once the worker is set up for the device."""
    config = tiny_config(engine={"precision": precision})
    _set_up_torch(config, torch.device(device))
    states = torch.randn(2, 2, 8, 16, dtype=torch.bfloat16)
    with profile() as found:
        F.scaled_dot_product_attention(states, states, states)
    assert any("flash" in event.key for event in found.key_averages()) == is_fused
