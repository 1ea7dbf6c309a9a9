"""What is wrong with settings that can be judged by themselves: bounds, and names that are no choice."""

import difflib
import math
import reprlib
from collections.abc import Iterator
from typing import Any

from dino.config.read import Leaf, get, leaves
from dino.config.schema import AUTO


def out_of_bounds(config: Any) -> Iterator[str]:
    """What is wrong with values that can be judged by themselves: bounds, and names that are no choice."""
    for key, leaf in leaves(config).items():
        value, choices = get(config, key), leaf.choices
        if choices and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            yield f"{key} must be one of {', '.join(choices)}, got {reprlib.repr(value)}{hint}"
        elif leaf.may_be_auto and isinstance(value, str) and value != AUTO:
            yield f"{key} must be {leaf.type_name}, got {reprlib.repr(value)}"
        elif not _within(value, **leaf.metadata["bounds"]):
            auto = f"{AUTO} or " if leaf.may_be_auto else ""
            yield f"{key} must be {auto}{bounds_text(leaf)}, got {value}"
        elif not _is_finite(value):
            yield f"{key} must be finite, got {reprlib.repr(value)}"


def _is_finite(value: Any) -> bool:
    """Whether a number, or every number of a list or mapping, is one that computers count with."""
    if isinstance(value, list | dict):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int | float) or abs(value) < (2**63 if isinstance(value, int) else math.inf)


def _within(value: Any, low: float | None, high: float | None, above: float | None, below: float | None) -> bool:
    """Whether a number, or every number of a list, lies within bounds; what is no number does."""
    if isinstance(value, list):
        return all(_within(entry, low, high, above, below) for entry in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    # Written so that NaN, for which no comparison holds, is out of any bounds.
    return (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def bounds_text(leaf: Leaf) -> str:
    """The bounds of a setting in words; empty where it has none."""
    bounds = leaf.metadata["bounds"]
    words = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
    parts = [f"{word} {bounds[name]}" for name, word in words.items() if bounds[name] is not None]
    return " and ".join("finite" if part == "below inf" else part for part in parts)
