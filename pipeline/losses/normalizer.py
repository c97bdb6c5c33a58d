"""Priors on an anchor's normaliser, and how much each is worth.

A prior predicts a_i = log E_j e^{s_ij} for an anchor before its batch is seen. `Evidence` measures
how wrong it is, and so how many pseudo-negatives it is worth (empirical Bayes).

Enters: embeddings, logits. Leaves: predictions [b], the batch's weight g.
Must not know: other workers, where the embeddings come from.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

HIDDEN = 256
LARGEST_MISS = 3.0  # in log units: beyond it the deviance grows linearly, so gradients stay small


class AmortizedPrior(nn.Module):
    """Predicts log E_j e^{s_ij} from an anchor's embedding and the logit scale; one net a side.

    No per-sample state: it works when every sample is seen once.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        self.image = _predictor(embed_dim)
        self.text = _predictor(embed_dim)

    def forward(
        self,
        image: Float[Tensor, "local dim"],
        text: Float[Tensor, "local dim"],
        logit_scale: Float[Tensor, ""],
    ) -> tuple[Float[Tensor, " local"], Float[Tensor, " local"]]:
        """Give (image_log_z, text_log_z), fp32, with gradient to this module only."""
        return self._predict(self.image, image, logit_scale), self._predict(
            self.text, text, logit_scale
        )

    @staticmethod
    def _predict(net: nn.Sequential, anchors: Tensor, logit_scale: Tensor) -> Tensor:
        scale = logit_scale.detach().log().expand(len(anchors), 1)
        inputs = torch.cat([anchors.detach().float(), scale.float()], dim=1)
        weight = next(net.parameters())
        return net(inputs.to(weight.dtype)).squeeze(1).float()


def _predictor(embed_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(embed_dim + 1, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))


def prior_deviance(
    log_z: Float[Tensor, " local"], log_mean: Float[Tensor, " local"]
) -> Float[Tensor, ""]:
    """Mean gamma deviance of predictions a against Zhat: e^{-a} Zhat + a - log Zhat - 1 >= 0.

    Linear in Zhat, so its minimiser is log E[Zhat | anchor] without bias from noise in Zhat
    (squared error on log Zhat would be biased).
    """
    miss = log_mean - log_z
    near = miss.clamp(max=LARGEST_MISS)
    return (near.exp() * (1 + miss - near) - miss - 1).mean()


def log_mean_exp(logits: Float[Tensor, "anchors others"]) -> Float[Tensor, " anchors"]:
    """Log of the mean of e^{s_ij} over j != i (square logits; the diagonal is left out)."""
    count = logits.shape[1] - 1
    masked = logits.clone()
    masked.diagonal().fill_(-math.inf)
    return masked.logsumexp(dim=1) - math.log(count)


@dataclass(kw_only=True)
class Evidence:
    """Measures the batch weight g = n / (n0 + n) of a prior on this worker.

    v: sampling variance of the batch's log-mean-exp, from its two halves (Var(difference) / 4).
    t: mean square of (batch's log-mean-exp - prediction). sigma2 = max(t - v, 0.05 t) is the
    prior's own error, g = sigma2 / (sigma2 + v), never below n/K. v and t are running averages.
    A bad prior takes itself out (g -> 1), a good one carries up to K negatives.
    """

    decay: float = 0.95
    sampling: float = 0.0
    miss: float = 0.0
    weight: float = 0.0  # total weight of the running averages: corrects their start from zero

    def update(
        self,
        logits: Float[Tensor, "local local"],
        log_mean: Float[Tensor, " local"] | None,
        log_z: Float[Tensor, " local"],
        num_virtual: int,
    ) -> float:
        """Take a batch into the averages and give g in [n/K, 1]; 0 when there are no negatives."""
        num_negatives = len(logits) - 1
        if log_mean is None:
            return 0.0
        floor = num_negatives / num_virtual
        if num_negatives < 3:
            return max(0.5, floor)  # no two halves to measure with: trust both alike
        half = len(logits) // 2
        halves = _half(logits, slice(0, half)) - _half(logits, slice(half, None))
        sampling, miss = torch.stack(
            [halves.square().mean() / 4, (log_mean - log_z).square().mean()]
        ).tolist()
        if math.isfinite(sampling + miss):
            self.sampling = self.decay * self.sampling + (1 - self.decay) * sampling
            self.miss = self.decay * self.miss + (1 - self.decay) * miss
            self.weight = self.decay * self.weight + (1 - self.decay)
        if not self.weight:
            return 1.0
        v, t = self.sampling / self.weight, self.miss / self.weight
        prior_error = max(t - v, 0.05 * t)
        total = prior_error + v
        return min(1.0, max(prior_error / total if total > 0 else 1.0, floor))

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {"sampling": self.sampling, "miss": self.miss, "weight": self.weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Read what `state_dict` gave."""
        self.sampling, self.miss, self.weight = state["sampling"], state["miss"], state["weight"]


def _half(logits: Tensor, columns: slice) -> Tensor:
    """Log-mean-exp over one half of the columns, the anchor's own left out; shape [b]."""
    part = logits[:, columns].clone()
    first = columns.start or 0
    own = torch.arange(part.shape[1], device=part.device)
    part[first + own, own] = -math.inf
    count = torch.full((len(logits),), part.shape[1], device=part.device, dtype=part.dtype)
    count[first + own] -= 1
    return part.logsumexp(dim=1) - count.log()
