"""Tiles of a GPU's logits give what blocks of rows give; on a GPU, compiled and in bf16 too."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.losses import gamma
from pipeline.losses.gamma import GammaLoss
from pipeline.losses.pairs import LocalPairs
from pipeline.losses.tiles import LEAST, TILE, TiledPairs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def _pairs(b: int, dim: int, seed: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(b, dim, generator=generator)
    text = image + torch.randn(b, dim, generator=generator)
    return F.normalize(image, dim=1).to(device), F.normalize(text, dim=1).to(device)


@settings(max_examples=60)
@given(
    st.integers(1, 23), st.integers(1, 9), st.sampled_from([1, 2]), st.floats(1, 100),
    st.integers(0, 1000),
)  # fmt: skip
def test_tiles_equal_rows(b: int, tile: int, parts: int, scale: float, seed: int) -> None:
    image, text = _pairs(b, 6, seed)
    logit_scale = torch.tensor(scale)
    rows = LocalPairs(image, text, logit_scale, block=5)
    tiled = TiledPairs(image, text, logit_scale, torch.float32, tile)
    expected, found = rows.sums(parts), tiled.sums(parts)
    torch.testing.assert_close(found.log_sum, expected.log_sum, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.count, expected.count)
    assert found.total == expected.total
    torch.testing.assert_close(tiled.positive, rows.positive, rtol=1e-5, atol=1e-4)
    log_u = -torch.rand(2, b) - scale
    pull = torch.rand(b)
    for mine, theirs in zip(tiled.weigh(log_u, pull), rows.weigh(log_u, pull), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("b", [TILE + 500, LEAST + 1])
@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize(("precision", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_on_a_gpu_the_loss_is_the_same_in_tiles(
    b: int, with_prior: bool, precision: torch.dtype, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whole tiles and of what is left over; `close` is of the gradient's norm."""
    inputs = [each.requires_grad_() for each in _pairs(b, 64, 0, "cuda")]
    scale = torch.tensor(40.0, device="cuda", requires_grad=True)
    log_z = torch.full((b,), 1.0, device="cuda") if with_prior else None
    found = []
    for least in (b, b + 1):
        monkeypatch.setattr(gamma, "LEAST", least)
        loss = GammaLoss(virtual_batch=4 * b, precision=precision)
        value = loss(*inputs, scale, log_z, log_z).loss
        found.append((value, *torch.autograd.grad(value, [*inputs, scale])))
    for mine, expected in zip(*found, strict=True):
        assert (mine - expected).norm() <= close * expected.norm()
