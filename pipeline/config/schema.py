"""The schema of a run: frozen sections, one field per decision, every field with its unit.

Enters: plain values from YAML and overrides. Leaves: a validated `Config`.
Must not know: any library of the system itself (torch, ray, mlflow).
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(gt=0, le=1)]
Byte = Annotated[int, Field(ge=0, le=255)]

HUB = "hf-hub:"  # how the name of a model on Hugging Face's hub begins, as in OpenCLIP


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no silent conversion of strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SourceConfig(Section):
    """One of several sources of training data; what is left out is as in `data`."""

    path: str = Field(description="Folder, file, glob or URL of Parquet.")
    weight: PositiveFloat = Field(
        default=1.0, description="How often an epoch sees each row, on the average."
    )
    split: str | None = Field(default=None, description="As data.train_split.")
    image_column: str | None = Field(default=None, description="As data.image_column.")
    caption_column: str | None = Field(default=None, description="As data.caption_column.")


def _check_crop_scale(scale: tuple[float, float]) -> None:
    low, high = scale
    if not 0 < low <= high <= 1:
        raise ValueError(
            f"crop_scale is {[low, high]}; it must be two shares with 0 < low <= high <= 1"
        )


class ViewConfig(Section):
    """How the second view of a training row differs from the first: seeded, as all draws are."""

    crop_scale: tuple[float, float] = Field(
        default=(0.5, 1.0), description="As data.crop_scale, of a crop of its own."
    )
    flip: Fraction = Field(default=0.0, description="As data.flip.")
    augment_image: Literal["none", "rand_augment"] = Field(
        default="rand_augment", description="As data.augment_image."
    )
    augment_text: Fraction = Field(
        default=1.0, description="As data.augment_text, of the first view's caption as it was."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_crop_scale(self.crop_scale)
        return self


class DataConfig(Section):
    """Where the pairs are and how a row becomes an image array and token ids."""

    train: tuple[SourceConfig, ...] = Field(
        min_length=1,
        description="Folder, file, glob or URL of training Parquet; or a list of sources, each "
        "with path and weight.",
    )
    val: str | None = Field(
        default=None, description="The same for evaluation; absent: no evaluation."
    )
    train_split: str = Field(
        default="auto",
        description="Rows used of a column `split`: a value, all, or auto: train (and restval).",
    )
    val_split: str = Field(
        default="auto",
        description="The same for evaluation; auto: val, or validation, valid, dev, test.",
    )
    image_column: str = Field(
        default="auto",
        description="Column of encoded images (bytes, or the path of a file), or auto.",
    )
    caption_column: str = Field(
        default="auto", description="Column of captions (string or list), or auto."
    )
    tokenizer: str = Field(
        default="train",
        description="`train` (BPE on the captions), or a Hugging Face tokenizer path or id.",
    )
    vocab_size: Annotated[int, Field(ge=300)] = Field(
        default=8192,
        description="Most tokens of a trained tokenizer; unused with a tokenizer path.",
    )
    shuffle_window: PositiveInt = Field(
        default=4096, description="Rows shuffled together: about this many, from random row groups."
    )
    crop_scale: tuple[float, float] = Field(
        default=(0.9, 1.0), description="Share of the image area kept by the random resized crop."
    )
    squeeze: bool = Field(
        default=False,
        description="Pictures of any shape are squeezed into the square and seen whole, before "
        "training crops them; else evaluation sees the centre square. ALBEF's way for tasks.",
    )
    flip: Fraction = Field(
        default=0.0, description="Probability of a left-right flip; captions name sides."
    )
    clean_captions: bool = Field(
        default=False,
        description="Mend broken encoding (mojibake), HTML entities and markup in captions, in "
        "training, evaluation and for a trained tokenizer.",
    )
    augment_image: Literal["none", "rand_augment"] = Field(
        default="none",
        description="What happens to training images after crop and flip: RandAugment draws two of "
        "ALBEF's ten operations, at magnitude 7 of 10, and applies each with probability 1/2.",
    )
    augment_text: Fraction = Field(
        default=0.0,
        description="Probability that a training caption has a tenth of its words swapped, deleted "
        "or, with synonyms, replaced or inserted (EDA). Can make a caption false: colours, counts.",
    )
    synonyms: str | None = Field(
        default=None,
        description="Text file for augment_text that every node reaches: a line a group of "
        "synonyms, separated by commas.",
    )
    second_view: ViewConfig = Field(
        default=ViewConfig(),
        description="The augmented view of a row, made when a term of structure needs it.",
    )
    image_mean: tuple[Fraction, Fraction, Fraction] = Field(
        default=(0.48145466, 0.4578275, 0.40821073),
        description="Subtracted from red, green and blue, which are from 0 to 1; CLIP's.",
    )
    image_std: tuple[Spread, Spread, Spread] = Field(
        default=(0.26862954, 0.26130258, 0.27577711),
        description="What they are divided by then; CLIP's.",
    )
    background: tuple[Byte, Byte, Byte] = Field(
        default=(255, 255, 255), description="RGB under transparent pixels, 0-255."
    )
    max_bad_fraction: Fraction = Field(
        default=0.5,
        description="The run stops when more than this share of the rows read is unusable.",
    )

    @field_serializer("train")
    def _plainly(self, sources: tuple[SourceConfig, ...]) -> object:
        """One path alone is written as it was given."""
        first = sources[0]
        is_plain = len(sources) == 1 and first == SourceConfig(path=first.path)
        return first.path if is_plain else [source.model_dump() for source in sources]

    @field_validator("train", mode="before")
    @classmethod
    def _one_source(cls, value: object) -> object:
        return ({"path": value},) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_crop_scale(self.crop_scale)
        return self


class ImageTower(Section):
    """A vision transformer; sizes as in transformers' CLIPVisionConfig or, of fusion, ViTConfig."""

    pretrained: str | None = Field(
        default=None,
        description="Of a fusion model: folder or hub id of a ViT of these sizes; its position "
        "embeddings are resized to `size`.",
    )
    size: PositiveInt = Field(default=224, description="Input side in pixels.")
    patch: PositiveInt = Field(default=32, description="Patch side in pixels; must divide size.")
    stem: Literal["patch", "conv"] = Field(
        default="patch",
        description="What reads the pixels. patch: a linear map of each patch, as ViT's. conv, of "
        "a fusion model: convolutions that halve the image until a pixel is a patch, so `patch` is "
        "a power of 2; they learn from fewer samples.",
    )
    width: PositiveInt = Field(default=768, description="Width of a layer; a multiple of heads.")
    layers: PositiveInt = Field(default=12, description="Layers of the transformer.")
    heads: PositiveInt = Field(default=12, description="Attention heads of a layer.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.size % self.patch:
            raise ValueError(f"patch is {self.patch}; it must divide size {self.size}")
        if self.stem == "conv" and (self.patch < 2 or self.patch & (self.patch - 1)):
            raise ValueError(f"patch is {self.patch}; with stem conv it is 2, 4, 8, 16, 32, ...")
        if self.stem == "conv" and self.pretrained is not None:
            raise ValueError(
                f"stem is conv; a pretrained ViT ({self.pretrained}) reads patches: leave out one"
            )
        _check_heads(self.width, self.heads)
        return self


class TextTower(Section):
    """A text transformer; sizes as in transformers' CLIPTextConfig or, of fusion, BertConfig."""

    pretrained: str | None = Field(
        default=None,
        description="Of a fusion model: folder or hub id of a BERT of this width; its first layers "
        "become the text encoder, the next ones the fusion encoder's.",
    )
    context_length: Annotated[int, Field(ge=3)] = Field(
        default=77, description="Tokens a caption is cut to, start and end included."
    )
    width: PositiveInt = Field(default=512, description="Width of a layer; a multiple of heads.")
    layers: PositiveInt = Field(default=12, description="Layers of the transformer.")
    heads: PositiveInt = Field(default=8, description="Attention heads of a layer.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_heads(self.width, self.heads)
        return self


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"heads is {heads}; it must divide width {width}")


class FusionEncoder(Section):
    """The encoder that reads a text while it looks at an image; width and heads as of the text."""

    layers: PositiveInt = Field(default=6, description="Layers of the fusion encoder.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="Of the text and the fusion encoder, in training; BERT's."
    )


class ModelConfig(Section):
    """The model: sizes, or pretrained weights."""

    kind: Literal["two_tower", "fusion"] = Field(
        default="two_tower",
        description="two_tower: CLIP. fusion: ALBEF, that is a ViT, a BERT, and an encoder that "
        "fuses them.",
    )
    init: str | None = Field(
        default=None,
        description="Folder or URL of a run, such as runs/demo: this one starts from its newest "
        "checkpoint's weights and its tokenizer; a task's heads are new. Of two_tower also a CLIP "
        "model of these sizes from elsewhere, in the form of transformers or OpenCLIP: a folder, "
        "or hf-hub:ORG/NAME.",
    )
    pretrained: str | None = Field(
        default=None,
        description="Of two_tower: folder or hub id of a CLIP model; its sizes replace those given "
        "here.",
    )
    embed_dim: PositiveInt = Field(
        default=512, description="Dimensions of the embeddings that both modalities share."
    )
    activation: Literal["quick_gelu", "gelu"] = Field(
        default="quick_gelu",
        description="Of two_tower: OpenAI's CLIP has quick_gelu, most of OpenCLIP's have gelu.",
    )
    image: ImageTower = ImageTower()
    text: TextTower = TextTower()
    fusion: FusionEncoder = FusionEncoder()
    logit_scale_init: Annotated[float, Field(ge=1, le=100)] = Field(
        default=1 / 0.07, description="First value of the logit scale (1 / temperature)."
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in backward: less memory, about a third slower.",
    )


LossKind = Literal[
    "gamma",
    "infonce_local",
    "infonce_gathered",
    "sigmoid_local",
    "sigmoid_ring",
    "fastclip_v1",
    "fastclip_v3",
]


class LossConfig(Section):
    """The contrastive loss."""

    kind: LossKind = Field(
        default="gamma",
        description="gamma, or a comparator: InfoNCE or SigLIP's sigmoid loss on local pairs or "
        "on the global batch (gathered; text blocks in a ring); FastCLIP with a constant (v1) or "
        "learned (v3) temperature. virtual_batch, prior, u and scale_rule are gamma's.",
    )
    prior: Literal["none", "amortized", "queue", "history"] = Field(
        default="none",
        description="Belief about each anchor's normaliser beside the local batch: a network's "
        "prediction, this worker's last embeddings, or what the row's last visit said.",
    )
    evidence: Literal["measured", "counted"] = Field(
        default="measured",
        description="What the prior is worth beside the batch: as much as its errors so far allow, "
        "or exactly the negatives of virtual_batch that the batch lacks.",
    )
    queue_size: PositiveInt = Field(
        default=4096, description="Pairs kept by prior queue, on each worker."
    )
    u: Literal["mean", "sampled"] = Field(
        default="mean",
        description="The auxiliary variable: its conditional mean, or a draw from it.",
    )
    virtual_batch: Annotated[int, Field(ge=2)] | Literal["global"] = Field(
        default="global",
        description="Batch size whose InfoNCE the loss targets; global: train.global_batch.",
    )
    exchange: NonNegativeInt = Field(
        default=0,
        description="Other workers whose pairs a worker also contrasts with in each step, in turn; "
        "bytes moved do not depend on the number of workers. 0: no feature leaves its worker.",
    )
    max_weight: PositiveFloat = Field(
        default=10.0,
        description="Cap on the summed weight of an anchor's negatives (1 on average).",
    )
    scale_rule: Literal["plain", "self_normalised", "rho", "fixed"] = Field(
        default="plain",
        description="Gradient of the logit scale: the loss's own; with weights normalised per "
        "anchor; toward divergence rho; none.",
    )
    rho: Annotated[float, Field(ge=0)] = Field(
        default=6.5,
        description="For scale_rule rho and fastclip_v3: divergence, in nats, of an anchor's "
        "weights on negatives from equal ones. Must stay below the log of the negatives.",
    )
    fastclip_gamma: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.8,
        description="For fastclip: weight of the batch in a row's moving average of normalisers "
        "(1: no memory).",
    )


