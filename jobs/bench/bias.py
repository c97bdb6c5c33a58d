"""Does a loss end where the expected objective has its optimum? Small batches, injected noise.

    python -m jobs.bench.bias [--quick] [--json FILE] [--figure FILE]

The experiment on synthetic data of "Why do we need large batch sizes in contrastive learning? A
gradient-bias perspective" (NeurIPS 2022), rebuilt: value against step, ten runs from different
initial values, noise from none to heavy, the conventional loss against the decomposable one at the
same small batch. The optimum is 1.0.

Data. Images x are uniform on the sphere S^5. The caption of x is a draw y ~ vMF(R^T x, kappa)
around its rotated image, R a random rotation, so y is uniform too. kappa is how precise a caption
is: A(kappa) = E<R^T x, y> is its mean cosine.

Noise is how unequal captions are in precision: for half of them A(kappa) = m - spread, for the
others m + spread, with m fixed. Without noise all captions have one kappa and the model contains
the truth: the log density ratio is kappa <R^T x, y>. With noise no temperature fits both halves.

Model. A linear image tower, normalised, x -> xA / |xA|; captions as they are; one logit scale
lambda. By symmetry the optimum of the expected objective with infinitely many negatives,
E[-s_ii + log E_j e^{s_ij}], has A parallel to R; there d log E_j e^{s_ij} / d lambda = A(lambda),
so lambda* solves A(lambda*) = E A(kappa) = m: the same at every level of noise. The value of a run
is the regression of its scores on the optimal ones over independent x and y,

    value = E[s s*] / E[s* s*] = lambda / lambda* E<xA / |xA|, xR>,    1.0 at the optimum.

Why bias needs noise to show. The expected InfoNCE loss on n negatives has a minimiser of its own
for each n. When the model contains the log density ratio, that ratio minimises it at every n (the
loss is the log likelihood of the true pair among n + 1), so biased gradients still end at 1.0. As
soon as the model is misspecified, as every real one is, the minimiser moves with n.

Runs. Every pair is seen once. A step has W workers of b pairs each; each worker has a loss of its
own (queue, evidence), and the mean is stepped on: no anchor meets another worker's pairs. SGD,
cosine schedule to zero, last iterate. The simulation is exact: workers' losses share nothing.

Goal, or exit status 1: at the heaviest noise the decomposable loss ends within 3 % of 1.0 in every
run, the conventional one in none.
"""

import math
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from jobs.bench.report import arguments, conclude, show_table
from pipeline.losses.gamma import GammaLoss
from pipeline.losses.normalizer import CountedEvidence, Evidence
from pipeline.losses.priors import AmortizedPrior, QueuePrior

GOAL = 0.03  # largest distance of a final value from 1.0
CONVENTIONAL, OURS = "InfoNCE", "gamma, queue"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What all runs have in common; rates are at the first step."""

    dim: int = 6
    workers: int = 8
    local_batch: int = 8
    queue: int = 1024  # pairs a worker
    steps: int = 2000
    matrix_rate: float = 0.2
    scale_rate: float = 0.2
    prior_rate: float = 1e-3  # Adam's, of the amortized prior
    largest_scale: float = 100.0
    largest_initial_scale: float = 20.0
    evaluate_every: int = 20  # steps
    vague: float = 3.0  # concentrations of captions at the heaviest noise
    precise: float = 30.0

    @property
    def virtual_batch(self) -> int:
        """K + 1: the positive, the local negatives and the queue."""
        return self.queue + self.local_batch

    @property
    def middle(self) -> float:
        """m: the mean cosine of captions at every level."""
        return (mean_cosine(self.vague, self.dim) + mean_cosine(self.precise, self.dim)) / 2

    def concentrations(self, noise: float) -> tuple[float, float]:
        """Give kappa of the vague and of the precise half at a share `noise` of the full spread."""
        half = (mean_cosine(self.precise, self.dim) - mean_cosine(self.vague, self.dim)) / 2
        low, high = (concentration(self.middle + sign * noise * half, self.dim) for sign in (-1, 1))
        return low, high

    @property
    def best_scale(self) -> float:
        """lambda*: see the module's docstring."""
        return concentration(self.middle, self.dim)


