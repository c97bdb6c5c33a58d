"""What one engine runs: all that is trained, in one module with one forward."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from pipeline.config.schema import Config, LossConfig
from pipeline.data.text import Tokenizer
from pipeline.errors import UserError
from pipeline.evaluate.embed import Parts
from pipeline.losses.priors import AmortizedPrior
from pipeline.losses.structure import Modality
from pipeline.models.fusion import Fusion, build_fusion
from pipeline.models.towers import Embeddings
from pipeline.models.two_tower import TwoTower, build_two_tower

LOGIT_BIAS_INIT = -10.0  # SigLIP's: at the start nearly every pair counts as no match

TOWERS = "towers."  # prefix of the model's parameters' names in what an engine trains


class Outputs(NamedTuple):
    """What an objective takes; absent parts are None. The first six are a contrastive loss's.

    `*_view` are of the same pairs' second view, `*_independent` by the second projection. The last
    six are a fusion model's: see `Fused`; `masked_words` are what was to be guessed, `image_states`
    what evaluation may keep, to match texts with later.
    """

    image: Float[Tensor, "local dim"] | None
    text: Float[Tensor, "local dim"] | None
    logit_scale: Float[Tensor, ""]
    image_log_z: Float[Tensor, " local"] | None = None
    text_log_z: Float[Tensor, " local"] | None = None
    logit_bias: Float[Tensor, ""] | None = None
    image_view: Float[Tensor, "local dim"] | None = None
    text_view: Float[Tensor, "local dim"] | None = None
    image_independent: Float[Tensor, "local dim"] | None = None
    text_independent: Float[Tensor, "local dim"] | None = None
    image_view_independent: Float[Tensor, "local dim"] | None = None
    text_view_independent: Float[Tensor, "local dim"] | None = None
    match_logits: Float[Tensor, "three_local 2"] | None = None
    match_labels: Int[Tensor, " three_local"] | None = None
    masked_logits: Float[Tensor, "chosen vocab"] | None = None
    masked_words: Int[Tensor, " chosen"] | None = None
    slow_masked_logits: Float[Tensor, "chosen vocab"] | None = None
    image_states: Float[Tensor, "local patches width"] | None = None

    @property
    def contrast(self) -> tuple[Any, ...]:
        """The arguments of a contrastive loss, in its order."""
        return self[:6]

    @property
    def parts(self) -> Parts:
        """What evaluation embeds with."""
        return Parts(
            self.image,
            self.text,
            self.image_independent,
            self.text_independent,
            self.image_states,
        )

    @property
    def matching(self) -> Float[Tensor, " pairs"]:
        """How surely each text belongs to its image: the matching head's logit of yes."""
        assert self.match_logits is not None, "it was given states"
        return self.match_logits[:, 1]

    def seen_by(self, slow: Embeddings) -> "Outputs":
        """The same, with another model's embeddings of the pairs for views."""
        return self._replace(
            image_view=slow.image,
            text_view=slow.text,
            image_view_independent=slow.image_independent,
            text_view_independent=slow.text_independent,
        )

    @property
    def modalities(self) -> tuple[Modality, Modality]:
        """Image and text features, for the losses of their structure."""
        assert self.image is not None, "training embeds both"
        assert self.text is not None, "training embeds both"
        return (
            Modality(
                shared=self.image,
                view=self.image_view,
                independent=self.image_independent,
                independent_view=self.image_view_independent,
            ),
            Modality(
                shared=self.text,
                view=self.text_view,
                independent=self.text_independent,
                independent_view=self.text_view_independent,
            ),
        )


class Pretraining(nn.Module):
    """Towers, and what only some losses train: a prior (by its own deviance), a logit bias."""

    def __init__(self, towers: TwoTower, prior: AmortizedPrior | None, *, has_logit_bias: bool):
        super().__init__()
        self.towers = towers
        self.prior = prior
        # Shape [1], not a scalar: ZeRO partitions parameters along their elements.
        self.logit_bias = nn.Parameter(torch.tensor([LOGIT_BIAS_INIT])) if has_logit_bias else None

    def forward(
        self,
        images: UInt8[Tensor, "local height width 3"] | None,
        tokens: Int[Tensor, "local length"] | None,
        view_images: UInt8[Tensor, "local height width 3"] | None = None,
        view_tokens: Int[Tensor, "local length"] | None = None,
    ) -> Outputs:
        """Embed images, texts, or both, and their second views in the same pass.

        The prior predicts only for both, in training.
        """
        found = self.towers(_joined(images, view_images), _joined(tokens, view_tokens))
        image, image_view = _split(found.image, view_images)
        text, text_view = _split(found.text, view_tokens)
        image_independent, image_view_independent = _split(found.image_independent, view_images)
        text_independent, text_view_independent = _split(found.text_independent, view_tokens)
        image_log_z = text_log_z = None
        if self.prior is not None and self.training and image is not None and text is not None:
            image_log_z, text_log_z = self.prior(image, text, found.logit_scale)
        logit_bias = None if self.logit_bias is None else self.logit_bias.float().squeeze(0)
        return Outputs(
            image=image,
            text=text,
            logit_scale=found.logit_scale,
            image_log_z=image_log_z,
            text_log_z=text_log_z,
            logit_bias=logit_bias,
            image_view=image_view,
            text_view=text_view,
            image_independent=image_independent,
            text_independent=text_independent,
            image_view_independent=image_view_independent,
            text_view_independent=text_view_independent,
        )