class Term(Section):
    """A term of the loss with a weight, which may begin late and rise."""

    weight: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="0: the term is not there, and costs nothing."
    )
    start_samples: NonNegativeInt = Field(
        default=0, description="Samples seen before which the weight is zero."
    )
    ramp_samples: NonNegativeInt = Field(
        default=0, description="Samples over which it then rises linearly."
    )

    def at(self, samples: int) -> float:
        """The weight when so many samples have been seen."""
        if samples < self.start_samples:
            return 0.0
        return self.weight * min(1.0, (samples - self.start_samples + 1) / (self.ramp_samples + 1))


class SeparationTerm(Term):
    """Deep feature separation: independent features beside the shared ones; the paper's L_Sep."""

    orthogonality: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Within the term: squared cosine of a sample's two features."
    )
    contrast: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Within the term: independent features of a sample and its view."
    )
    uniformity: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Within the term: log mean Gaussian potential of these features."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weight and not self.orthogonality + self.contrast + self.uniformity:
            raise ValueError(
                "orthogonality, contrast and uniformity are all 0, so nothing trains the "
                "independent features: give one a weight, or the term weight 0"
            )
        return self


class BridgeTerm(Term):
    """Brownian bridge: a view lies between its sample and the pair's other side; L_Br."""

    t: Fraction | Annotated[tuple[Fraction, ...], Field(min_length=1)] | Literal["sampled"] = Field(
        default=0.25,
        description="Share of the sample's own embedding in the point its view is pulled to; "
        "several (their mean), or sampled: drawn per row from 0 to 1.",
    )
    text: bool = Field(default=False, description="A bridge for augmented captions too.")


