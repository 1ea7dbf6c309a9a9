"""The verdict on a run, by its metrics."""

import math
import re

import pytest

from dino.config.auto import PoolFacts, resolve
from dino.config.read import leaves
from dino.config.schema import Config
from dino.monitor.verdict import healthy_ranges, judge
from dino.run import RunDirectory
from dino.training.settings import load

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
    "few prototypes": {
        "health/prototypes_in_use": 0.01,
        "health/kl_to_center": 0.005 * math.log(K),
        "health/entropy_ratio": 0.9,
    },
    "getting worse": {"health/knn": 0.1},
}
illnesses = pytest.mark.parametrize("state", ILL)


def config_of(prototypes: int = K, *settings: str) -> Config:
    fixed = [f"objective.prototypes={prototypes}", f"train.steps={STEPS}", "train.batch_size=8"]
    config = load(None, [*fixed, *settings])
    return resolve(config, PoolFacts(images=64, channels=3, kind="folder"))[0]


CONFIG = config_of()


def line(step: int, without: str = "no such name", **changes: float) -> dict:
    return {"step": step, **{name: value for name, value in (HEALTHY | changes).items() if without not in name}}


def verdict(*lines: dict):
    return judge(lines, CONFIG, WIDTH)


@illnesses
def test_every_illness_is_told_with_advice_that_names_settings_that_exist(state):
    """What stands there as `key=value` can be given as it is."""
    ill = ILL[state]
    judged = verdict(line(10), line(500), line(600, **ill), line(610, **ill))
    assert judged.state == state
    assert len(judged.advice) > 40
    keys = leaves(CONFIG).keys()
    groups = "|".join({key.split(".")[0] for key in keys})
    named = set(re.findall(rf"\b(?:{groups})\.[a-z_]+", judged.advice))
    assert named
    assert named <= keys
    load(None, re.findall(r"\b[a-z]+\.[a-z_]+=[\w.]*\w", judged.advice))


def test_a_low_rank_is_a_collapse_of_features():
    ill = {"health/rank_me": 2.0}
    assert verdict(line(600, **ill), line(610, **ill)).state == "collapsed: features"


@illnesses
def test_two_measures_in_a_row_are_needed_and_a_run_that_recovers_is_healthy_again(state):
    ill = ILL[state]
    assert verdict(line(10), line(500), line(600, **ill)).state == "healthy"
    assert verdict(line(10), line(500, **ill), line(510), line(520, **ill)).state == "healthy"
    assert verdict(line(10), line(500, **ill), {"step": 515, "loss/dino": 6.0}, line(520, **ill)).state == state
    assert verdict(line(10), line(500, **ill), line(510, **ill), line(520), line(530)) == ("healthy", "")


BEYOND_DOUBT = {"collapsed: uniform", "collapsed: constant", "collapsed: features"}


