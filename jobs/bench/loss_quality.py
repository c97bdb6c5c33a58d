"""Quality of the losses at equal samples: recall@10 as a share of all-gathered InfoNCE's.

W workers are simulated exactly in one process: each has its own share of the batch and its own
running state, and the step's gradient is the mean of theirs. Towers are small (a convolutional
net and a bag of words), so that the whole study fits two cores; it says which loss is better,
not how good an encoder can be. Results go to a file as they come, and are not run twice.

    python -m jobs.bench.loss_quality --out FOLDER --emoji FOLDER --photos FOLDER
"""

import itertools
import json
import math
import multiprocessing as mp
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.bench.report import arguments, conclude, show_table
from pipeline.config.schema import OptimConfig
from pipeline.data.demo import make_row
from pipeline.data.image import BadImage, decode, eval_geometry
from pipeline.data.layout import as_captions, read_catalog
from pipeline.data.text import train_tokenizer
from pipeline.engine.optimizer import parameter_groups
from pipeline.engine.partners import partner
from pipeline.engine.schedule import lr_factor
from pipeline.evaluate.retrieval import retrieval
from pipeline.losses.base import Loss, LossValue
from pipeline.losses.contrastive import FastCLIP
from pipeline.losses.gamma import Features, GammaLoss, Opened, ScaleRule, Weights
from pipeline.losses.normalizer import CountedEvidence, Evidence
from pipeline.losses.pairs import LocalPairs
from pipeline.losses.priors import AmortizedPrior, HistoryPrior, Prior, QueuePrior
from pipeline.train.module import LOGIT_BIAS_INIT
from pipeline.train.objective import STATELESS

SIDE, DIM, LENGTH = 32, 64, 48
WARMUP_STEPS = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Decoded pairs in memory: images [n, 32, 32, 3] uint8, tokens [n, 48] (0 is padding)."""

    images: Tensor
    tokens: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Tensor) -> "Pairs":
        """Give some of the pairs."""
        return Pairs(images=self.images[rows], tokens=self.tokens[rows])


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A data set, cut into training and test pairs, and how long to train on it."""

    name: str
    train: Pairs
    test: Pairs
    vocab_size: int
    samples: int


def scenes(rows: int, test_rows: int) -> Task:
    """Scenes of the demo, each seen once."""
    drawn = [make_row("train", row, 1) for row in range(rows)]
    drawn += [make_row("test", row, 1) for row in range(test_rows)]
    return _task("scenes", [(row["image"], row["caption"]) for row in drawn], test_rows, rows)


def folder_task(name: str, folder: str, epochs: float) -> Task:
    """All pairs under a folder; one in five, drawn once for all, is kept for the test."""
    catalog = read_catalog(folder, "folder", split="all")
    columns = [catalog.sources[0].columns.image, catalog.sources[0].columns.caption]
    pairs = []
    for shard in catalog.shards:
        table = pq.read_table(shard.path, columns=columns)
        for image, caption in zip(*(table[column].to_pylist() for column in columns), strict=True):
            captions = as_captions(caption)
            if captions:
                pairs.append((image, captions[0]))
    order = np.random.default_rng(0).permutation(len(pairs))
    pairs = [pairs[row] for row in order]
    test_rows = len(pairs) // 5
    return _task(name, pairs, test_rows, round(epochs * (len(pairs) - test_rows)))


def _task(name: str, pairs: Sequence[tuple[Any, Any]], test_rows: int, samples: int) -> Task:
    images, captions = [], []
    for image, caption in pairs:
        content = image["bytes"] if isinstance(image, dict) else image
        try:
            images.append(eval_geometry(decode(content, (255, 255, 255)), SIDE))
        except BadImage:
            continue
        captions.append(caption)
    cut = len(images) - test_rows
    tokenizer = train_tokenizer(captions[:cut], 4096)
    tokens = torch.from_numpy(tokenizer.encode(captions, LENGTH)[0]).long()
    everything = Pairs(images=torch.from_numpy(np.stack(images)), tokens=tokens)
    return Task(
        name=name,
        train=everything.take(torch.arange(cut)),
        test=everything.take(torch.arange(cut, len(images))),
        vocab_size=tokenizer.vocab_size,
        samples=samples,
    )


