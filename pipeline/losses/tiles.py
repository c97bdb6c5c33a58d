"""All pairs of a large local batch on a GPU: square tiles of the logits, by compiled code.

What `LocalPairs` does by rows, operation after operation, is bound by memory there. A tile is
computed by one matrix product and read by a few fused kernels, which take it from the cache;
memory is O(tile^2 + b dim). Measured beside other forms: `python -m jobs.bench.loss_gpu`.

Enters: detached fp32 embeddings. Leaves: log-sums per anchor, gradients by embedding and scale.
Must not know: losses, workers.
"""

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.losses.pairs import LocalPairs, Sums, count_negatives

LOG = logging.getLogger(__name__)
TILE = 8192
LEAST = 4096  # pairs for which to compile pays; fewer take a millisecond either way


def local_pairs(
    x: Float[Tensor, "b dim"],
    y: Float[Tensor, "b dim"],
    scale: Float[Tensor, ""],
    block: int,
    dtype: torch.dtype,
) -> "LocalPairs | TiledPairs":
    """All pairs of x and y, in the form that suits their number and device."""
    if x.device.type == "cuda" and len(x) >= LEAST:
        return TiledPairs(x, y, scale, dtype)
    return LocalPairs(x, y, scale, block)


class TiledPairs:
    """The same as `LocalPairs`; products are taken in `dtype`, all sums in fp32."""

    def __init__(
        self,
        x: Float[Tensor, "b dim"],
        y: Float[Tensor, "b dim"],
        scale: Float[Tensor, ""],
        dtype: torch.dtype,
        tile: int = TILE,
    ):
        self._x, self._y, self._scale = x.to(dtype), y.to(dtype), scale
        self._tile = tile
        self._cut = 0
        self.positive = x.new_zeros(len(x))

    def sums(self, parts: int) -> Sums:
        """Give the sums over negatives of rows (x anchors) and columns (y anchors)."""
        b = len(self._x)
        self._cut = cut = b // 2 if parts == 2 else 0
        log_sum = self.positive.new_full((parts, 2, b), -math.inf)
        look = _compiled(_look, self._x.device)
        for rows, columns, shift in self._tiles():
            by_row, by_column, own = look(self._x[rows], self._y[columns], self._scale, shift)
            for side, seen, more, others in ((0, rows, by_row, columns),
                                             (1, columns, by_column, rows)):  # fmt: skip
                part = log_sum[int(parts == 2 and others.start >= cut), side, seen]
                torch.logaddexp(part, more, out=part)
            self.positive[rows] += own
        return Sums(log_sum=log_sum, count=count_negatives(self.positive, parts, cut), total=b - 1)

    def weigh(
        self, log_u: Float[Tensor, "2 b"], pull: Float[Tensor, " b"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weigh negatives; what is given is told at `LocalPairs.weigh`. After `sums`."""
        x, y = self._x, self._y
        by_x, by_y = (torch.zeros_like(each, dtype=torch.float32) for each in (x, y))
        cosines = torch.zeros_like(log_u)
        weigh = _compiled(_weigh, x.device)
        for rows, columns, shift in self._tiles():
            weights, of_rows, of_columns = weigh(
                x[rows], y[columns], self._scale, log_u[0, rows], log_u[1, columns], pull[rows],
                shift,
            )  # fmt: skip
            cosines[0, rows] += of_rows
            cosines[1, columns] += of_columns
            by_x[rows] += _product(weights, y[columns])
            by_y[columns] += _product(weights.T, x[rows])
        return by_x, by_y, cosines.div_(self._scale)

    def _tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns, and how far right of the tile's own the logits' diagonal lies."""
        ranges = list(_ranges(0, self._cut, self._tile))
        ranges += _ranges(self._cut, len(self._x), self._tile)
        for rows in ranges:
            for columns in ranges:
                # A tensor: compiled code is made anew for each number it is given.
                shift = torch.tensor(rows.start - columns.start).to(self._x.device)
                yield rows, columns, shift


def _ranges(start: int, end: int, most: int) -> Iterator[slice]:
    """Cut into equal ranges, or as good as: code is compiled for each size."""
    size = math.ceil((end - start) / max(1, math.ceil((end - start) / most)))
    for begin in range(start, end, max(1, size)):
        yield slice(begin, min(begin + size, end))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In fp32, whatever is multiplied."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def _logits(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a tile, and where they are of a pair of its own."""
    row = torch.arange(len(x), device=x.device)[:, None]
    column = torch.arange(len(y), device=x.device)
    return _product(x, y.T) * scale, column == row + shift


def _look(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits, is_own = _logits(x, y, scale, shift)
    own = torch.where(is_own, logits, 0).sum(1)
    logits = torch.where(is_own, -math.inf, logits)
    return logits.logsumexp(1), logits.logsumexp(0), own


def _weigh(
    x: Tensor, y: Tensor, scale: Tensor, row_log_u: Tensor, column_log_u: Tensor, pull: Tensor,
    shift: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    logits, is_own = _logits(x, y, scale, shift)
    by_row = torch.where(is_own, 0, (logits + row_log_u[:, None]).exp())
    by_column = torch.where(is_own, 0, (logits + column_log_u).exp())
    weights = torch.where(is_own, -pull[:, None], by_row + by_column).to(x.dtype)
    return weights, (by_row * logits).sum(1), (by_column * logits).sum(0)


def find_c_compiler() -> str | None:
    """The C compiler that Triton uses on this machine, if there is one."""
    names = (os.environ.get("CC"), "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@cache
def _compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function compiled for a GPU; as it is elsewhere, and where there is no C compiler."""
    if device.type != "cuda":
        return function
    if find_c_compiler() is None:
        LOG.warning(
            "no C compiler (gcc, clang or $CC) on this node, so the loss is not compiled: on "
            "large local batches it takes several times as long"
        )
        return function
    compiled = torch.compile(function, dynamic=False)

    def call(*inputs: Any) -> Any:
        # What cannot be compiled here runs as it is, and torch warns of it. The sizes of tiles and
        # of what is left over, in both directions, are more than torch compiles by itself.
        with torch._dynamo.config.patch(suppress_errors=True, recompile_limit=16):
            return compiled(*inputs)

    return call
