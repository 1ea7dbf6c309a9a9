"""A value that changes with the step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear from `start` to `peak` over `warmup` steps, then along a cosine from `peak` to `end`.

    `start` is the value of step 0 (if there is a warm-up), `peak` that of step `warmup`, `end` that of the last step,
    `steps` − 1: each is reached exactly.
    """

    peak: float
    end: float
    steps: int
    start: float = 0.0
    warmup: int = 0

    def __call__(self, step: int) -> float:
        """The value at `step`, from 0."""
        if step < self.warmup:
            return self.start + (self.peak - self.start) * step / self.warmup
        if step >= self.steps - 1:
            return self.end
        progress = (step - self.warmup) / (self.steps - 1 - self.warmup)
        return self.peak + (self.end - self.peak) * 0.5 * (1 - math.cos(math.pi * progress))  # exactly peak at 0
