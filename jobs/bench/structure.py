"""What the latent structures do: zero-shot, linear probe, retrieval, at equal samples.

The objective is that of training (`pipeline.train.objective`), on two simulated workers in one
process; towers are small (a convolutional net and a bag of words, of `loss_quality`), so that the
study fits two cores. Views are drawn as in training, a few a row, before it. A variant adds one
term, or all, to the base loss in four parts; `clip` is the loss of the two modalities alone.

Scenes tell in the picture alone a texture, in the caption alone an owner's name. Emoji are
labelled by the commonest of their keywords, pictures of textbooks by the book.

    python -m jobs.bench.structure --out FOLDER --emoji FOLDER --photos FOLDER

Goal: on the scenes a linear probe finds the texture at least 10 points better with separation than
with the base. (The owner it finds in any bag of words.) Overhead: time of a step and bytes kept for
backward, on the demo's towers. Results go to a file as they come, and are not run twice.
"""

import itertools
import json
import multiprocessing as mp
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.bench.loss_quality import DIM, LENGTH, SIDE, WARMUP_STEPS, Pairs, Towers
from jobs.bench.report import arguments, conclude, show_table
from pipeline.config.load import parse_config
from pipeline.config.plan import Facts, make_plan
from pipeline.config.schema import Config, OptimConfig
from pipeline.data.augment import augment_image, augment_text
from pipeline.data.demo import COLORS, SHAPES, make_row
from pipeline.data.image import BadImage, RandomCrop, decode, decode_train, eval_geometry
from pipeline.data.layout import as_captions, read_catalog
from pipeline.data.private import OWNERS, TEXTURES
from pipeline.data.text import Tokenizer, train_tokenizer
from pipeline.engine.momentum import Momentum
from pipeline.engine.optimizer import parameter_groups
from pipeline.engine.schedule import lr_factor
from pipeline.evaluate.embed import Parts
from pipeline.evaluate.probe import linear_probe
from pipeline.evaluate.retrieval import retrieval
from pipeline.evaluate.zero_shot import class_embeddings, zero_shot
from pipeline.losses.base import LossValue
from pipeline.losses.structure import geometry, independent_geometry
from pipeline.train.module import FusionPretraining, Outputs, Pretraining, build_pretraining
from pipeline.train.objective import Objective, build_momentum, build_objective

WHITE = (255, 255, 255)
WORKERS, LOCAL = 2, 64
BATCH = WORKERS * LOCAL
VIEWS = 4  # of a row, drawn before training
VIEW_CROP = (0.5, 1.0)
RATE = 4e-3
SEEDS = 5
TUNING_SEED = 100
LEAST_GAIN = 10.0  # points

