"""What an indicator of a run's health is, and what it may look at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dino.methods.method import Seen


@dataclass
class Observed:
    """What a process has seen of its run.

    Attributes:
        seen: of the newest step.
        tokens: (Q, D) class tokens of the newest images, one view each, the newest last.
        indices: (Q,) of these images in the pool.
        used: (K,) bool, which prototypes were the first choice of some view since the last measurement.
        views: of all processes since the last measurement.
        labels: (N,) class numbers of the pool's images; None where it has no classes.
        classes: their number.
    """

    seen: Seen
    tokens: Tensor
    indices: Tensor
    used: Tensor
    views: int
    labels: Tensor | None
    classes: int


class Sizes(NamedTuple):
    """What a healthy range depends on.

    Attributes:
        outputs: K; None for a method without.
        width: D of the class tokens.
    """

    outputs: int | None
    width: int


@dataclass(frozen=True)
class Indicator:
    """One number that says something of a run's health.

    Attributes:
        name: of the metric.
        title: of its panel in the report.
        meaning: what it says.
        needs: "targets" (with logits), "tokens" (enough of them), "labels" or "no labels", "pairs" of embeddings,
            a "predictor", a "queue"; all of them.
        measure: the value on this process; the mean over processes is taken afterwards.
        healthy: least and greatest value in runs that learn; None: it has no such range.
    """

    name: str
    title: str
    meaning: str
    needs: tuple[str, ...]
    measure: Callable[[Observed], Tensor]
    healthy: Callable[[Sizes], tuple[float, float]] | None = None
