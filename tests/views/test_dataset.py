"""Samples and batches of views, also from a pool with images that cannot be read."""

import numpy as np
import pytest
import torch
from material import Pool, equal, preset

from dino.data import UnreadableImage
from dino.views import DeviceViews, ViewsDataset, collate
from dino.views.dataset import Sample
from dino.views.draws import sample_key
from dino.views.pipeline import cut_views, make_views


class TestBatches:
    def sample(self, number: int, sizes: list[int]) -> Sample:
        """View v of sample s is the constant 10 v + s."""
        views = [torch.full((1, size, size), 10 * v + number, dtype=torch.uint8) for v, size in enumerate(sizes)]
        return Sample(views, 2**63 + number, [(number, "why")] if number == 2 else [])

    def test_views_follow_each_other_global_ones_first(self):
        batch = collate([self.sample(number, [8, 8, 4, 4, 4]) for number in range(3)])
        assert [tuple(crop.shape) for crop in batch.crops] == [(6, 1, 8, 8), (9, 1, 4, 4)]
        assert batch.crops[0][:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]
        assert batch.crops[1][:, 0, 0, 0].tolist() == [20, 21, 22, 30, 31, 32, 40, 41, 42]
        assert batch.skipped == [(2, "why")]

    def test_keys_keep_all_64_bits(self):
        batch = collate([self.sample(number, [8, 8]) for number in range(3)])
        assert batch.keys.dtype == np.uint64
        assert batch.keys.tolist() == [2**63, 2**63 + 1, 2**63 + 2]

    def test_local_crops_of_the_global_size_join_the_global_ones(self):
        batch = collate([self.sample(number, [8, 8, 8]) for number in range(2)])
        assert len(batch.crops) == 1
        assert batch.crops[0][:, 0, 0, 0].tolist() == [0, 1, 10, 11, 20, 21]

    def test_without_local_crops_there_is_one_size(self):
        batch = collate([self.sample(number, [8, 8]) for number in range(2)])
        assert [tuple(crop.shape) for crop in batch.crops] == [(4, 1, 8, 8)]

    @pytest.mark.parametrize("options", [{}, {"local_size": 24}, {"local_crops": 0}])
    def test_crops_that_the_device_finishes_are_grouped_as_it_expects(self, options):
        spec, dataset = preset("dino", **options), ViewsDataset(Pool(), preset("dino", **options), 0, finished=False)
        batch = collate([dataset[0, index] for index in range(4)])
        finished = DeviceViews(spec).retouch(batch.crops, batch.keys)
        assert [crops.shape for crops in finished] == [crops.shape for crops in batch.crops]


class TestSamples:
    def test_a_sample_is_the_image_at_its_index_with_the_key_of_its_place(self):
        pool, spec = Pool(), preset("dino")
        for finished, make in ((True, make_views), (False, cut_views)):
            for epoch, index in [(0, 0), (3, 7)]:
                sample, key = ViewsDataset(pool, spec, 5, finished)[epoch, index], sample_key(5, epoch, index)
                assert sample.key == key
                assert equal(sample.views, make(pool.read(index), spec, key))


class TestUnreadable:
    @pytest.mark.parametrize("finished", [True, False])
    def test_the_next_readable_image_takes_its_place_and_it_is_reported(self, finished):
        pool = Pool(6, unreadable=(2, 3, 5))
        dataset, clean = ViewsDataset(pool, preset("dino"), 0, finished), Pool(6)
        for index, used, skipped in [(0, 0, []), (2, 4, [2, 3]), (3, 4, [3]), (5, 0, [5])]:
            sample = dataset[0, index]
            assert sample.skipped == [(at, f"{at} is broken") for at in skipped]
            clean.pixels[index] = pool.pixels[used]  # in its place: its own pixels, but the draws of the position
            assert equal(sample.views, ViewsDataset(clean, preset("dino"), 0, finished)[0, index].views)

    def test_no_readable_image_at_all(self):
        with pytest.raises(UnreadableImage, match=r"no image of 3 can be read; the first: 1 is broken"):
            ViewsDataset(Pool(3, unreadable=(0, 1, 2)), preset("dino"), 0)[0, 1]
