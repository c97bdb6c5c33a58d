"""The variance ratio tells how much noisier a local batch makes the gradient."""

import math

import pytest
import torch
import torch.nn.functional as F

from pipeline.losses.diagnostics import variance_ratio
from pipeline.losses.gamma import GammaLoss


def _unit(rows: int, dim: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("scale", [2.0, 8.0])
def test_variance_of_sharded_and_whole_batches_follows_the_formula(scale: float) -> None:
    """Monte Carlo of mean_ij H_ij over shards of b and over the whole of B (LOSS D.6)."""
    torch.manual_seed(0)
    batch, local, dim, draws = 48, 6, 4, 1500
    factor = torch.tensor(scale, dtype=torch.float64)
    logits = factor * (_unit(3000, dim) @ _unit(1, dim).T)
    log_z = (logits.logsumexp(0) - math.log(3000)).expand(3 * batch)

    def mean_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weights = (factor * (x @ y.T) - log_z[: len(x), None]).exp()
        weights.diagonal().zero_()
        return x.T @ weights @ y / (len(x) * (len(x) - 1))

    whole, sharded, ratios = [], [], []
    for _ in range(draws):
        x, y = _unit(batch, dim), _unit(batch, dim)
        whole.append(mean_kernel(x, y))
        parts = zip(x.split(local), y.split(local), strict=True)
        sharded.append(torch.stack([mean_kernel(*part) for part in parts]).mean(0))
    for _ in range(200):
        ratio = variance_ratio(_unit(128, dim), _unit(128, dim), factor, log_z)
        assert ratio is not None
        ratios.append(ratio)
    rho = torch.stack(ratios).median().item()
    measured = torch.stack(sharded).var(0).sum() / torch.stack(whole).var(0).sum()
    predicted = (1 + rho / (local - 1)) / (1 + rho / (batch - 1))
    assert measured.item() == pytest.approx(predicted, rel=0.2)


def test_effective_negatives_are_all_when_equal_and_one_when_one_dominates() -> None:
    image = _unit(9, 32).float()
    text = F.normalize(torch.ones(9, 32), dim=1)
    metrics = GammaLoss(virtual_batch=9)(image, text, torch.tensor(30.0)).diagnose()
    assert metrics["effective_negatives_image"].item() == pytest.approx(8, rel=1e-4)
    basis = torch.eye(9)
    shifted = basis.roll(1, 0)  # text i + 1 lies on image i, no text on its own
    metrics = GammaLoss(virtual_batch=9)(basis, shifted, torch.tensor(100.0)).diagnose()
    assert metrics["effective_negatives_image"].item() == pytest.approx(1, rel=1e-3)


def test_few_pairs_have_no_variance_ratio() -> None:
    x = _unit(15, 4)
    assert variance_ratio(x, x, torch.tensor(5.0), torch.zeros(15)) is None