@pytest.mark.parametrize("state", sorted(ILL.keys() - BEYOND_DOUBT))
def test_the_first_tenth_is_not_judged_by_itself_nor_with_what_comes_after(state):
    """Two measures after it are needed, though many before it were as bad."""
    ill = ILL[state]
    start = [line(10), *(line(step, **ill) for step in range(20, STEPS // 10 + 1, 10))]
    assert verdict(*start) == ("warming up", "")
    assert verdict(*start, line(110, **ill)).state == "warming up"
    assert verdict(*start, line(110, **ill), line(120, **ill)).state == state


@pytest.mark.parametrize("state", sorted(BEYOND_DOUBT))
def test_what_no_healthy_run_shows_is_told_in_the_first_tenth(state):
    assert verdict(line(10), line(20, **ILL[state])).state == "warming up"
    assert verdict(line(10), line(20, **ILL[state]), line(30, **ILL[state])).state == state


EARLY = {  # what healthy runs showed in their first tenth (benchmarks/verdicts.py), though a run must not end so
    "nearly uniform": {"health/entropy_ratio": 0.992, "health/kl_to_center": 0.008 * math.log(K)},
    "few dimensions": {"health/rank_me": 3.0, "health/feature_std": 0.08},
    "loss at ln K": {"loss/dino": math.log(K)},
}


@pytest.mark.parametrize("kind", EARLY)
def test_a_run_may_begin_as_it_must_not_end(kind):
    assert verdict(*(line(step, **EARLY[kind]) for step in (10, 20, 30, 100))) == ("warming up", "")


DOUBTFUL = {
    "objective.teacher_temperature=0.5": "objective.teacher_temperature=0.5 is not below",
    "objective.center_momentum=1.0": "the center never moves",
    "objective.teacher_momentum=0.0": "averages over no steps",
    "objective.prototypes=2": "objective.prototypes=2 tell no more",
}


@pytest.mark.parametrize("setting", DOUBTFUL)
def test_settings_with_which_nothing_is_learned_are_named_at_once_and_as_the_cause(setting):
    config = config_of(K, setting, "objective.centering=center")
    named = judge([line(10), line(20)], config, WIDTH)
    assert named.state == "doubtful settings"
    assert DOUBTFUL[setting] in named.advice
    ill = ILL["collapsed: features"]
    collapsed = judge([line(10), line(500, **ill), line(510, **ill)], config, WIDTH)
    assert collapsed.state == "collapsed: features"
    assert "The likely cause: " in collapsed.advice
    assert DOUBTFUL[setting] in collapsed.advice


def test_a_rate_far_above_what_is_advised_is_a_cause_but_no_fault_by_itself():
    config = config_of(K, "optim.lr=0.03")
    assert judge([line(10), line(500), line(600)], config, WIDTH).state == "healthy"
    ill = ILL["collapsed: uniform"]
    advice = judge([line(10), line(500, **ill), line(600, **ill)], config, WIDTH).advice
    assert "optim.lr=0.03 is 240 times what is advised for batches of 8" in advice


@pytest.mark.parametrize(
    ("settings", "left_out", "still_there"),
    [
        (["objective.centering=sinkhorn"], "objective.centering=sinkhorn", "objective.teacher_temperature (0.02)"),
        (["objective.teacher_temperature=0.02"], "a lower objective.teacher_temperature", "half of optim.lr"),
        (["objective.teacher_momentum=0.99"], "objective.teacher_momentum=0.99", "fewer objective.prototypes"),
        (["objective.centering=center"], "no such remedy", "objective.centering=sinkhorn"),
    ],
)
def test_remedies_name_only_what_differs(settings, left_out, still_there):
    ill = ILL["collapsed: uniform"]
    advice = judge([line(10), line(500, **ill), line(600, **ill)], config_of(K, *settings), WIDTH).advice
    assert left_out not in advice
    assert still_there in advice


def test_a_loss_that_stands_while_features_get_better_is_not_stuck():
    """As DINOv2's of its class tokens does at first: its targets become as much harder."""
    loss = ILL["stuck"]
    better = {"health/rank_me": 1.5 * HEALTHY["health/rank_me"]}
    assert verdict(line(10), line(500, **loss), line(600, **loss)).state == "stuck"
    assert verdict(line(10), line(500, **loss, **better), line(600, **loss, **better)).state == "healthy"


def test_images_that_are_all_alike_are_named():
    alike = {"health/distinct_images": 1 / 16}
    judged = verdict(line(10, **alike), line(20, **alike))
    assert judged.state == "images alike"
    assert "only 6% of those looked at differ" in judged.advice


VARIETY = {  # runs of different kinds that learn: nothing of it is an illness
    "as usual": {},
    "certain teacher": {"health/entropy_ratio": 0.03, "health/kl_to_center": 6.2},
    "cautious teacher": {"health/entropy_ratio": 0.95, "health/kl_to_center": 0.3},
    "one image in each batch for a prototype": {"health/prototypes_in_use": 1.0, "health/kl_to_center": 6.9},
    "a twentieth of the prototypes": {"health/prototypes_in_use": 0.06},
    "few dimensions": {"health/rank_me": 9.0, "health/feature_std": 0.25},
    "a narrow network on few images": {"health/rank_me": 7.5, "health/feature_std": 0.64},
    "all dimensions": {"health/rank_me": 191.0, "health/feature_std": 1.01},
    "loss near zero": {"loss/dino": 0.2},
    "loss above ln K": {"loss/dino": 1.05 * math.log(K)},
    "loss a little below ln K": {"loss/dino": 0.99 * math.log(K)},
    "neighbours a little worse": {"health/knn": 0.85 * HEALTHY["health/knn"]},
    "neighbours much better": {"health/knn": 0.99},
}


@pytest.mark.parametrize("kind", VARIETY)
def test_runs_that_learn_in_their_own_way_are_healthy(kind):
    plain = {"step": 505, "loss/dino": 6.0}  # without indicators: passed over
    early, late = [line(step, **VARIETY[kind]) for step in (200, 500)], line(900, **VARIETY[kind])
    assert verdict(line(10), *early, plain, late) == ("healthy", "")
    unlabelled = [line(step, without="knn", **VARIETY[kind]) for step in (10, 200, 500, 900)]
    assert verdict(*unlabelled) == ("healthy", "")


@pytest.mark.parametrize(("prototypes", "width"), [(64, 32), (1024, 96), (65536, 384)])
def test_limits_follow_the_size_of_the_network(prototypes, width):
    """The same state of a small and of a large network, whatever its figures in nats and dimensions."""
    nats = math.log(prototypes)
    good = {"loss/dino": 0.8 * nats, "health/kl_to_center": 0.2 * nats, "health/rank_me": width / 4}
    for state, changes in (
        ("healthy", {}),
        ("stuck", {"loss/dino": nats}),
        ("collapsed: constant", {"health/kl_to_center": 0.005 * nats}),
        ("collapsed: features", {"health/rank_me": 1.1}),
    ):
        lines = [line(step, **(good | changes)) for step in (10, 500, 600)]
        assert judge(lines, config_of(prototypes), width).state == state
    assert all(low < high for low, high in healthy_ranges(config_of(prototypes), width).values())


def test_neighbours_are_compared_with_the_first_measure_that_has_them():
    """The first look may come before there are enough tokens."""
    start = [line(10, without="knn"), line(20, **{"health/knn": 0.9})]
    judged = verdict(*start, line(500, **{"health/knn": 0.5}), line(510, **{"health/knn": 0.5}))
    assert judged.state == "getting worse"
    assert "(50%)" in judged.advice
    assert "(90%)" in judged.advice


@pytest.mark.parametrize(("first", "state"), [(0, "getting worse"), (10, "healthy")])
def test_without_labels_trained_weights_are_what_views_are_compared_with(first, state):
    """Views of a network that begins untrained may agree less later on, and it learns all the same."""
    agreement = ((first, 0.6), (500, 0.3), (600, 0.2))
    lines = [line(step, without="knn", **{"health/neighbour_agreement": value}) for step, value in agreement]
    assert verdict(*lines).state == state


def test_a_number_of_an_earlier_version_has_its_new_name(tmp_path):
    """Runs of before are judged and shown as those of today."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "health/kl_to_centre": 0.5, "health/centre_norm": 2.0}\n')
    assert RunDirectory(tmp_path).read_metrics() == [{"step": 1, "health/kl_to_center": 0.5, "health/center_norm": 2.0}]


def test_few_prototypes_that_tell_images_apart_are_no_illness():
    """As with a moving center (benchmarks/verdicts.py): 3 to 25 of 512 in use, and neighbours become better."""
    few = {"health/prototypes_in_use": 0.006, "health/kl_to_center": 0.17}
    assert verdict(line(10), line(600, **few), line(610, **few)).state == "healthy"
