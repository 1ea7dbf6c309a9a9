"""Views are those that were published, depend on (seed, epoch, image) alone, and work for any image."""

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dino.data import EpochStream, MicroBatches, UnreadableImage
from dino.settings import Config
from dino.views import MultiCrop, View, ViewsDataset, collate, multi_crop
from dino.views.dataset import Sample
from dino.views.pipeline import Augment, MultiCropViews, change_stroke, small_affine

DRAWS = 1500


def preset(name: str, **options) -> MultiCrop:
    """A preset at small sizes with the published scales of DINO."""
    settings = {
        "global_size": 24,
        "global_scale": (0.4, 1.0),
        "local_size": 12,
        "local_scale": (0.05, 0.4),
        "local_crops": 3,
    } | options
    return multi_crop(name, **settings)


def plain(size: int, **options) -> View:
    """A crop with nothing done to it but `options`."""
    return View(size, (1.0, 1.0), **options)


class Pool:
    """Images of noise in memory; those in `unreadable` cannot be read."""

    def __init__(self, images: int = 8, shape: tuple[int, ...] = (3, 20, 24), unreadable: tuple[int, ...] = ()):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (images, *shape), dtype=torch.uint8, generator=generator)
        self.names = [str(index) for index in range(images)]
        self.unreadable = unreadable

    def read(self, index: int) -> Tensor:
        if index in self.unreadable:
            raise UnreadableImage(f"{index} is broken")
        return self.pixels[index]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class TestPresets:
    """Published numbers: reference/meta-systems.md §1 and §2a, from the repositories' code."""

    @pytest.mark.parametrize("name", ["dino", "dinov2"])
    def test_probabilities(self, name):
        spec = preset(name)
        for view in (*spec.globals_, *spec.locals_):
            assert (view.flip, view.jitter, view.grey) == (0.5, 0.8, 0.2)
            assert view.blur_sigma == (0.1, 2.0)
            assert not view.affine
            assert view.stroke == 0
        assert [view.blur for view in spec.globals_] == [1.0, 0.1]
        assert [view.solarize for view in spec.globals_] == [0.0, 0.2]
        assert {(view.blur, view.solarize) for view in spec.locals_} == {(0.5, 0.0)}

    def test_dinov2_blurs_with_9_pixels_and_dino_with_three_sigma(self):
        """DINO blurs with PIL's Gaussian of any extent: its kernel must hold 3 × the largest sigma of 2 each side."""
        assert {view.blur_kernel for view in preset("dinov2").globals_} == {9}
        assert min(view.blur_kernel for view in preset("dino").globals_) >= 2 * 3 * 2 + 1

    @pytest.mark.parametrize("name", ["dino", "dinov2"])
    def test_jitter_strengths(self, name):
        """Brightness and contrast 0.6 … 1.4, saturation 0.8 … 1.2, hue ±0.1."""
        steps = Augment(replace(preset(name).globals_[0], flip=0, grey=0, blur=0)).colour
        (jitter,) = steps[0].transforms
        assert tuple(jitter.brightness) == pytest.approx((0.6, 1.4))
        assert tuple(jitter.contrast) == pytest.approx((0.6, 1.4))
        assert tuple(jitter.saturation) == pytest.approx((0.8, 1.2))
        assert tuple(jitter.hue) == pytest.approx((-0.1, 0.1))

    def test_inverted_blur_is_what_the_released_weights_had(self):
        spec = preset("dinov2", inverted_blur=True)
        assert [view.blur for view in spec.globals_] == [0.0, 0.9]
        assert {view.blur for view in spec.locals_} == {0.5}
        assert [replace(view, blur=0) for view in spec.globals_] == [
            replace(view, blur=0) for view in preset("dinov2").globals_
        ]

    def test_defaults_are_dinos_crops(self):
        views = Config().views
        assert (views.global_size, views.local_size, views.local_crops) == (224, 96, 8)
        assert (views.global_scale, views.local_scale) == ([0.4, 1.0], [0.05, 0.4])

    def test_sizes_and_scales_are_taken_as_given(self):
        spec = multi_crop("dinov2", 98, (0.32, 1.0), 42, (0.05, 0.32), 5)
        assert [(view.size, view.scale) for view in spec.globals_] == [(98, (0.32, 1.0))] * 2
        assert [(view.size, view.scale) for view in spec.locals_] == [(42, (0.05, 0.32))] * 5

    def test_handwriting_is_neither_flipped_nor_coloured(self):
        for view in (*preset("line_art").globals_, *preset("line_art").locals_):
            assert (view.flip, view.jitter, view.grey, view.blur, view.solarize) == (0, 0, 0, 0, 0)
            assert view.affine
            assert view.stroke > 0


