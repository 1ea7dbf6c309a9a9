"""Samples and batches of crops that workers make, also from a pool with images that cannot be read."""

import random

import numpy as np
import pytest
import torch
from material import PRESETS, Pool, equal, noise, preset
from oracle import oracle_crops
from torch.utils.data import DataLoader

from dino.data import EpochStream, MicroBatches
from dino.views import DeviceViews, ViewsDataset, collate
from dino.views.draws import sample_key
from dino.views.workers import Sample


class TestBatches:
    def sample(self, number: int) -> Sample:
        """View v of sample s is the constant 10 v + s: two views of 8², three of 4²."""
        sizes = {8: range(2), 4: range(2, 5)}
        crops = []
        for size, views in sizes.items():
            levels = torch.tensor([10 * view + number for view in views], dtype=torch.uint8)
            crops.append(levels[:, None, None, None].expand(-1, 1, size, size))
        return Sample(crops, 2**63 + number, [(number, "why")] if number == 2 else [])

    def test_views_follow_each_other_and_keys_keep_all_64_bits(self):
        batch = collate([self.sample(number) for number in range(3)])
        assert [tuple(crops.shape) for crops in batch.crops] == [(6, 1, 8, 8), (9, 1, 4, 4)]
        assert batch.crops[0][:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]
        assert batch.crops[1][:, 0, 0, 0].tolist() == [20, 21, 22, 30, 31, 32, 40, 41, 42]
        assert batch.skipped == [(2, "why")]
        assert batch.keys.dtype == np.uint64
        assert batch.keys.tolist() == [2**63, 2**63 + 1, 2**63 + 2]

    @pytest.mark.parametrize(
        ("settings", "shapes"),
        [
            ({}, [(8, 3, 24, 24), (12, 3, 12, 12)]),
            ({"local_size": 24}, [(20, 3, 24, 24)]),  # local crops of the global size join the global ones
            ({"local_crops": 0}, [(8, 3, 24, 24)]),
        ],
    )
    def test_crops_are_grouped_by_size_as_the_device_takes_them(self, settings, shapes):
        dataset = ViewsDataset(Pool(), preset("dino", **settings), 0)
        batch = collate([dataset[0, index] for index in range(4)])
        finished = DeviceViews(preset("dino", **settings)).photometric(batch.crops, batch.keys)
        assert [crops.shape for crops in batch.crops] == [crops.shape for crops in finished] == shapes


class TestSamples:
    @pytest.mark.parametrize("name", PRESETS)
    def test_a_sample_is_cropped_from_the_image_at_its_index_with_the_key_of_its_position(self, name):
        pool, spec = Pool(), preset(name)
        pool.pixels = noise(8, 3, 20, 24, low=64, high=192)
        for epoch, index in [(0, 0), (3, 7)]:
            sample, key = ViewsDataset(pool, spec, 5)[epoch, index], sample_key(5, epoch, index)
            assert sample.key == key
            expected = oracle_crops(spec, pool.read(index), key)
            for crops, first in zip(sample.crops, (0, 2), strict=True):
                difference = crops.int() - torch.stack(expected[first : first + len(crops)]).int()
                assert difference.abs().max() <= (1 if name == "line_art" else 0)

    @pytest.mark.parametrize("name", PRESETS)
    def test_crops_are_a_function_of_seed_epoch_and_image(self, name):
        """Whatever was asked for before, and random states are neither read nor changed."""
        positions = [(epoch, index) for epoch in range(3) for index in range(4)]
        dataset = ViewsDataset(Pool(), preset(name, affine=1.0), seed=0)
        first = {position: dataset[position].crops for position in positions}
        torch.manual_seed(999)
        random.seed(1)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
        again = ViewsDataset(Pool(), preset(name, affine=1.0), seed=0)
        for position in reversed(positions):
            assert equal(again[position].crops, first[position])
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_worker_processes_give_the_crops_of_this_process(self):
        dataset = ViewsDataset(Pool(unreadable=(3,)), preset("dino"), seed=0)
        sampler = MicroBatches(EpochStream(8, 4, seed=0), 0, 6, 0, 1, 1)
        expected = [collate([dataset[position] for position in batch]) for batch in sampler]
        torch.manual_seed(2)
        loader = DataLoader(
            dataset, batch_sampler=sampler, num_workers=2, collate_fn=collate, multiprocessing_context="fork"
        )
        for batch, here in zip(loader, expected, strict=True):
            assert equal(batch.crops, here.crops)
            assert np.array_equal(batch.keys, here.keys)
            assert batch.keys.dtype == np.uint64
            assert batch.skipped == here.skipped


class TestUnreadable:
    def test_the_next_readable_image_takes_its_place_and_it_is_reported(self):
        pool = Pool(6, unreadable=(2, 3, 5))
        dataset, clean = ViewsDataset(pool, preset("dino"), 0), Pool(6)
        for index, used, skipped in [(0, 0, []), (2, 4, [2, 3]), (3, 4, [3]), (5, 0, [5])]:
            sample = dataset[0, index]
            assert sample.skipped == [(at, f"{at} is broken") for at in skipped]
            clean.pixels[index] = pool.pixels[used]  # in its place: its own pixels, but the draws of the position
            assert equal(sample.crops, ViewsDataset(clean, preset("dino"), 0)[0, index].crops)

    def test_no_readable_image_at_all(self):
        """Handed over as data: an error in a worker process would lose its words."""
        dataset = ViewsDataset(Pool(3, unreadable=(0, 1, 2)), preset("dino"), 0)
        batch = collate([dataset[0, 1], dataset[0, 2]])
        assert batch.unreadable == "no image of 3 can be read; the first: 1 is broken"
        assert batch.crops == []
