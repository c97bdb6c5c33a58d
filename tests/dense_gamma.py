"""The gamma loss as one dense matrix under autograd: the oracle of the blocked form."""

import math

import torch
from torch import Tensor


def dense_gamma(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    num_virtual: int,
    log_z: tuple[Tensor | None, Tensor | None] = (None, None),
    batch_weight: float = 1.0,
) -> Tensor:
    """Value: the bound; gradient: that of -s_ii + u_i (e^{s_ii}/K + mean_j e^{s_ij}), u held."""
    logits = scale * image @ text.T
    total = logits.new_zeros(())
    for s, prior in ((logits, log_z[0]), (logits.T, log_z[1])):
        positive = s.diagonal()
        others = s.masked_fill(torch.eye(len(s), dtype=torch.bool), -math.inf)
        log_mean = others.logsumexp(1) - math.log(len(s) - 1)
        with torch.no_grad():
            negatives = log_mean
            if prior is not None:
                negatives = torch.logaddexp(
                    log_mean + math.log(batch_weight), prior + math.log(1 - batch_weight)
                )
            log_rate = torch.logaddexp(positive - math.log(num_virtual), negatives)
        linear = (
            (positive - math.log(num_virtual) - log_rate).exp() + (log_mean - log_rate).exp()
        ).mean() - positive.mean()
        bound = (log_rate - positive).mean().detach() + math.log(num_virtual)
        total = total + linear + (bound - linear).detach()
    return total / 2
