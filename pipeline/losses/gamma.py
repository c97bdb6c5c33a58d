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
Must not know: how partners' blocks travel. Compute O(b^2 d), memory O(b * block), of a large batch
on a GPU O(tile^2).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.losses.base import Gather, LossValue, State
from pipeline.losses.carry import carry, wide
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
from pipeline.losses.tiles import TiledPairs, local_pairs

PRIOR_GRADIENT_SCALE = 1e-3
SIDES = ("image", "text")
ScaleRule = Literal["plain", "self_normalised", "rho", "fixed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """A worker's detached unit-norm fp32 embeddings, [b, dim] each; row i of both is pair i."""

    image: Tensor
    text: Tensor

    @property
    def stacked(self) -> Tensor:
        """Images, then texts: [2, b, dim]."""
        return torch.stack([self.image, self.text])


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A worker's log u_i - log n of image and text anchors, [b] each, to go with its features."""

    image: Tensor
    text: Tensor


class Reach(Protocol):
    """Brings tensors of this step's partners; both sides must meet each other.

    What is sent travels while the worker weighs its own pairs: to call what comes back waits for
    the partners' tensors.
    """

    def meet(
        self, meeting: int, mine: Sequence[Tensor]
    ) -> Callable[[], Sequence[Sequence[Tensor]]]:
        """Send mine to the partners of a meeting; what comes back is, by partner, alike."""
        ...

    def again(self, mine: Sequence[Tensor]) -> Callable[[], Sequence[Sequence[Tensor]]]:
        """Send mine to the same partners, in the same order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A loss between its two halves: normalisers known, pairs not yet weighed.

    `partners` [2, m, dim] are a partner's texts, then images: what image and text anchors meet.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    features: Features
    scale: Tensor
    local: LocalPairs | TiledPairs
    partners: Sequence[Tensor]
    anchors: "_Anchors"
    log_z: Tensor | None
    keys: Tensor | None

    @property
    def weights(self) -> Weights:
        """What a partner needs beside the features."""
        image, text = self.anchors.log_weight
        return Weights(image=image, text=text)


@dataclass(kw_only=True)
class GammaLoss:
    """The loss of this module for both directions of an image-text batch.

    `virtual_batch` is K + 1. `u` is the conditional mean 1/R (EM) or a draw (stochastic EM).
    `prior` predicts from local state; without one, predictions may be given with the call.
    `scale_rule` says which gradient the logit scale gets (`rho`: see `_scale_gradient`). An
    anchor's total weight of negatives is capped at `max_weight`. With `reach` a worker also meets
    partners' pairs. With `one_sided` the first argument's embeddings alone are anchors, and the
    second's are what they are contrasted with; its prior then predicts for them alone. `precision`
    is that of the products of a large batch on a GPU (of embeddings, and of weights with
    embeddings); logits and sums are fp32 at least. The evidence of the prior is running state of
    this worker: see `state_dict`.
    """

    virtual_batch: int
    u: Literal["mean", "sampled"] = "mean"
    prior: Prior | None = None
    scale_rule: ScaleRule = "plain"
    rho: float = 0.0
    max_weight: float = math.inf
    reach: Reach | None = None
    one_sided: bool = False
    block: int = BLOCK_ROWS
    precision: torch.dtype = torch.float32
    image_evidence: Evidence = field(default_factory=Evidence)
    text_evidence: Evidence = field(default_factory=Evidence)
    meetings: int = 0

    def __post_init__(self) -> None:
        if self.one_sided and self.reach is not None:
            raise ValueError("one_sided: partners know two sides of anchors")

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
            return self.close(self.open(image, text, logit_scale, *predictions, keys))
        blocks = self.reach.meet(self.meetings, (image.detach(), text.detach()))
        self.meetings += 1
        opened = self.open(
            image, text, logit_scale, *predictions, keys,
            lambda: [Features(image=wide(x), text=wide(y)) for x, y in blocks()],
        )  # fmt: skip
        theirs = self.reach.again((opened.weights.image, opened.weights.text))
        return self.close(opened, lambda: [Weights(image=u, text=v) for u, v in theirs()])

    def open(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        image_log_z: Tensor | None = None,
        text_log_z: Tensor | None = None,
        keys: Tensor | None = None,
        partners: Callable[[], Sequence[Features]] = tuple,
    ) -> Opened:
        """First half: normalisers from local pairs and partners' features; inputs as of a call.

        `partners` is called once the local pairs are summed. `close` needs the partners' `weights`
        that come out of their first halves.
        """
        log_z = None
        if image_log_z is not None and text_log_z is not None:
            log_z = torch.stack([image_log_z, text_log_z])
        with torch.no_grad():
            features = Features(image=wide(image), text=wide(text))
            scale = wide(logit_scale)
            belief = log_z
            if self.prior is not None:
                known = [
                    side
                    for side in self.prior.predict(features.image, features.text, scale, keys)
                    if side is not None
                ]
                belief = torch.stack(known) if known else None
            # The batch's own noise is measured between two halves of the negatives.
            parts = 1 if belief is None else 2
            local = local_pairs(features.image, features.text, scale, self.block, self.precision)
            sums = local.sums(parts)
            met = [torch.stack([partner.text, partner.image]) for partner in partners()]
            for others in met:
                sums += foreign_sums(features.stacked, others, scale, self.block, parts)
            anchors = self._conclude(local.positive, sums, belief)
        return Opened(
            inputs=(image, text, logit_scale),
            features=features,
            scale=scale,
            local=local,
            partners=met,
            anchors=anchors,
            log_z=log_z,
            keys=keys,
        )

    def close(self, opened: Opened, partners: Callable[[], Sequence[Weights]] = tuple) -> LossValue:
        """Second half: gradients of all pairs, and the loss that carries them."""
        anchors = opened.anchors
        with torch.no_grad():
            *gradients, tilt = self._gradients(opened, partners)
            bound = anchors.bound.mean()
            if self.prior is not None:
                seen = [
                    Observation(log_z=log_z, tilt=tilts)
                    for log_z, tilts in zip(anchors.log_negatives, tilt, strict=True)
                ]
                self.prior.observe(
                    opened.features.image, opened.features.text, opened.scale, opened.keys, seen
                )
        loss = carry(bound, opened.inputs, gradients)
        if opened.log_z is not None and anchors.num_negatives:
            deviance = prior_deviance(opened.log_z, anchors.log_mean)
            # Trains the prior, and is no part of the loss's value. Adam does not see its
            # scale; clipping by the global norm does, and would shrink the towers' gradient.
            loss = loss + PRIOR_GRADIENT_SCALE * (deviance - deviance.detach())
        metrics = {"loss": bound, "logit_scale": opened.inputs[2].detach().clone()}
        diagnose = partial(_diagnose, anchors, tilt, opened.features, opened.scale)
        return LossValue(loss=loss, metrics=metrics | anchors.metrics, diagnose=diagnose)

    def _conclude(self, positive: Tensor, sums: Sums, log_z: Tensor | None) -> "_Anchors":
        num_negatives = sums.total
        num_virtual = max(self.virtual_batch - 1, num_negatives, 1)
        sides = 1 if self.one_sided else 2
        log_mean = sums.log_mean[:sides]
        negatives = log_mean
        metrics: dict[str, Tensor] = {}
        if log_z is not None:
            log_z = log_z.detach().to(log_mean.dtype)
            worth = math.inf if self.prior is None else self.prior.most_worth
            most = min(num_virtual, num_negatives + worth)
            miss = log_mean - log_z
            noise = sums.half_difference[:sides].square().mean(1) / 4
            measured = torch.stack([noise, miss.square().mean(1)], dim=1).tolist()
            weight = log_mean.new_tensor(
                [
                    evidence.update(sampling, error, num_negatives, most)
                    for evidence, (sampling, error) in zip(
                        (self.image_evidence, self.text_evidence), measured, strict=False
                    )
                ]
            )
            negatives = torch.logaddexp(
                log_mean + weight.clamp(min=1e-30).log()[:, None],
                log_z + (1 - weight).clamp(min=1e-30).log()[:, None],
            )
            metrics |= _by_side("prior_batch_weight", weight)
            if num_negatives:
                metrics |= _by_side("prior_error", -miss.mean(1))
                metrics |= _by_side("prior_rmse", miss.square().mean(1).sqrt())
        log_rate = torch.logaddexp(positive - math.log(num_virtual), negatives)
        log_u = -log_rate
        if math.isfinite(self.max_weight):
            # sum_j w_ij is e^{log_mean - log_rate}, before the cap; 0 without negatives
            excess = (log_mean - log_rate - math.log(self.max_weight)).clamp(min=0)
            log_u = log_u - excess
            metrics |= _by_side("weight_clip_rate", (excess > 0).to(excess.dtype).mean(1))
        if self.u == "sampled":
            # u_i = e_i / R_i with e_i ~ Exp(1) is a draw from Gamma(1, R_i).
            log_u = log_u + torch.empty_like(log_u).exponential_().log()
        return _Anchors(
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
        self, opened: Opened, partners: Callable[[], Sequence[Weights]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss's gradient by image, text and logit scale; the anchors' tilt [2, b]."""
        scale, anchors = opened.scale, opened.anchors
        log_weight, pull = anchors.log_weight, anchors.pull
        by_image, by_text, cosines = opened.local.weigh(log_weight, pull.sum(0))
        for others, theirs in zip(opened.partners, partners(), strict=True):
            more, more_cosines = weigh_foreign(
                opened.features.stacked, others, scale,
                log_weight, torch.stack([theirs.text, theirs.image]), self.block,
            )  # fmt: skip
            by_image += more[0]
            by_text += more[1]
            cosines += more_cosines
        cosines = cosines[: len(pull)]
        tilt = anchors.tilt(cosines)
        by_scale = self._scale_gradient(anchors, cosines, pull, tilt, scale)
        factor = scale / pull.numel()
        return by_image.mul_(factor), by_text.mul_(factor), by_scale, tilt

    def _scale_gradient(
        self, anchors: "_Anchors", cosines: Tensor, pull: Tensor, tilt: Tensor, scale: Tensor
    ) -> Tensor:
        """The gradient of the mean loss by the logit scale.

        plain: that of `loss_i`. self_normalised: the negatives' weights are scaled to sum to
        1 - p_i (what they sum to on average), which takes the noise of u out. rho: the dual
        problem's, (KL_i - rho) / scale with KL_i the divergence of the softmax over negatives from
        uniform (FastCLIP v3's objective divided by its temperature). fixed: zero.
        """
        if self.scale_rule == "fixed" or not anchors.num_negatives:
            return cosines.new_zeros(())
        if self.scale_rule == "rho":
            divergence = scale * tilt - anchors.log_negatives
            return (divergence - self.rho).mean() / scale
        own = anchors.positive / scale
        if self.scale_rule == "self_normalised":
            share = (anchors.positive - math.log(anchors.num_virtual) - anchors.log_rate).exp()
            return ((1 - share) * (tilt - own)).mean()
        return (cosines - pull * own).mean()

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
class _Anchors:
    """Normalisers of image and text anchors; all detached, `positive` [b], the others [2, b].

    Of a loss with one side of anchors they are [1, b], but for `log_weight`.

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
        return self.log_rate - self.positive + math.log(self.num_virtual)

    @property
    def log_weight(self) -> Tensor:
        """log u_i - log n, [2, b]: added to s_ij it gives the log weight of a negative."""
        weight = self.log_u - math.log(max(self.num_negatives, 1))
        return weight if len(weight) == 2 else F.pad(weight, (0, 0, 0, 1), value=-math.inf)

    @property
    def pull(self) -> Tensor:
        """Minus the positive's coefficient: 1 - u_i e^{s_ii} / K."""
        return 1 - (self.positive - math.log(self.num_virtual) + self.log_u).exp()

    def tilt(self, cosines: Tensor) -> Tensor:
        """Mean cosine of the negatives under their softmax: d log Z / d scale."""
        return cosines * (-(self.log_mean + self.log_u)).exp()


def _by_side(name: str, values: Tensor) -> dict[str, Tensor]:
    return {f"{name}_{side}": value for side, value in zip(SIDES, values, strict=False)}


@torch.no_grad()
def _diagnose(
    anchors: _Anchors, tilt: Tensor, features: Features, scale: Tensor
) -> dict[str, Tensor]:
    if not anchors.num_negatives:
        return {}
    divergence = scale * tilt - anchors.log_mean
    effective = anchors.num_negatives * (-divergence).exp().mean(1)
    both = features.stacked
    sides = len(anchors.log_rate)
    ratio = variance_ratio(both[:sides], both.flip(0)[:sides], scale, anchors.log_rate)
    found = _by_side("effective_negatives", effective)
    return found if ratio is None else found | _by_side("variance_ratio", ratio)
