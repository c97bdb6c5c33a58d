"""Laws of the gamma loss: what it equals, what it stays finite at, what its weights sum to."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jobs.bench.dense import dense_gamma
from pipeline.losses.gamma import Features, GammaLoss, ScaleRule
from pipeline.losses.normalizer import Evidence, prior_deviance
from pipeline.losses.pairs import LocalPairs, Sums


def _unit(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows_ = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return F.normalize(rows_, dim=1).requires_grad_()


def _scale(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def _cross_entropy(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits, labels = scale * image @ text.T, torch.arange(len(image))
    return 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels))


def _grads(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


@settings(max_examples=40)
@given(st.integers(2, 12), st.integers(2, 8), st.floats(1, 100), st.integers(0, 1000))
def test_without_a_prior_it_is_clip_on_the_local_batch(
    b: int, d: int, scale: float, seed: int
) -> None:
    """K = n and no prior: value and gradients of cross-entropy CLIP, to rounding."""
    image, text, logit_scale = _unit(b, d, seed), _unit(b, d, seed + 1), _scale(scale)
    ours = GammaLoss(virtual_batch=b)(image, text, logit_scale).loss
    theirs = _cross_entropy(image, text, logit_scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for mine, expected in zip(
        _grads(ours, image, text, logit_scale),
        _grads(theirs, image, text, logit_scale),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-9)


def _literal(
    image: Tensor, text: Tensor, scale: Tensor, a: Tensor, c: Tensor, n0: float, num_virtual: int
) -> Tensor:
    """The objective written as it is defined, with u fixed; a, c are the priors' log rates."""
    s = scale * image @ text.T
    b = len(s)
    n = b - 1
    off = 1 - torch.eye(b, dtype=s.dtype)
    total = s.new_zeros(())
    for logits, prior in ((s, a), (s.T, c)):
        negatives = (logits.exp() * off).sum(1)
        rate = logits.diagonal().exp() / num_virtual + (n0 * prior.exp() + negatives) / (n0 + n)
        u = (1 / rate).detach()
        total = (
            total
            + (
                -logits.diagonal() + u * (logits.diagonal().exp() / num_virtual + negatives / n)
            ).mean()
        )
    return total / 2


class _FixedEvidence(Evidence):
    def __init__(self, weight: float):
        super().__init__()
        self._weight = weight

    def update(self, *_: object) -> float:
        return self._weight


