"""Laws of bias and variance: where a small batch ends, and what a prior may weigh for it to."""

import math
from collections.abc import Iterator
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.bench.bias import (
    CONVENTIONAL,
    OURS,
    Run,
    Setting,
    draw_pairs,
    infonce,
    mean_cosine,
    train,
)
from pipeline.losses.gamma import GammaLoss, Opened
from pipeline.losses.normalizer import CountedEvidence, Evidence
from pipeline.losses.priors import HistoryPrior, QueuePrior

NO_POSITIVE = 10**9  # K so large that e^{s_ii}/K is nothing


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of calls on tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class _FixedEvidence(Evidence):
    def __init__(self, weight: float):
        super().__init__()
        self._weight = weight

    def update(self, *_: object) -> float:
        return self._weight


def _loss(num_virtual: int, g: float, prior: QueuePrior | HistoryPrior | None = None) -> GammaLoss:
    return GammaLoss(
        virtual_batch=num_virtual + 1,
        prior=prior,
        image_evidence=_FixedEvidence(g),
        text_evidence=_FixedEvidence(g),
    )


def _unit(rows: int, dim: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def _log_mean_exp(logits: Tensor) -> Tensor:
    return logits.logsumexp(1) - math.log(logits.shape[1])


def _weights(opened: Opened, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines, and each pair's weight for its image and for its text anchor (none for i = j)."""
    cosines = opened.features.image @ opened.features.text.T
    own = torch.eye(len(cosines), dtype=torch.bool)
    logits = (scale * cosines).masked_fill(own, -math.inf)
    by_image = (logits + opened.weights.image[:, None]).exp()
    by_text = (logits + opened.weights.text[None, :]).exp()
    return cosines, by_image, by_text


@pytest.mark.parametrize("b", [17, 65])
def test_bias_of_same_batch_and_of_decoupled_normalisers(b: int) -> None:
    """The delta method, for the repulsion E_j[w_ij c_ij] (the scale's gradient) with n negatives:
    same batch (1/n) (-Cov(e^s c, e^s)/Z^2 + E[e^s c]/Z chi2), an independent one the last term.

    Embeddings are uniform on S^3, so that e^{s_ij} has the same law for every anchor.
    """
    n, dim, scale = b - 1, 4, 2.5
    grid = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    law = (1 - grid.square()).sqrt() / (1 - grid.square()).sqrt().sum()
    e = (scale * grid).exp()
    z, pull, square = ((law * value).sum() for value in (e, e * grid, e * e))
    chi2 = square / z**2 - 1
    jensen = (pull / z * chi2 / n).item()
    directional = -(((law * e * e * grid).sum() - pull * z) / z**2 / n).item()
    assert chi2 / n < 0.2, "beyond, the delta method itself is off"

    generator = torch.Generator().manual_seed(b)
    found: dict[str, list[Tensor]] = {"same": [], "decoupled": []}
    for _ in range(40_000 // b):
        image, text = _unit(b, dim, generator), _unit(b, dim, generator)
        others = _unit(n, dim, generator)
        log_z = _log_mean_exp(scale * image @ others.T), _log_mean_exp(scale * text @ others.T)
        logit_scale = torch.tensor(scale, dtype=torch.float64)
        same = _loss(NO_POSITIVE, 1.0).open(image, text, logit_scale)
        decoupled = _loss(NO_POSITIVE, 1e-12).open(image, text, logit_scale, *log_z)
        for name, opened in (("same", same), ("decoupled", decoupled)):
            cosines, by_image, by_text = _weights(opened, scale)
            exact = (scale * cosines).exp().fill_diagonal_(0) / (n * z)
            found[name] += [
                ((by_image - exact) * cosines).sum(1),
                ((by_text - exact) * cosines).sum(0),
            ]
    bias = {name: torch.cat(parts).mean().item() for name, parts in found.items()}
    assert bias["same"] < 0 < bias["decoupled"]
    assert bias["same"] == pytest.approx(directional + jensen, rel=0.2)
    assert bias["decoupled"] == pytest.approx(jensen, rel=0.2)


def _total_weights(g: float, num_current: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean weight [K] of anchor 0's negatives over every choice of the batch from K + 1 pairs, the
    rest being in the queue; 1 - p+ of InfoNCE on all; its softmax over the negatives [K]."""
    num_virtual, scale = 6, 5.0
    generator = torch.Generator().manual_seed(0)
    # Rounded to what the queue keeps, so that batch and queue see the same numbers.
    image, text = (_unit(num_virtual + 1, 4, generator).float().double() for _ in range(2))
    total = torch.zeros(num_virtual, dtype=torch.float64)
    choices = list(combinations(range(1, num_virtual + 1), num_current))
    for chosen in choices:
        batch = torch.tensor([0, *chosen])
        rest = torch.tensor([j for j in range(1, num_virtual + 1) if j not in chosen])
        queue = QueuePrior(num_virtual, 4)
        queue.load_state_dict([{"image": image[rest], "text": text[rest], "keys": rest}], 0, 1)
        loss = _loss(num_virtual, g, queue)
        opened = loss.open(
            image[batch], text[batch], torch.tensor(scale, dtype=torch.float64), keys=batch
        )
        _, by_image, _ = _weights(opened, scale)
        total[batch[1:] - 1] += by_image[0, 1:]
    softmax = (scale * image[0] @ text.T).softmax(0)
    return total / len(choices), 1 - softmax[0], softmax[1:]


@pytest.mark.parametrize("num_current", [1, 2, 4])
def test_queue_and_batch_weigh_as_infonce_on_both(num_current: int) -> None:
    """E sum_j w_ij = 1 - p+, and each E w_ij is InfoNCE's softmax on all K, if g = n/K.

    Exchangeable: each choice of the n current ones of K negatives is as likely, so the
    expectation is a mean over all choices, without sampling.
    """
    mean, repulsion, softmax = _total_weights(num_current / 6, num_current)
    torch.testing.assert_close(mean, softmax, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(mean.sum(), repulsion, rtol=1e-6, atol=1e-8)


def test_queue_with_another_weight_is_biased() -> None:
    mean, repulsion, _ = _total_weights(0.8, 2)
    assert mean.sum() < 0.97 * repulsion, "more weight to the batch than its share: under-repels"


def test_a_queue_counts_for_no_more_than_it_holds() -> None:
    """Or else the first batches, weighed by a nearly empty queue, throw the model far off."""
    loss = GammaLoss(
        virtual_batch=104,
        prior=QueuePrior(100, 4),
        image_evidence=CountedEvidence(),
        text_evidence=CountedEvidence(),
    )
    generator = torch.Generator().manual_seed(0)
    for held in (0, 4, 8, 12):
        image, text = _unit(4, 4, generator), _unit(4, 4, generator)
        metrics = loss(image, text, torch.tensor(5.0, dtype=torch.float64)).metrics
        weight = metrics.get("prior_batch_weight_text", torch.ones(()))
        assert weight.item() == pytest.approx(3 / (3 + held))


def test_counted_evidence_is_the_batchs_share() -> None:
    assert CountedEvidence().update(0.0, 1.0, 3, 1031) == 3 / 1031


def _clustered(rows: int, generator: torch.Generator) -> Tensor:
    center = torch.tensor([1.0, 0, 0, 0, 0])
    return F.normalize(center + 0.2 * torch.randn(rows, 5, generator=generator), dim=1)


@pytest.mark.parametrize("g", [0.1, 0.5, 0.9])
def test_history_is_the_linear_moving_average(g: float) -> None:
    """Mixing by logaddexp equals, in fp64, Zbar <- (1 - g) Zbar + g Zhat; its first visit Zhat.

    At logit scale 100 on like embeddings e^s is 1e35 to 1e43: the sums overflow fp32.
    """
    generator = torch.Generator().manual_seed(0)
    rows, scale, keys = 9, torch.tensor(100.0), torch.arange(9)
    prior = HistoryPrior(rows, rank=0, world_size=1)
    loss = _loss(4096, g, prior)
    average = torch.zeros(2, rows, dtype=torch.float64)
    own = torch.eye(rows, dtype=torch.bool)
    for visit in range(8):
        image, text = _clustered(rows, generator), _clustered(rows, generator)
        logits = (100 * image.double() @ text.double().T).masked_fill(own, -math.inf)
        sums = torch.stack([logits.exp().sum(1), logits.exp().sum(0)]) / (rows - 1)
        gain = g if visit else 1.0
        average = (1 - gain) * average + gain * sums
        value = loss(image.requires_grad_(), text.requires_grad_(), scale, keys=keys).loss
        assert value.isfinite()
        remembered = prior.predict(image, text, scale, keys)
        for side in (0, 1):
            belief = remembered[side]
            assert belief is not None
            torch.testing.assert_close(belief.double(), average[side].log(), rtol=0, atol=2e-4)
    assert average.max() > torch.finfo(torch.float32).max, "the case is worth the trouble"


@pytest.mark.parametrize("kind", ["identical", "opposed", "random"])
def test_history_is_finite_at_first_visits_at_scale_100(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    prior = HistoryPrior(12, rank=0, world_size=1)
    loss = GammaLoss(virtual_batch=4096, prior=prior)
    scale = torch.tensor(100.0, requires_grad=True)
    for keys in (torch.arange(6), torch.arange(3, 9), torch.arange(6, 12), torch.arange(6)):
        image = _unit(6, 5, generator).float()
        text = _unit(6, 5, generator).float()
        if kind != "random":
            image = image[:1].expand(6, -1).clone()
            text = image.clone() if kind == "identical" else -image
        inputs = image.requires_grad_(), text.requires_grad_(), scale
        value = loss(*inputs, keys=keys)
        assert value.loss.isfinite()
        assert all(
            gradient.isfinite().all() for gradient in torch.autograd.grad(value.loss, inputs)
        )


@pytest.mark.parametrize("spread", [0.7, 1.5])
def test_variance_of_shards_against_one_batch(spread: float) -> None:
    """Var_sharded / Var_gathered = (1 + rho/(b-1)) / (1 + rho/(B-1)), rho = s12 / (s1 + s2).

    For kernel H_ij (image i, text j): s1 = Var E[H|i], s2 = Var E[H|j], s12 the interaction. Exact
    for given normalisers and independent images and texts. Draws come from a finite population, so
    that Z and the components of variance are known; a larger spread has a smaller rho.
    """
    total, b, scale, population = 16, 4, 6.0, 300
    generator = torch.Generator().manual_seed(0)
    far = torch.zeros(2, 5, dtype=torch.float64)
    far[:, 0] = 1
    images, texts = (
        F.normalize(
            0.5 * spread * torch.randn(population, 1, generator=generator) * far[side]
            + 0.3 * torch.randn(population, 5, generator=generator, dtype=torch.float64)
            + far[side],
            dim=1,
        )
        for side in (0, 1)
    )
    cosines = images @ texts.T
    e = (scale * cosines).exp()
    log_z = e.mean(1).log(), e.mean(0).log()
    kernel = 0.5 * (e / e.mean(1, keepdim=True) + e / e.mean(0, keepdim=True)) * cosines
    by_image = kernel.mean(1) - kernel.mean()
    by_text = kernel.mean(0) - kernel.mean()
    interaction = kernel - kernel.mean() - by_image[:, None] - by_text[None, :]
    main = by_image.square().mean() + by_text.square().mean()
    rho = (interaction.square().mean() / main).item()
    expected = (1 + rho / (b - 1)) / (1 + rho / (total - 1))
    assert expected > 1.5, "a case that tells"

    logit_scale = torch.tensor(scale, dtype=torch.float64)

    def repulsion(rows: Tensor, columns: Tensor) -> Tensor:
        opened = _loss(NO_POSITIVE, 1e-12).open(
            images[rows], texts[columns], logit_scale, log_z[0][rows], log_z[1][columns]
        )
        cosines, by_image, by_text = _weights(opened, scale)
        return 0.5 * ((by_image + by_text) * cosines).sum() / len(rows)

    gathered, sharded = [], []
    for _ in range(1500):
        rows, columns = torch.randint(population, (2, total), generator=generator)
        gathered.append(repulsion(rows, columns))
        parts = zip(rows.split(b), columns.split(b), strict=True)
        sharded.append(torch.stack([repulsion(*part) for part in parts]).mean())
    ratio = (torch.stack(sharded).var() / torch.stack(gathered).var()).item()
    assert ratio == pytest.approx(expected, rel=0.15)


def test_the_optimum_of_the_expected_loss_at_four_pairs() -> None:
    """Misspecified data (vMF captions of concentration 3 or 30), local batch 4: at which scale the
    expected gradient vanishes, in units of the optimum of the objective without sampling.

    Ours: a Newton step from 1.0, where the gradient with the exact normaliser has mean zero and
    serves as control variate. InfoNCE: bisection, the same pairs at every scale.
    """
    setting = Setting(local_batch=4)
    best, dim, num_batches = setting.best_scale, setting.dim, 2500
    fill = setting.queue // 4
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    images, texts = draw_pairs(
        rotation, setting.concentrations(1.0), (fill + num_batches) * 4, generator
    )
    images = (images @ rotation).view(-1, 4, dim)
    texts = texts.view(-1, 4, dim)

    low, high = 0.1, 2.0
    for _ in range(20):
        middle = (low + high) / 2
        scale = torch.tensor(middle * best, requires_grad=True)
        (gradient,) = torch.autograd.grad(infonce(images, texts, scale), scale)
        low, high = (middle, high) if gradient < 0 else (low, middle)
    assert (low + high) / 2 < 0.75

    anywhere = F.normalize(torch.randn(1_000_000, dim, generator=generator), dim=1)
    log_z = (best * anywhere[:, 0]).logsumexp(0) - math.log(len(anywhere))
    loss = GammaLoss(
        virtual_batch=setting.virtual_batch,
        prior=QueuePrior(setting.queue, dim),
        image_evidence=CountedEvidence(),
        text_evidence=CountedEvidence(),
    )
    drift = []
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        scale = torch.tensor(best, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(image, text, scale).loss, scale)
        cosines = image @ text.T
        pushed = ((best * cosines - log_z).exp() * cosines).fill_diagonal_(0).sum() / (4 * 3)
        if index >= fill:
            drift.append(gradient - (pushed - cosines.diagonal().mean()))
    slope = (mean_cosine(best * 1.01, dim) - mean_cosine(best * 0.99, dim)) / (0.02 * best)
    assert 0.97 < 1 - torch.stack(drift).mean().item() / (slope * best) < 1.03


def test_training_reaches_the_optimum_where_infonce_does_not() -> None:
    """The benchmark in small: 500 of its 2,000 steps, so a run's noise is about 0.03."""
    setting = Setting(steps=500)
    final = {
        loss: train(Run(level="heavy", loss=loss, seed=0, setting=setting)).final
        for loss in (CONVENTIONAL, OURS)
    }
    assert 0.9 < final[OURS] < 1.1
    assert final[CONVENTIONAL] < 0.75