class Towers(nn.Module):
    """A small convolutional net and a bag of words, with a logit scale."""

    def __init__(self, vocab_size: int):
        super().__init__()
        widths = (3, 32, 64, 128)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GELU()]
        self.image = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, DIM))
        self.words = nn.EmbeddingBag(vocab_size, 128, mode="mean", padding_idx=0)
        self.text = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, DIM))
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def forward(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """Give unit-norm image and text embeddings [n, 64], and the logit scale."""
        pixels = pairs.images.permute(0, 3, 1, 2).float().div(127.5).sub(1)
        scale = self.log_scale.clamp(0, math.log(100)).exp().squeeze(0)
        return (
            F.normalize(self.image(pixels), dim=1),
            F.normalize(self.text(self.words(pairs.tokens)), dim=1),
            scale,
        )


Simulated = Callable[[Tensor, Tensor, Tensor, Tensor, Any, Tensor], LossValue]


def over_shards(loss: Loss, workers: int) -> Simulated:
    """A comparator as `workers` see it: each its own share of the pairs."""

    def simulate(
        image: Tensor, text: Tensor, scale: Tensor, keys: Tensor, log_z: Any, bias: Tensor
    ) -> LossValue:
        del log_z
        shares = zip(*(side.chunk(workers) for side in (image, text, keys)), strict=True)
        values = [loss(x, y, scale, logit_bias=bias, keys=rows) for x, y, rows in shares]
        return LossValue(
            loss=torch.stack([value.loss for value in values]).mean(), metrics=values[0].metrics
        )

    return simulate


@dataclass(kw_only=True)
class Sharded:
    """A gamma loss on each worker; with partners, blocks met as over the wire.

    With `stale`, what partners sent one step ago: it would travel behind the towers' work.
    """

    losses: list[GammaLoss]
    exchange: int = 0
    oracle: bool = False
    stale: bool = False
    step: int = 0
    before: tuple[list[Features], list[Weights]] | None = None

    def __call__(
        self, image: Tensor, text: Tensor, scale: Tensor, keys: Tensor, log_z: Any, bias: Tensor
    ) -> LossValue:
        """Give the mean loss of the workers, who hold consecutive shares of the pairs."""
        del bias
        workers = len(self.losses)
        if self.oracle:
            pairs = LocalPairs(image.detach(), text.detach(), scale.detach(), len(image))
            log_z = pairs.sums(1).log_mean
        parts = list(zip(image.chunk(workers), text.chunk(workers), strict=True))
        beliefs: list[Any] = [(None, None)] * workers
        if log_z is not None:
            beliefs = list(zip(*(side.chunk(workers) for side in log_z), strict=True))
        shares = keys.chunk(workers)
        features = [Features(image=x.detach(), text=y.detach()) for x, y in parts]
        met = self.before[0] if self.before else features
        peers = [self._peers(rank) for rank in range(workers)]
        opened: list[Opened] = [
            self.losses[rank].open(
                *parts[rank],
                scale,
                image_log_z=beliefs[rank][0],
                text_log_z=beliefs[rank][1],
                keys=shares[rank],
                partners=partial(_of, met, peers[rank]),
            )
            for rank in range(workers)
        ]
        weights = [half.weights for half in opened]
        sent = self.before[1] if self.before else weights
        values = [
            self.losses[rank].close(opened[rank], partial(_of, sent, peers[rank]))
            for rank in range(workers)
        ]
        if self.stale:
            self.before = features, weights
        self.step += 1
        return LossValue(
            loss=torch.stack([value.loss for value in values]).mean(), metrics=values[0].metrics
        )

    def _peers(self, rank: int) -> list[int]:
        rounds = range(self.step * self.exchange, (self.step + 1) * self.exchange)
        found = [partner(rank, len(self.losses), round_) for round_ in rounds]
        return [peer for peer in found if peer is not None]


def _of(everyone: Sequence[Any], peers: Sequence[int]) -> list[Any]:
    return [everyone[peer] for peer in peers]


class _Exact(Evidence):
    """Trusts the prior alone."""

    def update(self, sampling: float, miss: float, num_negatives: int, num_virtual: float) -> float:
        """Give next to nothing for the batch."""
        del sampling, miss, num_negatives, num_virtual
        return 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A loss of the study. `comparator` is a loss.kind; else the gamma loss with the rest.

    `virtual` multiplies the global batch; with `counted` the prior stands for exactly the negatives
    that the batch lacks of it, else its evidence is measured.
    """

    comparator: str | None = None
    prior: str = "none"
    exchange: int = 0
    virtual: int = 1
    counted: bool = False
    stale: bool = False
    scale_rule: ScaleRule = "plain"


RECIPES: dict[str, Recipe] = {
    "InfoNCE gathered": Recipe(comparator="infonce_gathered"),
    "InfoNCE local": Recipe(comparator="infonce_local"),
    "gamma amortized": Recipe(prior="amortized"),
    "gamma amortized, k=1": Recipe(prior="amortized", exchange=1),
    "gamma none": Recipe(),
    "gamma none, k=1": Recipe(exchange=1),
    "gamma amortized, 4x virtual": Recipe(prior="amortized", virtual=4),
    "gamma amortized, self-normalised scale": Recipe(
        prior="amortized", scale_rule="self_normalised"
    ),
    "gamma none, k=1, a step stale": Recipe(exchange=1, stale=True),
    "gamma none, 4x virtual": Recipe(virtual=4),
    "gamma prototypes": Recipe(prior="prototypes"),
    "gamma amortized, blind to scale": Recipe(prior="blind"),
    "gamma amortized, counted": Recipe(prior="amortized", counted=True),
    "gamma queue": Recipe(prior="queue"),
    "gamma queue, counted": Recipe(prior="queue", counted=True),
    "gamma history": Recipe(prior="history"),
    "oracle Z": Recipe(prior="oracle"),
    "oracle Z, k=1": Recipe(prior="oracle", exchange=1),
    "sigmoid local": Recipe(comparator="sigmoid_local"),
    "sigmoid ring": Recipe(comparator="sigmoid_ring"),
    "FastCLIP v1": Recipe(comparator="fastclip_v1"),
    "FastCLIP v3": Recipe(comparator="fastclip_v3"),
}
FIVE_SEEDS = tuple(RECIPES)[:6]
ONE_SHAPE = (  # at 8 x 8 only
    "gamma none, k=1, a step stale",
    "gamma prototypes",
    "gamma amortized, blind to scale",
)
RHO = 2.0  # nats, below the log of the negatives at hand


def build(recipe: Recipe, workers: int, local: int, rows: int) -> Simulated:
    """Build the simulated workers' loss. Without a process group a gathered loss sees the whole."""
    batch = workers * local
    kind = recipe.comparator
    if kind in ("infonce_local", "sigmoid_local"):
        return over_shards(STATELESS[kind](), workers)
    if kind in ("infonce_gathered", "sigmoid_ring"):
        return over_shards(STATELESS[kind](), 1)
    if kind is not None:
        return over_shards(
            FastCLIP(rows, gamma=0.8, learns_scale=kind == "fastclip_v3", rho=RHO), 1
        )
    priors: dict[str, Callable[[int], Prior]] = {
        "queue": lambda rank: QueuePrior(batch - local, DIM),
        "history": lambda rank: HistoryPrior(rows, rank=rank, world_size=workers),
    }
    losses = [
        GammaLoss(
            virtual_batch=recipe.virtual * batch,
            prior=priors[recipe.prior](rank) if recipe.prior in priors else None,
            scale_rule=recipe.scale_rule,
            max_weight=10.0,
        )
        for rank in range(workers)
    ]
    for loss in losses:
        if recipe.prior == "oracle":
            loss.image_evidence = loss.text_evidence = _Exact()
        elif recipe.counted:
            loss.image_evidence, loss.text_evidence = CountedEvidence(), CountedEvidence()
    return Sharded(
        losses=losses,
        exchange=recipe.exchange,
        oracle=recipe.prior == "oracle",
        stale=recipe.stale,
    )


class Prototypes(nn.Module):
    """log Z predicted as log sum_k exp(scale <anchor, p_k> + beta_k): exact for texts that lie
    on few points, and a function of the scale as log Z is. The other networks' rival."""

    def __init__(self, count: int = 128):
        super().__init__()
        self.centers = nn.Parameter(torch.randn(2, count, DIM) * DIM**-0.5)
        self.offsets = nn.Parameter(torch.full((2, count), -math.log(count)))

    def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Give log Z of image and text anchors, [n] each."""
        anchors = torch.stack([image, text]).detach()
        logits = scale.detach() * (anchors @ self.centers.mT) + self.offsets[:, None]
        predicted = logits.logsumexp(2)
        return predicted[0], predicted[1]


class Blind(AmortizedPrior):
    """The amortized prior, never told the logit scale."""

    def forward(self, image: Tensor, text: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Give log Z of image and text anchors, [n] each."""
        return super().forward(image, text, torch.full_like(logit_scale, 1 / 0.07))


TRAINED: dict[str, Callable[[], nn.Module]] = {
    "amortized": lambda: AmortizedPrior(DIM),
    "prototypes": Prototypes,
    "blind": lambda: Blind(DIM),
}


class _Module(nn.Module):
    def __init__(self, vocab_size: int, prior: str):
        super().__init__()
        self.towers = Towers(vocab_size)
        self.logit_bias = nn.Parameter(torch.tensor([LOGIT_BIAS_INIT]))
        self.prior = TRAINED[prior]() if prior in TRAINED else None


def _batches(rows: int, batch: int, samples: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(0, dtype=torch.long)
    for _ in range(samples // batch):
        while len(pool) < batch:
            pool = torch.cat([pool, torch.randperm(rows, generator=generator)])
        yield pool[:batch]
        pool = pool[batch:]


def train(
    task: Task, recipe: Recipe, workers: int, local: int, seed: int, lr: float
) -> dict[str, Any]:
    """Train from scratch; give the test recalls and what was seen on the way."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    module = _Module(task.vocab_size, recipe.prior)
    optim = OptimConfig(lr=lr, weight_decay=0.1)
    optimizer = torch.optim.AdamW(parameter_groups(module, optim), lr=lr, betas=optim.betas,
                                  eps=optim.eps)  # fmt: skip
    batch = workers * local
    loss = build(recipe, workers, local, len(task.train))
    started, scales, seen = time.perf_counter(), [], []
    for step, rows in enumerate(_batches(len(task.train), batch, task.samples, seed)):
        factor = lr_factor(step * batch, warmup=WARMUP_STEPS * batch, total=task.samples,
                           schedule="cosine")  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        image, text, scale = module.towers(task.train.take(rows))
        log_z = module.prior(image, text, scale) if module.prior is not None else None
        value = loss(image, text, scale, rows, log_z, module.logit_bias.squeeze(0))
        optimizer.zero_grad()
        value.loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), optim.grad_clip)
        optimizer.step()
        scales.append(float(scale.detach()))
        seen.append({name: float(metric) for name, metric in value.metrics.items()})
        ends_epoch = (step + 1) * batch // len(task.train) > step * batch // len(task.train)
        if recipe.prior == "history" and ends_epoch and isinstance(loss, Sharded):
            _share(loss)
    with torch.no_grad():
        parts = [module.towers(task.test.take(rows))[:2]
                 for rows in torch.arange(len(task.test)).split(256)]  # fmt: skip
    image, text = (torch.cat(side) for side in zip(*parts, strict=True))
    recalls = dict(retrieval(image, text, torch.arange(len(image))))
    last = seen[-max(1, len(seen) // 5) :]
    return {
        "recall_at_10": 50
        * (recalls["text_to_image_recall_at_10"] + recalls["image_to_text_recall_at_10"]),
        "recall_at_1": 50
        * (recalls["text_to_image_recall_at_1"] + recalls["image_to_text_recall_at_1"]),
        "logit_scale": scales[-1],
        "metrics": {name: float(np.mean([item[name] for item in last])) for name in last[0]},
        "seconds": time.perf_counter() - started,
    }


def _share(loss: Sharded) -> None:
    """All workers' `share`, whose gather gives what each of them would give."""
    parts: list[Any] = []
    for gamma in loss.losses:
        assert gamma.prior is not None
        gamma.prior.share(lambda part: parts.append(part) or [])
    for gamma in loss.losses:
        assert gamma.prior is not None
        gamma.prior.share(lambda _: parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training of the study."""

    task: str
    loss: str
    workers: int
    local: int
    seed: int
    lr: float


SHAPES = ((4, 64), (8, 8), (16, 4))
RATES = (4e-3, 8e-3, 1.6e-2)
TUNING_SEED = 100


def tuning_runs() -> list[Run]:
    """One task, one shape, one seed of its own: every loss at every rate."""
    return [
        Run(task="scenes", loss=loss, workers=8, local=8, seed=TUNING_SEED, lr=lr)
        for lr in RATES
        for loss in RECIPES
    ]


def study_runs(tasks: Sequence[str], rates: dict[str, float], quick: bool) -> list[Run]:
    """Every loss, task, shape and seed; first seeds first, so that a part is a study too."""
    shapes = SHAPES[1:2] if quick else SHAPES
    return [
        Run(task=task, loss=loss, workers=workers, local=local, seed=seed, lr=rates[loss])
        for seed in range(2 if quick else 5)
        for task in tasks
        for workers, local in shapes
        for loss in RECIPES
        if (seed < 3 or loss in FIVE_SEEDS)
        and (loss not in ONE_SHAPE or (workers, local) == SHAPES[1])
    ]


def best_rates(done: dict[Run, dict[str, Any]]) -> dict[str, float]:
    """The rate of each loss with the best recall in tuning."""
    best: dict[str, tuple[float, float]] = {}
    for run in tuning_runs():
        score = done[run]["recall_at_10"], run.lr
        best[run.loss] = max(best.get(run.loss, score), score)
    return {loss: lr for loss, (_, lr) in best.items()}


def carry_out(
    runs: Sequence[Run], tasks: dict[str, Task], file: Path, processes: int, until: float
) -> dict[Run, dict[str, Any]]:
    """Do the runs that `file` lacks, until the clock `until`; give all that are done."""
    done = read_results(file)
    missing = [run for run in runs if run not in done]
    print(f"{len(missing)} of {len(runs)} runs to do", flush=True)
    with mp.get_context("fork").Pool(processes) as pool:
        inputs = ((tasks[run.task], run, until) for run in missing)
        for run, result in pool.imap_unordered(_carry_out, inputs):
            if result is None:
                continue
            done[run] = result
            with file.open("a") as out:
                out.write(json.dumps({**asdict(run), **result}) + "\n")
            print(f"{run.task:8} {run.workers}x{run.local:<3} seed {run.seed} lr {run.lr:g} "
                  f"{run.loss:40} R@10 {result['recall_at_10']:.1f}", flush=True)  # fmt: skip
    return done


def _carry_out(inputs: tuple[Task, Run, float]) -> tuple[Run, dict[str, Any] | None]:
    task, run, until = inputs
    if time.time() > until:
        return run, None
    return run, train(task, RECIPES[run.loss], run.workers, run.local, run.seed, run.lr)


def read_results(file: Path) -> dict[Run, dict[str, Any]]:
    """Read what earlier calls have done."""
    done = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        values = json.loads(line)
        run = Run(**{name: values.pop(name) for name in Run.__dataclass_fields__})
        done[run] = values
    return done


Scores = dict[tuple[str, int, int, str], dict[int, float]]  # task, W, b, loss -> seed -> recall@10


def collect(done: dict[Run, dict[str, Any]]) -> Scores:
    """Recall@10 by task, shape and loss, over the seeds that are done."""
    scores: Scores = {}
    for run, result in done.items():
        if run.seed != TUNING_SEED:
            key = run.task, run.workers, run.local, run.loss
            scores.setdefault(key, {})[run.seed] = result["recall_at_10"]
    return scores


def share(scores: Scores, task: str, shape: tuple[int, int], loss: str) -> float:
    """Mean recall@10 as a share of all-gathered InfoNCE's, over the seeds that both have."""
    found, whole = (scores.get((task, *shape, name), {}) for name in (loss, "InfoNCE gathered"))
    seeds = found.keys() & whole.keys()
    if not seeds:
        return math.nan
    return sum(found[seed] for seed in seeds) / sum(whole[seed] for seed in seeds)


def missed_goals(scores: Scores, tasks: Sequence[str]) -> list[str]:
    """The goals of the study that do not hold, or that nothing was run for."""
    reach0, reach1 = "gamma none", "gamma none, k=1"  # as shipped
    missed = []

    def ask(what: str, value: float, least: float) -> None:
        if not value >= least:
            missed.append(f"{what}: {100 * value:.1f} %, at least {100 * least:g} % is asked")

    for task in tasks:
        ask(f"{task}, 4x64, k=0", share(scores, task, (4, 64), reach0), 0.99)
        ways = (reach0,) if task == "scenes" else (reach0, reach1)
        best = max(share(scores, task, (8, 8), way) for way in ways)
        ask(f"{task}, 8x8, k<={len(ways) - 1}", best, 0.98)
    local = share(scores, "scenes", (8, 8), "InfoNCE local")
    if not local < share(scores, "scenes", (8, 8), reach0) - 0.02:
        missed.append(f"scenes, 8x8: InfoNCE local has {100 * local:.1f} %, not clearly below")
    wide = [share(scores, task, shape, "gamma none, 4x virtual")
            for task in tasks for shape in SHAPES]  # fmt: skip
    if not any(value > 1 for value in wide):
        missed.append("a virtual batch above the global one exceeds 100 % nowhere")
    return missed


def report(scores: Scores, tasks: Sequence[str]) -> None:
    """Print recall@10, its spread over seeds, and its share of all-gathered InfoNCE's."""
    shapes = [shape for shape in SHAPES if any(key[1:3] == shape for key in scores)]
    for task in tasks:
        rows = []
        for loss in RECIPES:
            row = [loss]
            for shape in shapes:
                found = list(scores.get((task, *shape, loss), {}).values())
                row.append(
                    f"{np.mean(found):.1f} ± {np.std(found):.1f} "
                    f"({100 * share(scores, task, shape, loss):.0f} %, {len(found)})"
                    if found
                    else ""
                )
            rows.append(row)
        columns = ["loss", *(f"{workers} x {local}" for workers, local in shapes)]
        show_table(f"{task}: recall@10 ± std over seeds (share of gathered, seeds)", columns, rows)


def draw(scores: Scores, tasks: Sequence[str], file: Path) -> None:
    """Draw each loss's share of all-gathered InfoNCE's recall@10, a panel a task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(tasks) + 2, 6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(tasks), sharey=True))
    for panel, task in zip(panels, tasks, strict=True):
        for offset, shape in enumerate(SHAPES):
            shares = [100 * share(scores, task, shape, loss) for loss in RECIPES]
            heights = np.arange(len(RECIPES)) + 0.25 * (offset - 1)
            panel.plot(shares, heights, "o", label=f"{shape[0]} workers x {shape[1]} pairs")
        panel.axvline(100, color="gray", linewidth=1)
        panel.set(title=task, xlabel="% of InfoNCE gathered, recall@10")
        panel.grid(alpha=0.3)
    panels[0].set_yticks(range(len(RECIPES)), RECIPES)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run what is missing of the study, print and judge what there is."""
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="folder of the results")
    parser.add_argument("--emoji", help="folder of emoji pictures and names")
    parser.add_argument("--photos", help="folder of photographs and alternative texts")
    parser.add_argument(
        "--minutes", type=float, default=120, help="stop after; call again to go on"
    )
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    until = time.time() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / ("quick.jsonl" if options.quick else "loss_quality.jsonl")
    tasks = {"scenes": scenes(3_000 if options.quick else 30_000, 500 if options.quick else 1_000)}
    if not options.quick:
        if options.emoji:
            tasks["emoji"] = folder_task("emoji", options.emoji, 20)
        if options.photos:
            tasks["photos"] = folder_task("photos", options.photos, 8)
    rates = dict.fromkeys(RECIPES, RATES[1])
    done: dict[Run, dict[str, Any]] = {}
    if not options.quick:
        done = carry_out(tuning_runs(), tasks, results, options.processes, until)
        if any(run not in done for run in tuning_runs()):
            sys.exit("tuning is not finished; call again to go on")
        rates = best_rates(done)
        print("learning rates:", ", ".join(f"{loss} {lr:g}" for loss, lr in rates.items()))
    runs = study_runs(list(tasks), rates, options.quick)
    done = carry_out(runs, tasks, results, options.processes, until)
    scores = collect({run: done[run] for run in runs if run in done})
    report(scores, list(tasks))
    if options.figure is not None:
        draw(scores, list(tasks), options.figure)
    facts = [{**asdict(run), **done[run]} for run in runs if run in done]
    missed = [] if options.quick else missed_goals(scores, list(tasks))
    conclude({"rates": rates, "runs": facts}, missed, options.json)


if __name__ == "__main__":
    main()
