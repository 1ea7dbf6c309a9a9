"""Images drawn by weights: exact counts every epoch, right frequencies, views of their own, any process, any step."""

from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from dino.data import EpochStream, MicroBatches
from dino.data.sampler import REPEAT

WEIGHTS = np.array([0.0, 0.25, 1.0, 3.5, 0.7, 2.05, 1.5, 1.0])


def epoch(stream: EpochStream, number: int) -> list[tuple[int, int]]:
    assert stream.images % stream.batch_size == 0
    steps = stream.images // stream.batch_size
    return [visit for step in range(number * steps, (number + 1) * steps) for visit in stream.batch(step)]


@pytest.mark.parametrize("scale", [1, 1e-9, 1e9])
def test_every_epoch_has_each_image_as_often_as_its_weight_says(scale):
    stream = EpochStream(len(WEIGHTS), 4, seed=3, weights=WEIGHTS * scale)
    wanted = WEIGHTS * len(WEIGHTS) / WEIGHTS.sum()
    for number in range(50):
        counts = np.bincount([image for _, image in epoch(stream, number)], minlength=len(WEIGHTS))
        assert counts.sum() == len(WEIGHTS)
        assert np.all(counts >= np.floor(wanted - 1e-9))
        assert np.all(counts <= np.ceil(wanted + 1e-9))


def test_frequencies_over_many_epochs_are_the_weights():
    stream = EpochStream(len(WEIGHTS), 8, seed=0, weights=WEIGHTS)
    epochs = 4000
    counts = np.bincount([image for number in range(epochs) for _, image in epoch(stream, number)], minlength=8)
    expected = WEIGHTS * epochs * 8 / WEIGHTS.sum()
    assert counts[0] == 0
    assert chisquare(counts[1:], expected[1:]).pvalue > 0.01
    np.testing.assert_allclose(counts, expected, rtol=0.03)


def test_equal_weights_are_one_visit_each():
    stream = EpochStream(64, 16, seed=1, weights=np.full(64, 0.3))
    for number in range(5):
        visits = epoch(stream, number)
        assert sorted(image for _, image in visits) == list(range(64))
        assert {when for when, _ in visits} == {number}


def test_further_visits_in_an_epoch_have_views_of_their_own():
    stream = EpochStream(8, 4, seed=0, weights=WEIGHTS)
    for number in range(20):
        visits = epoch(stream, number)
        assert len(set(visits)) == len(visits)
        for image, count in Counter(image for _, image in visits).items():
            assert sorted(when for when, which in visits if which == image) == [
                number + n * REPEAT for n in range(count)
            ]


def test_the_order_is_another_in_each_epoch_and_mixes_repeats():
    weights = np.r_[50.0, np.ones(50)]
    stream = EpochStream(51, 51, seed=0, weights=weights)
    orders = [[image for _, image in epoch(stream, number)] for number in range(3)]
    assert orders[0] != orders[1] != orders[2]
    places = np.flatnonzero(np.array(orders[0]) == 0)
    assert 20 <= len(places) <= 30
    assert np.diff(places).max() > 1
    assert places.min() < 10 and places.max() > 40  # noqa: PT018


@pytest.mark.parametrize("visits", [5, 24, 100])
def test_an_epoch_of_fewer_or_more_visits_than_images(visits):
    stream = EpochStream(8, 5, seed=0, weights=WEIGHTS, samples_per_epoch=visits)
    drawn = [stream.batch(step) for step in range(2 * visits)]
    for number in range(10):
        own = [image for batch in drawn for when, image in batch if when % REPEAT == number]
        counts, wanted = np.bincount(own, minlength=8), WEIGHTS * visits / WEIGHTS.sum()
        assert counts.sum() == visits
        assert np.all((counts >= np.floor(wanted - 1e-9)) & (counts <= np.ceil(wanted + 1e-9)))


def test_new_weights_within_an_epoch_repeat_no_view():
    stream = EpochStream(64, 8, seed=0)
    before = [visit for step in range(4) for visit in stream.batch(step)]
    stream.reweigh(np.linspace(0.5, 2, 64), renewals=1)
    after = [visit for step in range(4, 8) for visit in stream.batch(step)]
    assert {image for _, image in before} & {image for _, image in after}
    assert not set(before) & set(after)
    assert {when % REPEAT for when, _ in after} == {0}


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (4, 2)])
def test_processes_and_micro_batches_share_the_same_batches(processes, accumulation):
    def of(step: int) -> list[tuple[int, int]]:
        parts = [
            list(
                MicroBatches(EpochStream(24, 8, 5, np.linspace(0, 2, 24)), 0, 9, rank, processes, accumulation).of_step(
                    step
                )
            )
            for rank in range(processes)
        ]
        return [visit for micro in range(accumulation) for part in parts for visit in part[micro]]

    whole = EpochStream(24, 8, 5, np.linspace(0, 2, 24))
    for step in range(9):
        assert of(step) == whole.batch(step)


def test_any_step_can_be_asked_for_first():
    first, later = (EpochStream(24, 8, 5, np.linspace(0, 2, 24)) for _ in range(2))
    batches = [first.batch(step) for step in range(12)]
    assert later.batch(10) == batches[10]
    assert later.batch(2) == batches[2]


def test_new_weights_hold_from_the_next_batch_on():
    stream = EpochStream(24, 8, 5)
    before = stream.batch(0)
    stream.reweigh(np.r_[np.zeros(12), np.ones(12)])
    assert all(image >= 12 for _, image in stream.batch(1))
    stream.reweigh(None)
    assert stream.batch(0) == before