def frequency(view: View, image: Tensor, changed: Callable[[Tensor, Tensor], bool]) -> float:
    """How often the augmentations of a view, without its crop, change an image."""
    torch.manual_seed(0)
    steps = Augment(view).colour
    count = 0
    for _ in range(DRAWS):
        result = image
        for step in steps:
            result = step(result)
        count += changed(image, result)
    return count / DRAWS


class TestMeasuredFrequencies:
    """DINOv2's own transform took p for 1 − p; so what happens is counted, not what is asked for."""

    CHECKERBOARD = (torch.arange(9)[:, None] + torch.arange(9)).remainder(2).mul(255).to(torch.uint8).expand(3, 9, 9)

    @pytest.mark.parametrize("name", ["dino", "dinov2"])
    @pytest.mark.parametrize(("inverted", "expected"), [(False, (1.0, 0.1, 0.5)), (True, (0.0, 0.9, 0.5))])
    def test_blur(self, name, inverted, expected):
        spec = preset(name, inverted_blur=inverted)
        for view, share in zip((*spec.globals_, spec.locals_[0]), expected, strict=True):
            # Only the blur, and always wide enough to be seen.
            only = replace(view, size=9, flip=0, jitter=0, grey=0, solarize=0, blur_sigma=(2.0, 2.0))
            seen = frequency(only, self.CHECKERBOARD, lambda before, after: not torch.equal(before, after))
            assert seen == pytest.approx(share, abs=0 if share in (0, 1) else 0.04)

    @pytest.mark.parametrize(("what", "share"), [("flip", 0.5), ("jitter", 0.8), ("grey", 0.2), ("solarize", 0.2)])
    def test_everything_else(self, what, share):
        second = preset("dino").globals_[1]
        assert getattr(second, what) == share
        only = replace(plain(8), **{what: share})
        image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        seen = frequency(only, image, lambda before, after: not torch.equal(before, after))
        assert seen == pytest.approx(share, abs=0.05)

    def test_jitter_keeps_within_its_strengths(self):
        """Brightness and contrast of a grey constant: at most a factor of 1.4, at least 0.6."""
        torch.manual_seed(0)
        augment = Augment(plain(8, jitter=1.0))
        levels = [float(augment(torch.full((3, 8, 8), 100, dtype=torch.uint8)).float().mean()) for _ in range(300)]
        assert 60 - 1 <= min(levels) < 70
        assert 130 < max(levels) <= 140 + 1


class TestAugmentations:
    def test_solarize_inverts_from_128_up(self):
        values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
        expected = torch.where(values >= 128, 255 - values, values)
        (step,) = Augment(plain(16, solarize=1.0)).colour
        assert torch.equal(step(values), expected)

    def test_flip_mirrors_left_and_right(self):
        image = Pool(1, (3, 8, 8)).pixels[0]
        (step,) = Augment(plain(8, flip=1.0)).colour
        assert torch.equal(step(image), image[:, :, torch.arange(7, -1, -1)])

    def test_grey_makes_all_channels_the_luminance(self):
        image = Pool(1, (3, 8, 8)).pixels[0]
        (step,) = Augment(plain(8, grey=1.0)).colour
        luminance = torch.tensordot(torch.tensor([0.299, 0.587, 0.114]), image.float(), dims=1)
        assert (step(image).float() - luminance).abs().max() <= 1

    def test_blur_is_a_gaussian(self):
        """One bright pixel becomes exp(−d²/2σ²), normalised over the kernel."""
        image = torch.zeros(1, 25, 25, dtype=torch.uint8)
        image[0, 12, 12] = 255
        (step,) = Augment(View(25, (1.0, 1.0), blur=1.0, blur_sigma=(1.5, 1.5), blur_kernel=13)).colour
        offsets = torch.arange(25) - 12.0
        line = torch.exp(-(offsets**2) / (2 * 1.5**2)) * (offsets.abs() <= 6)
        expected = 255 * torch.outer(line, line) / line.sum() ** 2
        assert (step(image)[0].float() - expected).abs().max() <= 0.6

    def test_other_numbers_of_channels_share_one_draw(self):
        """Five equal channels stay equal under every augmentation."""
        grey = torch.randint(0, 256, (1, 20, 20), dtype=torch.uint8).expand(5, 20, 20)
        for name in ("dino", "line_art"):
            for seed in range(20):
                for view in MultiCropViews(preset(name))(grey, seed):
                    assert all(torch.equal(view[0], channel) for channel in view)


