"""The gamma-decomposable contrastive loss: a sum over pairs, no features gathered.

For anchor i with logits s_ij, n negatives at hand and K virtual negatives, the augmented objective
weights each exponential by an auxiliary variable u_i whose conditional law is Gamma(1, rate R_i),
with

    R_i = e^{s_ii}/K + [ n0 e^{a_i} + sum_{j != i} e^{s_ij} ] / (n0 + n)
    loss_i = -s_ii + u_i ( e^{s_ii}/K + (1/n) sum_{j != i} e^{s_ij} ),   u_i held fixed.

e^{a_i} is a gamma prior's rate: what is believed about E_j e^{s_ij} before this batch, worth n0
pseudo-negatives. Image and text anchors each have their own u. Source: "Why do we need large
batch sizes in contrastive learning? A gradient-bias perspective" (NeurIPS 2022); the finite-K form
with a measured evidence weight is derived for this project.

Negatives are the local pairs and, with reach, the pairs of a few partners: given both sides' u,
the terms of a pair (i here, j there) split into a gradient for x_i here and one for y_j there.

Enters: local embeddings, logit scale, the prior's predictions. Leaves: a scalar and metrics.
Must not know: how partners' blocks travel. Compute O(b^2 d), memory O(b * block).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.losses.base import Gather, LossValue, State
from pipeline.losses.diagnostics import variance_ratio
from pipeline.losses.normalizer import Evidence, prior_deviance
from pipeline.losses.pairs import (
    BLOCK_ROWS,
    LocalPairs,
    Sums,
    foreign_sums,
    weigh_foreign,
)
from pipeline.losses.priors import Observation, Prior

PRIOR_GRADIENT_SCALE = 1e-3
ScaleRule = Literal["plain", "self_normalised", "rho", "fixed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """A worker's detached unit-norm fp32 embeddings, [b, dim] each; row i of both is pair i."""

    image: Tensor
    text: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A worker's log u_i - log n of image and text anchors, [b] each, to go with its features."""

    image: Tensor
    text: Tensor


class Reach(Protocol):
    """Brings tensors of this step's partners; both sides must meet each other."""

    def meet(self, meeting: int, mine: Sequence[Tensor]) -> Sequence[Sequence[Tensor]]:
        """Send mine to the partners of a meeting, give theirs."""
        ...

    def again(self, mine: Sequence[Tensor]) -> Sequence[Sequence[Tensor]]:
        """Send mine to the same partners, give theirs in the same order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A loss between its two halves: normalisers known, pairs not yet weighed."""

    inputs: tuple[Tensor, Tensor, Tensor]
    log_z: tuple[Tensor | None, Tensor | None]
    features: Features
    local: LocalPairs
    partners: Sequence[Features]
    scale: Tensor
    rows: "_Direction"
    columns: "_Direction"
    keys: Tensor | None

    @property
    def weights(self) -> Weights:
        """What a partner needs beside the features."""
        return Weights(image=self.rows.log_weight, text=self.columns.log_weight)


