"""What a step minimises: a contrastive loss, terms of the latent structure, a fusion model's tasks.

Enters: a batch, and what a module says of it. Leaves: the loss. Each objective says what of a batch
the module is given, too.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from pipeline.config.plan import Plan
from pipeline.config.schema import Config, FusionConfig, StructureConfig
from pipeline.data.batches import Batch
from pipeline.data.text import Tokenizer
from pipeline.engine.momentum import Momentum
from pipeline.engine.partners import PartnerExchange
from pipeline.losses.base import Gather, Loss, LossValue, State
from pipeline.losses.contrastive import (
    FastCLIP,
    InfoNCEGathered,
    InfoNCELocal,
    SigmoidLocal,
    SigmoidRing,
)
from pipeline.losses.fusion import (
    MomentumContrast,
    mask_words,
    masked_words_loss,
    matching_loss,
    ramped,
)
from pipeline.losses.gamma import GammaLoss
from pipeline.losses.normalizer import CountedEvidence, Evidence
from pipeline.losses.priors import HistoryPrior, Prior, QueuePrior
from pipeline.losses.structure import (
    Modality,
    Separation,
    Uniformity,
    bridge,
    consistency,
    there,
)
from pipeline.train.module import TOWERS, Outputs
from pipeline.train.task import Module

BRIDGE_CURVE = {  # points t of the bridge, by the metric of the residual there
    f"structure/bridge_residual_at_{t:.3f}": t
    for t in (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
}

STATELESS = {
    "infonce_local": InfoNCELocal,
    "infonce_gathered": InfoNCEGathered,
    "sigmoid_local": SigmoidLocal,
    "sigmoid_ring": SigmoidRing,
}


Terms = list[tuple[float, Tensor, dict[str, Tensor]]]  # of each its weight, value, metrics


class Objective:
    """The contrastive loss of two towers, and weighted terms of the latent structure.

    Of the base loss's parts a share of `structure.in_modal` contrasts samples with their own views,
    V2V and T2T, the rest the two modalities. Each part has auxiliaries of its own.
    """

    def __init__(
        self,
        contrast: Any,
        structure: StructureConfig,
        *,
        gathered_batch: int,
        in_modal: dict[str, GammaLoss],
        separation: dict[str, Separation],
    ):
        """`in_modal` and `separation` by modality, image and text; empty when not wanted.

        `contrast` is a `Loss`, or what stands in its place in another objective. `gathered_batch`:
        the pairs of which geometric consistency stands for all.
        """
        self.contrast = contrast
        self._structure = structure
        self._gathered_batch = gathered_batch
        self._in_modal = in_modal
        self._separation = separation

    def inputs(self, batch: Batch) -> list[Tensor | None]:
        """What of a batch the module is given."""
        tokens = batch.view_tokens if self._structure.needs_text_views else None
        return [batch.images, batch.tokens, batch.view_images, tokens]

    def slow_inputs(self, inputs: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """What of a module's inputs its slow copy is given."""
        images, tokens, *_ = inputs
        return images, tokens if self._structure.needs_text_views else None

    def loss(self, outputs: Outputs, slow: Any, batch: Batch, samples: int) -> LossValue:
        """Give the loss of a batch, of which the module's slow copy, if there is one, said `slow`.

        `samples` have been seen before its step.
        """
        seen = outputs if slow is None else self._seen(outputs, slow)
        return self(seen, batch.keys, samples)

    def _seen(self, outputs: Outputs, slow: Any) -> Outputs:
        return outputs.seen_by(slow)

    def __call__(self, outputs: Outputs, keys: Int[Tensor, " local"], samples: int) -> LossValue:
        """Give the loss of a micro batch, `samples` having been seen before its step."""
        base = self._base(outputs, keys, samples)
        terms = self._terms(outputs, samples)
        if not terms:
            return base
        image, text = outputs.modalities
        share = self._structure.in_modal
        loss = (1 - share) * base.loss
        bound = (1 - share) * base.metrics["loss"]
        metrics = {**base.metrics, "contrastive_loss": base.metrics["loss"]}
        for weight, value, found in terms:
            loss = loss + weight * value
            bound = bound + weight * value.detach()
            metrics |= found
        metrics["loss"] = bound

        # Detached: what diagnoses is kept until it is asked, and the graph with it would be.
        curve = partial(_bridge_curve, *(side.detached for side in (image, text)))
        return LossValue(
            loss=loss, metrics=metrics, diagnose=lambda: {**base.diagnose(), **curve()}
        )

    def _base(self, outputs: Outputs, keys: Tensor, samples: int) -> LossValue:
        del samples
        return self.contrast(*outputs.contrast, keys=keys)

    def _terms(self, outputs: Outputs, samples: int) -> Terms:
        """Weight, value and metrics of each term that the run has.

        A term whose weight is still zero is there too: each parameter has a gradient in every step.
        """
        structure, scale = self._structure, outputs.logit_scale
        if not structure.is_on:
            return []
        image, text = outputs.modalities
        sides = {"image": image, "text": text}
        terms: Terms = []
        for side, contrast in self._in_modal.items():
            value = contrast(sides[side].shared, there(sides[side].view), scale)
            found = {f"in_modal_loss_{side}": value.metrics["loss"]}
            terms.append((structure.in_modal / 2, value.loss, found))
        for side, separation in self._separation.items():
            value, found = separation(sides[side], scale)
            found = {f"{name}_{side}": metric for name, metric in found.items()}
            terms.append((structure.separation.at(samples), value, found))
        if structure.bridge.weight:
            for side, own, other in (("image", image, text), ("text", text, image)):
                if side == "image" or structure.bridge.text:
                    value = self._bridge(own, other)
                    found = {f"bridge_residual_{side}": value.detach()}
                    terms.append((structure.bridge.at(samples), value, found))
        if structure.consistency.weight:
            if not structure.consistency.views:
                image, text = Modality(shared=image.shared), Modality(shared=text.shared)
            value, found = consistency(image, text, self._gathered_batch)
            terms.append((structure.consistency.at(samples), value, found))
        return [
            (weight, value, {f"structure/{name}": metric for name, metric in found.items()})
            for weight, value, found in terms
        ]

    def _bridge(self, own: Modality, other: Modality) -> Tensor:
        t, view = self._structure.bridge.t, there(own.view)
        if t == "sampled":
            drawn = torch.rand(len(view), 1, dtype=view.dtype, device=view.device)
            return bridge(view, own.shared, other.shared, drawn)
        points = t if isinstance(t, tuple) else (t,)
        return torch.stack([bridge(view, own.shared, other.shared, each) for each in points]).mean()

    @property
    def _parts(self) -> dict[str, Any]:
        """All that has running state, by name."""
        return {
            "contrast": self.contrast,
            **{f"in_modal_{side}": part for side, part in self._in_modal.items()},
            **{f"separation_{side}": part for side, part in self._separation.items()},
        }

    def share(self, gather: Gather) -> None:
        """Tell the other workers what they will need; all call it at the same step."""
        self.contrast.share(gather)

    def state_dict(self) -> State:
        """This worker's part of the running state."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, states: Sequence[State], rank: int, world_size: int) -> None:
        """Read the parts of all workers of the time, whose number may differ from `world_size`."""
        for name, part in self._parts.items():
            part.load_state_dict([state[name] for state in states], rank, world_size)


class FusionObjective(Objective):
    """Contrast with momentum features, matching, masked words, and terms of the latent structure.

    The views of the structure's terms are the momentum features.
    """

    contrast: MomentumContrast

    def __init__(self, fusion: FusionConfig, tokenizer: Tokenizer, **structure: Any):
        """`structure` as of `Objective`, its `contrast` a `MomentumContrast`."""
        super().__init__(**structure)
        self._fusion = fusion
        self._special = (tokenizer.start, tokenizer.end, tokenizer.pad)
        assert tokenizer.mask is not None, "the module has asked for it"
        self._mask, self._vocab_size = tokenizer.mask, tokenizer.vocab_size

    def inputs(self, batch: Batch) -> list[Tensor | None]:
        """Images, texts, the texts with masked words, and which these are; drawn anew each time."""
        masked, chosen = mask_words(
            batch.tokens,
            share=self._fusion.mask_share,
            special=self._special,
            mask=self._mask,
            vocab_size=self._vocab_size,
        )
        return [batch.images, batch.tokens, masked, chosen]

    def slow_inputs(self, inputs: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """All of them: it guesses the same words."""
        return inputs

    def _seen(self, outputs: Outputs, slow: Any) -> Outputs:
        embeddings, fused = slow
        return outputs.seen_by(embeddings)._replace(slow_masked_logits=fused.masked_logits)

    def _base(self, outputs: Outputs, keys: Tensor, samples: int) -> LossValue:
        image, text = outputs.modalities
        return self.contrast(
            image.shared,
            text.shared,
            there(image.view),
            there(text.view),
            outputs.logit_scale,
            keys=keys,
            alpha=self._alpha(samples),
        )

    def _terms(self, outputs: Outputs, samples: int) -> Terms:
        fusion = self._fusion
        match, match_found = matching_loss(there(outputs.match_logits), there(outputs.match_labels))
        words, words_found = masked_words_loss(
            there(outputs.masked_logits),
            there(outputs.masked_words),
            there(outputs.slow_masked_logits),
            self._alpha(samples),
        )
        own: Terms = [
            (fusion.matching, match, {"matching_loss": match.detach(), **match_found}),
            (fusion.masked_words, words, {"masked_words_loss": words.detach(), **words_found}),
        ]
        return own + super()._terms(outputs, samples)

    def _alpha(self, samples: int) -> float:
        fusion = self._fusion
        return ramped(fusion.distillation, fusion.distillation_ramp_samples, samples)


def _bridge_curve(image: Modality, text: Modality) -> dict[str, Tensor]:
    """How far augmented images lie from points t of the bridge; nothing without views."""
    if image.view is None:
        return {}
    return {
        name: bridge(image.view, image.shared, text.shared, t) for name, t in BRIDGE_CURVE.items()
    }


def build_objective(
    config: Config,
    plan: Plan,
    tokenizer: Tokenizer,
    *,
    embed_dim: int,
    rank: int,
    world_size: int,
) -> Objective:
    """Build what one worker of a run minimises."""
    structure, term = config.structure, config.structure.separation
    in_modal: dict[str, GammaLoss] = {}
    separation: dict[str, Separation] = {}
    for side in ("image", "text"):
        if structure.in_modal:
            in_modal[side] = _view_contrast(config, plan)
        if term.weight:
            separation[side] = Separation(
                contrast=_view_contrast(config, plan),
                orthogonality_weight=term.orthogonality,
                contrast_weight=term.contrast,
                uniformity_weight=term.uniformity,
                uniformity=Uniformity(precision=_precision(config)),
            )
    terms: dict[str, Any] = {
        "structure": structure,
        "gathered_batch": (
            plan.virtual_batch if config.loss.kind == "gamma" else plan.global_batch
        ),
        "in_modal": in_modal,
        "separation": separation,
    }
    if config.model.kind == "fusion":
        contrast = MomentumContrast(
            image=_momentum_contrast(config, plan, embed_dim),
            text=_momentum_contrast(config, plan, embed_dim),
        )
        return FusionObjective(config.fusion, tokenizer, contrast=contrast, **terms)
    loss = build_loss(config, plan, embed_dim=embed_dim, rank=rank, world_size=world_size)
    return Objective(loss, **terms)


def build_momentum(config: Config, module: Module, device: torch.device) -> Momentum | None:
    """Copy the model in a module that no engine has yet, if the run has a slow one.

    Of a task its head too, which gives the slow answers.
    """
    if not config.has_momentum:
        return None
    is_task = config.task is not None
    return Momentum(
        module if is_task else module.towers,
        config.structure.momentum,
        prefix="" if is_task else TOWERS,
        device=device,
        precision=_precision(config),
    )


def _view_contrast(config: Config, plan: Plan) -> GammaLoss:
    """The contrast of samples with their own views: anchors are the samples.

    A gamma loss whatever `loss.kind` is, without prior and partners: nothing leaves a worker. It
    moves the logit scale only beside a loss that does so by the same rule, its own gradient.
    """
    loss = config.loss
    is_plain = loss.kind.startswith("infonce") or (
        loss.kind == "gamma" and loss.scale_rule == "plain"
    )
    return GammaLoss(
        virtual_batch=plan.virtual_batch,
        u=loss.u,
        scale_rule="plain" if is_plain else "fixed",
        max_weight=loss.max_weight,
        one_sided=True,
        precision=_precision(config),
    )


def _momentum_contrast(config: Config, plan: Plan, embed_dim: int) -> GammaLoss:
    """One direction of a fusion model's contrast, with its queue of momentum features."""
    loss = config.loss
    prior = QueuePrior(loss.queue_size, embed_dim, one_sided=True)
    evidence = CountedEvidence if loss.evidence == "counted" else Evidence
    return GammaLoss(
        virtual_batch=plan.virtual_batch,
        u=loss.u,
        prior=prior if loss.prior == "queue" else None,
        scale_rule=loss.scale_rule,
        rho=loss.rho,
        max_weight=loss.max_weight,
        one_sided=True,
        precision=_precision(config),
        image_evidence=evidence(),
    )


