"""Rates over the window since the last metric point."""

import time
from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class Meter:
    """Counts samples, steps and seconds spent waiting for data since `window` was last called."""

    started: float = field(default_factory=time.perf_counter)
    samples: int = 0
    steps: int = 0
    waited: float = 0.0

    def add(self, samples: int, waited: float) -> None:
        """Count one step: pairs on all workers, and seconds this worker waited for its batch."""
        self.samples += samples
        self.steps += 1
        self.waited += waited

    def window(self) -> dict[str, float]:
        """Give samples_per_s, step_s and data_wait_share of the window, and start the next."""
        now = time.perf_counter()
        seconds = max(now - self.started, 1e-9)
        rates = {
            "samples_per_s": self.samples / seconds,
            "step_s": seconds / max(self.steps, 1),
            "data_wait_share": min(1.0, self.waited / seconds),
        }
        self.started, self.samples, self.steps, self.waited = now, 0, 0, 0.0
        return rates

    def skip(self) -> None:
        """Forget the window: what happened since was no training (evaluation, a checkpoint)."""
        self.window()
