"""One plain verdict on a run from its metrics: healthy, or what is wrong and the remedy that was published for it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dino.config.schema import Config
from dino.methods import METHODS
from dino.monitor.indicators import INDICATORS, Sizes

MEASURES = 2  # in a row must agree before anything is called wrong
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
    """The verdict on a run.

    Args:
        lines: of metrics.jsonl so far; those without indicators are passed over.
        config: resolved; the first tenth of the run is not judged.
        width: of the class token, D.
    """
    method = METHODS[config.objective.name]
    measured = measured_lines(lines)
    judged = [line for line in measured if line["step"] > config.train.steps / 10]
    if len(judged) < MEASURES:
        return Verdict("warming up")
    recent, ranges = judged[-MEASURES:], healthy_ranges(config, width)

    def all_below(name: str) -> bool:
        return all(name in line and line[name] < ranges[name][0] for line in recent)

    def all_above(name: str) -> bool:
        return all(name in line and line[name] > ranges[name][1] for line in recent)

    outputs, remedies = method.outputs(config), method.remedies
    if all_above("health/entropy_ratio"):
        text = f"the teacher finds all {outputs} prototypes equally likely"
        return _wrong("collapsed: uniform", text, remedies, "uniform")
    if all_below("health/kl_to_center") or outputs == 1:
        return _wrong("collapsed: constant", "the teacher says the same of every image", remedies, "peaked")
    if all_below("health/feature_std") or all_below("health/rank_me"):
        return _wrong("collapsed: features", "the class tokens of all images are nearly alike", remedies, "uniform")
    if all_above("health/negative_similarity"):
        text = "the embeddings of all images are nearly alike"
        return _wrong("collapsed: embeddings", text, remedies, "uniform")
    for name, curve in method.watched(config).items():
        blank = curve.blank
        if blank is not None and all(abs(line.get(name, 2 * blank) - blank) < 0.003 * blank for line in recent):
            known = "ln K = " * (outputs is not None)
            text = f"the loss stands at {known}{blank:.2f}: the student predicts nothing"
            return _wrong("stuck", text, remedies, "uniform")
    if all_below("health/prototypes_in_use"):
        return _wrong("few prototypes", "nearly all views choose the same few prototypes", remedies, "peaked")
    if all_above("health/queue_age"):
        text = "the queue's keys are older than the steps that the teacher averages over"
        return _wrong("stale queue", text, remedies, "stale")
    return _neighbours(measured, recent, remedies)


def _neighbours(measured: list[dict], recent: list[dict], remedies: Mapping[str, str]) -> Verdict:
    """Whether neighbours have become worse than they were at first."""
    for name, what in NEIGHBOURS.items():
        first = next((line[name] for line in measured if name in line), None)
        # Without classes only trained weights are a measure: views of an untrained network may well agree more.
        is_measure = name == "health/knn" or measured[0]["step"] == 0
        if is_measure and first is not None and all(line.get(name, first) < 0.8 * first for line in recent):
            text = f"{what} less often ({recent[-1][name]:.0%}) than at first ({first:.0%})"
            return _wrong("getting worse", text, remedies, "worse", "Usual ways on")
    return Verdict("healthy")


def _wrong(state: str, text: str, remedies: Mapping[str, str], kind: str, title: str = "Published remedies") -> Verdict:
    return Verdict(state, f"{text}. {title}: {remedies[kind]}" if kind in remedies else f"{text}.")
