"""Laws of what a fusion model learns from: each loss against a literal reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.losses.fusion import (
    MomentumContrast,
    mask_words,
    masked_words_loss,
    matching_loss,
)
from pipeline.losses.gamma import GammaLoss
from pipeline.losses.normalizer import CountedEvidence
from pipeline.losses.priors import QueuePrior

DIM = 6


def _unit(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, DIM, generator=generator, dtype=torch.float64), dim=1)


def _features(rows: int, seed: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Image and text features, with gradient; the momentum model's, without; a scale."""
    own = [_unit(rows, seed + k).requires_grad_() for k in range(2)]
    slow = [_unit(rows, seed + k) for k in range(2, 4)]
    return own, slow, torch.tensor(9.0, dtype=torch.float64, requires_grad=True)


def _contrast(virtual_batch: int, queue: int) -> MomentumContrast:
    def side() -> GammaLoss:
        prior = QueuePrior(queue, DIM, one_sided=True) if queue else None
        if prior is not None:
            prior._held["text"] = prior._held["text"].double()
        return GammaLoss(
            virtual_batch=virtual_batch,
            prior=prior,
            one_sided=True,
            image_evidence=CountedEvidence(),
        )

    return MomentumContrast(image=side(), text=side())


def _albef(
    anchors: Tensor, own: Tensor, others: Tensor, queue: Tensor, scale: Tensor, alpha: float
) -> Tensor:
    """One direction of ALBEF's contrast, a row at a time (section 3.3, eq. 5 and 6)."""
    candidates = torch.cat([others, queue])
    total = scale.new_zeros(())
    for row in range(len(anchors)):
        logits = scale * (candidates @ anchors[row])
        soft = (scale.detach() * (candidates @ own[row])).softmax(0)
        target = alpha * soft
        target[row] += 1 - alpha
        total = total - (target * logits.log_softmax(0)).sum()
    return total / len(anchors)


def _call(contrast: MomentumContrast, own: list[Tensor], slow: list[Tensor], scale: Tensor,
          alpha: float, first: int = 0) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    keys = torch.arange(len(own[0])) + first
    value = contrast(*own, *slow, scale, keys=keys, alpha=alpha)
    return value.loss, value.metrics


