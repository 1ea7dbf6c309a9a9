"""Indicators of a run's health. A new one is a file beside these and its entry in INDICATORS."""

from dino.monitor.indicators.features import FEATURES
from dino.monitor.indicators.indicator import Indicator, Observed, Sizes
from dino.monitor.indicators.neighbours import NEIGHBOURS
from dino.monitor.indicators.pairs import PAIRS
from dino.monitor.indicators.targets import TARGETS

INDICATORS: list[Indicator] = [
    *TARGETS,
    *FEATURES,
    *PAIRS,
    *NEIGHBOURS,
]

__all__ = ["INDICATORS", "Indicator", "Observed", "Sizes"]
