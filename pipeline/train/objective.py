"""What one engine runs: all that is trained in one module with one forward, and the loss."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from pipeline.config.plan import Plan
from pipeline.config.schema import Config, LossConfig, StructureConfig
from pipeline.data.text import Tokenizer
from pipeline.engine.momentum import Momentum
from pipeline.engine.partners import PartnerExchange
from pipeline.evaluate.embed import Parts
from pipeline.losses.base import Gather, Loss, LossValue, State
from pipeline.losses.contrastive import (
    FastCLIP,
    InfoNCEGathered,
    InfoNCELocal,
    SigmoidLocal,
    SigmoidRing,
)
from pipeline.losses.gamma import GammaLoss
from pipeline.losses.normalizer import CountedEvidence, Evidence
from pipeline.losses.priors import AmortizedPrior, HistoryPrior, Prior, QueuePrior
from pipeline.losses.structure import (
    Modality,
    Separation,
    Uniformity,
    bridge,
    consistency,
    there,
)
from pipeline.models.two_tower import Embeddings, TwoTower, build_two_tower

LOGIT_BIAS_INIT = -10.0  # SigLIP's: at the start nearly every pair counts as no match

BRIDGE_CURVE = {  # points t of the bridge, by the metric of the residual there
    f"structure/bridge_residual_at_{t:.3f}": t
    for t in (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
}

TOWERS = "towers."  # prefix of their parameters' names in `Pretraining`

STATELESS = {
    "infonce_local": InfoNCELocal,
    "infonce_gathered": InfoNCEGathered,
    "sigmoid_local": SigmoidLocal,
    "sigmoid_ring": SigmoidRing,
}


class Outputs(NamedTuple):
    """What the objective takes; absent parts are None. The first six are a contrastive loss's.

    `*_view` are of the same pairs' second view, `*_independent` by the second projection.
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

    @property
    def contrast(self) -> tuple[Any, ...]:
        """The arguments of a contrastive loss, in its order."""
        return self[:6]

    @property
    def parts(self) -> Parts:
        """What evaluation embeds with."""
        return Parts(self.image, self.text, self.image_independent, self.text_independent)

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


def _joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return first if first is None or second is None else torch.cat([first, second])


def _split(both: Tensor | None, second: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if both is None or second is None:
        return both, None
    first, view = both.split([len(both) - len(second), len(second)])
    return first, view


class Objective:
    """What a step minimises: the contrastive loss, and weighted terms of the latent structure.

    Of the base loss's parts a share of `structure.in_modal` contrasts samples with their own views,
    V2V and T2T, the rest the two modalities. Each part has auxiliaries of its own.
    """

    def __init__(
        self,
        contrast: Loss,
        structure: StructureConfig,
        *,
        gathered_batch: int,
        in_modal: dict[str, GammaLoss],
        separation: dict[str, Separation],
    ):
        """`in_modal` and `separation` by modality, image and text; empty when not wanted.

        `gathered_batch`: the pairs of which geometric consistency stands for all.
        """
        self.contrast = contrast
        self._structure = structure
        self._gathered_batch = gathered_batch
        self._in_modal = in_modal
        self._separation = separation

    def __call__(self, outputs: Outputs, keys: Int[Tensor, " local"], samples: int) -> LossValue:
        """Give the loss of a micro batch, `samples` having been seen before its step."""
        base = self.contrast(*outputs.contrast, keys=keys)
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
            metrics |= {f"structure/{name}": metric for name, metric in found.items()}
        metrics["loss"] = bound

        # Detached: what diagnoses is kept until it is asked, and the graph with it would be.
        curve = partial(_bridge_curve, *(side.detached for side in (image, text)))
        return LossValue(
            loss=loss, metrics=metrics, diagnose=lambda: {**base.diagnose(), **curve()}
        )

    def _terms(
        self, outputs: Outputs, samples: int
    ) -> list[tuple[float, Tensor, dict[str, Tensor]]]:
        """Weight, value and metrics of each term that the run has.

        A term whose weight is still zero is there too: each parameter has a gradient in every step.
        """
        structure, scale = self._structure, outputs.logit_scale
        if not structure.is_on:
            return []
        image, text = outputs.modalities
        sides = {"image": image, "text": text}
        terms: list[tuple[float, Tensor, dict[str, Tensor]]] = []
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
        return terms

    def _bridge(self, own: Modality, other: Modality) -> Tensor:
        t, view = self._structure.bridge.t, there(own.view)
        if t == "sampled":
            drawn = torch.rand(len(view), 1, dtype=view.dtype, device=view.device)
            return bridge(view, own.shared, other.shared, drawn)
        points = t if isinstance(t, tuple) else (t,)
        return torch.stack([bridge(view, own.shared, other.shared, each) for each in points]).mean()

    @property
    def needs_text_views(self) -> bool:
        """Whether a term looks at the captions' views."""
        return self._structure.needs_text_views

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


def _bridge_curve(image: Modality, text: Modality) -> dict[str, Tensor]:
    """How far augmented images lie from points t of the bridge; nothing without views."""
    if image.view is None:
        return {}
    return {
        name: bridge(image.view, image.shared, text.shared, t) for name, t in BRIDGE_CURVE.items()
    }


def build_pretraining(config: Config, tokenizer: Tokenizer) -> Pretraining:
    """Build the module of a run, with weights drawn from `train.seed`."""
    torch.manual_seed(config.train.seed)
    towers = build_two_tower(
        config.model,
        vocab_size=tokenizer.vocab_size,
        start=tokenizer.start,
        end=tokenizer.end,
        pad=tokenizer.pad,
        mean=config.data.image_mean,
        std=config.data.image_std,
        independent=bool(config.structure.separation.weight),
    )
    return Pretraining(
        towers,
        AmortizedPrior(towers.embed_dim) if _has_prior(config.loss) else None,
        has_logit_bias=config.loss.kind in ("sigmoid_local", "sigmoid_ring"),
    )


def build_objective(
    config: Config, plan: Plan, *, embed_dim: int, rank: int, world_size: int
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
    return Objective(
        build_loss(config, plan, embed_dim=embed_dim, rank=rank, world_size=world_size),
        structure,
        gathered_batch=plan.virtual_batch if config.loss.kind == "gamma" else plan.global_batch,
        in_modal=in_modal,
        separation=separation,
    )


def build_momentum(config: Config, module: Pretraining, device: torch.device) -> Momentum | None:
    """Copy the towers of a module that no engine has yet, if the run has slow ones."""
    if not config.structure.has_momentum:
        return None
    return Momentum(
        module.towers, config.structure.momentum, device=device, precision=_precision(config)
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


def _has_prior(loss: LossConfig) -> bool:
    return loss.kind == "gamma" and loss.prior == "amortized"
