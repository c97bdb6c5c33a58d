"""The numbers that follow from a config: pure arithmetic, said in sentences before step 1.

Enters: a `Config` and `Facts` found outside it. Leaves: a frozen `Plan`, or every contradiction
at once. Must not know: how the facts were found.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config.schema import Config
from pipeline.errors import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the config does not say: the data's size and the model's."""

    train_rows: int
    val_rows: int
    vocab_size: int
    num_parameters: int
    embed_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Derived numbers of a run. Batches in pairs, memory and traffic in bytes per worker."""

    workers: int
    global_batch: int
    local_batch: int
    micro_batch: int
    accumulation: int
    virtual_batch: int
    train_rows: int
    val_rows: int
    samples: int
    steps: int
    warmup_samples: int
    vocab_size: int
    num_parameters: int
    zero_stage: int
    precision: str
    state_bytes: int
    loss_bytes_per_step: int
    all_gather_bytes_per_step: int
    checkpoint_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def sentences(self) -> list[str]:
        """The plan as a reader wants it."""
        epochs = self.samples / self.train_rows
        accumulate = (
            "in one forward"
            if self.accumulation == 1
            else f"in {self.accumulation} micro batches of {self.micro_batch}"
        )
        return [
            f"Data: {self.train_rows:,} training rows, {self.val_rows:,} evaluation rows.",
            f"Batch: {self.global_batch:,} pairs a step on {self.workers} worker(s), "
            f"{self.local_batch:,} each {accumulate}; the loss targets a virtual batch of "
            f"{self.virtual_batch:,}.",
            f"Length: {self.steps:,} steps, {self.samples:,} samples, {epochs:.2f} epochs; "
            f"warm-up over {self.warmup_samples:,} samples.",
            f"Model: {self.num_parameters:,} parameters, vocabulary {self.vocab_size:,}.",
            f"Memory: ZeRO stage {self.zero_stage} in {self.precision} holds about "
            f"{_bytes(self.state_bytes)} of parameters, gradients and optimiser state per worker "
            "(activations come on top).",
            f"Traffic of the loss: {_bytes(self.loss_bytes_per_step)} per worker and step; an "
            f"all-gather of features with gradient would move "
            f"{_bytes(self.all_gather_bytes_per_step)}.",
            f"Checkpoint: about {_bytes(self.checkpoint_bytes)}.",
        ]


def _batches(config: Config) -> tuple[int, int]:
    """Local and micro batch, in pairs."""
    local = config.train.global_batch // config.cluster.workers
    return local, local if config.engine.micro_batch == "auto" else config.engine.micro_batch


def find_contradictions(config: Config) -> list[Problem]:
    """Everything in `config` that contradicts itself, whatever the data."""
    problems: list[Problem] = []
    train, workers = config.train, config.cluster.workers
    if train.global_batch % workers:
        down, up = train.global_batch // workers * workers, -(-train.global_batch // workers)
        problems.append(
            Problem(
                place="train.global_batch",
                message=f"is {train.global_batch}; it must be a multiple of cluster.workers "
                f"{workers}, e.g. {down or workers} or {up * workers}",
            )
        )
        return problems
    local, micro = _batches(config)
    if local % micro:
        problems.append(
            Problem(
                place="engine.micro_batch",
                message=f"is {micro}; it must divide the local batch {local} "
                f"(train.global_batch {train.global_batch} / cluster.workers {workers})",
            )
        )
    if config.loss.kind == "infonce_gathered" and micro != local:
        problems.append(
            Problem(
                place="engine.micro_batch",
                message=f"is {micro}, fewer than the local batch {local}: infonce_gathered would "
                "miss negatives of the other micro batches; use auto, or loss.kind=gamma",
            )
        )
    if config.loss.kind == "gamma" and micro < 2:
        problems.append(
            Problem(
                place="engine.micro_batch",
                message=f"is {micro}; a pair without any other has no negatives and trains "
                "nothing: raise it, raise train.global_batch, or lower cluster.workers",
            )
        )
    virtual = config.loss.virtual_batch
    if config.loss.kind == "gamma" and isinstance(virtual, int) and virtual < micro:
        problems.append(
            Problem(
                place="loss.virtual_batch",
                message=f"is {virtual}; it must be at least the micro batch {micro}, whose pairs "
                "are all used: raise it, or use global",
            )
        )
    if config.evaluate.zero_shot and config.data.val is None:
        problems.append(
            Problem(place="data.val", message="missing; evaluate.zero_shot needs rows to classify")
        )
    if len({task.column for task in config.evaluate.zero_shot}) < len(config.evaluate.zero_shot):
        problems.append(
            Problem(
                place="evaluate.zero_shot",
                message="names a column twice; metrics are named by column",
            )
        )
    return problems


def make_plan(config: Config, facts: Facts) -> tuple[Plan, list[Problem]]:
    """Derive the plan; the problems are what contradicts the data. The config is consistent."""
    train, workers = config.train, config.cluster.workers
    local, micro = _batches(config)
    wanted = train.samples or round((train.epochs or 0) * facts.train_rows)
    steps = wanted // train.global_batch
    virtual = config.loss.virtual_batch
    problems: list[Problem] = []
    if train.global_batch > facts.train_rows:
        problems.append(
            Problem(
                place="train.global_batch",
                message=f"is {train.global_batch}, more than the {facts.train_rows} rows of "
                "data.train; a pair may occur once in a batch: lower it or give more data",
            )
        )
    elif steps == 0:
        problems.append(
            Problem(
                place="train.samples" if train.samples else "train.epochs",
                message=f"gives {wanted} samples, less than one global batch of "
                f"{train.global_batch}; train longer or lower train.global_batch",
            )
        )
    if config.optim.warmup_samples > wanted:
        problems.append(
            Problem(
                place="optim.warmup_samples",
                message=f"is {config.optim.warmup_samples}, more than the run's {wanted} samples",
            )
        )
    gathers = config.loss.kind == "infonce_gathered"
    # Received per worker: both modalities forward (2U), their gradients backward (2U), fp32.
    unit = (workers - 1) * local * facts.embed_dim * 4
    plan = Plan(
        workers=workers,
        global_batch=train.global_batch,
        local_batch=local,
        micro_batch=micro,
        accumulation=max(1, local // micro),
        virtual_batch=train.global_batch if gathers or virtual == "global" else virtual,
        train_rows=facts.train_rows,
        val_rows=min(facts.val_rows, config.evaluate.max_rows),
        samples=steps * train.global_batch,
        steps=steps,
        warmup_samples=config.optim.warmup_samples,
        vocab_size=facts.vocab_size,
        num_parameters=facts.num_parameters,
        zero_stage=config.engine.zero_stage,
        precision=config.engine.precision,
        state_bytes=_state_bytes(config, facts.num_parameters),
        loss_bytes_per_step=4 * unit if gathers else 0,
        all_gather_bytes_per_step=4 * unit,
        checkpoint_bytes=_weight_bytes(config) * facts.num_parameters + 12 * facts.num_parameters,
    )
    return plan, problems


def _weight_bytes(config: Config) -> int:
    return 2 if config.engine.precision == "bf16" else 4


def _state_bytes(config: Config, parameters: int) -> int:
    """ZeRO's shares: optimiser state over workers from stage 1, gradients 2, parameters 3."""
    stage, workers = config.engine.zero_stage, config.cluster.workers
    weight = _weight_bytes(config)
    # AdamW's two moments, and a master copy: always in bf16, and for any partitioned stage.
    optimizer = 8 + (4 if weight == 2 or stage else 0)
    shares = [
        weight / (workers if stage >= 3 else 1),
        weight / (workers if stage >= 2 else 1),
        optimizer / (workers if stage >= 1 else 1),
    ]
    return math.ceil(parameters * sum(shares))


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "KB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")
