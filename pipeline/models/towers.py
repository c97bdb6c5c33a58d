"""What the models share: what they give, normalised pixels, projections, the logit scale."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from pipeline.errors import UserError

MAX_LOGIT_SCALE = 100.0


class Embeddings(NamedTuple):
    """Unit-norm fp32 rows; what was not asked for, or has no input, is None."""

    image: Float[Tensor, "batch dim"] | None
    text: Float[Tensor, "batch dim"] | None
    logit_scale: Float[Tensor, ""]
    image_independent: Float[Tensor, "batch dim"] | None
    text_independent: Float[Tensor, "batch dim"] | None


class Pixels(nn.Module):
    """uint8 images, as they travel, -> normalised [batch, 3, height, width]; on the device."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        """`mean` and `std` of RGB values from 0 to 1."""
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std) * 255, persistent=False)

    def forward(
        self, images: UInt8[Tensor, "batch height width 3"], dtype: torch.dtype
    ) -> Float[Tensor, "batch 3 height width"]:
        """Normalise in fp32, then round to `dtype`."""
        pixels = (images.float() - self.mean.float()) / self.std.float()
        return pixels.permute(0, 3, 1, 2).to(dtype)


def clamped_scale(log_scale: Float[Tensor, " 1"]) -> Float[Tensor, ""]:
    """The logit scale of its logarithm, in fp32, from 1 to 100."""
    return log_scale.float().clamp(0.0, math.log(MAX_LOGIT_SCALE)).exp().squeeze(0)


def project(
    projection: nn.Linear | None, pooled: Float[Tensor, "batch width"]
) -> Float[Tensor, "batch dim"] | None:
    """Unit-norm fp32 rows; None without a projection."""
    return None if projection is None else F.normalize(projection(pooled).float(), dim=-1)


def load_pretrained(kind: Any, path: str, place: str, what: str, **options: Any) -> Any:
    """Load a model class of transformers, `what` in words, in fp32 from a folder or the hub.

    Raises `UserError` that begins with `place`, the config path, when it cannot be loaded.
    """
    try:
        return kind.from_pretrained(path, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{place}: {path!r} cannot be loaded as {what} ({error}); give a folder saved by "
            "transformers, or a hub id that is reachable from here"
        ) from error
