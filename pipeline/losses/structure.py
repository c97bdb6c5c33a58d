"""Latent modality structures: what is kept of each modality beside what both share.

Pulling two modalities onto one point throws away what only one of them knows. Three regularisers
of "Understanding and constructing latent modality structures in multi-modal representation
learning" (CVPR 2023), called the paper here, shape the latent space instead:

- deep feature separation (`Separation`): independent features beside the shared ones;
- Brownian bridge (`bridge`): an augmented view lies between its image and its text;
- geometric consistency (`consistency`): both modalities have the same inner geometry.

Each is a sum over a worker's own samples or pairs, but for the uniformity's log of a mean, which
has an auxiliary scalar (`Uniformity`): no feature is gathered.

Enters: unit-norm embeddings of a worker's pairs, row i of each is pair i. Leaves: scalars.
Must not know: other workers, where views come from.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pipeline.losses.base import State, own_or_mean
from pipeline.losses.carry import carry, wide
from pipeline.losses.gamma import GammaLoss
from pipeline.losses.pairs import BLOCK_ROWS, LocalPairs
from pipeline.losses.tiles import TiledPairs, local_pairs

SHARPNESS = 2.0  # of the Gaussian potential e^{-t |u - v|^2}: t as in Wang and Isola (2020)
SCALE = 2 * SHARPNESS  # of unit vectors -t |u - v|^2 is 2 t <u, v> - 2 t
MEMORY = 0.95  # of the uniformity's running mean: about twenty batches
MANY = 3  # times as many rows as dimensions
LEAST_NORM = 1e-6  # of a bridge's mean before it is normalised: of opposite points it has none

Rows = Float[Tensor, "local dim"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Modality:
    """A worker's features of one modality, [b, dim] each; what a run does not make is None.

    `shared` are the embeddings that are contrasted with the other modality, `view` those of an
    augmented view of the same samples; `independent` and `independent_view` come from a second
    projection of the same.
    """

    shared: Tensor
    view: Tensor | None = None
    independent: Tensor | None = None
    independent_view: Tensor | None = None

    @property
    def detached(self) -> "Modality":
        """The same without gradient."""
        return Modality(
            shared=self.shared.detach(),
            view=_detached(self.view),
            independent=_detached(self.independent),
            independent_view=_detached(self.independent_view),
        )


def _detached(features: Tensor | None) -> Tensor | None:
    return None if features is None else features.detach()


# ---- deep feature separation ---------------------------------------------------------------------


def orthogonality(shared: Rows, independent: Rows) -> Float[Tensor, ""]:
    """Mean squared cosine of a sample's two features: L_Ortho of one modality (paper, sec. 3.2)."""
    return (shared * independent).sum(1).square().mean()