LEVELS = {"none": 0.0, "light": 1 / 3, "moderate": 2 / 3, "heavy": 1.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training: a level of noise, a loss, a seed (data, initial values)."""

    level: str
    loss: str
    seed: int
    setting: Setting


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A run's values at `steps`; the last is its final value. `scale` is its last logit scale."""

    run: Run
    steps: list[int]
    values: list[float]
    scale: float

    @property
    def final(self) -> float:
        """The value after the last step."""
        return self.values[-1]

    @property
    def is_within(self) -> bool:
        """Whether it ended as near to the optimum as the goal asks."""
        return abs(self.final - 1) < GOAL


# ---- data


def _cosine_law(kappa: float, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines on a fine grid and their probabilities under vMF(mu, kappa): ~ e^{kappa c}
    (1 - c^2)^{(dim - 3) / 2} (Mardia and Jupp, Directional Statistics, 2000, section 9.3)."""
    edges = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    cosines = (edges[1:] + edges[:-1]) / 2
    log_density = kappa * cosines + (dim - 3) / 2 * torch.log1p(-cosines.square())
    return cosines, log_density.softmax(0)


def mean_cosine(kappa: float, dim: int) -> float:
    """A(kappa): the mean cosine of vMF(mu, kappa) draws to mu; rises from 0 to 1."""
    cosines, probability = _cosine_law(kappa, dim)
    return float((cosines * probability).sum())


def concentration(cosine: float, dim: int) -> float:
    """The kappa of which `cosine` is the mean cosine, by bisection of log kappa."""
    low, high = math.log(1e-3), math.log(1e3)
    for _ in range(60):
        middle = (low + high) / 2
        if mean_cosine(math.exp(middle), dim) < cosine:
            low = middle
        else:
            high = middle
    return math.exp(low)


def draw_pairs(
    rotation: Float[Tensor, "dim dim"],
    concentrations: Iterable[float],
    count: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "count dim"], Float[Tensor, "count dim"]]:
    """Draw images and their captions, unit norm; each kappa equally often on average."""
    dim, kappas = len(rotation), list(concentrations)
    image = F.normalize(torch.randn(count, dim, generator=generator), dim=1)
    kind = torch.randint(len(kappas), (count,), generator=generator)
    cosine = torch.empty(count)
    for index, kappa in enumerate(kappas):
        chosen = kind == index
        grid, probability = _cosine_law(kappa, dim)
        uniform = torch.rand(int(chosen.sum()), generator=generator, dtype=torch.float64)
        place = torch.searchsorted(probability.cumsum(0), uniform).clamp(max=len(grid) - 1)
        cosine[chosen] = grid[place].float()
    center = image @ rotation
    aside = torch.randn(count, dim, generator=generator)
    aside = F.normalize(aside - (aside * center).sum(1, keepdim=True) * center, dim=1)
    sine = (1 - cosine.square()).clamp(min=0).sqrt()
    return image, cosine[:, None] * center + sine[:, None] * aside


# ---- losses


class Sharded(Protocol):
    """The mean loss of the workers of one step."""

    def __call__(
        self,
        image: Float[Tensor, "workers local dim"],
        text: Float[Tensor, "workers local dim"],
        scale: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """Give the loss of unit-norm embeddings; text [w, i] is the caption of image [w, i]."""
        ...


def infonce(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of each worker's own pairs: negatives are local."""
    logits = scale * image @ text.transpose(1, 2)
    workers, local, _ = logits.shape
    labels = torch.arange(local).expand(workers, -1)
    return 0.5 * (F.cross_entropy(logits.transpose(1, 2), labels) + F.cross_entropy(logits, labels))


def infonce_gathered(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The same over all workers' pairs: what gathering the features buys."""
    return infonce(image.reshape(1, -1, image.shape[2]), text.reshape(1, -1, text.shape[2]), scale)


class ShardedGamma:
    """A gamma loss for each worker, and an amortized prior that they train together, or none."""

    def __init__(self, workers: Iterable[GammaLoss], prior: AmortizedPrior | None = None):
        self.workers = list(workers)
        self.prior = prior

    def __call__(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        """Give the mean over workers."""
        log_z = None, None
        if self.prior is not None:
            flat = self.prior(image.flatten(0, 1), text.flatten(0, 1), scale)
            log_z = tuple(side.view(image.shape[:2]) for side in flat)
        values = [
            loss(
                image[worker], text[worker], scale, *(s if s is None else s[worker] for s in log_z)
            )
            for worker, loss in enumerate(self.workers)
        ]
        return torch.stack([value.loss for value in values]).mean()


def _gamma(
    setting: Setting, *, queue: bool = False, amortized: bool = False, counted: bool = False
) -> ShardedGamma:
    def worker() -> GammaLoss:
        evidence = CountedEvidence if counted else Evidence
        return GammaLoss(
            virtual_batch=setting.virtual_batch,
            prior=QueuePrior(setting.queue, setting.dim) if queue else None,
            scale_rule="plain",
            image_evidence=evidence(),
            text_evidence=evidence(),
        )

    return ShardedGamma(
        [worker() for _ in range(setting.workers)],
        AmortizedPrior(setting.dim) if amortized else None,
    )


LOSSES: dict[str, Callable[[Setting], Sharded]] = {
    CONVENTIONAL: lambda _: infonce,
    "InfoNCE, gathered": lambda _: infonce_gathered,
    OURS: partial(_gamma, queue=True, counted=True),
    "gamma, queue, evidence measured": partial(_gamma, queue=True),
    "gamma, amortized": partial(_gamma, amortized=True, counted=True),
    "gamma, amortized, evidence measured": partial(_gamma, amortized=True),
    "gamma, no prior": _gamma,
}


# ---- runs


def train(run: Run) -> Outcome:
    """Train from random initial values and follow the value."""
    setting = run.setting
    generator = torch.Generator().manual_seed(run.seed)
    torch.manual_seed(run.seed)
    shape = (setting.dim, setting.dim)
    rotation = torch.linalg.qr(torch.randn(shape, generator=generator))[0]
    matrix = (torch.randn(shape, generator=generator) / math.sqrt(setting.dim)).requires_grad_()
    reach = setting.largest_initial_scale - 1
    scale = (1 + reach * torch.rand((), generator=generator)).requires_grad_()
    probe = F.normalize(torch.randn(1000, setting.dim, generator=generator), dim=1)
    batch = setting.workers * setting.local_batch
    images, texts = draw_pairs(rotation, setting.concentrations(LEVELS[run.level]),
                               setting.steps * batch, generator)  # fmt: skip
    shards = (setting.steps, setting.workers, setting.local_batch, setting.dim)
    images, texts = images.view(shards), texts.view(shards)

    loss = LOSSES[run.loss](setting)
    rates = [
        {"params": [matrix], "lr": setting.matrix_rate},
        {"params": [scale], "lr": setting.scale_rate},
    ]
    optimizer = torch.optim.SGD(rates)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps)
    trained_prior = loss.prior if isinstance(loss, ShardedGamma) else None
    prior_optimizer = (
        torch.optim.Adam(trained_prior.parameters(), setting.prior_rate) if trained_prior else None
    )

    best_scale = setting.best_scale

    @torch.no_grad()
    def value() -> float:
        found = F.normalize(probe @ matrix, dim=1)
        return float(scale / best_scale * (found * (probe @ rotation)).sum(1).mean())

    steps, values = [0], [value()]
    for step in range(setting.steps):
        optimizer.zero_grad()
        embedded = F.normalize(images[step] @ matrix, dim=2)
        loss(embedded, texts[step], scale).backward()
        optimizer.step()
        schedule.step()
        if prior_optimizer is not None:
            prior_optimizer.step()
            prior_optimizer.zero_grad()
        with torch.no_grad():
            scale.clamp_(1, setting.largest_scale)
        if (step + 1) % setting.evaluate_every == 0:
            steps.append(step + 1)
            values.append(value())
    return Outcome(run=run, steps=steps, values=values, scale=scale.item())


def plan(setting: Setting, num_seeds: int, num_extra_seeds: int) -> list[Run]:
    """The runs: both losses and the gathered one at all levels, all others at the heaviest."""
    compared = [CONVENTIONAL, "InfoNCE, gathered", OURS]
    heaviest = list(LEVELS)[-1]
    runs = [(level, loss, num_seeds) for loss in compared for level in LEVELS]
    runs += [(heaviest, loss, num_extra_seeds) for loss in LOSSES if loss not in compared]
    return [
        Run(level=level, loss=loss, seed=seed, setting=setting)
        for level, loss, seeds in runs
        for seed in range(seeds)
    ]


def train_all(runs: list[Run]) -> list[Outcome]:
    """Train on all CPUs, one thread each; outcomes in the order of `runs`."""
    found: dict[Run, Outcome] = {}
    with ProcessPoolExecutor(
        os.cpu_count(), get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        for future in as_completed([pool.submit(train, run) for run in runs]):
            found[future.result().run] = future.result()
            if sys.stderr.isatty():
                print(f"\r{len(found)} of {len(runs)} runs", end="", file=sys.stderr, flush=True)
    return [found[run] for run in runs]


# ---- report


def rows(outcomes: list[Outcome]) -> list[list[str]]:
    """One row for each loss and level, in the order of the runs."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.run.loss, outcome.run.level), []).append(outcome)
    table = []
    for (loss, level), group in groups.items():
        finals = [outcome.final for outcome in group]
        numbers = [f"{number:.3f}" for number in (mean(finals), min(finals), max(finals))]
        within = sum(outcome.is_within for outcome in group)
        table.append([loss, level, *numbers, f"{within} of {len(group)}"])
    return table


def misses(outcomes: list[Outcome]) -> list[str]:
    """What of the goal was missed, in sentences; empty when it was met."""
    heaviest = [
        outcome for outcome in outcomes if LEVELS[outcome.run.level] == max(LEVELS.values())
    ]
    ours = [outcome for outcome in heaviest if outcome.run.loss == OURS]
    conventional = [outcome for outcome in heaviest if outcome.run.loss == CONVENTIONAL]
    found = []
    if not all(outcome.is_within for outcome in ours):
        found.append(f"'{OURS}' does not end within {GOAL:.0%} of 1.0 in every run.")
    if any(outcome.is_within for outcome in conventional):
        found.append(f"'{CONVENTIONAL}' ends within {GOAL:.0%} of 1.0 in some run.")
    return found


def draw(outcomes: list[Outcome], file: Path) -> None:
    """Draw value against step: a panel for each level, a thin line for each run."""
    from matplotlib.figure import Figure

    setting = outcomes[0].run.setting
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, len(LEVELS), sharey=True)
    for panel, (level, noise) in zip(panels, LEVELS.items(), strict=True):
        for loss, color in ((CONVENTIONAL, "tab:orange"), (OURS, "tab:blue")):
            shown = [o for o in outcomes if (o.run.level, o.run.loss) == (level, loss)]
            for index, outcome in enumerate(shown):
                label = f"{loss} ({len(shown)} runs)" if index == 0 else None
                panel.plot(outcome.steps, outcome.values, color=color, linewidth=0.7, label=label)
        panel.axhline(1, color="black", linewidth=1, linestyle="--", label="optimum")
        kappas = sorted(
            {f"{kappa:.1f}": None for kappa in setting.concentrations(noise)}, key=float
        )
        panel.set(title=f"noise {level}: κ = {' and '.join(kappas)}", xlabel="step", ylim=(0, 2))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("value")
    panels[0].legend(loc="upper right", fontsize=9)
    figure.suptitle(f"Value against step at local batch {setting.local_batch}: "
                    "regression of scores on the optimal ones")  # fmt: skip
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run, report, and exit by the goal."""
    options = arguments(__doc__).parse_args()
    setting = Setting()
    num_seeds, num_extra_seeds = (1, 1) if options.quick else (10, 4)
    if options.quick:
        print("quick: 1 seed, not 10")
    outcomes = train_all(plan(setting, num_seeds, num_extra_seeds))
    show_table(
        f"Value after {setting.steps:,} steps, optimum 1.0; W={setting.workers}, "
        f"b={setting.local_batch}, queue {setting.queue:,}",
        ["loss", "noise", "mean", "min", "max", f"within {GOAL:.0%}"],
        rows(outcomes),
    )
    if options.figure is not None:
        draw(outcomes, options.figure)
    results = {
        "setting": {**asdict(setting), "virtual_batch": setting.virtual_batch},
        "best_scale": setting.best_scale,
        "kappa": {level: setting.concentrations(noise) for level, noise in LEVELS.items()},
        "largest_distance": GOAL,
        "runs": [
            {
                "level": outcome.run.level,
                "loss": outcome.run.loss,
                "seed": outcome.run.seed,
                "final": outcome.final,
                "scale": outcome.scale,
                "steps": outcome.steps,
                "values": outcome.values,
            }
            for outcome in outcomes
        ],
    }
    conclude(results, misses(outcomes), options.json)


if __name__ == "__main__":
    main()
