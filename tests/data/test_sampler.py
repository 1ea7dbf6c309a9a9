"""The order of images: every one once an epoch, the same batches however many processes share them, resumable."""

import itertools

import pytest

from dino.data import EpochStream, MicroBatches

SIZES = [(12, 4), (10, 3), (7, 7), (100, 32), (13, 1), (5, 4)]  # images, batch


def positions(stream: EpochStream, steps: range) -> list[tuple[int, int]]:
    return [position for step in steps for position in stream.batch(step)]


@pytest.mark.parametrize(("images", "batch"), SIZES)
def test_every_image_exactly_once_an_epoch(images, batch):
    epochs = 3 * batch  # that many end on a step
    visited = positions(EpochStream(images, batch, seed=0), range(3 * images))
    assert [epoch for epoch, _ in visited] == sorted(epoch for epoch, _ in visited)
    for epoch in range(epochs):
        assert sorted(index for at, index in visited if at == epoch) == list(range(images))


@pytest.mark.parametrize(("images", "batch"), SIZES)
def test_every_batch_is_full(images, batch):
    stream = EpochStream(images, batch, seed=0)
    assert all(len(stream.batch(step)) == batch for step in range(2 * images))


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_processes_share_the_batch_of_one(processes, accumulation):
    """The union over processes and micro-batches is the global batch, and no two of them have an image in common."""
    images, batch, steps = 100, 72, 5
    shares = [
        list(MicroBatches(EpochStream(images, batch, seed=1), 0, steps, rank, processes, accumulation))
        for rank in range(processes)
    ]
    assert all(len(share) == steps * accumulation for share in shares)
    assert {len(micro) for share in shares for micro in share} == {batch // (processes * accumulation)}
    whole = EpochStream(images, batch, seed=1)
    for step in range(steps):
        micros = [share[step * accumulation + micro] for micro in range(accumulation) for share in shares]
        assert sorted(itertools.chain(*micros)) == sorted(whole.batch(step))


def test_length_is_what_iteration_gives():
    sampler = MicroBatches(EpochStream(50, 12, seed=0), 3, 8, process=1, processes=2, accumulation=3)
    assert len(sampler) == len(list(sampler)) == 5 * 3


@pytest.mark.parametrize("start", range(12))
def test_resumed_at_any_step_it_goes_on_as_if_never_stopped(start):
    through = list(MicroBatches(EpochStream(10, 6, seed=3), 0, 12, 1, 2, 3))
    resumed = list(MicroBatches(EpochStream(10, 6, seed=3), start, 12, 1, 2, 3))
    assert resumed == through[3 * start :]


def test_steps_may_be_asked_for_in_any_order():
    stream, steps = EpochStream(10, 4, seed=0), [5, 0, 9, 2, 5]
    assert [stream.batch(step) for step in steps] == [EpochStream(10, 4, seed=0).batch(step) for step in steps]


def test_no_process_keeps_to_a_shard_of_the_data():
    """Within a few epochs each of 4 processes meets far more images than its quarter."""
    images, processes = 40, 4
    for rank in range(processes):
        seen = set()
        for micro in MicroBatches(EpochStream(images, 8, seed=0), 0, 5 * 6, rank, processes, 1):  # 6 epochs
            seen |= {index for _, index in micro}
        assert len(seen) > 0.6 * images


def test_order_differs_by_epoch_and_by_seed():
    orders = {
        (seed, epoch): tuple(index for at, index in positions(EpochStream(60, 60, seed), range(4)) if at == epoch)
        for seed in range(3)
        for epoch in range(4)
    }
    assert len(set(orders.values())) == len(orders)
    assert tuple(range(60)) not in orders.values()
