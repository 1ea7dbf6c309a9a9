"""The verdict on a run, by its metrics."""

import math
import re

import pytest

from dino.config.read import leaves, load
from dino.monitor.verdict import healthy_ranges, judge

K, WIDTH, STEPS = 1024, 192, 1000
HEALTHY = {
    "loss/dino": 6.1,
    "health/entropy_ratio": 0.7,
    "health/kl_to_center": 2.0,
    "health/prototypes_in_use": 0.6,
    "health/rank_me": 50.0,
    "health/feature_std": 0.8,
    "health/knn": 0.5,
}
ILL = {
    "collapsed: uniform": {"health/entropy_ratio": 0.999, "health/kl_to_center": 0.0, "loss/dino": math.log(K)},
    "collapsed: constant": {"health/entropy_ratio": 0.0, "health/kl_to_center": 0.0, "loss/dino": 0.0},
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


def test_the_first_tenth_is_not_judged_with_what_comes_after():
    """Two measures after it are needed, though many before it were as bad."""
    ill = ILL["collapsed: constant"]
    start = [line(step, **ill) for step in range(10, STEPS // 10 + 1, 10)]
    assert verdict(*start, line(110, **ill)).state == "warming up"
    assert verdict(*start, line(110, **ill), line(120, **ill)).state == "collapsed: constant"


@pytest.mark.parametrize("state", ILL)
def test_measures_that_are_not_in_a_row_say_nothing(state):
    ill = ILL[state]
    assert verdict(line(10), line(500, **ill), line(510), line(520, **ill)).state == "healthy"
    assert verdict(line(10), line(500, **ill), {"step": 515, "loss/dino": 6.0}, line(520, **ill)).state == state


@pytest.mark.parametrize("state", ILL)
def test_a_run_that_recovers_is_healthy_again(state):
    ill = ILL[state]
    assert verdict(line(10), line(500, **ill), line(510, **ill), line(520), line(530)) == ("healthy", "")


VARIETY = {  # runs of different kinds that learn: nothing of it is an illness
    "certain teacher": {"health/entropy_ratio": 0.03, "health/kl_to_center": 6.2},
    "cautious teacher": {"health/entropy_ratio": 0.95, "health/kl_to_center": 0.3},
    "one image in each batch for a prototype": {"health/prototypes_in_use": 1.0, "health/kl_to_center": 6.9},
    "a twentieth of the prototypes": {"health/prototypes_in_use": 0.06},
    "few dimensions": {"health/rank_me": 9.0, "health/feature_std": 0.25},
    "all dimensions": {"health/rank_me": 191.0, "health/feature_std": 1.01},
    "loss near zero": {"loss/dino": 0.2},
    "loss above ln K": {"loss/dino": 1.05 * math.log(K)},
    "loss a little below ln K": {"loss/dino": 0.99 * math.log(K)},
    "neighbours a little worse": {"health/knn": 0.85 * HEALTHY["health/knn"]},
    "neighbours much better": {"health/knn": 0.99},
}


@pytest.mark.parametrize("kind", VARIETY)
def test_runs_that_learn_in_their_own_way_are_healthy(kind):
    assert verdict(line(10), *(line(step, **VARIETY[kind]) for step in (200, 500, 900))) == ("healthy", "")


@pytest.mark.parametrize(("prototypes", "width"), [(64, 32), (1024, 96), (65536, 384)])
def test_limits_follow_the_size_of_the_network(prototypes, width):
    """The same state of a small and of a large network, whatever its figures in nats and dimensions."""
    nats = math.log(prototypes)
    good = {"loss/dino": 0.8 * nats, "health/kl_to_center": 0.2 * nats, "health/rank_me": width / 4}

    def state(**changes: float) -> str:
        lines = [{**HEALTHY, **good, **changes, "step": step} for step in (10, 500, 600)]
        return judge(lines, STEPS, prototypes, width).state

    assert state() == "healthy"
    assert state(**{"loss/dino": nats}) == "stuck"
    assert state(**{"health/kl_to_center": 0.005 * nats}) == "collapsed: constant"
    assert state(**{"health/rank_me": 1.1}) == "collapsed: features"


def test_neighbours_are_compared_with_the_first_measure_that_has_them():
    """The first look may come before the queue is filled."""
    first = {key: value for key, value in line(10).items() if key != "health/knn"}
    lines = [first, line(20, **{"health/knn": 0.9}), line(500, **{"health/knn": 0.5}), line(510, **{"health/knn": 0.5})]
    found = verdict(*lines)
    assert found.state == "getting worse"
    assert "50%" in found.advice
    assert "90%" in found.advice


@pytest.mark.parametrize(("first", "state"), [(0, "getting worse"), (10, "healthy")])
def test_without_labels_trained_weights_are_what_views_are_compared_with(first, state):
    """Views of a network that begins untrained may agree less later on, and it learns all the same."""
    lines = [
        {key: value for key, value in line(step, **{"health/neighbour_agreement": share}).items() if "knn" not in key}
        for step, share in ((first, 0.6), (500, 0.3), (600, 0.2))
    ]
    assert verdict(*lines).state == state


def test_lines_without_indicators_are_passed_over():
    plain = {"step": 605, "loss/dino": 6.0}
    assert verdict(line(500), plain, line(600), plain).state == "healthy"


def test_without_labels_neighbours_are_not_missed():
    lines = [{key: value for key, value in line(step).items() if key != "health/knn"} for step in (10, 500, 600)]
    assert verdict(*lines).state == "healthy"


@pytest.mark.parametrize("state", ILL)
def test_advice_names_settings_that_exist(state):
    """What stands there as `key=value` can be given as it is."""
    advice = verdict(line(10), line(500, **ILL[state]), line(600, **ILL[state])).advice
    groups = {key.split(".")[0] for key, _ in leaves()}
    named = re.findall(rf"\b(?:{'|'.join(groups)})\.[a-z_]+", advice)
    assert named
    assert set(named) <= {key for key, _ in leaves()}
    for setting in re.findall(r"\b[a-z]+\.[a-z_]+=[\w.]*\w", advice):
        load(None, [setting])


@pytest.mark.parametrize("prototypes", [64, 1024, 65536])
@pytest.mark.parametrize("width", [32, 384, 1536])
def test_ranges_leave_room(prototypes, width):
    assert all(band.low < band.high and band.meaning for band in healthy_ranges(prototypes, width).values())