class TestShapes:
    @pytest.mark.parametrize("name", ["dino", "dinov2", "line_art"])
    @pytest.mark.parametrize("channels", [1, 2, 3, 5])
    @pytest.mark.parametrize("size", [(30, 40), (12, 12), (5, 7), (4, 4), (8, 90)])
    def test_any_image_gives_every_view(self, name, channels, size):
        """Also images smaller than a crop, and far from square."""
        image = torch.randint(0, 256, (channels, *size), dtype=torch.uint8)
        make = MultiCropViews(preset(name))
        for seed in range(5):
            views = make(image, seed)
            assert [tuple(view.shape) for view in views] == [(channels, 24, 24)] * 2 + [(channels, 12, 12)] * 3
            assert {view.dtype for view in views} == {torch.uint8}

    @pytest.mark.parametrize("name", ["dino", "dinov2", "line_art"])
    def test_no_local_crops(self, name):
        spec = preset(name, local_crops=0)
        views = MultiCropViews(spec)(Pool().read(0), 0)
        assert [tuple(view.shape) for view in views] == [(3, 24, 24)] * 2

    @pytest.mark.parametrize("size", [1, 2, 4, 8])
    def test_crops_smaller_than_the_blur(self, size):
        views = MultiCropViews(preset("dino", local_size=size))(Pool().read(0), 0)
        assert views[-1].shape == (3, size, size)

    def test_crops_cover_the_share_of_the_image_asked_for(self):
        """A crop of an image whose value is its column spans as many columns as its share of the area allows."""
        ramp = torch.arange(200, dtype=torch.uint8).expand(1, 200, 200)
        torch.manual_seed(0)
        for scale in ((0.05, 0.4), (0.4, 1.0)):
            spans = []
            for _ in range(200):
                crop = Augment(View(50, scale))(ramp).float()
                spans.append(float(crop.max() - crop.min()) / 200)
            assert max(spans) <= (scale[1] * 4 / 3) ** 0.5 + 0.02
            assert min(spans) >= (scale[0] * 3 / 4) ** 0.5 - 0.03


class TestRandomness:
    def dataset(self, seed: int = 0, name: str = "dino") -> ViewsDataset:
        return ViewsDataset(Pool(), preset(name), seed)

    @pytest.mark.parametrize("name", ["dino", "dinov2", "line_art"])
    def test_views_are_a_function_of_seed_epoch_and_image(self, name):
        positions = [(epoch, index) for epoch in range(3) for index in range(4)]
        first = {position: self.dataset(0, name)[position].views for position in positions}
        again = self.dataset(0, name)
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

    def test_views_of_one_image_differ_from_each_other(self):
        views = self.dataset()[0, 0].views
        assert not torch.equal(views[0], views[1])
        assert not torch.equal(views[2], views[3])

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    @pytest.mark.parametrize("workers", [1, 2])
    def test_worker_processes_give_the_views_of_this_process(self, workers):
        dataset = self.dataset()
        sampler = MicroBatches(EpochStream(8, 4, seed=0), 0, 6, 0, 1, 1)
        expected = [collate([dataset[position] for position in batch]) for batch in sampler]
        torch.manual_seed(workers)
        loader = DataLoader(
            dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate, multiprocessing_context="fork"
        )
        for found, wanted in zip(loader, expected, strict=True):
            assert equal(found.crops, wanted.crops)

    @pytest.mark.parametrize("name", ["dino", "dinov2", "line_art"])
    def test_global_random_states_are_left_alone(self, name):
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        python_state = random.getstate()
        self.dataset(0, name)[0, 0]
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
        assert random.getstate() == python_state

    def test_the_state_is_put_back_after_an_error(self):
        torch_state = torch.get_rng_state()
        with pytest.raises(Exception, match=r"\w"):
            MultiCropViews(preset("dino"))(torch.zeros(3, 0, 0, dtype=torch.uint8), 0)
        assert torch.equal(torch.get_rng_state(), torch_state)


