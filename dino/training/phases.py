"""A run's phases: crop sizes that change on the way, as for DINOv2's high resolution (Oquab et al. 2023, §5)."""

from dataclasses import replace
from typing import NamedTuple

from dino.config.schema import Config, ViewsConfig


class Stretch(NamedTuple):
    """Optimizer steps `start` to `stop` − 1, and the views that they have."""

    start: int
    stop: int
    views: ViewsConfig


def stretches(config: Config) -> list[Stretch]:
    """The whole run, cut where `train.phases` begin; schedules go on over all of it. Needs resolved steps."""
    steps = int(config.train.steps)
    starts = [0, *(round(phase.begin * steps) for phase in config.train.phases), steps]
    views = [config.views]
    for phase in config.train.phases:
        views.append(replace(config.views, global_size=phase.global_size, local_size=phase.local_size))
    return [Stretch(*three) for three in zip(starts, starts[1:], views, strict=False)]


def views_at(config: Config, step: int) -> ViewsConfig:
    """The views of an optimizer step, or of the end of the run."""
    return next(
        (found.views for found in stretches(config) if found.start <= step < found.stop), stretches(config)[-1].views
    )