@settings(max_examples=40)
@given(st.integers(3, 9), st.floats(0.2, 1.0), st.integers(9, 200), st.integers(0, 1000))
def test_gradient_is_that_of_the_defined_objective(
    b: int, g: float, num_virtual: int, seed: int
) -> None:
    image, text, scale = _unit(b, 5, seed), _unit(b, 5, seed + 1), _scale(7.0)
    a, c = torch.randn(2, b, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    n = b - 1
    loss = GammaLoss(
        virtual_batch=num_virtual + 1,
        image_evidence=_FixedEvidence(g),
        text_evidence=_FixedEvidence(g),
    )
    ours = loss(image, text, scale, a, c).loss
    literal = _literal(image, text, scale, a, c, n * (1 - g) / g, num_virtual)
    for mine, expected in zip(
        _grads(ours, image, text, scale), _grads(literal, image, text, scale), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-9)


@settings(max_examples=60)
@given(
    st.integers(2, 17), st.integers(1, 20), st.floats(1, 100), st.sampled_from([0.3, 1.0]),
    st.integers(0, 1000),
)  # fmt: skip
def test_blocked_equals_dense(b: int, block: int, scale: float, g: float, seed: int) -> None:
    """Forward and backward, whatever the blocks leave over."""
    image, text, logit_scale = _unit(b, 6, seed), _unit(b, 6, seed + 1), _scale(scale)
    a, c = torch.randn(2, b, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    priors = (a, c) if g < 1 else (None, None)
    loss = GammaLoss(virtual_batch=3 * b, block=block, image_evidence=_FixedEvidence(g),
                     text_evidence=_FixedEvidence(g))  # fmt: skip
    ours = loss(image, text, logit_scale, *priors).loss
    dense = dense_gamma(image, text, logit_scale, 3 * b - 1, priors, g)
    torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-9)
    for mine, expected in zip(
        _grads(ours, image, text, logit_scale),
        _grads(dense, image, text, logit_scale),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-9)


def test_bf16_embeddings_have_fp32_logits() -> None:
    """The loss of rounded embeddings is that of fp32 ones of the same values."""
    image, text = (_unit(40, 16, seed).detach().bfloat16() for seed in (0, 1))
    halves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    wide = [image.float().requires_grad_(), text.float().requires_grad_()]
    scale = torch.tensor(100.0, requires_grad=True)
    first = GammaLoss(virtual_batch=40, block=7)(*halves, scale).loss
    second = GammaLoss(virtual_batch=40)(*wide, scale).loss
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    for mine, expected in zip(_grads(first, *halves), _grads(second, *wide), strict=True):
        torch.testing.assert_close(mine, expected.bfloat16())


def _others(everyone: list[Any], rank: int) -> list[Any]:
    return everyone[:rank] + everyone[rank + 1 :]


def _in_shards(
    loss: Callable[[], GammaLoss], image: Tensor, text: Tensor, scale: Tensor, shards: int
) -> Tensor:
    """The mean loss of workers that each meet the blocks of all others."""
    losses = [loss() for _ in range(shards)]
    parts = list(zip(image.chunk(shards), text.chunk(shards), strict=True))
    features = [Features(image=x.detach(), text=y.detach()) for x, y in parts]
    opened = [
        gamma.open(x, y, scale, partners=partial(_others, features, rank))
        for rank, (gamma, (x, y)) in enumerate(zip(losses, parts, strict=True))
    ]
    weights = [half.weights for half in opened]
    values = [
        gamma.close(half, partial(_others, weights, rank)).loss
        for rank, (gamma, half) in enumerate(zip(losses, opened, strict=True))
    ]
    return torch.stack(values).mean()


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(2, 4), st.floats(1, 60), st.integers(0, 1000))
def test_meeting_every_partner_is_infonce_on_the_global_batch(
    local: int, shards: int, scale: float, seed: int
) -> None:
    """Reach is exact: both workers' gradients of a shared pair add up to its gradient."""
    b = local * shards
    image, text, logit_scale = _unit(b, 5, seed), _unit(b, 5, seed + 1), _scale(scale)
    ours = _in_shards(lambda: GammaLoss(virtual_batch=b, block=2), image, text, logit_scale, shards)
    theirs = _cross_entropy(image, text, logit_scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for mine, expected in zip(
        _grads(ours, image, text, logit_scale),
        _grads(theirs, image, text, logit_scale),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-9)


@settings(max_examples=20)
@given(st.integers(3, 9), st.floats(2, 60), st.integers(0, 1000))
def test_scale_rules_without_a_prior(b: int, scale: float, seed: int) -> None:
    """K = n: plain and self-normalised agree; rho is the dual's derivative; fixed is zero."""
    image, text, logit_scale = _unit(b, 5, seed), _unit(b, 5, seed + 1), _scale(scale)
    found = {
        rule: _grads(
            GammaLoss(virtual_batch=b, scale_rule=rule, rho=0.3)(image, text, logit_scale).loss,
            logit_scale,
        )[0]
        for rule in get_args(ScaleRule)
    }
    torch.testing.assert_close(found["plain"], found["self_normalised"])
    assert found["fixed"] == 0
    # d/d scale of (1/scale) (mean log E_j e^{s_ij}) + rho / scale, times scale
    free = _scale(scale)
    logits = free * (image @ text.T).detach()
    sums = [
        s.masked_fill(torch.eye(b, dtype=torch.bool), -math.inf).logsumexp(1) - math.log(b - 1)
        for s in (logits, logits.T)
    ]
    dual = 0.5 * (sums[0].mean() + sums[1].mean()) / free + 0.3 / free
    torch.testing.assert_close(found["rho"], _grads(dual, free)[0] * scale)


@pytest.mark.parametrize("b", [1, 2, 3, 64])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("kind", ["random", "identical", "duplicates", "opposed"])
@pytest.mark.parametrize("with_prior", [False, True])
def test_finite_everywhere(b: int, scale: float, kind: str, with_prior: bool) -> None:
    image, text = _unit(b, 4, 0).detach().float(), _unit(b, 4, 1).detach().float()
    if kind == "identical":
        image = text = image[:1].expand(b, -1).clone()
    elif kind == "duplicates":
        text = text[torch.arange(b) // 2]
    elif kind == "opposed":
        text = -image
    image, text = image.requires_grad_(), text.clone().requires_grad_()
    log_z = torch.zeros(b, requires_grad=True) if with_prior else None
    logit_scale = torch.tensor(scale, requires_grad=True)
    loss = GammaLoss(virtual_batch=256)
    for _ in range(3):
        value = loss(image, text, logit_scale, log_z, log_z)
        assert value.loss.isfinite()
        for gradient in _grads(value.loss, image, text, logit_scale):
            assert gradient.isfinite().all()


def test_sampled_u_has_the_mean_gradient() -> None:
    """u ~ Gamma(1, R): its mean is 1/R, so draws average to the mean form's gradient."""
    image, text, scale = _unit(6, 4, 0), _unit(6, 4, 1), _scale(5.0)
    (expected,) = _grads(GammaLoss(virtual_batch=6)(image, text, scale).loss, image)
    torch.manual_seed(0)
    sampled = GammaLoss(virtual_batch=6, u="sampled")
    draws = torch.stack([_grads(sampled(image, text, scale).loss, image)[0] for _ in range(4000)])
    assert draws.std(dim=0).max() > 0.01
    error = (draws.mean(0) - expected).abs()
    assert (error <= 5 * draws.std(0) / math.sqrt(len(draws))).all()


@pytest.mark.parametrize(("g", "cap", "most"), [(0.25, math.inf, 4.0), (0.01, 3.0, 3.0)])
@pytest.mark.parametrize("prior", [-50.0, 0.0, 50.0])
def test_an_anchors_weights_are_bounded(g: float, cap: float, most: float, prior: float) -> None:
    """sum_j w_ij <= 1/g, and <= max_weight, whatever the prior says."""
    image, text = _unit(8, 4, 0), _unit(8, 4, 1)
    log_z = torch.full((8,), prior, dtype=torch.float64)
    loss = GammaLoss(
        virtual_batch=1001,
        max_weight=cap,
        image_evidence=_FixedEvidence(g),
        text_evidence=_FixedEvidence(g),
    )
    opened = loss.open(image, text, _scale(20.0), log_z, log_z)
    logits = (20 * image @ text.T).detach()
    logits.diagonal().fill_(-math.inf)
    weights = (logits + opened.weights.image[:, None]).exp()
    assert (weights.sum(1) <= most + 1e-9).all()
    if prior == -50.0:
        assert weights.sum(1).max().item() == pytest.approx(most, rel=1e-4), "it is reached"


def test_exact_normaliser_is_unbiased_over_shards() -> None:
    """P2: given the true Z, the mean decoupled gradient over random shardings is the full one.

    The full loss is L_kappa with Z over all other pairs; each shard uses only its own pairs.
    """
    total, b, num_virtual = 12, 4, 11
    image, text, scale = _unit(total, 3, 0), _unit(total, 3, 1), _scale(6.0)
    pairs = LocalPairs(image.detach(), text.detach(), scale.detach(), 5)
    log_z = pairs.sums(1).log_mean
    full = _literal(image, text, scale, log_z[0], log_z[1], 1e12, num_virtual)
    (expected,) = _grads(full, image)
    generator = torch.Generator().manual_seed(0)
    gradients = []
    for _ in range(3000):
        loss = image.new_zeros(())
        for shard in torch.randperm(total, generator=generator).split(b):
            evidence = _FixedEvidence(1e-12), _FixedEvidence(1e-12)
            gamma = GammaLoss(
                virtual_batch=num_virtual + 1, image_evidence=evidence[0], text_evidence=evidence[1]
            )
            value = gamma(image[shard], text[shard], scale, log_z[0][shard], log_z[1][shard])
            loss = loss + value.loss * b / total
        gradients.append(_grads(loss, image)[0])
    stacked = torch.stack(gradients)
    standard_error = stacked.std(0) / math.sqrt(len(stacked))
    assert ((stacked.mean(0) - expected).abs() <= 5 * standard_error + 1e-9).all()


def test_prior_deviance_is_minimal_at_the_log_of_the_mean() -> None:
    """Noise in Zhat does not shift the minimiser from log E[Zhat] (mean of logs would)."""
    noise = torch.distributions.Gamma(2.0, 2.0).sample((200_000,)).double()
    grid = torch.linspace(-0.6, 0.6, 121, dtype=torch.float64)
    values = torch.stack([prior_deviance(a.expand(len(noise)), noise.log()) for a in grid])
    assert grid[values.argmin()].item() == pytest.approx(0.0, abs=0.021)
    assert noise.log().mean().item() < -0.2


def test_evidence_trusts_a_good_prior_and_drops_a_bad_one() -> None:
    torch.manual_seed(0)
    good, bad = Evidence(), Evidence()
    for _ in range(200):
        sums = Sums(
            log_sum=torch.randn(2, 2, 16, 8).logsumexp(3), count=torch.full((2, 16), 8.0), total=16
        )
        noise = float(sums.half_difference.square().mean()) / 4
        miss = sums.log_mean - 0.5  # log E e^s of N(0, 1)
        good_weight = good.update(noise, float(miss.square().mean()), 16, 1000)
        bad_weight = bad.update(noise, float((miss - 8).square().mean()), 16, 1000)
    assert good_weight < 0.4
    assert bad_weight > 0.95


def test_evidence_never_falls_below_the_share_of_real_negatives() -> None:
    weight = Evidence().update(0.0, 0.0, 8, 16)
    assert weight >= 8 / 16


def test_evidence_survives_its_state() -> None:
    loss, again = GammaLoss(virtual_batch=64), GammaLoss(virtual_batch=64)
    image, text, scale = _unit(8, 4, 0), _unit(8, 4, 1), _scale(5.0)
    prior = torch.zeros(8, dtype=torch.float64)
    loss(image, text, scale, prior, prior)
    again.load_state_dict([loss.state_dict()], 0, 1)
    first = loss(image, text, scale, prior, prior).metrics
    second = again(image, text, scale, prior, prior).metrics
    assert all(torch.equal(first[name], second[name]) for name in first)
