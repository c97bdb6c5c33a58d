"""Laws of the comparators in one process: what each equals, and what they stay finite at."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.losses.contrastive import (
    FastCLIP,
    InfoNCEGathered,
    InfoNCELocal,
    SigmoidLocal,
    SigmoidRing,
)
from tests.dense_comparators import (
    DenseFastCLIP,
    dense_global_contrastive,
    dense_infonce,
    dense_sigmoid,
)


def _unit(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows_ = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return F.normalize(rows_, dim=1).requires_grad_()


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def _assert_same(ours: Tensor, theirs: Tensor, *inputs: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    for mine, expected in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=rtol, atol=atol)


@settings(max_examples=20)
@given(st.integers(1, 9), st.floats(1, 100), st.integers(0, 1000))
def test_infonce_is_cross_entropy(b: int, scale: float, seed: int) -> None:
    inputs = _unit(b, 5, seed), _unit(b, 5, seed + 1), _number(scale)
    for loss in (InfoNCELocal(), InfoNCEGathered()):
        _assert_same(loss(*inputs).loss, dense_infonce(*inputs), *inputs, rtol=1e-9, atol=1e-9)


@settings(max_examples=20)
@given(st.integers(1, 9), st.floats(1, 100), st.floats(-20, 5), st.integers(0, 1000))
def test_sigmoid_is_siglips(b: int, scale: float, bias: float, seed: int) -> None:
    inputs = _unit(b, 5, seed), _unit(b, 5, seed + 1), _number(scale), _number(bias)
    for loss in (SigmoidLocal(), SigmoidRing()):
        ours = loss(*inputs[:3], logit_bias=inputs[3]).loss
        _assert_same(ours, dense_sigmoid(*inputs), *inputs, rtol=1e-9, atol=1e-9)


@settings(max_examples=20)
@given(st.integers(2, 9), st.floats(1, 30), st.floats(0, 3), st.integers(0, 1000))
def test_fastclip_without_memory_is_the_global_contrastive_loss(
    b: int, scale: float, rho: float, seed: int
) -> None:
    """gamma = 1. v3, by tau: tau/2 mean[log(eps+g1) + log(eps+g2)] + rho tau."""
    image, text = _unit(b, 5, seed), _unit(b, 5, seed + 1)
    tau, keys = _number(1 / scale), torch.arange(b)
    v1 = FastCLIP(b, gamma=1.0, learns_scale=False)(image, text, 1 / tau, keys=keys).loss
    assert torch.autograd.grad(v1, tau, retain_graph=True)[0] == 0
    theirs = dense_global_contrastive(image, text, 1 / tau)
    _assert_same(v1, theirs, image, text, rtol=2e-5, atol=2e-5)
    v3 = FastCLIP(b, gamma=1.0, learns_scale=True, rho=rho)(image, text, 1 / tau, keys=keys).loss
    theirs = tau * dense_global_contrastive(image, text, 1 / tau) + rho * tau
    _assert_same(v3, theirs, image, text, tau, rtol=2e-5, atol=2e-4)


@settings(max_examples=20)
@given(st.integers(2, 6), st.floats(0.05, 1), st.booleans(), st.floats(1, 30), st.integers(0, 1000))
def test_fastclip_remembers_each_row(
    b: int, gamma: float, learns_scale: bool, scale: float, seed: int
) -> None:
    """Several steps over few rows, in a new order each time."""
    settings_: dict[str, Any] = {"gamma": gamma, "learns_scale": learns_scale, "rho": 0.7}
    ours, theirs = FastCLIP(8, **settings_), DenseFastCLIP(**settings_)
    for step in range(4):
        generator = torch.Generator().manual_seed(seed + step)
        keys = torch.randperm(8, generator=generator)[:b]
        inputs = _unit(b, 5, seed + step), _unit(b, 5, seed + step + 9), _number(scale + step)
        loss = ours(*inputs, keys=keys).loss
        _assert_same(loss, theirs(*inputs, keys), *inputs, rtol=2e-5, atol=2e-5)


def _calls() -> dict[str, Any]:
    """Each comparator as a function of image, text and scale, with its state where it has one."""
    bias = torch.tensor(-10.0, requires_grad=True)
    v1 = FastCLIP(256, gamma=0.5, learns_scale=False)
    v3 = FastCLIP(256, gamma=0.5, learns_scale=True, rho=2.0)
    return {
        "infonce_local": InfoNCELocal(),
        "infonce_gathered": InfoNCEGathered(),
        "sigmoid_local": lambda *inputs: SigmoidLocal()(*inputs, logit_bias=bias),
        "sigmoid_ring": lambda *inputs: SigmoidRing()(*inputs, logit_bias=bias),
        "fastclip_v1": lambda *inputs: v1(*inputs, keys=torch.arange(len(inputs[0]))),
        "fastclip_v3": lambda *inputs: v3(*inputs, keys=torch.arange(len(inputs[0]))),
    }


@pytest.mark.parametrize("b", [1, 2, 3, 64])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("kind", ["random", "identical", "duplicates", "opposed", "perfect"])
def test_finite_everywhere(b: int, scale: float, kind: str) -> None:
    """In fp32; a second visit follows a first one of other features, so u is off by far."""
    first = [_unit(b, 4, seed).detach().float() for seed in (0, 1)]
    image, text = (part.clone() for part in first)
    if kind == "identical":
        image = text = image[:1].expand(b, -1).clone()
    elif kind == "duplicates":
        text = text[torch.arange(b) // 2]
    elif kind == "opposed":
        text = -image
    elif kind == "perfect":
        text = image.clone()
    image, text = image.requires_grad_(), text.clone().requires_grad_()
    logit_scale = torch.tensor(scale, requires_grad=True)
    for name, loss in _calls().items():
        loss(*first, logit_scale)
        for _ in range(2):
            value = loss(image, text, logit_scale)
            gradients = torch.autograd.grad(value.loss, (image, text, logit_scale))
            assert all(part.isfinite().all() for part in (value.loss, *gradients)), name


def test_equal_keys_in_a_batch_and_what_is_not_finite() -> None:
    """Across an epoch's border a row may come twice: the later one is kept. NaN is not kept."""
    loss = FastCLIP(4, gamma=0.5, learns_scale=False)
    image, text, scale = _unit(3, 4, 0), _unit(3, 4, 1), _number(5.0)
    alone = FastCLIP(4, gamma=0.5, learns_scale=False)
    alone(image, text, scale, keys=torch.tensor([0, 1, 2]))
    loss(image, text, scale, keys=torch.tensor([0, 2, 2]))
    known = alone.state_dict()["log_u"]
    assert loss.state_dict()["rows"].tolist() == [0, 2]
    torch.testing.assert_close(loss.state_dict()["log_u"], known[:, [0, 2]])
    bad = loss(image * float("nan"), text, scale, keys=torch.tensor([0, 1, 2]))
    assert not bad.loss.isfinite()
    torch.testing.assert_close(loss.state_dict()["log_u"], known[:, [0, 2]])


def test_metrics_are_numbers() -> None:
    image, text, scale = _unit(4, 4, 0), _unit(4, 4, 1), _number(5.0)
    for name, loss in _calls().items():
        metrics = loss(image, text, scale).metrics
        assert {"loss", "logit_scale"} <= metrics.keys(), name
        assert ("logit_bias" in metrics) == name.startswith("sigmoid")
        assert all(part.ndim == 0 and not part.requires_grad for part in metrics.values()), name
    first = FastCLIP(9, gamma=0.5, learns_scale=False)
    shares = [
        first(image, text, scale, keys=torch.tensor(keys)).metrics["first_visit_share"].item()
        for keys in ([0, 1, 2, 3], [2, 3, 4, 5])
    ]
    assert shares == [1.0, 0.5]


def test_missing_inputs_are_named() -> None:
    image, text, scale = _unit(4, 4, 0), _unit(4, 4, 1), _number(5.0)
    for loss in (SigmoidLocal(), SigmoidRing()):
        with pytest.raises(ValueError, match="needs logit_bias"):
            loss(image, text, scale)
    with pytest.raises(ValueError, match="needs keys"):
        FastCLIP(4, gamma=0.5, learns_scale=True)(image, text, scale)
