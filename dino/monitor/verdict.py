"""One plain verdict on a run from its metrics: healthy, or what is wrong and the remedy that was published for it."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from dino.config.auto import RULES, PoolFacts
from dino.config.read import get
from dino.config.schema import Config
from dino.methods import METHODS
from dino.monitor.indicators import INDICATORS, Sizes

RISEN = 1.2  # times its first value, from which on rank or neighbours count as better
MEASURES = 2  # in a row must agree before anything is called wrong
DISTINCT = "health/distinct_images"  # which is there only where images are alike
# Limits of a collapse, and what they are in the first tenth of a run: of the teacher's entropy over ln K, of what
# targets tell over ln K, of rank and deviation.
UNIFORM, EARLY_UNIFORM = 0.995, 0.998
TOLD, EARLY_TOLD = 0.01, 0.002
PEAKED = 0.8
EARLY_RANK, EARLY_DEVIATION = 2.5, 0.05
NEIGHBOURS = {  # indicators that must not fall, and what a fall means
    "health/knn": "nearest neighbours name the class",
    "health/neighbour_agreement": "two views of an image have the same nearest neighbours",
}


class Verdict(NamedTuple):
    """`state` in a word or two for the progress bar; `advice` explains what is wrong, empty where nothing is."""

    state: str = ""
    advice: str = ""


def healthy_ranges(config: Config, width: int) -> dict[str, tuple[float, float]]:
    """By metric, least and greatest value in runs that learn.

    Wide, as runs differ: a value outside calls for a look, not for a stop.

    Args:
        width: of the class token, D.
    """
    sizes = Sizes(METHODS[config.objective.name].outputs(config), width)
    return {indicator.name: indicator.healthy(sizes) for indicator in INDICATORS if indicator.healthy is not None}


def measured_lines(lines: Sequence[dict]) -> list[dict]:
    """The lines of metrics.jsonl that hold indicators."""
    names = {indicator.name for indicator in INDICATORS}
    return [line for line in lines if not names.isdisjoint(line)]


def judge(lines: Sequence[dict], config: Config, width: int) -> Verdict:
    """The verdict on a run; docs/health.md shows what its limits are taken from.

    Args:
        lines: of metrics.jsonl so far; those without indicators are passed over.
        config: resolved; in the first tenth of the run only what no healthy run shows is called wrong.
        width: of the class token, D.
    """
    measured = measured_lines(lines)
    if len(measured) < MEASURES:
        return Verdict("warming up")
    later = [line for line in measured if line["step"] > config.train.steps / 10]
    is_early = len(later) < MEASURES
    recent = (measured if is_early else later)[-MEASURES:]
    if DISTINCT in recent[-1]:
        text = f"the images are alike: only {recent[-1][DISTINCT]:.0%} of those looked at differ from each other"
        return Verdict("images alike", f"{text}. Look at data.root, and at the crops in the report")
    method = METHODS[config.objective.name]
    doubts = [*method.doubts(config), *_doubts(config)]
    found = _collapse(recent, config, width, is_early) or (
        None if is_early else _failing(measured, recent, config, width)
    )
    if found is not None:
        state, text, kind = found
        return Verdict(state, _advice(text, doubts, method.remedies.get(kind, ""), config))
    if certain := [*method.doubts(config)]:
        return Verdict("doubtful settings", _advice("runs with such settings do not learn", certain, "", config))
    return Verdict("warming up") if is_early else _neighbours(measured, recent, method.remedies, config)


class Found(NamedTuple):
    """What is wrong: the state in a word, a sentence on it, and under which name methods have remedies for it."""

    state: str
    text: str
    kind: str


def _collapse(recent: list[dict], config: Config, width: int, is_early: bool) -> Found | None:
    """What has collapsed by all of these lines; early in a run only what is beyond doubt."""
    outputs, ranges = METHODS[config.objective.name].outputs(config), healthy_ranges(config, width)
    least_rank, least_deviation = ranges["health/rank_me"][0], ranges["health/feature_std"][0]
    if is_early:
        least_rank, least_deviation = min(EARLY_RANK, least_rank), EARLY_DEVIATION

    def all_within(name: str, low: float, high: float) -> bool:
        return all(low <= line.get(name, math.nan) <= high for line in recent)

    nats = math.log(outputs) if outputs else 1.0
    least = (EARLY_TOLD if is_early else TOLD) * nats
    tells_nothing = outputs == 1 or all_within("health/kl_to_center", 0, least)
    if tells_nothing and outputs != 1 and all_within("health/entropy_ratio", EARLY_UNIFORM if is_early else UNIFORM, 2):
        return Found("collapsed: uniform", f"the teacher finds all {outputs} prototypes equally likely", "uniform")
    if outputs == 1 or (
        all_within("health/kl_to_center", 0, TOLD * nats) and all_within("health/entropy_ratio", 0, PEAKED)
    ):
        return Found("collapsed: constant", "the teacher says the same of every image", "peaked")
    if all_within("health/feature_std", 0, least_deviation) or all_within("health/rank_me", 0, least_rank):
        return Found("collapsed: features", "the class tokens of all images are nearly alike", "uniform")
    return None


def _failing(measured: list[dict], recent: list[dict], config: Config, width: int) -> Found | None:
    """What else is wrong by all of these lines, once the run should be learning."""
    method, ranges = METHODS[config.objective.name], healthy_ranges(config, width)
    outputs = method.outputs(config)

    def all_above(name: str) -> bool:
        return all(name in line and line[name] > ranges[name][1] for line in recent)

    if all_above("health/negative_similarity"):
        return Found("collapsed: embeddings", "the embeddings of all images are nearly alike", "uniform")
    for name, curve in method.watched(config).items():
        blank = curve.blank
        if (
            blank is not None
            and not _has_risen(measured, recent)
            and all(abs(line.get(name, 2 * blank) - blank) < 0.003 * blank for line in recent)
        ):
            known = "ln K = " * (outputs is not None)
            return Found("stuck", f"the loss stands at {known}{blank:.2f}: the student predicts nothing", "uniform")
    in_use, told = "health/prototypes_in_use", "health/kl_to_center"
    few = all(in_use in line and line[in_use] < ranges[in_use][0] for line in recent)
    # With a moving center, runs that learn use few prototypes at a time; then these differ between images.
    tell_little = outputs is not None and all(line.get(told, 0) < TOLD * math.log(outputs) for line in recent)
    if few and tell_little and not _has_risen(measured, recent):
        return Found("few prototypes", "nearly all views choose the same few prototypes", "peaked")
    if all_above("health/queue_age"):
        return Found("stale queue", "the queue's keys are older than the steps that the teacher averages over", "stale")
    return None


def _has_risen(measured: list[dict], recent: list[dict]) -> bool:
    """Whether rank or neighbours say that something is learned, though the loss may stand where it did."""
    for name in ("health/rank_me", *NEIGHBOURS):
        first = next((line[name] for line in measured if name in line), math.inf)
        if all(line.get(name, 0) > RISEN * first for line in recent):
            return True
    return False


def _doubts(config: Config) -> Iterator[str]:
    """What may well be the cause of something wrong, but is no fault by itself."""
    advised, _ = RULES["optim.lr"](config, PoolFacts(1, 1, ""))
    if isinstance(advised, float) and config.optim.lr > 10 * advised:
        yield (
            f"optim.lr={config.optim.lr:g} is {config.optim.lr / advised:.0f} times what is advised for batches of "
            f"{config.train.batch_size} ({advised:g})"
        )


def _neighbours(measured: list[dict], recent: list[dict], remedies: Mapping[str, str], config: Config) -> Verdict:
    """Whether neighbours have become worse than they were at first."""
    for name, what in NEIGHBOURS.items():
        first = next((line[name] for line in measured if name in line), None)
        # Without classes only trained weights are a measure: views of an untrained network may well agree more.
        is_measure = name == "health/knn" or measured[0]["step"] == 0
        if is_measure and first is not None and all(line.get(name, first) < 0.8 * first for line in recent):
            text = f"{what} less often ({recent[-1][name]:.0%}) than at first ({first:.0%})"
            return Verdict("getting worse", _advice(text, [], remedies.get("worse", ""), config, "Usual ways on"))
    return Verdict("healthy")


def _advice(text: str, doubts: Sequence[str], remedies: str, config: Config, title: str = "Published remedies") -> str:
    parts = [f"{text}."]
    if doubts:
        parts.append(f"The likely cause: {'; '.join(doubts)}.")
    if applicable := ", ".join(item for item in remedies.split(", ") if not _is_so_already(item, config)):
        parts.append(f"{title}: {applicable}")
    return " ".join(parts)


def _is_so_already(remedy: str, config: Config) -> bool:
    """Whether what a remedy names, `key=value` or `a lower key (value)`, is what the config has."""
    for key, value in re.findall(r"([a-z]+\.[a-z_]+)=([\w.]+)", remedy):
        if str(get(config, key)).lower() == value:
            return True
    for word, key, value in re.findall(r"(\w+) ([a-z]+\.[a-z_]+) \(([\d.]+)\)", remedy):
        current = get(config, key)
        if current <= float(value) if word in ("lower", "fewer", "shorter") else current >= float(value):
            return True
    return False
