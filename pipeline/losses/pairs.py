"""All pairs of two sets of embeddings, a block of rows at a time: sums of exponentials, gradients.

Logits s_ij = scale <x_i, y_j> of many pairs are never held as a whole: memory O(b * block).
One product of a block serves both directions (rows: image anchors; columns: text anchors).

Enters: detached fp32 embeddings. Leaves: log-sums per anchor, gradients by embedding and scale.
Must not know: losses, workers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK_ROWS = 256  # rows of logits worked on at once: the fastest on a CPU, and small
KEPT_BLOCKS = 8  # as many are kept from forward to backward; beyond, logits are computed twice


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """What image and text anchors see of their negatives, in one part or two random halves.

    log_sum [parts, 2, b] is log sum_j e^{s_ij} over each part (rows come shuffled, so halves by
    position are random ones), count [parts, b] how many negatives it has, `total` all of them.
    """

    log_sum: Tensor
    count: Tensor
    total: int

    def __add__(self, other: "Sums") -> "Sums":
        """Both sets of negatives together."""
        return Sums(
            log_sum=torch.logaddexp(self.log_sum, other.log_sum),
            count=self.count + other.count,
            total=self.total + other.total,
        )

    @property
    def log_mean(self) -> Tensor:
        """Log of the mean of e^{s_ij} over all negatives; -inf without any; shape [2, b]."""
        whole = self.log_sum[0]
        if len(self.log_sum) > 1:
            whole = torch.logaddexp(whole, self.log_sum[1])
        return whole - math.log(max(self.total, 1))

    @property
    def half_difference(self) -> Tensor:
        """Log-mean-exp of the first half less the second's; NaN where one is empty; [2, b]."""
        log_mean = self.log_sum - self.count.log()[:, None]
        return log_mean[0] - log_mean[1]