class ConsistencyTerm(Term):
    """Geometric consistency: both modalities have the same inner geometry; L_GC.

    Like the paper's it grows with the batch: loss.virtual_batch, of a comparator the global batch.
    """

    views: bool = Field(default=True, description="Also between a sample and its view: L_GC^a.")


class StructureConfig(Section):
    """Latent modality structures beside the contrastive loss; all off unless a weight is given."""

    views: Literal["augmented", "momentum"] = Field(
        default="augmented",
        description="What a view is: an augmented image and caption of the row (data.second_view), "
        "or the row as moving averages of the towers embed it.",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.995,
        description="Decay per step of the averages of views momentum, or of a fusion model's "
        "momentum model.",
    )
    in_modal: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="Share of the contrasts of a sample with its own view (V2V, T2T) in the base "
        "loss; the paper's is 0.5, four equal parts with V2T and T2V. Contrasts of views are gamma "
        "losses on local pairs, whatever loss.kind is.",
    )
    separation: SeparationTerm = SeparationTerm()
    bridge: BridgeTerm = BridgeTerm()
    consistency: ConsistencyTerm = ConsistencyTerm()

    @property
    def is_on(self) -> bool:
        """Whether there is any term beside the contrast of the two modalities."""
        return self.needs_views or self.consistency.weight > 0 or self.separation.weight > 0

    @property
    def has_momentum(self) -> bool:
        """Whether slow towers embed each row too."""
        return self.needs_views and self.views == "momentum"

    @property
    def has_second_view(self) -> bool:
        """Whether the data gives an augmented view of each row."""
        return self.needs_views and self.views == "augmented"

    @property
    def needs_views(self) -> bool:
        """Whether a term compares each row with a view of it."""
        return bool(self.bridge.weight) or self.needs_text_views

    @property
    def needs_text_views(self) -> bool:
        """Whether captions need views too: a bridge may be for images alone."""
        return bool(
            self.in_modal
            or (self.separation.weight and self.separation.contrast)
            or (self.bridge.weight and self.bridge.text)
            or (self.consistency.weight and self.consistency.views)
        )