@dataclass(kw_only=True)
class GammaLoss:
    """The loss of this module for both directions of an image-text batch.

    `virtual_batch` is K + 1. `u` is the conditional mean 1/R (EM) or a draw (stochastic EM).
    `prior` predicts from local state; without one, predictions may be given with the call.
    `scale_rule` says which gradient the logit scale gets (`rho`: see `_scale_gradient`). An
    anchor's total weight of negatives is capped at `max_weight`. With `reach` a worker also meets
    partners' pairs. The evidence of the prior is
    running state of this worker: see `state_dict`.
    """

    virtual_batch: int
    u: Literal["mean", "sampled"] = "mean"
    prior: Prior | None = None
    scale_rule: ScaleRule = "plain"
    rho: float = 0.0
    max_weight: float = math.inf
    reach: Reach | None = None
    block: int = BLOCK_ROWS
    image_evidence: Evidence = field(default_factory=Evidence)
    text_evidence: Evidence = field(default_factory=Evidence)
    meetings: int = 0

    def __call__(
        self,
        image: Float[Tensor, "local dim"],
        text: Float[Tensor, "local dim"],
        logit_scale: Float[Tensor, ""],
        image_log_z: Float[Tensor, " local"] | None = None,
        text_log_z: Float[Tensor, " local"] | None = None,
        logit_bias: Tensor | None = None,
        keys: Int[Tensor, " local"] | None = None,
    ) -> LossValue:
        """Give the loss of unit-norm embeddings; row i of both is pair i.

        `image_log_z`, `text_log_z` are a trained prior's a_i, with gradient to it alone; `keys`
        tell rows apart for a prior that remembers them. The value of the loss is the bound
        -s_ii + log(K R_i), averaged over pairs and directions: InfoNCE at the virtual batch, and
        exactly InfoNCE on the local batch when K = n without a prior. Its gradient is that of
        `loss_i` above.
        """
        del logit_bias
        predictions = image_log_z, text_log_z
        if self.reach is None:
            return self.close(self.open(image, text, logit_scale, *predictions, keys), ())
        blocks = self.reach.meet(self.meetings, (image.detach(), text.detach()))
        self.meetings += 1
        partners = [Features(image=_wide(x), text=_wide(y)) for x, y in blocks]
        opened = self.open(image, text, logit_scale, *predictions, keys, partners)
        theirs = self.reach.again((opened.weights.image, opened.weights.text))
        return self.close(opened, [Weights(image=u, text=v) for u, v in theirs])

    @torch.no_grad()
    def open(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        image_log_z: Tensor | None = None,
        text_log_z: Tensor | None = None,
        keys: Tensor | None = None,
        partners: Sequence[Features] = (),
    ) -> Opened:
        """First half: normalisers from local pairs and partners' features.

        `close` needs the partners' `weights` that come out of their first halves.
        """
        features = Features(image=_wide(image), text=_wide(text))
        x, y, scale = features.image, features.text, _wide(logit_scale)
        local = LocalPairs(x, y, scale, self.block)
        row_sums, column_sums = local.sums()
        for partner in partners:
            row_sums += foreign_sums(x, partner.text, scale, self.block)
            column_sums += foreign_sums(y, partner.image, scale, self.block)
        beliefs: tuple[Tensor | None, Tensor | None] = (image_log_z, text_log_z)
        if self.prior is not None:
            beliefs = self.prior.predict(features.image, features.text, scale, keys)
        positive = scale * (x * y).sum(1)
        rows = self._direct(positive, row_sums, beliefs[0], self.image_evidence)
        columns = self._direct(positive, column_sums, beliefs[1], self.text_evidence)
        return Opened(
            inputs=(image, text, logit_scale),
            log_z=(image_log_z, text_log_z),
            features=features,
            local=local,
            partners=partners,
            scale=scale,
            rows=rows,
            columns=columns,
            keys=keys,
        )

    def close(self, opened: Opened, partners: Sequence[Weights]) -> LossValue:
        """Second half: gradients of all pairs, and the loss that carries them."""
        rows, columns = opened.rows, opened.columns
        with torch.no_grad():
            *gradients, diagnoses = self._gradients(opened, partners)
            bound = 0.5 * (rows.bound + columns.bound).mean()
        loss = _Carry.apply(bound, *gradients, *opened.inputs)
        assert isinstance(loss, Tensor)
        for direction, log_z in zip((rows, columns), opened.log_z, strict=True):
            if log_z is not None and direction.num_negatives:
                deviance = prior_deviance(log_z, direction.log_mean)
                # Trains the prior, and is no part of the loss's value. Adam does not see its
                # scale; clipping by the global norm does, and would shrink the towers' gradient.
                loss = loss + PRIOR_GRADIENT_SCALE * (deviance - deviance.detach())
        metrics = {"loss": bound, "logit_scale": opened.inputs[2].detach().clone()}
        for side, direction, more in zip(
            ("image", "text"), (rows, columns), diagnoses, strict=True
        ):
            metrics |= {
                f"{name}_{side}": value for name, value in (direction.metrics | more).items()
            }
        return LossValue(loss=loss, metrics=metrics)

    def _direct(
        self, positive: Tensor, sums: Sums, log_z: Tensor | None, evidence: Evidence
    ) -> "_Direction":
        num_negatives = int(sums.count[:, 0].sum())
        num_virtual = max(self.virtual_batch - 1, num_negatives, 1)
        log_mean = sums.log_mean
        negatives = log_mean
        metrics: dict[str, Tensor] = {}
        if log_z is not None:
            log_z = log_z.detach().to(log_mean.dtype)
            weight = evidence.update(sums.half_difference, log_mean - log_z, num_negatives,
                                     num_virtual)  # fmt: skip
            negatives = torch.logaddexp(
                log_mean + math.log(max(weight, 1e-30)), log_z + math.log(max(1 - weight, 1e-30))
            )
            metrics["prior_batch_weight"] = log_mean.new_tensor(weight)
            if num_negatives:
                metrics["prior_error"] = (log_z - log_mean).mean()
                metrics["prior_rmse"] = (log_z - log_mean).square().mean().sqrt()
        log_positive = positive - math.log(num_virtual)
        log_rate = torch.logaddexp(log_positive, negatives)
        # sum_j w_ij, before the cap; -inf without negatives
        log_total = log_mean - log_rate
        log_u = -log_rate
        if math.isfinite(self.max_weight):
            excess = (log_total - math.log(self.max_weight)).clamp(min=0)
            log_u = log_u - excess
            metrics["weight_clip_rate"] = (excess > 0).float().mean()
        if self.u == "sampled":
            # u_i = e_i / R_i with e_i ~ Exp(1) is a draw from Gamma(1, R_i).
            log_u = log_u + torch.empty_like(log_u).exponential_().log()
        return _Direction(
            num_negatives=num_negatives,
            num_virtual=num_virtual,
            positive=positive,
            log_mean=log_mean,
            log_negatives=negatives,
            log_rate=log_rate,
            log_u=log_u,
            metrics=metrics,
        )

    def _gradients(
        self, opened: Opened, partners: Sequence[Weights]
    ) -> tuple[Tensor, Tensor, Tensor, tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """The loss's gradient by image, text, and logit scale; diagnoses of both directions."""
        x, y, scale = opened.features.image, opened.features.text, opened.scale
        rows, columns = opened.rows, opened.columns
        mine = opened.weights
        weighed = opened.local.weigh(mine.image, mine.text)
        grad_x, grad_y = weighed.x, weighed.y
        row_cosines, column_cosines = weighed.row_cosines, weighed.column_cosines
        for other, theirs in zip(opened.partners, partners, strict=True):
            gradient, cosines = weigh_foreign(
                x, other.text, scale, mine.image, theirs.text, self.block
            )
            grad_x, row_cosines = grad_x + gradient, row_cosines + cosines
            gradient, cosines = weigh_foreign(
                y, other.image, scale, mine.text, theirs.image, self.block
            )
            grad_y, column_cosines = grad_y + gradient, column_cosines + cosines
        pull = rows.pull + columns.pull
        grad_x, grad_y = grad_x - pull[:, None] * y, grad_y - pull[:, None] * x
        factor = 1 / (2 * len(x))
        by_scale = 0.5 * (
            self._scale_gradient(rows, row_cosines, scale)
            + self._scale_gradient(columns, column_cosines, scale)
        )
        if self.prior is not None:
            self.prior.observe(
                opened.features.image,
                opened.features.text,
                scale,
                opened.keys,
                (rows.observation(row_cosines), columns.observation(column_cosines)),
            )
        diagnoses = (
            _diagnose(rows, row_cosines, x, y, scale),
            _diagnose(columns, column_cosines, y, x, scale),
        )
        return grad_x * (scale * factor), grad_y * (scale * factor), by_scale, diagnoses

    def _scale_gradient(self, direction: "_Direction", cosines: Tensor, scale: Tensor) -> Tensor:
        """The gradient of one direction's mean loss by the logit scale.

        plain: that of `loss_i`. self_normalised: the negatives' weights are scaled to sum to
        1 - p_i (what they sum to on average), which takes the noise of u out. rho: the dual
        problem's, (KL_i - rho) / scale with KL_i the divergence of the softmax over negatives from
        uniform (FastCLIP v3's objective divided by its temperature). fixed: zero.
        """
        if self.scale_rule == "fixed" or not direction.num_negatives:
            return cosines.new_zeros(())
        tilt = direction.tilt(cosines)
        if self.scale_rule == "rho":
            divergence = scale * tilt - direction.log_negatives
            return (divergence - self.rho).mean() / scale
        own = direction.positive / scale
        if self.scale_rule == "self_normalised":
            share = (
                direction.positive - math.log(direction.num_virtual) - direction.log_rate
            ).exp()
            return ((1 - share) * (tilt - own)).mean()
        return (cosines - direction.pull * own).mean()

    def share(self, gather: Gather) -> None:
        """Let the prior tell the other workers what they will need."""
        if self.prior is not None:
            self.prior.share(gather)

    def state_dict(self) -> State:
        """Running state of this worker: saved by every worker, since it is measured locally."""
        state: State = {
            "image": self.image_evidence.state_dict(),
            "text": self.text_evidence.state_dict(),
            "meetings": self.meetings,
        }
        return state | {"prior": self.prior.state_dict()} if self.prior is not None else state

    def load_state_dict(self, states: Sequence[State], rank: int, world_size: int) -> None:
        """Read what all workers of the time gave; `world_size` may differ from their number."""
        self.image_evidence.load_state_dict([state["image"] for state in states], rank, world_size)
        self.text_evidence.load_state_dict([state["text"] for state in states], rank, world_size)
        self.meetings = states[0]["meetings"]
        if self.prior is not None:
            self.prior.load_state_dict([state["prior"] for state in states], rank, world_size)


@dataclass(frozen=True, kw_only=True)
class _Direction:
    """Normalisers of one direction; all tensors [b], detached.

    log_rate is log R; log_mean the log-mean-exp over negatives at hand, log_negatives the same
    mixed with the prior; log_u is log of the auxiliary variable.
    """

    num_negatives: int
    num_virtual: int
    positive: Tensor
    log_mean: Tensor
    log_negatives: Tensor
    log_rate: Tensor
    log_u: Tensor
    metrics: dict[str, Tensor]

    @property
    def bound(self) -> Tensor:
        """-s_ii + log(K R_i) for each anchor."""
        return -self.positive + self.log_rate + math.log(self.num_virtual)

    @property
    def log_weight(self) -> Tensor:
        """log u_i - log n: added to s_ij it gives the log weight of a negative."""
        return self.log_u - math.log(max(self.num_negatives, 1))

    @property
    def pull(self) -> Tensor:
        """Minus the positive's coefficient: 1 - u_i e^{s_ii} / K."""
        return 1 - (self.positive - math.log(self.num_virtual) + self.log_u).exp()

    def tilt(self, cosines: Tensor) -> Tensor:
        """Mean cosine of the negatives under their softmax: d log Z / d scale."""
        return cosines * (-(self.log_mean + self.log_u)).exp()

    def observation(self, cosines: Tensor) -> Observation:
        """What a prior may learn from."""
        return Observation(log_z=self.log_negatives, tilt=self.tilt(cosines))


def _diagnose(
    direction: _Direction, cosines: Tensor, anchors: Tensor, others: Tensor, scale: Tensor
) -> dict[str, Tensor]:
    if not direction.num_negatives:
        return {}
    divergence = scale * direction.tilt(cosines) - direction.log_mean
    found = {"effective_negatives": direction.num_negatives * (-divergence).exp().mean()}
    ratio = variance_ratio(anchors, others, scale, direction.log_rate)
    return found if ratio is None else found | {"variance_ratio": ratio}


class _Carry(torch.autograd.Function):
    """A scalar with known gradients: they were computed by blocks, beside the value."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, value: Tensor, by_image: Tensor, by_text: Tensor, by_scale: Tensor,
        image: Tensor, text: Tensor, logit_scale: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(by_image, by_text, by_scale)
        ctx.kinds = image.dtype, text.dtype, logit_scale.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        parts = [
            (gradient * saved).to(kind)
            for saved, kind in zip(ctx.saved_tensors, ctx.kinds, strict=True)
        ]
        return None, None, None, None, *parts


def _wide(values: Tensor) -> Tensor:
    """Detached, in fp32 at least: logits at scale 100 need it."""
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))
