"""The order of images: as often an epoch as their weights say, the same however many processes share it, resumable."""

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare, entropy

from dino.data import EpochStream, MicroBatches
from dino.data.sampler import REPEAT, effective_number

WEIGHTS = np.array([0.0, 0.25, 1.0, 3.5, 0.7, 2.05, 1.5, 1.0])


def samples(stream: EpochStream, steps: range) -> list[tuple[int, int]]:
    return [sample for step in steps for sample in stream.batch(step)]


def epoch(stream: EpochStream, number: int) -> list[tuple[int, int]]:
    steps = stream.samples_per_epoch // stream.batch_size
    return samples(stream, range(number * steps, (number + 1) * steps))


class TestOrder:
    @pytest.mark.parametrize(("images", "batch"), [(12, 4), (10, 3), (7, 7), (13, 1), (5, 4)])
    def test_every_image_exactly_once_an_epoch_in_full_batches(self, images, batch):
        stream = EpochStream(images, batch, seed=0)
        batches = [stream.batch(step) for step in range(3 * images)]  # which end with an epoch
        assert {len(one) for one in batches} == {batch}
        everything = list(itertools.chain(*batches))
        assert [number for number, _ in everything] == sorted(number for number, _ in everything)
        for number in range(3 * batch):
            assert sorted(image for at, image in everything if at == number) == list(range(images))

    def test_differs_by_epoch_and_by_seed(self):
        orders = {tuple(range(60))}
        for seed, number in itertools.product(range(3), range(4)):
            orders.add(tuple(image for _, image in epoch(EpochStream(60, 60, seed), number)))
        assert len(orders) == 13

    @pytest.mark.parametrize("weights", [None, np.linspace(0, 2, 10)])
    def test_steps_may_be_asked_for_in_any_order(self, weights):
        stream, steps = EpochStream(10, 4, 0, weights), [5, 0, 9, 2, 5, 30, 1]
        assert [stream.batch(step) for step in steps] == [EpochStream(10, 4, 0, weights).batch(step) for step in steps]


class TestProcesses:
    @pytest.mark.parametrize("processes", [1, 2, 3, 4])
    @pytest.mark.parametrize("accumulation", [1, 2, 3])
    @pytest.mark.parametrize("weights", [None, np.linspace(0, 2, 100)])
    def test_share_the_batch_of_one(self, processes, accumulation, weights):
        """One after the other, the processes' micro-batches are the global batch."""
        batch, steps = 72, 5
        whole = EpochStream(100, batch, 1, weights)
        parts = [list(MicroBatches(whole, 0, steps, rank, processes, accumulation)) for rank in range(processes)]
        assert {len(micro) for part in parts for micro in part} == {batch // (processes * accumulation)}
        for step in range(steps):
            micros = [part[step * accumulation + micro] for micro in range(accumulation) for part in parts]
            assert list(itertools.chain(*micros)) == whole.batch(step)

    @pytest.mark.parametrize("start", range(12))
    def test_resumed_at_any_step_they_go_on_as_if_never_stopped(self, start):
        through = list(MicroBatches(EpochStream(10, 6, seed=3), 0, 12, 1, 2, 3))
        resumed = MicroBatches(EpochStream(10, 6, seed=3), start, 12, 1, 2, 3)
        assert list(resumed) == through[3 * start :]
        assert len(resumed) == 3 * (12 - start)


class TestWeights:
    @pytest.mark.parametrize("scale", [1, 1e-9, 1e9])
    @pytest.mark.parametrize("count", [8, 24, 100])
    def test_every_epoch_has_each_image_as_often_as_its_weight_says(self, scale, count):
        stream = EpochStream(8, 4, 3, WEIGHTS * scale, count)
        expected = WEIGHTS * count / WEIGHTS.sum()
        for number in range(20):
            counts = np.bincount([image for _, image in epoch(stream, number)], minlength=8)
            assert counts.sum() == count
            assert np.all((counts >= np.floor(expected - 1e-9)) & (counts <= np.ceil(expected + 1e-9)))

    def test_batches_go_on_over_an_epochs_end(self):
        everything = samples(EpochStream(8, 5, 0, WEIGHTS, 24), range(24))
        assert [sum(at % REPEAT == number for at, _ in everything) for number in range(5)] == [24] * 5

    def test_frequencies_over_many_epochs_are_the_weights(self):
        stream, epochs = EpochStream(8, 8, 0, WEIGHTS), 1000
        counts = np.bincount([image for number in range(epochs) for _, image in epoch(stream, number)], minlength=8)
        expected = WEIGHTS * epochs * 8 / WEIGHTS.sum()
        assert counts[0] == 0
        assert chisquare(counts[1:], expected[1:]).pvalue > 0.01

    def test_further_samples_in_an_epoch_have_views_of_their_own(self):
        stream = EpochStream(8, 4, 0, WEIGHTS)
        for number in range(20):
            own = epoch(stream, number)
            for image, count in Counter(image for _, image in own).items():
                expected = [number + repeat * REPEAT for repeat in range(count)]
                assert sorted(at for at, which in own if which == image) == expected

    def test_repeats_are_spread_over_the_epoch(self):
        stream = EpochStream(51, 51, 0, np.r_[50.0, np.ones(50)])
        orders = [[image for _, image in epoch(stream, number)] for number in range(3)]
        assert orders[0] != orders[1] != orders[2]
        positions = np.flatnonzero(np.array(orders[0]) == 0)
        assert 20 <= len(positions) <= 30
        assert positions.min() < 10 < 40 < positions.max()

    def test_new_weights_hold_from_the_next_batch_on_and_repeat_no_view(self):
        stream = EpochStream(64, 8, seed=0)
        before = samples(stream, range(4))
        stream.reweigh(np.r_[np.zeros(20), np.linspace(0.5, 2, 44)], renewals=1)
        after = samples(stream, range(4, 8))
        assert min(image for _, image in after) >= 20
        assert {image for _, image in before} & {image for _, image in after}
        assert not set(before) & set(after)
        assert {at % REPEAT for at, _ in after} == {0}
        stream.reweigh(None)
        assert samples(stream, range(4)) == before


def test_effective_number():
    """exp of the entropy of the shares, as SciPy has it; k for k equal ones."""
    sizes = np.random.default_rng(0).random(20) * (np.arange(20) % 3 > 0)
    assert effective_number(sizes) == pytest.approx(np.exp(entropy(sizes)))
    assert effective_number(np.full(7, 0.3)) == pytest.approx(7)
