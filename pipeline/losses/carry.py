"""A scalar whose gradients are known before backward: they were computed beside the value.

Enters: detached values, the inputs they belong to. Leaves: a loss. Must not know: which loss.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def carry(value: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Give the scalar `value` as a function of `inputs` whose gradients by them are `gradients`.

    There are as many gradients as inputs, each of its input's shape.
    """
    loss = _Carry.apply(value, len(inputs), *gradients, *inputs)
    assert isinstance(loss, Tensor)
    return loss


def wide(values: Tensor) -> Tensor:
    """Detached, in fp32 at least: logits at scale 100 need it."""
    values = values.detach()
    return values.float() if values.dtype.itemsize < torch.float32.itemsize else values


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *rest: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(*rest[:count])
        ctx.kinds = [part.dtype for part in rest[count:]]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        parts = [
            (gradient * saved).to(kind)
            for saved, kind in zip(ctx.saved_tensors, ctx.kinds, strict=True)
        ]
        return None, None, *([None] * len(parts)), *parts