class FusionConfig(Section):
    """What a fusion model learns beside the contrast, which is of its momentum features; ALBEF."""

    distillation: Fraction = Field(
        default=0.4,
        description="Share of the momentum model's answers in the targets of contrast and masked "
        "words (alpha).",
    )
    distillation_ramp_samples: NonNegativeInt = Field(
        default=0, description="Samples over which that share rises linearly from zero."
    )
    matching: Annotated[float, Field(ge=0)] = Field(
        default=1.0,
        description="Weight of telling pairs from hard negatives of the micro batch (ITM).",
    )
    masked_words: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Weight of guessing masked words (MLM)."
    )
    mask_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.15, description="Share of a caption's tokens that are to be guessed."
    )


class TaskConfig(Section):
    """What a fusion model is fine-tuned for; its rows have texts and answers in place of captions.

    Metrics are named by the kind. reasoning (a statement about one picture or two, true or false),
    entailment (a hypothesis, three classes) and classification (any labels) are one way to train.
    """

    kind: Literal["vqa", "reasoning", "entailment", "classification", "assignment"] = Field(
        description="vqa: a decoder ranks a list of answers. assignment: the step before "
        "two-picture reasoning, from captions: is a text of the first picture, the second, none?"
    )
    answer_column: str = Field(
        default="auto",
        description="Column of answers or labels, or auto; of a list of questions a list as long.",
    )
    answers: str | None = Field(
        default=None,
        description="The closed list: a text file, an answer a line, or a JSON list; absent: what "
        "the training rows answer.",
    )
    max_answers: PositiveInt = Field(
        default=3128, description="Of vqa's training answers: the commonest that are kept."
    )
    decoder_layers: PositiveInt = Field(default=6, description="Of vqa's answer decoder.")
    distillation: Fraction = Field(
        default=0.0,
        description="Share of the answers of a momentum model (structure.momentum is its decay) in "
        "the targets (alpha); 0: there is none.",
    )
    distillation_ramp_samples: NonNegativeInt = Field(
        default=0, description="Samples over which that share rises linearly from zero."
    )
    ranked: PositiveInt = Field(
        default=128,
        description="Of vqa: answers scored whole in evaluation, the likeliest by first token.",
    )


