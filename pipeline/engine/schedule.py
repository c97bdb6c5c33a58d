"""Learning-rate schedules by samples seen, so that resizing the cluster does not move them."""

import math
from typing import Literal


def lr_factor(
    samples: int,
    *,
    warmup: int,
    total: int,
    schedule: Literal["cosine", "constant"],
    least: float = 0.0,
) -> float:
    """Give the factor on the peak rate for the step that has `samples` pairs behind it.

    Rises linearly over `warmup` samples, then stays, or falls along a half cosine to `least` at
    `total` samples.
    """
    if samples < warmup:
        return (samples + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (samples - warmup) / max(1, total - warmup))
    return least + (1.0 - least) * 0.5 * (1.0 + math.cos(math.pi * progress))