class TestBatches:
    def sample(self, number: int, sizes: list[int]) -> Sample:
        """View v of sample s is the constant 10 v + s."""
        views = [torch.full((1, size, size), 10 * v + number, dtype=torch.uint8) for v, size in enumerate(sizes)]
        return Sample(views, [(number, "why")] if number == 2 else [])

    def test_views_follow_each_other_global_ones_first(self):
        batch = collate([self.sample(number, [8, 8, 4, 4, 4]) for number in range(3)])
        assert [tuple(crop.shape) for crop in batch.crops] == [(6, 1, 8, 8), (9, 1, 4, 4)]
        assert batch.crops[0][:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]
        assert batch.crops[1][:, 0, 0, 0].tolist() == [20, 21, 22, 30, 31, 32, 40, 41, 42]
        assert batch.skipped == [(2, "why")]

    def test_local_crops_of_the_global_size_join_the_global_ones(self):
        batch = collate([self.sample(number, [8, 8, 8]) for number in range(2)])
        assert len(batch.crops) == 1
        assert batch.crops[0][:, 0, 0, 0].tolist() == [0, 1, 10, 11, 20, 21]

    def test_without_local_crops_there_is_one_size(self):
        batch = collate([self.sample(number, [8, 8]) for number in range(2)])
        assert [tuple(crop.shape) for crop in batch.crops] == [(4, 1, 8, 8)]


class TestUnreadable:
    def test_the_next_readable_image_takes_its_place_and_it_is_reported(self):
        pool = Pool(6, unreadable=(2, 3, 5))
        dataset, clean = ViewsDataset(pool, preset("dino"), 0), Pool(6)
        for index, used, skipped in [(0, 0, []), (2, 4, [2, 3]), (3, 4, [3]), (5, 0, [5])]:
            sample = dataset[0, index]
            assert sample.skipped == [(at, f"{at} is broken") for at in skipped]
            clean.pixels[index] = pool.pixels[used]  # in its place: its own pixels, but the draws of the position
            assert equal(sample.views, ViewsDataset(clean, preset("dino"), 0)[0, index].views)

    def test_no_readable_image_at_all(self):
        with pytest.raises(UnreadableImage, match=r"no image of 3 can be read; the first: 1 is broken"):
            ViewsDataset(Pool(3, unreadable=(0, 1, 2)), preset("dino"), 0)[0, 1]


class TestLineArt:
    @pytest.mark.parametrize("level", [0, 255, 100])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_a_blank_page_stays_blank(self, level, channels):
        """White stays white and black black: no seam shows where the page ends and the background comes in."""
        blank = torch.full((channels, 21, 17), level, dtype=torch.uint8)
        make = MultiCropViews(preset("line_art"))
        for seed in range(40):
            for view in make(blank, seed):
                assert view.unique().tolist() == [level]

    @pytest.mark.parametrize(("ink", "paper"), [(0, 255), (255, 0)])
    def test_background_comes_in_around_a_moved_drawing(self, ink, paper):
        drawing = torch.full((1, 40, 40), paper, dtype=torch.uint8)
        drawing[:, 15:25, 15:25] = ink
        torch.manual_seed(0)
        for _ in range(50):
            border = small_affine(drawing)[0, [0, -1]]
            assert (border == paper).all()

    def test_colours_are_kept_and_nothing_is_flipped(self):
        left, right = torch.tensor([200, 30, 90]), torch.tensor([20, 180, 140])
        image = torch.cat([left.view(3, 1, 1).expand(3, 40, 20), right.view(3, 1, 1).expand(3, 40, 20)], dim=2)
        spec = preset("line_art", global_scale=(0.8, 1.0))
        for seed in range(30):
            for view in MultiCropViews(spec)(image.to(torch.uint8), seed)[:2]:
                assert (view[:, 12, 5] - left).abs().max() <= 2
                assert (view[:, 12, -6] - right).abs().max() <= 2

    @pytest.mark.parametrize("width", [3, 5])
    def test_dark_strokes_grow_with_a_negative_amount_and_shrink_with_a_positive_one(self, width):
        page = torch.full((1, 15, 15), 255, dtype=torch.uint8)
        page[:, :, 5 : 5 + width] = 0

        def stroke(amount: float, image: Tensor = page) -> float:
            """Width of the dark line in the middle row, in pixels."""
            return float((255 - change_stroke(image, amount).float())[0, 7].sum() / 255)

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
        view = replace(preset("line_art").globals_[0], affine=False, scale=(1.0, 1.0), size=40)
        torch.manual_seed(0)
        ink = [float((255 - Augment(view)(page).float()).mean() / 255) for _ in range(40)]
        assert max(ink) > min(ink) + 0.02