class OptimConfig(Section):
    """AdamW with a warm-up and a schedule counted in samples."""

    lr: PositiveFloat = Field(default=5e-4, description="Peak learning rate of the towers.")
    prior_lr: PositiveFloat = Field(
        default=2e-3, description="Peak learning rate of the amortized prior."
    )
    betas: tuple[float, float] = Field(
        default=(0.9, 0.98),
        description="AdamW's decay per step of the averages of gradient and squared gradient.",
    )
    eps: PositiveFloat = Field(
        default=1e-6,
        description="AdamW's, added to the root of the squared gradient's average; the prior has "
        "one of its own.",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.2, description="On matrices only: not on norms, biases and the logit scale."
    )
    warmup_samples: NonNegativeInt = Field(
        default=0, description="Samples over which the rate rises linearly from zero."
    )
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine",
        description="The rate after the warm-up: falls along a half cosine to `min_lr` at the "
        "run's end, or stays.",
    )
    min_lr: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="What a cosine ends at; the prior's rate falls by the same factor."
    )
    grad_clip: PositiveFloat = Field(default=1.0, description="Largest global gradient norm.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr:g}; it must not be above lr {self.lr:g}")
        if self.min_lr and self.schedule == "constant":
            raise ValueError(f"min_lr is {self.min_lr:g}; a constant rate does not fall: leave it")
        return self


