"""One plain verdict on a run from its metrics: healthy, or what is wrong and the remedy that was published for it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

MEASURES = 2  # in a row must agree before anything is called wrong


class Range(NamedTuple):
    """Where an indicator lies in runs that learn, and what it says outside."""

    low: float
    high: float
    meaning: str


def healthy_ranges(prototypes: int, width: int) -> dict[str, Range]:
    """By metric. Wide, as runs differ: a value outside calls for a look, not for a stop.

    Args:
        prototypes: K.
        width: of the class token, D.
    """
    return {
        "health/entropy_ratio": Range(0.02, 0.98, "the teacher's entropy over ln K; 1: uniform, 0: one prototype"),
        "health/kl_to_centre": Range(
            0.02 * math.log(prototypes), math.log(prototypes), "what targets tell of their image, in nats; 0: nothing"
        ),
        "health/prototypes_in_use": Range(0.05, 1.0, "share of the prototypes that could be some view's first choice"),
        "health/rank_me": Range(min(8.0, width / 8), width, "effective rank of the class tokens"),
        "health/feature_std": Range(0.1, 1.05, "spread of the class tokens' directions; 1: even, 0: all equal"),
    }


class Verdict(NamedTuple):
    """`state` in a word or two for the progress bar; `advice` explains what is wrong, empty where nothing is."""

    state: str
    advice: str = ""


NEIGHBOURS = {
    "health/knn": "nearest neighbours name the class",
    "health/neighbour_agreement": "two views of an image have the same nearest neighbours",
}
UNIFORM = (
    "Published remedies: a lower objective.teacher_temperature (0.02), objective.centering=sinkhorn, half of optim.lr "
    "with a longer optim.warmup_steps; on small sets fewer objective.prototypes and objective.momentum=0.99"
)
PEAKED = (
    "Published remedies: objective.centering=sinkhorn, or a faster centre (objective.center_momentum=0.9), and a "
    "higher objective.teacher_temperature"
)


def judge(lines: Sequence[dict], steps: int, prototypes: int, width: int) -> Verdict:
    """The verdict on a run.

    Args:
        lines: of metrics.jsonl so far; those without indicators are passed over.
        steps: of the whole run; its first tenth is not judged.
        prototypes, width: K and D.
    """
    measured = [line for line in lines if "health/entropy_ratio" in line]
    judged = [line for line in measured if line["step"] > steps / 10]
    if len(judged) < MEASURES:
        return Verdict("warming up")
    recent = judged[-MEASURES:]
    ranges = healthy_ranges(prototypes, width)

    def all_below(name: str) -> bool:
        return all(name in line and line[name] < ranges[name].low for line in recent)

    limit = math.log(prototypes)
    if all(line["health/entropy_ratio"] > ranges["health/entropy_ratio"].high for line in recent):
        return Verdict("collapsed: uniform", f"the teacher finds all {prototypes} prototypes equally likely. {UNIFORM}")
    if all_below("health/kl_to_centre"):
        return Verdict("collapsed: constant", f"the teacher says the same of every image. {PEAKED}")
    if all_below("health/feature_std") or all_below("health/rank_me"):
        return Verdict("collapsed: features", f"the class tokens of all images are nearly alike. {UNIFORM}")
    if all(abs(line["loss/dino"] - limit) < 0.003 * limit for line in recent):
        return Verdict("stuck", f"the loss stands at ln K = {limit:.2f}: the student predicts nothing. {UNIFORM}")
    if all_below("health/prototypes_in_use"):
        return Verdict("few prototypes", f"nearly all views choose the same few prototypes. {PEAKED}")
    for name, what in NEIGHBOURS.items():
        before = next((line[name] for line in measured if name in line), None)
        # Without classes only trained weights are a measure: views of an untrained network may well agree more.
        known = name == "health/knn" or measured[0]["step"] == 0
        if known and before is not None and all(line.get(name, before) < 0.8 * before for line in recent):
            return Verdict(
                "getting worse",
                f"{what} less often ({recent[-1][name]:.0%}) than at first ({before:.0%}). "
                "Usual ways on: a lower optim.lr, a higher objective.momentum, milder views",
            )
    return Verdict("healthy")
