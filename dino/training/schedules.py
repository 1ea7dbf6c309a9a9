"""Values that change with the step: learning rate, weight decay, teacher momentum, teacher temperature."""

import math
from dataclasses import dataclass

from dino.config.read import Config


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


@dataclass(frozen=True)
class Schedules:
    """The four of a DINO run, in optimizer steps of this run."""

    lr: Schedule
    weight_decay: Schedule
    momentum: Schedule
    temperature: Schedule

    def at(self, step: int) -> dict[str, float]:
        """Their values at `step`, by the names of the metrics."""
        return {
            "optim/lr": self.lr(step),
            "optim/weight_decay": self.weight_decay(step),
            "teacher/momentum": self.momentum(step),
            "teacher/temperature": self.temperature(step),
        }


def schedules(config: Config) -> Schedules:
    """Build them from a resolved config. The learning rate's first step is one (warm-up + 1)-th of the peak, not 0."""
    optim, objective, steps = config.optim, config.objective, int(config.train.steps)
    warmup, temperature = int(optim.warmup_steps), float(objective.teacher_temperature)
    return Schedules(
        lr=Schedule(float(optim.lr), optim.lr_end, steps, start=float(optim.lr) / (warmup + 1), warmup=warmup),
        weight_decay=Schedule(optim.weight_decay, optim.weight_decay_end, steps),
        momentum=Schedule(float(objective.momentum), float(objective.momentum_end), steps),
        temperature=Schedule(
            temperature,
            temperature,
            steps,
            start=objective.teacher_temperature_start,
            warmup=int(objective.teacher_temperature_warmup),
        ),
    )
