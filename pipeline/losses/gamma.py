"""The gamma-decomposable contrastive loss: a sum over local pairs, no features from elsewhere.

For anchor i with logits s_ij, b local pairs, n = b-1 local negatives and K virtual negatives, the
augmented objective weights each exponential by an auxiliary variable u_i whose conditional law is
Gamma(1, rate R_i), with

    R_i = e^{s_ii}/K + [ n0 e^{a_i} + sum_{j != i} e^{s_ij} ] / (n0 + n)
    loss_i = -s_ii + u_i ( e^{s_ii}/K + (1/n) sum_{j != i} e^{s_ij} ),   u_i held fixed.

e^{a_i} is a gamma prior's rate: what is believed about E_j e^{s_ij} before this batch, worth n0
pseudo-negatives. Image and text anchors each have their own u. Source: "Why do we need large
batch sizes in contrastive learning? A gradient-bias perspective" (NeurIPS 2022); the finite-K form
with a measured evidence weight is derived for this project.

Enters: local embeddings, logit scale, the prior's predictions. Leaves: a scalar and metrics.
Must not know: other workers. Compute O(b^2 d), memory O(b^2), bytes communicated 0.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.losses.normalizer import Evidence, log_mean_exp, prior_deviance

PRIOR_GRADIENT_SCALE = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class LossValue:
    """`loss` to run backward on; `metrics` are detached scalars to log (local to this worker)."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(kw_only=True)
class GammaLoss:
    """The loss of this module for both directions of an image-text batch.

    `virtual_batch` is K + 1. `u` is the conditional mean 1/R (EM) or a draw (stochastic EM).
    The evidence of the prior is running state of this worker: see `state_dict`.
    """

    virtual_batch: int
    u: Literal["mean", "sampled"] = "mean"
    image_evidence: Evidence = field(default_factory=Evidence)
    text_evidence: Evidence = field(default_factory=Evidence)

    def __call__(
        self,
        image: Float[Tensor, "local dim"],
        text: Float[Tensor, "local dim"],
        logit_scale: Float[Tensor, ""],
        image_log_z: Float[Tensor, " local"] | None = None,
        text_log_z: Float[Tensor, " local"] | None = None,
    ) -> LossValue:
        """Give the loss of unit-norm embeddings; row i of both is pair i.

        `image_log_z`, `text_log_z` are the prior's a_i, with gradient to the prior alone; absent:
        no prior. The value of the loss is the bound -s_ii + log(K R_i), averaged over pairs and
        directions: InfoNCE at the virtual batch, and exactly InfoNCE on the local batch when
        K = n without a prior. Its gradient is that of `loss_i` above.
        """
        logits = logit_scale * (image @ text.T)
        rows = _Direction.of(logits, image_log_z, self.image_evidence, self.virtual_batch)
        columns = _Direction.of(logits.T, text_log_z, self.text_evidence, self.virtual_batch)
        with torch.no_grad():
            # One matrix serves both directions: d loss / d s_ij, times 2b.
            coefficients = rows.weights(logits, self.u) + columns.weights(logits.T, self.u).T
            coefficients.diagonal().sub_(2.0)
            bound = 0.5 * (rows.bound + columns.bound).mean()
        surrogate = (coefficients * logits).sum() / (2 * len(logits))
        loss = surrogate + (bound - surrogate).detach()
        for direction, log_z in ((rows, image_log_z), (columns, text_log_z)):
            if log_z is not None and direction.log_mean is not None:
                deviance = prior_deviance(log_z, direction.log_mean)
                # Trains the prior, and is no part of the loss's value. Adam does not see its
                # scale; clipping by the global norm does, and would shrink the towers' gradient.
                loss = loss + PRIOR_GRADIENT_SCALE * (deviance - deviance.detach())
        metrics = {"loss": bound, "logit_scale": logit_scale.detach()}
        for side, direction in (("image", rows), ("text", columns)):
            metrics |= {f"{name}_{side}": value for name, value in direction.metrics.items()}
        return LossValue(loss=loss, metrics=metrics)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Plain numbers; saved by every worker, since the evidence is measured locally."""
        return {"image": self.image_evidence.state_dict(), "text": self.text_evidence.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Read what `state_dict` gave."""
        self.image_evidence.load_state_dict(state["image"])
        self.text_evidence.load_state_dict(state["text"])


@dataclass(frozen=True, kw_only=True)
class _Direction:
    """Normalisers of one direction; anchors are rows. All tensors are detached.

    log_rate [b] is log R; log_mean [b] the batch's log-mean-exp over negatives (None when b = 1).
    """

    num_virtual: int
    log_rate: Tensor
    log_mean: Tensor | None
    positive: Tensor
    metrics: dict[str, Tensor]

    @staticmethod
    @torch.no_grad()
    def of(
        logits: Tensor, log_z: Tensor | None, evidence: Evidence, virtual_batch: int
    ) -> "_Direction":
        num_negatives = len(logits) - 1
        num_virtual = max(virtual_batch - 1, num_negatives, 1)
        logits = logits.detach()
        positive = logits.diagonal()
        log_mean = None
        metrics: dict[str, Tensor] = {}
        if num_negatives:
            log_mean = log_mean_exp(logits)
        negatives = log_mean if log_mean is not None else torch.full_like(positive, -math.inf)
        if log_z is not None:
            log_z = log_z.detach().to(logits.dtype)
            weight = evidence.update(logits, log_mean, log_z, num_virtual)
            negatives = torch.logaddexp(
                negatives + math.log(max(weight, 1e-30)), log_z + math.log(max(1 - weight, 1e-30))
            )
            metrics["prior_batch_weight"] = logits.new_tensor(weight)
            if log_mean is not None:
                metrics["prior_rmse"] = (log_z - log_mean).square().mean().sqrt()
        log_rate = torch.logaddexp(positive - math.log(num_virtual), negatives)
        return _Direction(
            num_virtual=num_virtual,
            log_rate=log_rate,
            log_mean=log_mean,
            positive=positive,
            metrics=metrics,
        )

    @property
    def bound(self) -> Tensor:
        """-s_ii + log(K R_i) for each anchor; shape [b]."""
        return -self.positive + self.log_rate + math.log(self.num_virtual)

    def weights(self, logits: Tensor, u: Literal["mean", "sampled"]) -> Tensor:
        """u_i times each exponential: u_i e^{s_ij}/n off the diagonal, u_i e^{s_ii}/K on it."""
        num_negatives = max(len(logits) - 1, 1)
        # Never e^s alone: at logit scale 100 it overflows; differences from log R do not.
        weights = (logits - self.log_rate[:, None] - math.log(num_negatives)).exp()
        diagonal = (self.positive - self.log_rate - math.log(self.num_virtual)).exp()
        weights.diagonal().copy_(diagonal)
        if u == "sampled":
            # u_i = e_i / R_i with e_i ~ Exp(1) is a draw from Gamma(1, R_i).
            weights = weights * torch.empty_like(self.log_rate).exponential_()[:, None]
        return weights
