"""How an anchor's normaliser is concluded from a batch and a prior: the measure of their worth.

A prior predicts a_i = log E_j e^{s_ij} for an anchor before its batch is seen. `Evidence` measures
how wrong it is, and so how many pseudo-negatives it is worth (empirical Bayes).

Enters: log-mean-exps and predictions. Leaves: the batch's weight g, a trained prior's deviance.
Must not know: where predictions come from, other workers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from pipeline.losses.base import State, own_or_mean

LARGEST_MISS = 3.0  # in log units: beyond it the deviance grows linearly, so gradients stay small


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

    def update(self, sampling: float, miss: float, num_negatives: int, num_virtual: float) -> float:
        """Take a batch into the averages and give g in [n/K, 1]; 0 when there are no negatives.

        `sampling` is the batch's own estimate of v, `miss` its mean square of (log-mean-exp less
        prediction).
        """
        if not num_negatives:
            return 0.0
        floor = num_negatives / num_virtual
        if num_negatives < 3:
            return max(0.5, floor)  # no two halves to measure with: trust both alike
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

    def state_dict(self) -> State:
        """Plain numbers."""
        return {"sampling": self.sampling, "miss": self.miss, "weight": self.weight}

    def load_state_dict(self, states: Sequence[State], rank: int, world_size: int) -> None:
        """Read this worker's numbers, or the mean of all when the number of workers changed."""
        state = own_or_mean(states, rank, world_size)
        self.sampling, self.miss, self.weight = state["sampling"], state["miss"], state["weight"]


class CountedEvidence(Evidence):
    """Takes a prior for exactly the K - n negatives that the batch lacks: g = n/K, not measured.

    For a full queue of K - n fresh pairs this is the share of the batch in batch and queue: any n
    of the K are as likely to be the batch, so the expected gradient is that of InfoNCE on K.
    """

    def update(self, sampling: float, miss: float, num_negatives: int, num_virtual: float) -> float:
        """Give n/K."""
        del sampling, miss
        return num_negatives / num_virtual
