"""What a batch says about its own noise: is the local batch large enough?

Enters: detached embeddings and weights. Leaves: scalars. Must not know: other workers.
"""

from jaxtyping import Float
from torch import Tensor

PROBE = 64  # anchors, and as many negatives that are not their own
LARGEST = 1e4


def variance_ratio(
    x: Float[Tensor, "*sides b dim"],
    y: Float[Tensor, "*sides b dim"],
    scale: Float[Tensor, ""],
    log_rate: Float[Tensor, "*sides b"],
) -> Float[Tensor, "*sides"] | None:
    """Give rho = s12 / (s1 + s2) of the repulsion's kernel H_ij = u_i e^{s_ij} d s_ij.

    s1 and s2 are the variances that anchors and negatives bring by themselves, s12 that of their
    pairing. The gradient of a step with local batch b and global batch B has the variance of the
    all-gathered one times (1 + rho/(b-1)) / (1 + rho/(B-1)): b - 1 well above rho loses nothing by
    staying local. Two-way analysis of variance on a probe of the batch, with d s_ij taken by a
    shared bilinear map (x_i y_j^T). Derived for this project. None below 16 pairs.
    """
    half = min(PROBE, x.shape[-2] // 2)
    if half < 8:
        return None
    anchors, others = x[..., :half, :], y[..., half : 2 * half, :]
    weights = (scale * (anchors @ others.mT) - log_rate[..., :half, None]).exp()
    # Squared norms of means of H by Gram matrices: no dim x dim product.
    by_others = weights @ (others @ others.mT)
    by_anchors = (anchors @ anchors.mT) @ weights
    of_anchors = (weights * by_others).sum((-2, -1)) / half**2
    of_others = (weights * by_anchors).sum((-2, -1)) / half**2
    mean = (by_anchors * by_others).sum((-2, -1)) / half**4
    free = half - 1
    pairing = weights.square().sum((-2, -1)) - half * (of_anchors + of_others) + half**2 * mean
    s12 = pairing / free**2
    s1 = ((of_anchors - half * mean) * half / free - s12) / half
    s2 = ((of_others - half * mean) * half / free - s12) / half
    alone = (s1 + s2).clamp(min=0)
    return (s12 / alone).clamp(max=LARGEST)
