"""Views that worker processes make depend on the key alone, and work for any image."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from material import Pool, equal, keys_of, noise, plain, preset, still, untouched
from torch import Tensor
from torch.utils.data import DataLoader

from dino.data import EpochStream, MicroBatches
from dino.views import MultiCrop, View, ViewsDataset, collate
from dino.views.operations import change_stroke, small_affine
from dino.views.pipeline import cut, cut_views, make_views, retouch

PRESETS = ["dino", "dinov2", "line_art"]


def only(view: View) -> MultiCrop:
    return MultiCrop(globals_=(view,), locals_=())


class TestShapes:
    @pytest.mark.parametrize("name", PRESETS)
    @pytest.mark.parametrize("channels", [1, 2, 3, 5])
    @pytest.mark.parametrize("size", [(30, 40), (12, 12), (5, 7), (4, 4), (8, 90)])
    def test_any_image_gives_every_view(self, name, channels, size):
        """Also images smaller than a crop, and far from square."""
        image = noise(channels, *size)
        for key in range(5):
            views = make_views(image, preset(name, affine=1.0, stroke=0.5), key)
            assert [tuple(view.shape) for view in views] == [(channels, 24, 24)] * 2 + [(channels, 12, 12)] * 3
            assert {view.dtype for view in views} == {torch.uint8}

    @pytest.mark.parametrize("name", PRESETS)
    def test_no_local_crops(self, name):
        image = Pool().read(0)
        views = make_views(image, preset(name, local_crops=0), 0)
        assert [tuple(view.shape) for view in views] == [(3, 24, 24)] * 2
        assert equal(views, make_views(image, preset(name), 0)[:2])

    @pytest.mark.parametrize("size", [1, 2, 4, 8])
    def test_crops_smaller_than_the_blur(self, size):
        views = make_views(Pool().read(0), preset("dino", local_size=size), 0)
        assert views[-1].shape == (3, size, size)

    def test_crops_show_the_part_that_was_drawn(self):
        """An image whose pixels tell their row and column: what a crop shows, whichever way round."""
        rows, columns = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
        image = torch.stack([rows, columns]).to(torch.uint8)
        for flip in (False, True):
            crop = cut(image, View(10, (0.1, 1.0)), still([(200, 200)], box=[(30, 60, 100, 50)], flip=[flip])).float()
            # Of 10 pixels over 100 rows the first is centred at 30 + 5, in a scale where pixel n is centred at n + ½.
            assert (crop[0, 1:-1, :] - (30 + 10 * torch.arange(1, 9) + 4.5)[:, None]).abs().max() <= 1
            expected = 60 + 5 * torch.arange(1, 9) + 2
            assert (crop[1, :, 1:-1] - (expected.flip(0) if flip else expected)).abs().max() <= 1

    def test_the_whole_image_in_its_own_size_is_left_as_it_is(self):
        image = noise(3, 16, 16)
        assert torch.equal(cut(image, plain(16), still([(16, 16)])), image)
        assert torch.equal(retouch(image, preset("dino").globals_[1], untouched(1)), image)


class TestRandomness:
    @pytest.mark.parametrize("name", PRESETS)
    def test_views_are_a_function_of_seed_epoch_and_image(self, name):
        positions = [(epoch, index) for epoch in range(3) for index in range(4)]
        dataset = ViewsDataset(Pool(), preset(name), seed=0)
        first = {position: dataset[position].views for position in positions}
        again = ViewsDataset(Pool(), preset(name), seed=0)
        torch.manual_seed(999)
        random.seed(1)
        for position in reversed(positions):
            assert equal(again[position].views, first[position])
            torch.rand(3)

    def test_another_seed_epoch_or_image_gives_other_views(self):
        constant = Pool(12)
        constant.pixels[:] = constant.pixels[0]  # so that only the draws differ
        places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0, 10, 1), (0, 11, 1), (0, 1, 11), (11, 0, 1)]
        found = [ViewsDataset(constant, preset("dino"), seed)[epoch, index].views for seed, epoch, index in places]
        for one in range(len(found)):
            for other in range(one):
                assert not equal(found[one], found[other]), (places[one], places[other])

    @pytest.mark.parametrize("name", PRESETS)
    def test_views_of_one_image_differ_from_each_other(self, name):
        views = make_views(Pool().read(0), preset(name), 0)
        assert not torch.equal(views[0], views[1])
        assert not torch.equal(views[2], views[3])

    @pytest.mark.parametrize("name", PRESETS)
    def test_global_random_states_are_left_alone(self, name):
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        python_state = random.getstate()
        _ = ViewsDataset(Pool(), preset(name, affine=1.0, stroke=0.5), 0)[0, 0]
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
        assert random.getstate() == python_state

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    @pytest.mark.parametrize("workers", [1, 2])
    def test_worker_processes_give_the_views_of_this_process(self, workers):
        dataset = ViewsDataset(Pool(unreadable=(3,)), preset("dino"), seed=0)
        sampler = MicroBatches(EpochStream(8, 4, seed=0), 0, 6, 0, 1, 1)
        expected = [collate([dataset[position] for position in batch]) for batch in sampler]
        torch.manual_seed(workers)
        loader = DataLoader(
            dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate, multiprocessing_context="fork"
        )
        for found, wanted in zip(loader, expected, strict=True):
            assert equal(found.crops, wanted.crops)
            assert np.array_equal(found.keys, wanted.keys)
            assert found.keys.dtype == np.uint64
            assert found.skipped == wanted.skipped


class TestPasses:
    """Crops may be cut by workers and finished on the device: the two halves are the whole."""

    @pytest.mark.parametrize("name", PRESETS)
    def test_crops_alone_have_nothing_done_to_their_pixels(self, name):
        bare = replace(preset(name).globals_[0], jitter=0.0, grey=0.0, blur=0.0, solarize=0.0, stroke=0.0)
        image = Pool().read(0)
        spec = MultiCrop((preset(name).globals_[0],) * 3, ())
        for key in range(10):
            assert equal(cut_views(image, spec, key), make_views(image, MultiCrop((bare,) * 3, ()), key))

    def test_without_augmentations_a_view_is_its_crop(self):
        image = Pool().read(0)
        for key in range(10):
            assert equal(make_views(image, only(plain(9)), key), cut_views(image, only(plain(9)), key))

    def test_five_equal_channels_stay_equal(self):
        """However many channels, all share one draw."""
        grey = noise(1, 20, 20).expand(5, 20, 20)
        for name in ("dino", "line_art"):
            for key in range(20):
                for view in make_views(grey, preset(name), key):
                    assert all(torch.equal(view[0], channel) for channel in view)


class TestLineArt:
    @pytest.mark.parametrize("level", [0, 255, 100])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_a_blank_page_stays_blank(self, level, channels):
        """White stays white and black black: no seam shows where the page ends and the background comes in."""
        blank = torch.full((channels, 21, 17), level, dtype=torch.uint8)
        for key in keys_of(40).tolist():
            for view in make_views(blank, preset("line_art"), key):
                assert view.unique().tolist() == [level]

    @pytest.mark.parametrize(("ink", "paper"), [(0, 255), (255, 0)])
    def test_background_comes_in_around_a_moved_drawing(self, ink, paper):
        drawing = torch.full((1, 1, 40, 40), float(paper))
        drawing[..., 15:25, 15:25] = ink
        moves = np.linspace(-0.15, 0.15, 7)
        geometry = still(
            [(40, 40)] * 7, angle=moves, shear=-moves, zoom=1 - np.abs(moves), shift=np.stack([moves] * 2, 1)
        )
        moved = small_affine(drawing, torch.tensor([[float(paper)]]), geometry, torch.tensor([[40.0, 40.0]]))
        assert (moved[:, :, [0, -1]] == paper).all()
        assert (moved[:, :, :, [0, -1]] == paper).all()
        assert [float(image.sub(ink).abs().min()) for image in moved] == [0.0] * 7  # the drawing is still there

    def test_colours_are_kept_and_nothing_is_flipped(self):
        left, right = torch.tensor([200, 30, 90]), torch.tensor([20, 180, 140])
        image = torch.cat([left.view(3, 1, 1).expand(3, 40, 20), right.view(3, 1, 1).expand(3, 40, 20)], dim=2)
        spec = preset("line_art", global_scale=(0.8, 1.0))
        for key in range(30):
            for view in make_views(image.to(torch.uint8), spec, key)[:2]:
                assert (view[:, 12, 5] - left).abs().max() <= 2
                assert (view[:, 12, -6] - right).abs().max() <= 2

    @pytest.mark.parametrize("width", [3, 5])
    def test_dark_strokes_grow_with_a_negative_amount_and_shrink_with_a_positive_one(self, width):
        page = torch.full((1, 1, 15, 15), 255.0)
        page[..., 5 : 5 + width] = 0

        def stroke(amount: float, image: Tensor = page) -> float:
            """Width of the dark line in the middle row, in pixels."""
            return float((255 - change_stroke(image, torch.tensor([amount])))[0, 0, 7].sum() / 255)

        assert stroke(0.0) == width
        assert stroke(-1.0) == width + 2
        assert stroke(1.0) == width - 2
        assert stroke(-0.5) == pytest.approx(width + 1, abs=0.02)
        assert stroke(0.25) == pytest.approx(width - 0.5, abs=0.02)
        # Light strokes on a dark page go the other way.
        assert 15 - stroke(-1.0, 255 - page) == width - 2
        assert 15 - stroke(1.0, 255 - page) == width + 2

    def test_strokes_vary_in_width(self):
        page = torch.full((1, 40, 40), 255, dtype=torch.uint8)
        page[:, :, 17:23] = 0
        spec = only(plain(40, stroke=0.5))
        ink = [float((255 - make_views(page, spec, key)[0].float()).mean() / 255) for key in range(40)]
        assert min(ink) == pytest.approx(5 / 40, abs=0.005)
        assert max(ink) == pytest.approx(7 / 40, abs=0.005)