def _precision(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.engine.precision == "bf16" else torch.float32


def build_loss(config: Config, plan: Plan, *, embed_dim: int, rank: int, world_size: int) -> Loss:
    """Build one worker's loss of a run."""
    loss = config.loss
    if loss.kind in STATELESS:
        return STATELESS[loss.kind]()
    if loss.kind in ("fastclip_v1", "fastclip_v3"):
        return FastCLIP(
            plan.train_rows,
            gamma=loss.fastclip_gamma,
            learns_scale=loss.kind == "fastclip_v3",
            rho=loss.rho,
        )
    prior: Prior | None = None
    if loss.prior == "queue":
        prior = QueuePrior(loss.queue_size, embed_dim)
    elif loss.prior == "history":
        prior = HistoryPrior(plan.train_rows, rank=rank, world_size=world_size)
    evidence = CountedEvidence if loss.evidence == "counted" else Evidence
    return GammaLoss(
        virtual_batch=plan.virtual_batch,
        u=loss.u,
        prior=prior,
        scale_rule=loss.scale_rule,
        rho=loss.rho,
        max_weight=loss.max_weight,
        reach=PartnerExchange(loss.exchange) if loss.exchange else None,
        precision=_precision(config),
        image_evidence=evidence(),
        text_evidence=evidence(),
    )