class LocalPairs:
    """All pairs of images x and texts y. After `sums`, `positive` [b] holds the logits s_ii."""

    def __init__(
        self,
        x: Float[Tensor, "b dim"],
        y: Float[Tensor, "b dim"],
        scale: Float[Tensor, ""],
        block: int,
    ):
        self._x, self._y, self._scale, self._block = x, y, scale, block
        self._kept: Tensor | None = None
        self.positive = x.new_empty(len(x))

    def _logits(self, start: int, end: int) -> Tensor:
        """Rows start..end-1 of the logits, with -inf on the diagonal."""
        if self._kept is not None:
            return self._kept[start:end]
        logits = (self._scale * self._x[start:end]) @ self._y.T
        own = logits[:, start:end].diagonal()
        self.positive[start:end] = own
        own.fill_(-math.inf)
        return logits

    def sums(self, parts: int) -> Sums:
        """Give the sums over negatives of rows (x anchors) and columns (y anchors)."""
        b = len(self._x)
        cut = b // 2 if parts == 2 else 0
        if b <= KEPT_BLOCKS * self._block:
            self._kept = self._logits(0, b)
        log_sum = self._x.new_full((parts, 2, b), -math.inf)
        for start, end in _blocks(b, self._block, cut):
            logits = self._logits(start, end)
            for part, columns in enumerate((slice(cut), slice(cut, b)) if cut else (slice(b),)):
                log_sum[part, 0, start:end] = logits[:, columns].logsumexp(1)
            seen = log_sum[int(parts == 2 and start >= cut), 1]
            torch.logaddexp(seen, logits.logsumexp(0), out=seen)
        return Sums(log_sum=log_sum, count=count_negatives(self.positive, parts, cut), total=b - 1)

    def weigh(
        self, log_u: Float[Tensor, "2 b"], pull: Float[Tensor, " b"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weigh negatives by w_ij = e^{s_ij + log_u[0, i]} and w'_ij = e^{s_ij + log_u[1, j]}.

        Gives, of sum_ij (w_ij + w'_ij) s_ij - sum_i pull_i s_ii with all but s held fixed, the
        gradients by x and by y [b, dim] before the factor `scale`; and each anchor's weighted sum
        of its negatives' cosines [2, b]. Each log u carries all else that multiplies the
        exponential, so no e^s stands alone. To be called once.
        """
        x, y = self._x, self._y
        by_x, by_y = torch.empty_like(x), torch.zeros_like(y)
        cosines = torch.zeros_like(log_u)
        for start, end in _blocks(len(x), self._block, 0):
            logits = self._logits(start, end)
            by_row = (logits + log_u[0, start:end, None]).exp_()
            by_column = (logits + log_u[1]).exp_()
            logits[:, start:end].diagonal().fill_(0)  # 0 * -inf is no number
            torch.linalg.vecdot(by_row, logits, out=cosines[0, start:end])
            cosines[1] += torch.linalg.vecdot(by_column, logits, dim=0)
            weights = by_row.add_(by_column)
            weights[:, start:end].diagonal().copy_(-pull[start:end])
            torch.mm(weights, y, out=by_x[start:end])
            by_y.addmm_(weights.T, x[start:end])
        return by_x, by_y, cosines.div_(self._scale)


def count_negatives(
    positive: Float[Tensor, " b"], parts: int, cut: int
) -> Float[Tensor, "parts b"]:
    """Count each anchor's negatives among the pairs, or before and from `cut` on."""
    b = len(positive)
    count = positive.new_full((parts, b), b - 1 - cut)
    if parts == 2:
        count[0, :cut], count[0, cut:] = cut - 1, cut
        count[1, :cut] = b - cut
    return count


def foreign_sums(
    anchors: Float[Tensor, "2 b dim"],
    others: Float[Tensor, "2 m dim"],
    scale: Tensor,
    block: int,
    parts: int,
) -> Sums:
    """Sums over all of `others`, none of which is an anchor's own pair."""
    rows, width = anchors.shape[1], others.shape[1]
    cut = width // 2 if parts == 2 else 0
    log_sum = anchors.new_full((parts, 2, rows), -math.inf)
    for start, end in _blocks(rows, block, 0):
        logits = (scale * anchors[:, start:end]) @ others.mT
        log_sum[-1, :, start:end] = logits[:, :, cut:].logsumexp(2)
        if cut:
            log_sum[0, :, start:end] = logits[:, :, :cut].logsumexp(2)
    count = anchors.new_full((parts, rows), width - cut)
    if parts == 2:
        count[0] = cut
    return Sums(log_sum=log_sum, count=count, total=width)


def weigh_foreign(
    anchors: Float[Tensor, "2 b dim"],
    others: Float[Tensor, "2 m dim"],
    scale: Tensor,
    anchor_log_u: Float[Tensor, "2 b"],
    other_log_u: Float[Tensor, "2 m"],
    block: int,
) -> tuple[Float[Tensor, "2 b dim"], Float[Tensor, "2 b"]]:
    """Give the gradient by `anchors` and the anchors' own weighted cosines, over all pairs.

    The gradient by `others` is their worker's, which weighs the same pairs.
    """
    gradient, cosines = torch.empty_like(anchors), torch.empty_like(anchor_log_u)
    for start, end in _blocks(anchors.shape[1], block, 0):
        logits = (scale * anchors[:, start:end]) @ others.mT
        mine = (logits + anchor_log_u[:, start:end, None]).exp_()
        cosines[:, start:end] = torch.linalg.vecdot(mine, logits) / scale
        weights = mine.add_((logits + other_log_u[:, None, :]).exp_())
        gradient[:, start:end] = weights @ others
    return gradient, cosines


def _blocks(rows: int, block: int, cut: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `block` rows; none reaches across `cut`."""
    start = 0
    while start < rows:
        end = min(start + block, rows)
        if start < cut < end:
            end = cut
        yield start, end
        start = end