class EngineConfig(Section):
    """How DeepSpeed holds parameters, gradients and optimiser state."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="What is split over the workers: nothing (0), optimiser state (1), gradients "
        "too (2), parameters too (3).",
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16",
        description="Of weights and activations; in bf16 the optimiser keeps an fp32 copy.",
    )
    micro_batch: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="Pairs per worker in one forward; auto: global_batch / workers in one go. "
        "Fewer: gradients accumulate, and negatives come from the micro batch.",
    )


class TrainConfig(Section):
    """How long, how much at once, and what happens how often."""

    global_batch: PositiveInt = Field(
        default=512, description="Pairs per optimiser step, all workers."
    )
    samples: PositiveInt | None = Field(
        default=None, description="Length of the run in pairs seen."
    )
    epochs: PositiveFloat | None = Field(default=None, description="Length of the run in epochs.")
    seed: NonNegativeInt = Field(
        default=0,
        description="Of first weights, order of rows, augmentation, and what a step draws.",
    )
    checkpoint_every: PositiveInt = Field(
        default=500, description="Optimiser steps between checkpoints."
    )
    keep: PositiveInt = Field(default=2, description="Checkpoints kept; the newest ones.")
    log_every: PositiveInt = Field(default=10, description="Optimiser steps between metric points.")
    max_nonfinite: PositiveInt = Field(
        default=10,
        description="Stop after so many steps in a row whose loss or gradient is not finite.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.samples is None) == (self.epochs is None):
            raise ValueError(
                "give exactly one of samples and epochs (the length of the run), the other as "
                f"null; samples is {self.samples or 'null'}, epochs is {self.epochs or 'null'}"
            )
        return self


class ZeroShotTask(Section):
    """Zero-shot classification of rows by a label column."""

    column: str = Field(description="Column of class labels in the evaluation Parquet.")
    prompts: tuple[str, ...] = Field(
        default=("a photo of a {}",), description="Templates; embeddings are averaged over them."
    )
    classes: str | None = Field(
        default=None,
        description="Text file, one class name a line; absent: the column's distinct values.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        bad = [prompt for prompt in self.prompts if prompt.count("{}") != 1]
        if bad or not self.prompts:
            raise ValueError(f"prompts is {list(self.prompts)}; each needs one {{}} for the class")
        return self


class LinearProbeTask(Section):
    """Classification of a label column by a linear classifier on embeddings, fitted for it."""

    column: str = Field(description="Column of class labels in both sets.")
    train: str = Field(description="Folder, file, glob or URL of Parquet to fit it to: all rows.")
    train_split: str = Field(default="auto", description="As `data.train_split`, of `train`.")
    test: str | None = Field(
        default=None,
        description="The same to test it on, all other rows; absent: what is used of data.val.",
    )
    test_split: str = Field(
        default="auto", description="As `data.val_split`, of `test`; auto prefers `test`."
    )
    modality: Literal["image", "text"] = Field(
        default="image", description="Whose embeddings are classified."
    )
    shots: tuple[PositiveInt, ...] = Field(
        default=(),
        description="Few-shot too: fitted to so many rows a class, three times drawn anew; the "
        "usual ones are 5, 20, 50.",
    )


class EvaluateConfig(Section):
    """What is measured on data.val, and when; always at the end of the run too."""

    every: PositiveInt | Literal["end"] = Field(
        default="end", description="Optimiser steps between evaluations, or only at the end."
    )
    max_rows: PositiveInt = Field(
        default=10_000, description="Rows of data.val used, from the start."
    )
    batch: PositiveInt = Field(default=128, description="Rows per worker in one forward.")
    retrieval: bool = Field(
        default=True, description="Recall at 1, 5 and 10, image to text and text to image."
    )
    rerank: PositiveInt | None = Field(
        default=None,
        description="Of a fusion model: so many of a query's best by contrast are ordered anew by "
        "the matching head, as retrieval_reranked; none: not.",
    )
    zero_shot: tuple[ZeroShotTask, ...] = Field(
        default=(), description="Zero-shot classifications, each of a label column."
    )
    linear_probe: tuple[LinearProbeTask, ...] = Field(
        default=(), description="At the end of the run, and by `gammaray evaluate`."
    )
    embedding: Literal["shared", "independent", "both"] = Field(
        default="shared",
        description="What a linear probe sees: the features contrasted with the other modality, "
        "the independent ones of structure.separation, or both side by side.",
    )


class TrackingConfig(Section):
    """Where MLflow keeps the run."""

    uri: str = Field(
        default="embedded",
        description="embedded (sqlite beside the runs; one node), or a server's URI.",
    )
    experiment: str = Field(default="gammaray", description="The MLflow experiment of the run.")
    system_metrics_seconds: PositiveInt = Field(
        default=10, description="Seconds between system metrics."
    )


class WorkersRange(Section):
    """A number of workers that follows what the cluster has."""

    min: PositiveInt = Field(description="Training waits while fewer are possible.")
    max: PositiveInt = Field(description="So many are asked for.")
    check_every_s: PositiveFloat = Field(
        default=60.0, description="Seconds between looks whether more, or only fewer, are possible."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, more than max {self.max}: swap them")
        return self


class ClusterConfig(Section):
    """What the run asks of Ray, and where its files go."""

    address: str = Field(
        default="local", description="local (start Ray here), or auto or an address."
    )
    workers: PositiveInt | WorkersRange = Field(
        default=1,
        description="Data-parallel workers: a number, or {min, max} to grow and shrink with the "
        "cluster.",
    )
    cpus_per_worker: PositiveFloat = Field(default=1.0, description="CPUs reserved for one worker.")
    gpus_per_worker: Literal[0, 1] = Field(
        default=0, description="GPUs of one worker; 0: it trains on CPUs."
    )
    ingest_cpus: PositiveInt = Field(
        default=1, description="CPUs that must be left beside the workers for reading and decoding."
    )
    storage: str = Field(
        default="runs", description="Folder or URL for checkpoints; runs live inside it."
    )
    max_failures: NonNegativeInt = Field(
        default=3,
        description="Failures after which the run gives up, of those since the last checkpoint; "
        "before, it resumes by itself. Nodes taken away with notice do not count.",
    )
    stall_minutes: PositiveFloat = Field(
        default=10.0,
        description="A worker that does nothing for so long shows its stacks and is restarted.",
    )

    @property
    def max_workers(self) -> int:
        """How many workers there are at most; the number itself where it is fixed."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def min_workers(self) -> int:
        """How many workers there are at least."""
        return self.workers if isinstance(self.workers, int) else self.workers.min