class FusionPretraining(nn.Module):
    """A fusion model, as the engine runs it; what its loss trains is all its own."""

    def __init__(self, model: Fusion):
        super().__init__()
        self.towers = model

    def forward(
        self,
        images: UInt8[Tensor, "local height width 3"] | None,
        tokens: Int[Tensor, "local length"] | None,
        masked: Int[Tensor, "local length"] | None = None,
        chosen: Bool[Tensor, "local length"] | None = None,
        states: Float[Tensor, "local patches width"] | None = None,
    ) -> Outputs:
        """Embed images, texts, or both; with `masked` texts, or `states`, fuse them: see `Fusion`.

        The one way in for all that evaluation asks of a model that is partitioned, too.
        """
        found, fused = self.towers(
            images, tokens, masked, chosen, states, gives_states=not self.training
        )
        outputs = Outputs(
            image=found.image,
            text=found.text,
            logit_scale=found.logit_scale,
            image_independent=found.image_independent,
            text_independent=found.text_independent,
        )
        if fused is None:
            return outputs
        words = None if tokens is None or chosen is None else tokens[chosen]
        return outputs._replace(**fused._asdict(), masked_words=words)


def _joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return first if first is None or second is None else torch.cat([first, second])


def _split(both: Tensor | None, second: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if both is None or second is None:
        return both, None
    first, view = both.split([len(both) - len(second), len(second)])
    return first, view


def architecture(module: nn.Module) -> dict[str, Any]:
    """What a config does not say where a pretrained model decides it: `like` of the builders."""
    towers: Any = module.towers
    if isinstance(towers, TwoTower):
        return towers.clip_config.to_dict()
    parts = {"vision_config": towers.vision_model, "text_config": towers.text_model}
    return {name: part.config.to_dict() for name, part in parts.items()}


def build_pretraining(
    config: Config, tokenizer: Tokenizer, like: Mapping[str, Any] | None = None
) -> Pretraining | FusionPretraining:
    """Build the module of a run, with weights drawn from `train.seed`.

    `like`: the `architecture` of another, which then is this one's. Raises `UserError` when
    pretrained weights cannot be had, or the tokenizer lacks what the model needs.
    """
    torch.manual_seed(config.train.seed)
    if config.model.kind == "fusion":
        if tokenizer.mask is None:
            raise UserError(
                f"data.tokenizer: {config.data.tokenizer!r} has no mask token, which a fusion "
                "model's masked words need; use one made for BERT, or `train`"
            )
        return FusionPretraining(build_fusion_model(config, tokenizer, like))
    towers = build_two_tower(
        config.model,
        vocab_size=tokenizer.vocab_size,
        start=tokenizer.start,
        end=tokenizer.end,
        pad=tokenizer.pad,
        mean=config.data.image_mean,
        std=config.data.image_std,
        independent=bool(config.structure.separation.weight),
        like=like,
    )
    return Pretraining(
        towers,
        AmortizedPrior(towers.embed_dim) if _has_prior(config.loss) else None,
        has_logit_bias=config.loss.kind in ("sigmoid_local", "sigmoid_ring"),
    )


def build_fusion_model(
    config: Config, tokenizer: Tokenizer, like: Mapping[str, Any] | None = None
) -> Fusion:
    """The fusion model of a run, pretraining or not, its weights not yet those of `model.init`.

    `like` as of `build_pretraining`. Raises `UserError`, as `build_fusion` does, and for a
    tokenizer without a padding of its own.
    """
    if tokenizer.pad in (tokenizer.start, tokenizer.end):
        raise UserError(
            f"data.tokenizer: {config.data.tokenizer!r} pads with its start or end token, and a "
            "fusion model must tell padding from text: use one made for BERT, or `train`"
        )
    return build_fusion(
        config.model,
        vocab_size=tokenizer.vocab_size,
        pad=tokenizer.pad,
        mean=config.data.image_mean,
        std=config.data.image_std,
        independent=bool(config.structure.separation.weight),
        like=like,
    )


def _has_prior(loss: LossConfig) -> bool:
    return loss.kind == "gamma" and loss.prior == "amortized"
