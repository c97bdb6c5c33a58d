"""All pairs of two sets of embeddings, a block of rows at a time: sums of exponentials, gradients.

Logits s_ij = scale <x_i, y_j> are never held as a whole: memory O(b * block), twice computed.
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

BLOCK_ROWS = 256  # rows of logits held at once: the fastest on a CPU, and small


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """What anchors see of their negatives, in two halves (random ones: rows come shuffled).

    log_sum [2, b] is log sum_j e^{s_ij} over each half, count [2, b] how many negatives it has.
    """

    log_sum: Tensor
    count: Tensor

    @staticmethod
    def empty(rows: int, like: Tensor) -> "Sums":
        """No negatives yet."""
        return Sums(log_sum=like.new_full((2, rows), -math.inf), count=like.new_zeros(2, rows))

    def __add__(self, other: "Sums") -> "Sums":
        """Both sets of negatives together."""
        return Sums(
            log_sum=torch.logaddexp(self.log_sum, other.log_sum), count=self.count + other.count
        )

    @property
    def log_mean(self) -> Tensor:
        """Log of the mean of e^{s_ij} over all negatives; -inf without any; shape [b]."""
        total = torch.logaddexp(self.log_sum[0], self.log_sum[1])
        return total - self.count.sum(0).clamp(min=1).log()

    @property
    def half_difference(self) -> Tensor:
        """Log-mean-exp of the first half less that of the second; NaN where one is empty; [b]."""
        log_mean = self.log_sum - self.count.log()
        return log_mean[0] - log_mean[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighted:
    """Of sum_ij c_ij s_ij with fixed c: gradients by x, y [b, dim] before the factor `scale`,
    and the weighted sums of cosines of each anchor's negatives, [b]; c_ij = w_ij + w'_ij."""

    x: Tensor
    y: Tensor
    row_cosines: Tensor
    column_cosines: Tensor


class LocalPairs:
    """All pairs i != j of x and y [b, dim]; more logits than a block are computed twice."""

    def __init__(
        self,
        x: Float[Tensor, "b dim"],
        y: Float[Tensor, "b dim"],
        scale: Float[Tensor, ""],
        block: int,
    ):
        self._x, self._y, self._scale, self._block = x, y, scale, block
        self._kept: Tensor | None = None

    def _logits(self, start: int, end: int) -> Tensor:
        """Rows start..end-1 of the logits, with -inf on the diagonal."""
        if self._kept is not None:
            return self._kept[start:end]
        logits = (self._scale * self._x[start:end]) @ self._y.T
        logits[:, start:end].fill_diagonal_(-math.inf)
        return logits

    def sums(self) -> tuple[Sums, Sums]:
        """Give the sums over negatives of rows (x anchors) and columns (y anchors)."""
        b = len(self._x)
        half = b // 2
        if b <= self._block:
            self._kept = self._logits(0, b)
        rows, columns = Sums.empty(b, self._x), Sums.empty(b, self._x)
        for start, end in _blocks(b, self._block, half):
            logits = self._logits(start, end)
            rows.log_sum[0, start:end] = logits[:, :half].logsumexp(1)
            rows.log_sum[1, start:end] = logits[:, half:].logsumexp(1)
            side = int(start >= half)
            columns.log_sum[side] = torch.logaddexp(columns.log_sum[side], logits.logsumexp(0))
        for sums in (rows, columns):
            sums.count[0, :half], sums.count[0, half:] = half - 1, half
            sums.count[1, :half], sums.count[1, half:] = b - half, b - half - 1
        return rows, columns

    def weigh(self, row_log_u: Float[Tensor, " b"], column_log_u: Float[Tensor, " b"]) -> Weighted:
        """Weigh pairs by w_ij = e^{s_ij + row_log_u_i} and w'_ij = e^{s_ij + column_log_u_j}.

        Each log u carries all else that multiplies the exponential, so no e^s stands alone. To be
        called once.
        """
        x, y = self._x, self._y
        grad_x, grad_y = torch.empty_like(x), torch.zeros_like(y)
        row_cosines, column_cosines = torch.empty_like(row_log_u), torch.zeros_like(column_log_u)
        for start, end in _blocks(len(x), self._block, 0):
            logits = self._logits(start, end)
            by_row = (logits + row_log_u[start:end, None]).exp_()
            by_column = (logits + column_log_u[None, :]).exp_()
            logits[:, start:end].fill_diagonal_(0)  # 0 * -inf is no number
            row_cosines[start:end] = torch.linalg.vecdot(by_row, logits)
            column_cosines += torch.linalg.vecdot(by_column, logits, dim=0)
            weights = by_row.add_(by_column)
            grad_x[start:end] = weights @ y
            grad_y.addmm_(weights.T, x[start:end])
        return Weighted(
            x=grad_x,
            y=grad_y,
            row_cosines=row_cosines / self._scale,
            column_cosines=column_cosines / self._scale,
        )


def foreign_sums(
    anchors: Float[Tensor, "b dim"], others: Float[Tensor, "m dim"], scale: Tensor, block: int
) -> Sums:
    """Sums over all of `others`, none of which is an anchor's own pair."""
    sums = Sums.empty(len(anchors), anchors)
    half = len(others) // 2
    for start, end in _blocks(len(anchors), block, 0):
        logits = (scale * anchors[start:end]) @ others.T
        sums.log_sum[0, start:end] = logits[:, :half].logsumexp(1)
        sums.log_sum[1, start:end] = logits[:, half:].logsumexp(1)
    sums.count[0], sums.count[1] = half, len(others) - half
    return sums


def weigh_foreign(
    anchors: Float[Tensor, "b dim"],
    others: Float[Tensor, "m dim"],
    scale: Tensor,
    anchor_log_u: Float[Tensor, " b"],
    other_log_u: Float[Tensor, " m"],
    block: int,
) -> tuple[Float[Tensor, "b dim"], Float[Tensor, " b"]]:
    """Give the gradient by `anchors` and the anchors' own weighted cosines, over all pairs.

    The gradient by `others` is their worker's, which weighs the same pairs.
    """
    gradient, cosines = torch.empty_like(anchors), torch.empty_like(anchor_log_u)
    for start, end in _blocks(len(anchors), block, 0):
        logits = (scale * anchors[start:end]) @ others.T
        mine = (logits + anchor_log_u[start:end, None]).exp_()
        cosines[start:end] = torch.linalg.vecdot(mine, logits) / scale
        weights = mine.add_((logits + other_log_u[None, :]).exp_())
        gradient[start:end] = weights @ others
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
