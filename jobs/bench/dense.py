"""The gamma loss as one dense matrix: the oracle of the blocked form, and its measure of cost."""

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
    """Give the bound, with the gradient of -s_ii + u_i (e^{s_ii}/K + mean_j e^{s_ij}), u held.

    `num_virtual` is K, `log_z` the prior's a_i of image and text anchors, [b] each. The logits and
    their coefficients are held whole: memory O(b^2).
    """
    logits = scale * image @ text.T
    with torch.no_grad():
        b = len(logits)
        positive = logits.diagonal()
        coefficients = torch.zeros_like(logits)
        bound = logits.new_zeros(())
        for s, prior, target in (
            (logits, log_z[0], coefficients),
            (logits.T, log_z[1], coefficients.T),
        ):
            others = s.clone()
            others.diagonal().fill_(-math.inf)
            negatives = others.logsumexp(1) - math.log(b - 1)
            if prior is not None:
                negatives = torch.logaddexp(
                    negatives + math.log(batch_weight), prior + math.log(1 - batch_weight)
                )
            log_rate = torch.logaddexp(positive - math.log(num_virtual), negatives)
            target += others.sub_((log_rate + math.log(b - 1))[:, None]).exp_()
            target.diagonal().add_((positive - math.log(num_virtual) - log_rate).exp() - 1)
            bound += (log_rate - positive).mean() / 2 + math.log(num_virtual) / 2
    surrogate = (coefficients * logits).sum() / (2 * len(logits))
    return surrogate + (bound - surrogate).detach()
