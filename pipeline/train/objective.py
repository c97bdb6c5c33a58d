"""What one engine runs: all that is trained in one module with one forward, and the loss."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from pipeline.config.plan import Plan
from pipeline.config.schema import Config, LossConfig
from pipeline.data.text import Tokenizer
from pipeline.engine.partners import PartnerExchange
from pipeline.losses.base import Loss
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
from pipeline.models.two_tower import TwoTower, build_two_tower

LOGIT_BIAS_INIT = -10.0  # SigLIP's: at the start nearly every pair counts as no match

STATELESS = {
    "infonce_local": InfoNCELocal,
    "infonce_gathered": InfoNCEGathered,
    "sigmoid_local": SigmoidLocal,
    "sigmoid_ring": SigmoidRing,
}


class Outputs(NamedTuple):
    """What a loss takes, in its order; absent parts are None."""

    image: Float[Tensor, "local dim"] | None
    text: Float[Tensor, "local dim"] | None
    logit_scale: Float[Tensor, ""]
    image_log_z: Float[Tensor, " local"] | None
    text_log_z: Float[Tensor, " local"] | None
    logit_bias: Float[Tensor, ""] | None


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
    ) -> Outputs:
        """Embed images, texts, or both; the prior predicts only for both, in training."""
        image, text, logit_scale = self.towers(images, tokens)
        image_log_z = text_log_z = None
        if self.prior is not None and self.training and image is not None and text is not None:
            image_log_z, text_log_z = self.prior(image, text, logit_scale)
        logit_bias = None if self.logit_bias is None else self.logit_bias.float().squeeze(0)
        return Outputs(image, text, logit_scale, image_log_z, text_log_z, logit_bias)


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
    )
    return Pretraining(
        towers,
        AmortizedPrior(towers.embed_dim) if _has_prior(config.loss) else None,
        has_logit_bias=config.loss.kind in ("sigmoid_local", "sigmoid_ring"),
    )


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
        precision=torch.bfloat16 if config.engine.precision == "bf16" else torch.float32,
        image_evidence=evidence(),
        text_evidence=evidence(),
    )


def _has_prior(loss: LossConfig) -> bool:
    return loss.kind == "gamma" and loss.prior == "amortized"
