"""The comparators as their papers define them, dense, in one process: what the others are held to.

Each takes a whole batch: image, text [B, dim] unit-norm, row i of both a pair.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-14


def dense_infonce(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits, labels = scale * image @ text.T, torch.arange(len(image))
    return 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels))


def dense_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(signs * (scale * image @ text.T + bias)).sum() / len(image)


def dense_global_contrastive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """mean_i [log(eps + g1_i) + log(eps + g2_i)] / 2, differentiated as a whole."""
    return torch.stack([(EPS + g).log().mean() for g in _mean_exp(image, text, scale)]).mean()


class DenseFastCLIP:
    """u in the linear domain, a number for each row and side; gradients by autograd."""

    def __init__(self, *, gamma: float, learns_scale: bool, rho: float = 0.0):
        self.gamma, self.learns_scale, self.rho = gamma, learns_scale, rho
        self.u: dict[tuple[int, int], float] = {}

    def __call__(self, image: Tensor, text: Tensor, scale: Tensor, keys: Tensor) -> Tensor:
        surrogate = value = image.new_zeros(())
        temperature = scale if self.learns_scale else scale.detach() + 0 * scale
        for side, g in enumerate(_mean_exp(image, text, temperature)):
            u = []
            for key, now in zip(keys.tolist(), g.tolist(), strict=True):
                old = self.u.get((side, key))
                u.append(now if old is None else (1 - self.gamma) * old + self.gamma * now)
            self.u |= {(side, key): new for key, new in zip(keys.tolist(), u, strict=True)}
            held = EPS + g.new_tensor(u)
            surrogate = surrogate + (g / held).mean() / 2
            value = value + held.log().mean() / 2
        loss = surrogate + (value - surrogate).detach()
        return (loss + self.rho) / scale if self.learns_scale else loss


def _mean_exp(image: Tensor, text: Tensor, scale: Tensor) -> list[Tensor]:
    """g of image and of text anchors: the mean over others of e^margin."""
    logits = scale * image @ text.T
    others = 1 - torch.eye(len(image), dtype=image.dtype)
    count = max(len(image) - 1, 1)
    return [((s - s.diagonal()[:, None]).exp() * others).sum(1) / count for s in (logits, logits.T)]
