"""Comparators of the gamma loss: contrastive losses that need other workers' features.

The one file of losses/ that may touch torch.distributed; the gamma loss beside it cannot.
Enters: local embeddings. Leaves: a scalar and metrics.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pipeline.losses.base import Gather, LossValue, State


class InfoNCEGathered:
    """InfoNCE over the global batch: local anchors against all workers' gathered embeddings.

    The "local loss, gather with gradient" form: the mean of this loss over W workers is InfoNCE on
    the whole batch, and so is the mean of its gradients. Logits b x Wb on each worker; each worker
    receives 2(W-1)bd embedding values forward, and their gradients are reduce-scattered backward.
    """

    def __call__(
        self,
        image: Float[Tensor, "local dim"],
        text: Float[Tensor, "local dim"],
        logit_scale: Float[Tensor, ""],
        image_log_z: Tensor | None = None,
        text_log_z: Tensor | None = None,
        logit_bias: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> LossValue:
        """Give the loss of unit-norm embeddings; every worker must hold equally many pairs."""
        del image_log_z, text_log_z, logit_bias, keys
        all_image, all_text = gather_rows(image), gather_rows(text)
        first = len(image) * _rank()
        labels = torch.arange(first, first + len(image), device=image.device)
        loss = 0.5 * (
            F.cross_entropy(logit_scale * (image @ all_text.T), labels)
            + F.cross_entropy(logit_scale * (text @ all_image.T), labels)
        )
        return LossValue(
            loss=loss, metrics={"loss": loss.detach(), "logit_scale": logit_scale.detach()}
        )

    def share(self, gather: Gather) -> None:
        """Nothing to share."""

    def state_dict(self) -> State:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, states: Sequence[State], rank: int, world_size: int) -> None:
        """Nothing to read."""


def gather_rows(rows: Float[Tensor, "local dim"]) -> Float[Tensor, "all dim"]:
    """Concatenate all workers' rows in rank order, with gradient back to the owner of each row."""
    return _GatherRows.apply(rows) if _world_size() > 1 else rows  # pyright: ignore[reportReturnType]


class _GatherRows(torch.autograd.Function):
    """All-gather forward; backward sums every worker's gradient of my rows (reduce-scatter)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        gathered = [torch.empty_like(rows) for _ in range(_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        mine = torch.empty_like(gradient[: len(gradient) // _world_size()])
        parts = [part.contiguous() for part in gradient.chunk(_world_size())]
        dist.reduce_scatter(mine, parts)
        return mine


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
