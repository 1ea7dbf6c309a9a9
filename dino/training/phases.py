"""A run's phases: crop sizes that change on the way, as for DINOv2's high resolution (Oquab et al. 2023, §5)."""

from dataclasses import replace
from typing import NamedTuple

from dino.config.schema import Config, ViewsConfig


class Span(NamedTuple):
    """Optimizer steps `start` to `stop` − 1, and the views that they have."""

    start: int
    stop: int
    views: ViewsConfig


def spans(config: Config) -> list[Span]:
    """The whole run, divided where `train.phases` begin; schedules go on over all of it. Needs a resolved config."""
    steps = config.train.steps
    views, starts = [config.views], [0]
    for phase in config.train.phases:
        views.append(replace(config.views, global_size=phase.global_size, local_size=phase.local_size))
        starts.append(round(phase.begin * steps))
    stops = [*starts[1:], steps]
    return [Span(start, stop, of_span) for start, stop, of_span in zip(starts, stops, views, strict=True)]


def views_at(config: Config, step: int) -> ViewsConfig:
    """The views of an optimizer step, or of the end of the run."""
    for span in spans(config):
        if span.start <= step < span.stop:
            return span.views
    return spans(config)[-1].views