@settings(max_examples=25)
@given(st.integers(2, 9), st.floats(0, 1), st.integers(0, 1000))
def test_without_a_queue_it_is_albefs_contrast_on_the_batch(
    rows: int, alpha: float, seed: int
) -> None:
    """Value and all gradients, that of the scale among them."""
    own, slow, scale = _features(rows, seed)
    ours, _ = _call(_contrast(rows, 0), own, slow, scale, alpha)
    nothing = torch.empty(0, DIM, dtype=torch.float64)
    literal = 0.5 * (
        _albef(own[0], slow[0], slow[1], nothing, scale, alpha)
        + _albef(own[1], slow[1], slow[0], nothing, scale, alpha)
    )
    torch.testing.assert_close(ours, literal, rtol=1e-9, atol=1e-9)
    inputs = [*own, scale]
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(literal, inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_with_a_full_queue_its_value_is_albefs_and_its_pull_too(alpha: float) -> None:
    """The queue counts in the normaliser: value, and gradient of the positives, to rounding.

    Its negatives carry no gradient; those of the batch stand for them, each n/K-th part K/n fold.
    """
    rows, queue = 4, 8
    contrast = _contrast(rows + queue, queue)
    scale = torch.tensor(9.0, dtype=torch.float64)
    past = [[_unit(rows, 50 + 10 * k + side) for side in range(2)] for k in range(2)]
    for index, slow in enumerate(past):
        own, _, _ = _features(rows, 90 + index)
        _call(contrast, own, slow, scale, alpha, first=100 + rows * index)
    own, slow, scale = _features(rows, 7)
    ours, metrics = _call(contrast, own, slow, scale, alpha)
    queues = [torch.cat([pair[side] for pair in past]) for side in range(2)]
    literal = 0.5 * (
        _albef(own[0], slow[0], slow[1], queues[1], scale, alpha)
        + _albef(own[1], slow[1], slow[0], queues[0], scale, alpha)
    )
    torch.testing.assert_close(ours, literal, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(metrics["loss"], literal.detach(), rtol=1e-9, atol=1e-9)
    assert float(metrics["prior_batch_weight_text"]) == pytest.approx((rows - 1) / (rows + 7))
    surrogate = _surrogate(own[0], slow, queues[1], scale, alpha)
    expected = torch.autograd.grad(surrogate / 2, own[0])[0]
    torch.testing.assert_close(torch.autograd.grad(ours, own[0])[0], expected, rtol=1e-7, atol=1e-9)


def _surrogate(
    anchors: Tensor, slow: list[Tensor], queue: Tensor, scale: Tensor, alpha: float
) -> Tensor:
    """mean_i of -sum_j t_ij s_ij + u_i (e^{s_ii}/K + (1/n) sum_{j != i} e^{s_ij}), u_i = 1/R_i."""
    own, others = slow
    candidates, rows = torch.cat([others, queue]), len(anchors)
    num_virtual, num_negatives = rows + len(queue) - 1, rows - 1
    total = scale.new_zeros(())
    for row in range(rows):
        logits = scale * (candidates @ anchors[row])
        target = alpha * (scale.detach() * (candidates @ own[row])).softmax(0)
        target[row] += 1 - alpha
        with torch.no_grad():
            rate = logits.exp().sum() / num_virtual  # of the positive, the batch and the queue
        local = sum(logits[j].exp() for j in range(rows) if j != row) / num_negatives
        total = total - (target * logits).sum() + (logits[row].exp() / num_virtual + local) / rate
    return total / rows


def test_the_queue_survives_a_save_and_another_number_of_workers() -> None:
    first, second = _contrast(12, 8), _contrast(12, 8)
    scale = torch.tensor(9.0, dtype=torch.float64)
    for worker, contrast in enumerate((first, second)):
        own, slow, _ = _features(4, worker)
        _call(contrast, own, slow, scale, 0.4, first=4 * worker)
    states = [first.state_dict(), second.state_dict()]
    again = _contrast(12, 8)
    again.load_state_dict(states, rank=1, world_size=2)
    for side in ("image", "text"):
        mine, theirs = again.state_dict()[side]["prior"], states[1][side]["prior"]
        assert {name: value.tolist() for name, value in mine.items()} == {
            name: value.tolist() for name, value in theirs.items()
        }
    alone = _contrast(12, 8)
    alone.load_state_dict(states, rank=0, world_size=1)
    assert sorted(alone.state_dict()["text"]["prior"]["keys"].tolist()) == list(range(8))


def test_one_pair_alone_gives_a_finite_loss() -> None:
    own, slow, scale = _features(1, 3)
    loss, _ = _call(_contrast(8, 4), own, slow, scale, 0.4)
    loss.backward()
    assert loss.isfinite()
    assert own[0].grad is not None
    assert own[0].grad.isfinite().all()


def test_matching_is_the_cross_entropy_of_labelled_pairs() -> None:
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0], [5.0, 0.0], [0.5, 0.1]])
    labels = torch.tensor([1, 1, -100, 0])
    loss, metrics = matching_loss(logits, labels)
    of = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1)), math.log(1 + math.exp(-0.4))]
    assert float(loss) == pytest.approx(sum(of) / 3, rel=1e-6)
    assert float(metrics["matching_accuracy"]) == pytest.approx(2 / 3)


@given(st.integers(0, 5), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=25)
def test_masked_words_is_the_literal_soft_cross_entropy(
    count: int, alpha: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, slow = torch.randn(2, count, 7, generator=generator)
    words = torch.randint(7, (count,), generator=generator)
    loss, metrics = masked_words_loss(logits.requires_grad_(), words, slow, alpha)
    total = 0.0
    for row in range(count):
        target = [alpha * float(p) for p in slow[row].softmax(0)]
        target[int(words[row])] += 1 - alpha
        total -= sum(
            t * float(p) for t, p in zip(target, logits[row].detach().log_softmax(0), strict=True)
        )
    assert loss.item() == pytest.approx(total / max(count, 1), rel=1e-4, abs=1e-6)
    loss.backward()
    assert logits.grad is not None, "every parameter has a gradient, even if nothing was masked"
    assert 0 <= float(metrics["masked_words_accuracy"]) <= 1


def test_words_are_masked_berts_way() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(10, 1000, (400, 50), dtype=torch.int32)
    tokens[:, 0], tokens[:, 40], tokens[:, 41:] = 1, 3, 0
    shown, chosen = mask_words(tokens, share=0.15, special=(1, 3, 0), mask=2, vocab_size=1000)
    assert shown.dtype == tokens.dtype
    assert not chosen[:, [0, *range(40, 50)]].any()
    assert (shown == tokens)[~chosen].all()
    words = 400 * 39
    assert chosen.sum() / words == pytest.approx(0.15, abs=0.01)
    as_mask = (shown == 2)[chosen].float().mean()
    kept = (shown == tokens)[chosen].float().mean()
    assert float(as_mask) == pytest.approx(0.8, abs=0.03)
    assert float(kept) == pytest.approx(0.1, abs=0.02)
