"""The numbers that follow from a config: pure arithmetic, said in sentences before step 1.

Of a run whose number of workers may change they are those of the most; `resize` gives the others.
Enters: a `Config` and `Facts` found outside it. Leaves: a frozen `Plan`, or every contradiction
at once. Must not know: how the facts were found.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config.schema import Config, LossKind, StructureConfig
from pipeline.errors import Problem

# Comparators whose anchors meet the pairs of all workers; the other two meet their own worker's.
WHOLE_BATCH: frozenset[LossKind] = frozenset(
    ("infonce_gathered", "sigmoid_ring", "fastclip_v1", "fastclip_v3")
)


ENOUGH_GROUPS = 4  # row groups in a window: see `jobs.bench.shuffle`


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the config does not say: the data's size and the model's.

    An epoch of weighted sources has other rows than `train_rows`: `epoch_rows`.
    """

    train_rows: int
    epoch_rows: int
    row_groups: int
    val_rows: int
    vocab_size: int
    num_parameters: int
    embed_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Derived numbers of a run. Batches in pairs, memory and traffic in bytes per worker.

    `virtual_batch` is what the gamma loss targets; of a comparator, what it contrasts at once.
    `structure` names the terms beside the contrast, with weights. A term may need a view of each
    row: `second_view` of the data, or `momentum`, the row as slow towers embed it. `fusion` says
    what a fusion model learns beside them, `task` what it is fine-tuned for; empty where neither.
    """

    workers: int
    global_batch: int
    local_batch: int
    micro_batch: int
    accumulation: int
    loss_kind: LossKind
    virtual_batch: int
    train_rows: int
    epoch_rows: int
    row_groups: int
    shuffle_window: int
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
    rerank_bytes: int
    second_view: bool
    momentum: bool
    structure: tuple[str, ...]
    fusion: str
    task: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def sentences(self) -> list[str]:
        """The plan as a reader wants it."""
        epochs = self.samples / self.epoch_rows
        accumulate = (
            "in one forward"
            if self.accumulation == 1
            else f"in {self.accumulation} micro batches of {self.micro_batch}"
        )
        contrast = self.task or (
            f"the loss targets a virtual batch of {self.virtual_batch:,}"
            if self.loss_kind == "gamma"
            else f"loss {self.loss_kind} contrasts {self.virtual_batch:,} pairs at once"
        )
        traffic = (
            f"Traffic of the loss: {_bytes(self.loss_bytes_per_step)} per worker and step; an "
            "all-gather of features with gradient would move "
            f"{_bytes(self.all_gather_bytes_per_step)}."
        )
        return [
            f"Data: {self.train_rows:,} training rows, {self.epoch_rows:,} an epoch; "
            f"{self.val_rows:,} evaluation rows.",
            self._order(),
            f"Batch: {self.global_batch:,} pairs a step on {self.workers} worker(s), "
            f"{self.local_batch:,} each {accumulate}; {contrast}.",
            *self._structure(),
            f"Length: {self.steps:,} steps, {self.samples:,} samples, {epochs:.2f} epochs; "
            f"warm-up over {self.warmup_samples:,} samples.",
            f"Model: {self.num_parameters:,} parameters, vocabulary {self.vocab_size:,}.",
            f"Memory: ZeRO stage {self.zero_stage} in {self.precision} holds about "
            f"{_bytes(self.state_bytes)} of parameters, gradients and optimiser state per worker "
            "(activations come on top).",
            *([] if self.task else [traffic]),
            f"Checkpoint: about {_bytes(self.checkpoint_bytes)}.",
            *([] if self.rerank_bytes == 0 else [self._rerank()]),
        ]

    def _rerank(self) -> str:
        return (
            f"Re-ranking: each worker keeps the states of its share of {self.val_rows:,} "
            f"evaluation images, {_bytes(self.rerank_bytes)} each, in its node's memory."
        )

    def _structure(self) -> list[str]:
        said = f"Structure: {', '.join(self.structure)}"
        if self.fusion:
            terms = f" {said}, with momentum features as views." if self.structure else ""
            return [
                f"Fusion: {self.fusion}; the momentum model sees each pair once more without "
                f"gradient, and takes {_bytes(4 * self.num_parameters)} on every worker.{terms}"
            ]
        if not self.structure:
            return []
        if self.momentum:
            return [
                f"{said}; moving averages of the towers embed each pair once more without "
                "gradient: about a third more time than a run without, and "
                f"{_bytes(4 * self.num_parameters)} for them on every worker."
            ]
        if not self.second_view:
            return [f"{said}; no view of the pairs is needed."]
        return [
            f"{said}; of each pair a second, augmented view is decoded and embedded in the same "
            f"forward, {2 * self.micro_batch:,} images and captions for {self.micro_batch:,} "
            "pairs: towers take about twice the time and activations about twice the memory of a "
            "run without."
        ]

    def _order(self) -> str:
        """How well rows are mixed; too few row groups in a window leave neighbours together."""
        rows = self.train_rows / max(self.row_groups, 1)
        groups = min(math.ceil(self.shuffle_window / rows), self.row_groups)
        said = f"Order: shuffled in windows of {groups:,} random row groups of {rows:,.0f} rows"
        if groups >= ENOUGH_GROUPS or groups >= self.row_groups:
            return f"{said}."
        return (
            f"{said}: so few that pairs of a batch come from the same places; set "
            f"data.shuffle_window={math.ceil(ENOUGH_GROUPS * rows)} (a reading task holds as many "
            "encoded), or write smaller row groups with `gammaray data prepare`."
        )


def clock(seconds: int) -> str:
    """How long the rest of a plan takes, as h:mm:ss."""
    return f"{seconds // 3600:d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _batches(config: Config) -> tuple[int, int]:
    """Local and micro batch, in pairs."""
    local = config.train.global_batch // config.cluster.max_workers
    return local, local if config.engine.micro_batch == "auto" else config.engine.micro_batch


def find_contradictions(config: Config) -> list[Problem]:
    """Everything in `config` that contradicts itself, whatever the data."""
    problems: list[Problem] = []
    train, workers = config.train, config.cluster.max_workers
    if config.tracking.uri == "embedded" and "://" in config.cluster.storage:
        problems.append(
            Problem(
                place="tracking.uri",
                message=f"embedded needs local storage, cluster.storage is {config.cluster.storage}"
                "; give the URI of an MLflow server",
            )
        )
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
    if config.task is None:
        problems += _loss_contradictions(config, local, micro)
    problems += _model_contradictions(config)
    if config.evaluate.embedding != "shared" and not config.structure.separation.weight:
        problems.append(
            Problem(
                place="evaluate.embedding",
                message=f"is {config.evaluate.embedding}; only structure.separation makes "
                "independent features: give it a weight, or leave this at shared",
            )
        )
    problems += _task_contradictions(config, micro)
    if config.evaluate.zero_shot and config.data.val is None:
        problems.append(
            Problem(place="data.val", message="missing; evaluate.zero_shot needs rows to classify")
        )
    for kind, tasks in (
        ("zero_shot", config.evaluate.zero_shot),
        ("linear_probe", config.evaluate.linear_probe),
    ):
        if len({task.column for task in tasks}) < len(tasks):
            problems.append(
                Problem(
                    place=f"evaluate.{kind}",
                    message="names a column twice; metrics are named by column",
                )
            )
    if config.data.val is None:
        problems += [
            Problem(
                place=f"evaluate.linear_probe.{index}.test",
                message="missing, and so is data.val: give rows to test the classifier on",
            )
            for index, task in enumerate(config.evaluate.linear_probe)
            if task.test is None
        ]
    return problems


def _model_contradictions(config: Config) -> list[Problem]:
    """What the kind of model contradicts."""
    model, loss = config.model, config.loss
    problems: list[Problem] = []

    def check(is_wrong: bool, place: str, message: str) -> None:
        if is_wrong:
            problems.append(Problem(place=place, message=message))

    pretrained = model.pretrained or model.image.pretrained or model.text.pretrained
    check(
        bool(model.init and pretrained),
        "model.init",
        f"is {model.init}, and {pretrained} is to be loaded too: leave one out",
    )
    if model.kind == "two_tower":
        check(
            config.evaluate.rerank is not None,
            "evaluate.rerank",
            f"is {config.evaluate.rerank}, and the model is two_tower, which has no matching head: "
            "leave it out, or set model.kind=fusion",
        )
        check(
            model.image.stem == "conv",
            "model.image.stem",
            "is conv, and the model is two_tower, whose ViT reads patches: leave it out, or set "
            "model.kind=fusion",
        )
        return problems + [
            Problem(
                place=f"model.{tower}.pretrained",
                message="is set, and the model is two_tower: give a whole CLIP model as "
                "model.pretrained, or set model.kind=fusion",
            )
            for tower, part in (("image", model.image), ("text", model.text))
            if part.pretrained is not None
        ]
    check(
        config.evaluate.rerank is not None and not config.evaluate.retrieval,
        "evaluate.rerank",
        f"is {config.evaluate.rerank}, and there is no retrieval whose best it could order: set "
        "evaluate.retrieval=true, or leave it out",
    )
    check(
        model.activation != "quick_gelu",
        "model.activation",
        f"is {model.activation}, which is of two_tower; a ViT and a BERT have their own: leave it "
        "out",
    )
    check(
        model.pretrained is not None,
        "model.pretrained",
        "is a CLIP model, which has no fusion encoder: give a ViT as model.image.pretrained and a "
        "BERT as model.text.pretrained",
    )
    check(
        model.image.width != model.text.width,
        "model.text.width",
        f"is {model.text.width}, model.image.width {model.image.width}; in a fusion model texts "
        "attend to image states, so both must be equal: change one",
    )
    check(
        loss.kind != "gamma",
        "loss.kind",
        f"is {loss.kind}; a fusion model's contrast with momentum features is gamma's: set gamma",
    )
    check(
        loss.prior not in ("none", "queue"),
        "loss.prior",
        f"is {loss.prior}; a fusion model has momentum features to queue: set queue, or none",
    )
    check(
        loss.exchange > 0,
        "loss.exchange",
        f"is {loss.exchange}; a fusion model's workers exchange no features: set 0",
    )
    check(
        config.structure.has_second_view,
        "structure.views",
        "is augmented; the views of a fusion model's terms are its momentum features: set momentum",
    )
    return problems


def _task_contradictions(config: Config, micro: int) -> list[Problem]:
    """What a task contradicts, in micro batches of `micro`; without one nothing."""
    task, evaluate = config.task, config.evaluate
    if task is None:
        return []
    problems: list[Problem] = []
    if config.model.kind != "fusion":
        problems.append(
            Problem(
                place="model.kind",
                message=f"is {config.model.kind}; task {task.kind} needs the fusion encoder: set "
                "model.kind=fusion",
            )
        )
    if task.kind == "assignment" and micro < 3:
        problems.append(
            Problem(
                place="engine.micro_batch",
                message=f"is {micro}; a text and two other pictures of its micro batch make three: "
                "raise it, raise train.global_batch, or lower cluster.workers",
            )
        )
    if task.kind == "assignment" and task.distillation:
        problems.append(
            Problem(
                place="task.distillation",
                message=f"is {task.distillation}; assignment draws its pictures anew, so a "
                "momentum model would be asked something else: leave it out",
            )
        )
    if config.structure.is_on:
        problems.append(
            Problem(
                place="structure",
                message=f"has terms with a weight, which are of pretraining; task {task.kind} has "
                "its own loss: leave them out",
            )
        )
    measured = {
        "zero_shot": evaluate.zero_shot,
        "linear_probe": evaluate.linear_probe,
        "rerank": evaluate.rerank,
    }
    problems += [
        Problem(
            place=f"evaluate.{name}",
            message=f"is set; a run of task {task.kind} is measured by its answers alone: leave it "
            "out, and evaluate the pretraining run",
        )
        for name, value in measured.items()
        if value
    ]
    return problems


def _loss_contradictions(config: Config, local: int, micro: int) -> list[Problem]:
    """What the loss contradicts, at `local` pairs per worker in micro batches of `micro`."""
    problems: list[Problem] = []
    kind, virtual = config.loss.kind, config.loss.virtual_batch
    if kind in WHOLE_BATCH and micro != local:
        problems.append(
            Problem(
                place="engine.micro_batch",
                message=f"is {micro}, fewer than the local batch {local}: {kind} would "
                "miss negatives of the other micro batches; use auto, or loss.kind=gamma",
            )
        )
    if kind in WHOLE_BATCH and config.train.global_batch < 2:
        problems.append(
            Problem(
                place="train.global_batch",
                message=f"is {config.train.global_batch}; a pair without any other has no "
                "negatives and trains nothing: raise it",
            )
        )
    if kind not in WHOLE_BATCH and micro < 2:
        problems.append(
            Problem(
                place="engine.micro_batch",
                message=f"is {micro}; a pair without any other has no negatives and trains "
                "nothing: raise it, raise train.global_batch, or lower cluster.workers",
            )
        )
    at_hand = micro * (config.loss.exchange + 1)
    if kind == "gamma" and isinstance(virtual, int) and virtual < at_hand:
        problems.append(
            Problem(
                place="loss.virtual_batch",
                message=f"is {virtual}; it must be at least {at_hand}, the pairs at hand (the "
                "micro batch and partners'), which are all used: raise it, or use global",
            )
        )
    if config.loss.evidence == "counted" and config.loss.prior == "none":
        problems.append(
            Problem(
                place="loss.evidence",
                message="is counted, but there is no prior whose worth it could be: choose "
                "loss.prior, or leave it at measured",
            )
        )
    if kind == "fastclip_v3" or (kind == "gamma" and config.loss.scale_rule == "rho"):
        negatives = (at_hand if kind == "gamma" else config.train.global_batch) - 1
        largest = math.log(negatives) if negatives else math.inf
        if config.loss.rho >= largest:
            problems.append(
                Problem(
                    place="loss.rho",
                    message=f"is {config.loss.rho:g}; weights on {negatives} negatives diverge by "
                    f"less than ln {negatives} = {largest:.2f} nats from equal ones, so the logit "
                    f"scale would only grow: lower it, e.g. to {largest / 2:.1f}",
                )
            )
    workers, exchange = config.cluster.max_workers, config.loss.exchange
    if exchange and (kind != "gamma" or exchange >= workers):
        problems.append(
            Problem(
                place="loss.exchange",
                message=f"is {exchange}; it needs loss.kind=gamma and as many other workers "
                f"(there are {workers - 1}): lower it, 0 keeps every feature on its worker",
            )
        )
    if kind != "gamma" and virtual != "global":
        problems.append(
            Problem(
                place="loss.virtual_batch",
                message=f"is {virtual}; {kind} contrasts the pairs it sees and no virtual ones: "
                "leave it at global, or use loss.kind=gamma",
            )
        )
    return problems


def make_plan(config: Config, facts: Facts) -> tuple[Plan, list[Problem]]:
    """Derive the plan; the problems are what contradicts the data. The config is consistent."""
    train, workers = config.train, config.cluster.max_workers
    local, micro = _batches(config)
    wanted = train.samples or round((train.epochs or 0) * facts.epoch_rows)
    steps = wanted // train.global_batch
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
    slow = 4 * facts.num_parameters if config.has_momentum else 0
    val_rows = min(facts.val_rows, config.evaluate.max_rows)
    plan = Plan(
        workers=workers,
        global_batch=train.global_batch,
        local_batch=local,
        micro_batch=micro,
        accumulation=max(1, local // micro),
        loss_kind=config.loss.kind,
        virtual_batch=_virtual_batch(config),
        train_rows=facts.train_rows,
        epoch_rows=facts.epoch_rows,
        row_groups=facts.row_groups,
        shuffle_window=config.data.shuffle_window,
        val_rows=val_rows,
        samples=steps * train.global_batch,
        steps=steps,
        warmup_samples=config.optim.warmup_samples,
        vocab_size=facts.vocab_size,
        num_parameters=facts.num_parameters,
        zero_stage=config.engine.zero_stage,
        precision=config.engine.precision,
        state_bytes=_state_bytes(config, facts.num_parameters) + slow,
        loss_bytes_per_step=loss_bytes(config.loss.kind, workers, local, facts.embed_dim)
        + config.loss.exchange * local * 8 * (facts.embed_dim + 1),
        all_gather_bytes_per_step=loss_bytes("infonce_gathered", workers, local, facts.embed_dim),
        checkpoint_bytes=(_weight_bytes(config) + 12) * facts.num_parameters + slow,
        rerank_bytes=_rerank_bytes(config, val_rows),
        second_view=config.structure.has_second_view,
        momentum=config.has_momentum,
        structure=_terms(config.structure),
        fusion=_fusion(config),
        task=_task(config),
    )
    return plan, problems


def _terms(structure: StructureConfig) -> tuple[str, ...]:
    named = {
        "in-modal contrast": structure.in_modal,
        "separation": structure.separation.weight,
        "bridge": structure.bridge.weight,
        "consistency": structure.consistency.weight,
    }
    return tuple(f"{name} {weight:g}" for name, weight in named.items() if weight)


def _fusion(config: Config) -> str:
    if config.model.kind != "fusion" or config.task is not None:
        return ""
    fusion = config.fusion
    return (
        f"matching on pairs and two hard negatives each (weight {fusion.matching:g}), "
        f"{fusion.mask_share:.0%} of the words masked (weight {fusion.masked_words:g}), "
        f"{fusion.distillation:.0%} of the targets by the momentum model"
    )


def _task(config: Config) -> str:
    if config.task is None:
        return ""
    alpha = config.task.distillation
    slow = f", {alpha:.0%} of the targets by a momentum model" if alpha else ""
    return f"fine-tuned for {config.task.kind}{slow}"


def resize(config: Config, workers: int, before: Plan) -> Config:
    """Give the config under which a run goes on with another number of workers.

    `before` is its plan as it began. Objective (virtual batch) and length stay (to the nearest
    step). So does the global
    batch where it can be cut into equal micro batches no larger than before (of half their number
    or more, lest the losses lose their negatives); else it becomes the nearest that can.
    """
    pairs = before.global_batch
    if config.loss.kind in WHOLE_BATCH:
        micro, accumulation = max(1, round(pairs / workers)), 1
    else:
        least = -(-pairs // (workers * before.micro_batch))
        accumulation = next(
            (parts for parts in range(least, 2 * least + 1) if pairs % (workers * parts) == 0),
            least,
        )
        micro = min(before.micro_batch, max(2, round(pairs / (workers * accumulation))))
    train = {"global_batch": workers * accumulation * micro, "samples": before.samples}
    loss: dict[str, Any] = {"exchange": min(config.loss.exchange, workers - 1)}
    if config.loss.kind == "gamma":
        loss["virtual_batch"] = before.virtual_batch
    return config.model_copy(
        update={
            "train": config.train.model_copy(update={**train, "epochs": None}),
            "engine": config.engine.model_copy(update={"micro_batch": micro}),
            "loss": config.loss.model_copy(update=loss),
            "cluster": config.cluster.model_copy(update={"workers": workers}),
        }
    )


def _virtual_batch(config: Config) -> int:
    """Of a loss that contrasts local pairs alone: the micro batch."""
    kind, virtual = config.loss.kind, config.loss.virtual_batch
    if kind in WHOLE_BATCH or (kind == "gamma" and virtual == "global"):
        return config.train.global_batch
    return _batches(config)[1] if virtual == "global" else virtual


def loss_bytes(kind: LossKind, workers: int, local: int, embed_dim: int) -> int:
    """Bytes a worker receives for one loss of `local` pairs and its backward; fp32 features.

    `unit` is what it receives when the embeddings of one side are gathered or scattered.
    """
    others = (workers - 1) * local
    unit = 4 * others * embed_dim
    return {
        "gamma": 0,
        "infonce_local": 0,
        "infonce_gathered": 4 * unit,  # both sides forward, their gradients backward
        "sigmoid_local": 0,
        "sigmoid_ring": 2 * unit,  # texts and their gradients
        "fastclip_v1": 2 * unit + 16 * others,  # both sides; two fp32 u, an int64 key
        "fastclip_v3": 2 * unit + 16 * others,
    }[kind]


def _weight_bytes(config: Config) -> int:
    return 2 if config.engine.precision == "bf16" else 4


def _state_bytes(config: Config, parameters: int) -> int:
    """ZeRO's shares: optimiser state over workers from stage 1, gradients 2, parameters 3."""
    stage, workers = config.engine.zero_stage, config.cluster.max_workers
    weight = _weight_bytes(config)
    # AdamW's two moments, and a master copy: always in bf16, and for any partitioned stage.
    optimizer = 8 + (4 if weight == 2 or stage else 0)
    shares = [
        weight / (workers if stage >= 3 else 1),
        weight / (workers if stage >= 2 else 1),
        optimizer / (workers if stage >= 1 else 1),
    ]
    return math.ceil(parameters * sum(shares))


def _rerank_bytes(config: Config, rows: int) -> int:
    """States of a worker's images: of each patch and of the whole, so wide as the tower."""
    if config.evaluate.rerank is None:
        return 0
    image = config.model.image
    states = (image.size // image.patch) ** 2 + 1
    own = math.ceil(rows / config.cluster.max_workers)
    return own * states * image.width * _weight_bytes(config)


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "KB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")