@dataclass(kw_only=True)
class Uniformity:
    """log of the mean Gaussian potential between samples, by an auxiliary scalar.

    The paper's L_Uni of one modality, log (1/N) sum_jk e^{-t |z_j - z_k|^2} with t = 2, up to a
    constant, as Wang and Isola (2020) have it: the mean A over pairs j != k. (As printed the sum
    has the pairs j = k too, which say nothing and whose share depends on N; and one log over the
    sum of both modalities, where two are meant.) A log of a global mean is no sum over pairs, but

        log A = min over u of  u A - log u - 1,

    and with u held fixed, that is. u is one over a running mean of A on this worker, of the batches
    before (at the first, of this one), so it does not depend on this batch, and the gradient is
    that of the global log A in expectation, as far as the mean is up to date. Derived for this
    project.
    """

    block: int = BLOCK_ROWS
    precision: torch.dtype = torch.float32
    mean: float = 0.0
    weight: float = 0.0  # total weight of the running mean: corrects its start from zero

    def __call__(self, rows: Rows) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Give the bound u A - log u - 1, and `uniformity` (this batch's log A) as a metric."""
        b = len(rows)
        if b < 2:
            return rows.sum() * 0.0, {}
        with torch.no_grad():
            pairs, log_mean = _log_potential(wide(rows), self.block, self.precision)
            log_u = -(math.log(self.mean / self.weight) if self.weight else float(log_mean))
            weights = log_mean.new_full((2, b), log_u - SCALE - math.log(b * (b - 1)))
            weights[1] = -math.inf  # each ordered pair counts once
            by_row, by_column, _ = pairs.weigh(weights, weights.new_zeros(b))
            value = (log_mean + log_u).exp() - log_u - 1
            batch_mean = float(log_mean.exp())
            if math.isfinite(batch_mean):
                self.mean = MEMORY * self.mean + (1 - MEMORY) * batch_mean
                self.weight = MEMORY * self.weight + (1 - MEMORY)
        loss = carry(value, (rows,), (SCALE * (by_row + by_column),))
        return loss, {"uniformity": log_mean}

    def state_dict(self) -> State:
        """Plain numbers."""
        return {"mean": self.mean, "weight": self.weight}

    def load_state_dict(self, states: Sequence[State], rank: int, world_size: int) -> None:
        """Read this worker's numbers, or the mean of all when the number of workers changed."""
        state = own_or_mean(states, rank, world_size)
        self.mean, self.weight = state["mean"], state["weight"]


def _log_potential(
    rows: Rows, block: int, precision: torch.dtype
) -> tuple[LocalPairs | TiledPairs, Float[Tensor, ""]]:
    """All pairs of rows, summed, and log of the mean of e^{-t |z_j - z_k|^2} over j != k."""
    pairs = local_pairs(rows, rows, rows.new_tensor(SCALE), block, precision)
    log_sum = pairs.sums(1).log_sum[0, 0].logsumexp(0)
    return pairs, log_sum - math.log(len(rows) * max(len(rows) - 1, 1)) - SCALE


@dataclass(kw_only=True)
class Separation:
    """Deep feature separation, the paper's L_Sep of one modality: three terms with weights.

    Orthogonality of shared and independent features, contrast of the independent features of a
    sample and of its augmented view (L_Con^i: in print the view is missing from the numerator,
    which makes it constant), and uniformity of the independent features. The paper prints no
    weights. `contrast` is one-sided, and has auxiliaries of its own.
    """

    contrast: GammaLoss
    orthogonality_weight: float = 1.0
    contrast_weight: float = 1.0
    uniformity_weight: float = 1.0
    uniformity: Uniformity = field(default_factory=Uniformity)

    def __call__(
        self, features: Modality, logit_scale: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Give the sum of the terms that have a weight; the contrast needs a view."""
        independent = there(features.independent)
        orthogonal = orthogonality(features.shared, independent)
        metrics = {"orthogonality": orthogonal.detach()}
        loss = self.orthogonality_weight * orthogonal
        if self.contrast_weight:
            contrast = self.contrast(independent, there(features.independent_view), logit_scale)
            metrics["independent_contrast"] = contrast.metrics["loss"]
            loss = loss + self.contrast_weight * contrast.loss
        if self.uniformity_weight:
            uniform, found = self.uniformity(independent)
            metrics |= found
            loss = loss + self.uniformity_weight * uniform
        return loss, metrics

    def state_dict(self) -> State:
        """This worker's part of the running state."""
        return {
            "contrast": self.contrast.state_dict(),
            "uniformity": self.uniformity.state_dict(),
        }

    def load_state_dict(self, states: Sequence[State], rank: int, world_size: int) -> None:
        """Read the parts of all workers of the time, whose number may differ from `world_size`."""
        self.contrast.load_state_dict([state["contrast"] for state in states], rank, world_size)
        self.uniformity.load_state_dict([state["uniformity"] for state in states], rank, world_size)


# ---- Brownian bridge -----------------------------------------------------------------------------


def bridge_mean(own: Rows, other: Rows, t: float | Float[Tensor, "local 1"]) -> Rows:
    """mu = (t z_own + (1 - t) z_other) / |t z_own + (1 - t) z_other|; t a number, or one a row."""
    return F.normalize(t * own + (1 - t) * other, dim=1, eps=LEAST_NORM)


def bridge(
    view: Rows, own: Rows, other: Rows, t: float | Float[Tensor, "local 1"]
) -> Float[Tensor, ""]:
    """Mean of |z^a - mu(z_own, z_other, t)|^2: L_Br of the paper.

    The augmented view of a sample is to lie on the bridge between the sample (t = 1) and its pair
    in the other modality (t = 0). The expansion in print lacks a sign, a constant and the square
    root of the denominator; for unit vectors it is

        2 - 2 (t <z_own, z^a> + (1 - t) <z_other, z^a>) / sqrt(t^2 + (1-t)^2 + 2 t (1-t) <z, z>).

    The bridge's variance t (1 - t), which the paper's density has and its loss has not, is left
    out.
    """
    return (view - bridge_mean(own, other, t)).square().sum(1).mean()


# ---- geometric consistency -----------------------------------------------------------------------


def squared_differences(a: Rows, b: Rows, c: Rows, d: Rows) -> Float[Tensor, ""]:
    """sum_jk (<a_j, b_k> - <c_j, d_k>)^2; of many rows without a matrix of pairs, O(rows dim^2).

    sum_jk <a_j, b_k> <c_j, d_k> is the inner product of c'a with d'b, [dim, dim] both, which is
    faster from three times as many rows as dimensions on. That way the sum is in fp32 right to
    about 1e-6 of sum_jk <a_j, b_k>^2, and may be negative by as much.
    """
    if len(a) <= MANY * a.shape[1]:
        return (a @ b.T - c @ d.T).square().sum()

    def products(p: Tensor, q: Tensor, r: Tensor, s: Tensor) -> Tensor:
        return ((r.T @ p) * (s.T @ q)).sum()

    return products(a, b, a, b) + products(c, d, c, d) - 2 * products(a, b, c, d)


def consistency(
    image: Modality, text: Modality, gathered_batch: int
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Geometric consistency of both modalities, L_GC of the paper; with views also L_GC^a.

        L_GC   = (1/N) sum_jk (<V_j, T_k> - <V_k, T_j>)^2 + (<V_j, V_k> - <T_j, T_k>)^2
        L_GC^a = (1/N) sum_jk (<V_j, V_k> - <V^a_j, V^a_k>)^2 + the same of T
               + (1/N) sum_j (<V_j, T_j> - <V^a_j, T^a_j>)^2

    A 1/N before N x N terms grows with N; N is the batch that one would gather, here
    `gathered_batch`, whatever a worker holds. Pairs j = k are zero, so the mean over the b (b - 1)
    local pairs times N - 1 equals, on the average over shardings, the sum on all N (the factor is
    often given as N/b, which for small b is not it). Metrics: the root mean square of the
    differences of each kind, over pairs.
    """
    v, t = image.shared, text.shared
    pairs = max(len(v) * (len(v) - 1), 1)
    sums = {
        "cross_modal": squared_differences(v, t, t, v),
        "in_modal": squared_differences(v, v, t, t),
    }
    own = v.new_zeros(())
    if image.view is not None and text.view is not None:
        va, ta = image.view, text.view
        sums["image_view"] = squared_differences(v, v, va, va)
        sums["text_view"] = squared_differences(t, t, ta, ta)
        own = ((v * t).sum(1) - (va * ta).sum(1)).square().mean()
    means = {name: value / pairs for name, value in sums.items()}
    loss = (gathered_batch - 1) * torch.stack(list(means.values())).sum() + own
    metrics = {
        f"{name}_asymmetry": mean.detach().clamp(min=0).sqrt() for name, mean in means.items()
    }
    return loss, metrics


def there(features: Tensor | None) -> Tensor:
    """The features; they were to be made. Raises ValueError where there are none."""
    if features is None:
        raise ValueError("features are missing that this term needs; make views and projections")
    return features


# ---- what it did ---------------------------------------------------------------------------------


@torch.no_grad()
def geometry(
    image: Float[Tensor, "images dim"], text: Float[Tensor, "images dim"]
) -> dict[str, float]:
    """The geometry of matched pairs, row i of both: numbers that tell how modalities lie.

    `modality_gap`: distance of the two means (Liang et al. 2022). `alignment`: mean squared
    distance of a pair; `uniformity_*`: log mean Gaussian potential (Wang and Isola 2020; lower is
    more spread out, about -4 where all are orthogonal). `*_asymmetry`: root mean square of
    <V_j,T_k> - <V_k,T_j> and of <V_j,V_k> - <T_j,T_k>.
    """
    v, t = wide(image), wide(text)
    found: dict[str, Any] = {
        "modality_gap": (v.mean(0) - t.mean(0)).norm(),
        "alignment": (v - t).square().sum(1).mean(),
    }
    for name, rows in (("image", v), ("text", t)):
        found[f"uniformity_{name}"] = _log_potential(rows, BLOCK_ROWS, v.dtype)[1]
    found |= consistency(Modality(shared=v), Modality(shared=t), len(v))[1]
    return {name: float(value) for name, value in found.items()}


@torch.no_grad()
def independent_geometry(
    shared: Float[Tensor, "rows dim"], independent: Float[Tensor, "rows dim"]
) -> dict[str, float]:
    """Of one modality: mean squared cosine of the parts, and the independent part's variance.

    `independent_share` is the share of the independent features in the total variance of both
    (the trace of the covariance of unit vectors, 1 - |mean|^2).
    """
    spread = [1 - float(rows.mean(0).square().sum()) for rows in (shared, independent)]
    return {
        "orthogonality": float(orthogonality(shared, independent)),
        "independent_share": spread[1] / max(sum(spread), 1e-12),
    }