class Config(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="The run's name: its folder in cluster.storage and its MLflow run name."
    )
    data: DataConfig
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    structure: StructureConfig = StructureConfig()
    fusion: FusionConfig = FusionConfig()
    task: TaskConfig | None = Field(default=None, description="Absent: pretraining.")
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def has_momentum(self) -> bool:
        """Whether a slow copy of the model embeds each row too."""
        if self.task is not None:
            return self.task.distillation > 0
        return self.model.kind == "fusion" or self.structure.has_momentum


def flatten(config: Config) -> dict[str, str | int | float | bool]:
    """Give `config` as flat dotted keys with plain values; lists and nothing become text."""
    flat: dict[str, str | int | float | bool] = {}

    def visit(value: object, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                visit(item, f"{path}.{key}" if path else str(key))
        elif isinstance(value, str | int | float):
            flat[path] = value
        else:
            flat[path] = str(value)

    visit(config.model_dump(mode="json"), "")
    return flat


def is_elsewhere(path: str) -> bool:
    """Whether a path is a URL or names a model on the hub."""
    return "://" in path or path.startswith(HUB)


def resolve_path(path: str, base: Path) -> str:
    """Make a local relative `path` absolute under `base`; leave the others alone."""
    if is_elsewhere(path) or Path(path).is_absolute():
        return path
    return str((base / path).resolve())
