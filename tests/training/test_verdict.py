"""The verdict on a run, by its metrics."""

import math
import re

import pytest

from dino.config import leaves
from dino.training.verdict import healthy_ranges, judge

K, WIDTH, STEPS = 1024, 192, 1000
HEALTHY = {
    "loss/dino": 6.1,
    "health/entropy_ratio": 0.7,
    "health/kl_to_centre": 2.0,
    "health/prototypes_in_use": 0.6,
    "health/rank_me": 50.0,
    "health/feature_std": 0.8,
    "health/knn": 0.5,
}
ILL = {
    "collapsed: uniform": {"health/entropy_ratio": 0.999, "health/kl_to_centre": 0.0, "loss/dino": math.log(K)},
    "collapsed: constant": {"health/entropy_ratio": 0.0, "health/kl_to_centre": 0.0, "loss/dino": 0.0},
    "collapsed: features": {"health/feature_std": 0.01},
    "stuck": {"loss/dino": math.log(K) - 0.001},
    "few prototypes": {"health/prototypes_in_use": 0.01},
    "getting worse": {"health/knn": 0.1},
}


def line(step: int, **changes: float) -> dict:
    return {"step": step, **HEALTHY, **changes}


def verdict(*lines: dict):
    return judge(lines, STEPS, K, WIDTH)


def test_a_run_that_learns_is_healthy():
    assert verdict(line(10), line(500), line(600)) == ("healthy", "")


@pytest.mark.parametrize("state", ILL)
def test_every_illness_is_told_with_advice(state):
    found = verdict(line(10), line(500), line(600, **ILL[state]), line(610, **ILL[state]))
    assert found.state == state
    assert len(found.advice) > 40


def test_a_low_rank_is_a_collapse_of_features():
    ill = {"health/rank_me": 2.0}
    assert verdict(line(600, **ill), line(610, **ill)).state == "collapsed: features"


@pytest.mark.parametrize("state", ILL)
def test_one_measure_alone_says_nothing(state):
    assert verdict(line(10), line(500), line(600, **ILL[state])).state == "healthy"


@pytest.mark.parametrize("state", ILL)
def test_the_first_tenth_is_not_judged(state):
    found = verdict(*(line(step, **ILL[state]) for step in range(10, STEPS // 10 + 1, 10)))
    assert found == ("warming up", "")


def test_lines_without_indicators_are_passed_over():
    plain = {"step": 605, "loss/dino": 6.0}
    assert verdict(line(500), plain, line(600), plain).state == "healthy"


def test_without_labels_neighbours_are_not_missed():
    lines = [{key: value for key, value in line(step).items() if key != "health/knn"} for step in (10, 500, 600)]
    assert verdict(*lines).state == "healthy"


@pytest.mark.parametrize("state", ILL)
def test_advice_names_settings_that_exist(state):
    advice = verdict(line(10), line(500, **ILL[state]), line(600, **ILL[state])).advice
    named = re.findall(r"\b(?:objective|optim|views|model|train)\.[a-z_]+", advice)
    assert named
    assert set(named) <= {key for key, _ in leaves()}


@pytest.mark.parametrize("prototypes", [64, 1024, 65536])
@pytest.mark.parametrize("width", [32, 384, 1536])
def test_ranges_leave_room(prototypes, width):
    assert all(band.low < band.high and band.meaning for band in healthy_ranges(prototypes, width).values())