IN_MODAL = {"in_modal": 0.5}
VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "base": IN_MODAL,
    "separation": {**IN_MODAL, "separation": {"weight": 1.0}},
    "bridge": {**IN_MODAL, "bridge": {"weight": 0.1}},
    "consistency": {**IN_MODAL, "consistency": {"weight": 0.03}},
}
VARIANTS["all"] = {name: value for terms in VARIANTS.values() for name, value in terms.items()}
WEIGHTS = {
    "separation": (0.1, 0.3, 1.0),
    "bridge": (0.03, 0.1, 0.3),
    "consistency": (0.003, 0.01, 0.03),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """A label of the pairs: names [n] ("" where a pair has none), and how a caption says a class.

    Without prompts it is not classified zero-shot. `sides`: the modalities that are probed.
    """

    names: list[str]
    classes: tuple[str, ...]
    prompts: tuple[str, ...] = ()
    sides: tuple[str, ...] = ("image",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A data set: training pairs first, then test pairs; views [n, VIEWS] of each row."""

    name: str
    pairs: Pairs
    view_images: Tensor
    view_tokens: Tensor
    train_rows: int
    samples: int
    labels: dict[str, Label]
    tokenizer: Tokenizer


def scenes(rows: int, test_rows: int, epochs: float, split: str) -> Task:
    """Private scenes of the demo; tested on rows of `split`."""
    drawn = [make_row("train", row, 1, private=True) for row in range(rows)]
    drawn += [make_row(split, row, 1, private=True) for row in range(test_rows)]
    labels = {
        "shape": Label(
            names=_column(drawn, "shape"), classes=SHAPES, prompts=("a {}", "there is a {}")
        ),
        "color": Label(
            names=_column(drawn, "color"),
            classes=COLORS,
            prompts=tuple(f"a {{}} {shape}" for shape in SHAPES),
        ),
        "texture": Label(names=_column(drawn, "texture"), classes=TEXTURES),
        "owner": Label(names=_column(drawn, "owner"), classes=OWNERS, sides=("text",)),
    }
    captions = [str(row["caption"]) for row in drawn]
    return _task(
        "scenes", [row["image"] for row in drawn], captions, labels, rows, round(epochs * rows)
    )


def _column(rows: list[dict[str, Any]], name: str) -> list[str]:
    return [str(row[name] or "") for row in rows]


def emoji(folder: str, epochs: float) -> Task:
    """Emoji, labelled by the most frequent of their keywords among the ten commonest."""
    table = _read(folder, ["image", "caption", "keywords"])
    counts = Counter(word for row in table for word in row["keywords"])
    classes = tuple(word for word, _ in counts.most_common(10))
    names = [next((word for word in classes if word in row["keywords"]), "") for row in table]
    label = Label(names=names, classes=classes, prompts=("{}", "a {}"))
    return _folder("emoji", table, {"keyword": label}, epochs)


def photos(folder: str, epochs: float) -> Task:
    """Pictures of textbooks, labelled by the book."""
    table = _read(folder, ["image", "caption", "book"])
    names = [row["book"].replace("-", " ") for row in table]
    classes = tuple(sorted(set(names)))
    label = Label(names=names, classes=classes, prompts=("{}", "a picture of {}"))
    return _folder("photos", table, {"book": label}, epochs)


def _read(folder: str, columns: list[str]) -> list[dict[str, Any]]:
    catalog = read_catalog(folder, "folder", split="all")
    rows = [
        row
        for shard in catalog.shards
        for row in pq.read_table(shard.path, columns=columns).to_pylist()
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[place] for place in order]


def _folder(
    name: str, table: list[dict[str, Any]], labels: dict[str, Label], epochs: float
) -> Task:
    """One row in five, the last ones, is kept for the test."""
    captions = [as_captions(row["caption"])[0] for row in table]
    train_rows = len(table) - len(table) // 5
    images = [row["image"] for row in table]
    return _task(name, images, captions, labels, train_rows, round(epochs * train_rows))


def _task(
    name: str,
    images: Sequence[Any],
    captions: list[str],
    labels: dict[str, Label],
    train_rows: int,
    samples: int,
) -> Task:
    tokenizer = train_tokenizer(captions[:train_rows], 4096)
    plain, views, texts = [], [], []
    for row, (data, caption) in enumerate(zip(images, captions, strict=True)):
        rngs = [np.random.default_rng([0, row, view]) for view in range(VIEWS)]
        try:
            plain.append(eval_geometry(decode(data, WHITE), SIDE))
            crops = [RandomCrop(VIEW_CROP, 0.0, rng) for rng in rngs]
            drawn = decode_train(data, WHITE, SIDE, crops)
        except BadImage as error:
            raise RuntimeError(f"{name}: row {row} is {error.reason}") from error
        views.append(
            [augment_image(pixels, WHITE, rng) for pixels, rng in zip(drawn, rngs, strict=True)]
        )
        texts.append([augment_text(caption, {}, rng) for rng in rngs])
    tokens = torch.from_numpy(tokenizer.encode(captions, LENGTH)[0]).long()
    flat = list(itertools.chain.from_iterable(texts))
    view_tokens = torch.from_numpy(tokenizer.encode(flat, LENGTH)[0]).long()
    return Task(
        name=name,
        pairs=Pairs(images=torch.from_numpy(np.stack(plain)), tokens=tokens),
        view_images=torch.from_numpy(np.stack([np.stack(each) for each in views])),
        view_tokens=view_tokens.reshape(len(captions), VIEWS, -1),
        train_rows=train_rows,
        samples=samples,
        labels=labels,
        tokenizer=tokenizer,
    )


class TwoPartTowers(Towers):
    """The towers with a second projection of the same features, for independent ones."""

    def __init__(self, vocab_size: int):
        super().__init__(vocab_size)
        self.own_image = _like(self.image[-1])
        self.own_text = _like(self.text[-1])

    def features(self, images: Tensor | None, tokens: Tensor | None) -> Parts:
        """Unit-norm features [n, 64] of either input, shared and independent."""
        found: dict[str, Tensor | None] = {"image": None, "text": None}
        if images is not None:
            pixels = images.permute(0, 3, 1, 2).float().div(127.5).sub(1)
            pooled = self.image[:-1](pixels)
            found["image"] = F.normalize(self.image[-1](pooled), dim=1)
            found["image_independent"] = F.normalize(self.own_image(pooled), dim=1)
        if tokens is not None:
            pooled = self.text[:-1](self.words(tokens))
            found["text"] = F.normalize(self.text[-1](pooled), dim=1)
            found["text_independent"] = F.normalize(self.own_text(pooled), dim=1)
        return Parts(**found)


def _like(layer: nn.Module) -> nn.Linear:
    assert isinstance(layer, nn.Linear)
    return nn.Linear(layer.in_features, layer.out_features)


def config_of(structure: dict[str, Any], samples: int) -> Config:
    """The config of a variant."""
    return parse_config(
        {
            "name": "structure",
            "data": {"train": "nowhere"},
            "structure": structure,
            "train": {"global_batch": BATCH, "samples": samples},
            "cluster": {"workers": WORKERS},
        },
        "structure",
    )


def train(task: Task, structure: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train from scratch and measure."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = config_of(structure, task.samples)
    facts = Facts(
        train_rows=task.train_rows, epoch_rows=task.train_rows, row_groups=1, val_rows=0,
        vocab_size=300, num_parameters=1, embed_dim=DIM,
    )  # fmt: skip
    plan, problems = make_plan(config, facts)
    assert not problems
    objectives = [
        build_objective(config, plan, task.tokenizer, embed_dim=DIM, rank=rank, world_size=WORKERS)
        for rank in range(WORKERS)
    ]
    towers = TwoPartTowers(task.tokenizer.vocab_size)
    optim = OptimConfig(lr=RATE, weight_decay=0.1)
    optimizer = torch.optim.AdamW(parameter_groups(towers, optim), lr=RATE, betas=optim.betas,
                                  eps=optim.eps)  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    started, metrics = time.perf_counter(), {}
    for step in range(task.samples // BATCH):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(task.train_rows, generator=generator)])
        rows, order = order[:BATCH], order[BATCH:]
        factor = lr_factor(step * BATCH, warmup=WARMUP_STEPS * BATCH, total=task.samples,
                           schedule="cosine")  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        which = torch.randint(VIEWS, (BATCH,), generator=generator)
        outputs = _forward(towers, task, rows, which if config.structure.has_second_view else None)
        values = []
        for objective, part, keys in zip(
            objectives, _shares(outputs), rows.chunk(WORKERS), strict=True
        ):
            values.append(objective(part, keys, step * BATCH))
        optimizer.zero_grad()
        torch.stack([value.loss for value in values]).mean().backward()
        nn.utils.clip_grad_norm_(towers.parameters(), optim.grad_clip)
        optimizer.step()
        metrics = {name: float(value) for name, value in values[0].metrics.items()}
    seconds = time.perf_counter() - started
    return {**_measure(towers, task), "metrics": metrics, "seconds": seconds}


def _forward(towers: TwoPartTowers, task: Task, rows: Tensor, which: Tensor | None) -> Outputs:
    images, tokens = task.pairs.images[rows], task.pairs.tokens[rows]
    if which is not None:
        images = torch.cat([images, task.view_images[rows, which]])
        tokens = torch.cat([tokens, task.view_tokens[rows, which]])
    found = towers.features(images, tokens)
    scale = towers.log_scale.clamp(0, float(np.log(100))).exp().squeeze(0)
    parts = {name: part for name, part in found._asdict().items() if part is not None}
    first = {name: part[: len(rows)] for name, part in parts.items()}
    second: dict[str, Tensor] = {}
    if which is not None:
        for side in ("image", "text"):
            second[f"{side}_view"] = parts[side][len(rows) :]
            second[f"{side}_view_independent"] = parts[f"{side}_independent"][len(rows) :]
    return Outputs(logit_scale=scale, **first, **second)  # pyright: ignore[reportArgumentType]


def _shares(outputs: Outputs) -> list[Outputs]:
    """What each worker holds."""
    parts = [
        [value] * WORKERS if value is None or not value.ndim else value.chunk(WORKERS)
        for value in outputs
    ]
    return [
        Outputs(*(values[worker] for values in parts))  # pyright: ignore[reportArgumentType]
        for worker in range(WORKERS)
    ]


@torch.no_grad()
def _measure(towers: TwoPartTowers, task: Task) -> dict[str, float]:
    """Percentages; probes of the shared features, and of both parts side by side."""
    towers.eval()
    blocks = [
        towers.features(task.pairs.images[rows], task.pairs.tokens[rows])
        for rows in torch.arange(len(task.pairs)).split(512)
    ]
    whole = Parts(*(torch.cat([part for part in parts if part is not None])
                    for parts in zip(*blocks, strict=True)))  # fmt: skip
    cut = task.train_rows
    image, text = whole.chosen("shared")
    assert image is not None
    assert text is not None
    test_image, test_text = image[cut:], text[cut:]
    recalls = dict(retrieval(test_image, test_text, torch.arange(len(test_image))))
    found = {
        f"recall@{k}": 50
        * (recalls[f"text_to_image_recall_at_{k}"] + recalls[f"image_to_text_recall_at_{k}"])
        for k in (1, 10)
    }
    for name, label in task.labels.items():
        if label.prompts:
            weights = class_embeddings(
                lambda tokens: _text_of(towers, tokens), label.classes, label.prompts,
                task.tokenizer, LENGTH, torch.device("cpu"),
            )  # fmt: skip
            measured = dict(zero_shot(test_image, label.names[cut:], label.classes, weights))
            found[f"zero-shot {name}"] = 100 * measured["accuracy"]
        for side in label.sides:
            for kind in ("shared", "both"):
                rows = whole.chosen(kind)[side == "text"]
                assert rows is not None
                with torch.enable_grad():
                    accuracy = linear_probe(
                        rows[:cut][:MOST_PROBED], label.names[:cut][:MOST_PROBED],
                        rows[cut:], label.names[cut:],
                    )  # fmt: skip
                found[f"probe {name} ({kind})"] = 100 * accuracy
    assert whole.image_independent is not None
    shape = geometry(test_image, test_text)
    shape |= independent_geometry(test_image, whole.image_independent[cut:])
    return found | {f"geometry {name}": value for name, value in shape.items()}


MOST_PROBED = 5000


def _text_of(towers: TwoPartTowers, tokens: Tensor) -> Tensor:
    text = towers.features(None, tokens.long()).text
    assert text is not None
    return text


# ---- the study -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training of the study."""

    task: str
    variant: str
    structure: str  # JSON
    seed: int


def study_runs(tasks: Sequence[str], seeds: int) -> list[Run]:
    """Every variant, task and seed; first seeds first, so that a part is a study too."""
    return [
        Run(task=task, variant=variant, structure=json.dumps(structure), seed=seed)
        for seed in range(seeds)
        for task in tasks
        for variant, structure in VARIANTS.items()
    ]


def tuning_runs() -> list[Run]:
    """Weights of each term, on the scenes, with a seed of their own; and the base."""
    base = Run(task="scenes", variant="base", structure=json.dumps(IN_MODAL), seed=TUNING_SEED)
    return [base] + [
        Run(
            task="scenes",
            variant=f"{term} {weight:g}",
            structure=json.dumps({**IN_MODAL, term: {"weight": weight}}),
            seed=TUNING_SEED,
        )
        for term, weights in WEIGHTS.items()
        for weight in weights
    ]


def carry_out(runs: Sequence[Run], tasks: dict[str, Task], file: Path) -> dict[Run, dict[str, Any]]:
    """Do the runs that `file` lacks; give all."""
    done: dict[Run, dict[str, Any]] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        values = json.loads(line)
        run = Run(**{name: values.pop(name) for name in Run.__dataclass_fields__})
        done[run] = values
    missing = [run for run in runs if run not in done]
    print(f"{len(missing)} of {len(runs)} runs to do", flush=True)
    with mp.get_context("fork").Pool(2) as pool:
        for run, result in pool.imap_unordered(_carry_out, ((tasks[r.task], r) for r in missing)):
            done[run] = result
            with file.open("a") as out:
                out.write(json.dumps({**asdict(run), **result}) + "\n")
            shown = {name: round(value, 1) for name, value in result.items()
                     if isinstance(value, float) and "geometry" not in name}  # fmt: skip
            print(f"{run.task:7} {run.variant:16} seed {run.seed} {shown}", flush=True)
    return {run: done[run] for run in runs}


def _carry_out(inputs: tuple[Task, Run]) -> tuple[Run, dict[str, Any]]:
    task, run = inputs
    return run, train(task, json.loads(run.structure), run.seed)


def report(done: dict[Run, dict[str, Any]], tasks: Sequence[str]) -> dict[str, Any]:
    """Print means and spreads over seeds; give them."""
    found: dict[str, Any] = {}
    variants = list(dict.fromkeys(run.variant for run in done))
    for task in tasks:
        of_task = {run: result for run, result in done.items() if run.task == task}
        names = [
            name
            for name, value in next(iter(of_task.values())).items()
            if isinstance(value, float) and name != "seconds"
        ]
        rows = []
        for name in names:
            row = [name]
            for variant in variants:
                values = [result[name] for run, result in of_task.items()
                          if run.variant == variant]  # fmt: skip
                digits = 3 if "geometry" in name else 1
                spread = f" ± {np.std(values):.{digits}f}" if len(values) > 1 else ""
                row.append(f"{np.mean(values):.{digits}f}{spread}" if values else "")
                found[f"{task}/{variant}/{name}"] = values
            rows.append(row)
        # One row a variant: there may be many in tuning, and a line holds a dozen measures.
        columns = [[name, *cells] for name, *cells in rows]
        for part in (columns[start : start + 8] for start in range(0, len(columns), 8)):
            turned = [[variant, *(row[1 + index] for row in part)]
                      for index, variant in enumerate(variants)]  # fmt: skip
            show_table(f"{task}: mean ± std over seeds",
                       ["variant", *(row[0] for row in part)], turned)  # fmt: skip
    return found


def missed_goals(found: dict[str, Any]) -> list[str]:
    """Separation on the scenes, where the base cannot know."""
    base, separated = (
        float(np.mean(found[f"scenes/{variant}/probe texture ({kind})"]))
        for variant, kind in (("base", "shared"), ("separation", "both"))
    )
    if separated - base >= LEAST_GAIN:
        return []
    return [
        f"scenes, probe of the texture: {separated:.1f} % with separation, {base:.1f} % with the "
        f"base; {LEAST_GAIN:g} points more are asked"
    ]


# ---- what a step costs ---------------------------------------------------------------------------


COSTED = {**VARIANTS, "all, momentum": {**VARIANTS["all"], "views": "momentum"}}


def overhead(repetitions: int) -> dict[str, dict[str, float]]:
    """Milliseconds of forward, loss and backward, and bytes kept for it; the demo's towers."""
    parts: dict[str, Callable[[], None]] = {}
    kept: dict[str, float] = {}
    for variant, structure in COSTED.items():
        values = {
            "name": "cost",
            "data": {"train": "nowhere", "vocab_size": 400},
            "model": {
                "embed_dim": 128,
                "image": {"size": 32, "patch": 8, "width": 128, "layers": 2, "heads": 4},
                "text": {"context_length": 24, "width": 128, "layers": 2, "heads": 4},
            },
            "structure": structure,
            "train": {"global_batch": BATCH, "samples": 10 * BATCH},
            "engine": {"precision": "fp32"},
        }
        config = parse_config(values, "cost")
        tokenizer = train_tokenizer(["a cat", "a dog"], 300)
        module = build_pretraining(config, tokenizer)
        momentum = build_momentum(config, module, torch.device("cpu"))
        facts = Facts(train_rows=10**6, epoch_rows=10**6, row_groups=1, val_rows=0,
                      vocab_size=300, num_parameters=1, embed_dim=128)  # fmt: skip
        plan, _ = make_plan(config, facts)
        objective = build_objective(config, plan, tokenizer, embed_dim=128, rank=0, world_size=1)
        inputs = [torch.randint(0, 256, (BATCH, 32, 32, 3), dtype=torch.uint8),
                  torch.randint(4, 250, (BATCH, 24))] * (1 + plan.second_view)  # fmt: skip

        forward = partial(_value, module, momentum, objective, inputs)
        parts[variant] = partial(_backward, forward)
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            forward()
        kept[variant] = float(total)
    times: dict[str, list[float]] = {variant: [] for variant in parts}
    for _ in range(repetitions + 1):
        for variant, part in parts.items():
            started = time.perf_counter()
            part()
            times[variant].append(time.perf_counter() - started)
    return {
        variant: {
            "milliseconds": 1000 * statistics.median(times[variant][1:]),
            "over_base": statistics.median(
                mine / base
                for mine, base in zip(times[variant][1:], times["base"][1:], strict=True)
            ),
            "kept_bytes": kept[variant],
            "kept_over_base": kept[variant] / kept["base"],
        }
        for variant in parts
    }


def _value(
    module: Pretraining | FusionPretraining,
    momentum: Momentum | None,
    objective: Objective,
    inputs: list[Tensor],
) -> LossValue:
    outputs = module(*inputs)
    if momentum is not None:
        outputs = outputs.seen_by(momentum(*inputs[:2]))
    return objective(outputs, torch.arange(BATCH), 0)


def _backward(forward: Callable[[], LossValue]) -> None:
    forward().loss.backward()


def main() -> None:
    """Measure, print, judge."""
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--emoji", metavar="FOLDER", help="Parquet with image, caption, keywords")
    parser.add_argument("--photos", metavar="FOLDER", help="Parquet with image, caption, book")
    parser.add_argument("--tune", action="store_true", help="the terms' weights, on the scenes")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    costs = overhead(5 if options.quick else 30)
    show_table(
        f"A step of {BATCH} pairs, the demo's towers, two threads",
        ["variant", "ms", "over base", "kept for backward, MB", "over base"],
        [[variant, f"{cost['milliseconds']:.0f}", f"{cost['over_base']:.2f}",
          f"{cost['kept_bytes'] / 1e6:.1f}", f"{cost['kept_over_base']:.2f}"]
         for variant, cost in costs.items()],
    )  # fmt: skip
    rows, epochs = (6_000, 0.2) if options.quick else (30_000, 1.0)
    tasks = {"scenes": scenes(rows, 1000, 6 * epochs, "val" if options.tune else "test")}
    if options.emoji and not options.tune:
        tasks["emoji"] = emoji(options.emoji, 20 * epochs)
    if options.photos and not options.tune:
        tasks["photos"] = photos(options.photos, 8 * epochs)
    runs = tuning_runs() if options.tune else study_runs(list(tasks), 1 if options.quick else SEEDS)
    file = options.out / f"{'tuning' if options.tune else 'runs'}-{rows}.jsonl"
    found = report(carry_out(runs, tasks, file), list(tasks))
    if options.figure is not None and not options.tune:
        draw(found, list(tasks), options.figure)
    missed = [] if options.tune else missed_goals(found)
    conclude({"overhead": costs, "found": found}, missed, options.json)


SHOWN = {
    "scenes": ("recall@10", "zero-shot shape", "probe shape (both)", "probe texture (both)"),
    "emoji": ("recall@10", "zero-shot keyword", "probe keyword (both)"),
    "photos": ("recall@10", "zero-shot book", "probe book (both)"),
}


def draw(found: dict[str, Any], tasks: Sequence[str], file: Path) -> None:
    """Draw how far each variant is from the base, in points, with the spread over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    others = [variant for variant in VARIANTS if variant != "base"]
    for axes, task in zip(panels, tasks, strict=True):
        names = SHOWN[task]
        for index, variant in enumerate(others):
            gains = [
                np.subtract(found[f"{task}/{variant}/{name}"], found[f"{task}/base/{name}"])
                for name in names
            ]
            places = np.arange(len(names)) + 0.16 * (index - (len(others) - 1) / 2)
            axes.bar(places, [gain.mean() for gain in gains], 0.16, label=variant,
                     yerr=[gain.std() for gain in gains], error_kw={"linewidth": 0.8})  # fmt: skip
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(np.arange(len(names)), names, rotation=20, ha="right", fontsize=8)
        axes.set_title(task, fontsize=10)
        axes.grid(alpha=0.3, axis="y")
    panels[0].set_ylabel("points above the base, equal samples")
    panels[-1].legend(fontsize=8)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
