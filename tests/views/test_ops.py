"""What is done to the pixels of crops: by definition, as torchvision does it, as often as published; and a new one."""

import colorsys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from material import (
    EVERYTHING,
    PRESETS,
    RAGGED,
    Pool,
    canvas_of,
    change,
    drawn,
    equal,
    keys_of,
    noise,
    only,
    plain,
    preset,
    views_of,
)
from oracle import oracle_views, photometric, row
from torch import Tensor
from torchvision.transforms.v2 import functional

from dino.training.settings import load
from dino.views import DeviceViews, MultiCrop, View, ViewsDataset, view_spec
from dino.views.ops import AUGMENTATIONS, Augmentation
from dino.views.ops.blur import Blur, by_products, by_sums, reaches, weights_of
from dino.views.ops.jitter import places_of_channels, turn_hue
from dino.views.ops.stroke import largest_of_nine

ROUNDING = 0.51  # levels
# Just below or above 127.5, a pixel is inverted or not: the results are half a level apart each way.
SOLARIZED = ROUNDING + 0.5


class TestDefinitions:
    def test_solarize_inverts_from_128_up(self):
        values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
        assert torch.equal(change("solarize", values).byte(), torch.where(values >= 128, 255 - values, values))

    def test_hue_is_that_of_the_colour_circle(self):
        """Also of greys, and of colours of which two components are equal."""
        levels = torch.tensor([0.0, 40.0, 127.0, 255.0])
        pixels = torch.cartesian_prod(levels, levels, levels).mT.reshape(1, 3, 8, 8)
        for shift in (-0.5, -0.1, 0.0, 1 / 12, 0.4):
            turned = (
                turn_hue(pixels, torch.from_numpy(places_of_channels(np.array([shift]))).float())
                .flatten(2)[0]
                .mT.tolist()
            )
            for before, after in zip(pixels.flatten(2)[0].mT.tolist(), turned, strict=True):
                hue, saturation, value = colorsys.rgb_to_hsv(*before)
                assert after == pytest.approx(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value), abs=1e-3)

    @pytest.mark.parametrize(("size", "kernel"), [(24, 9), (24, 13), (13, 13), (7, 7), (2, 1), (1, 1)])
    def test_blur_also_at_the_edges_of_small_crops(self, size, kernel):
        """As sums and as products, each with as many taps as the widest of them needs, and with its own."""
        images, sigmas = noise(5, 3, size, size).float(), np.array([0.1, 0.5, 1.0, 1.7, 2.0])
        reach = reaches(sigmas, View(size, (1.0, 1.0), {}, kernel))
        expected = torch.stack([
            functional.gaussian_blur(image, [kernel] * 2, [sigma] * 2)
            for image, sigma in zip(images, sigmas.tolist(), strict=True)
        ])  # fmt: skip
        for blur in (by_sums, by_products):
            blurred = blur(images, torch.from_numpy(weights_of(sigmas, reach.max())).float())
            torch.testing.assert_close(blurred, expected, atol=1e-3, rtol=0)
            for n, of_one in enumerate(reach.tolist()):
                weights = torch.from_numpy(weights_of(sigmas[n : n + 1], of_one)).float()
                torch.testing.assert_close(blur(images[n : n + 1], weights)[0], expected[n], atol=2e-3, rtol=0)

    @pytest.mark.parametrize("size", [1, 2, 3, 24])
    def test_largest_of_nine(self, size):
        images = noise(5, 3, size, size).float()
        assert torch.equal(largest_of_nine(images), F.max_pool2d(images, 3, stride=1, padding=1))

    @pytest.mark.parametrize("width", [3, 5])
    def test_dark_strokes_grow_with_a_negative_amount_and_shrink_with_a_positive_one(self, width):
        """Light strokes on a dark page go the other way."""
        page = torch.full((1, 1, 15, 15), 255, dtype=torch.uint8)
        page[..., 5 : 5 + width] = 0
        for amount, wider in [(0.0, 0.0), (-1.0, 2.0), (1.0, -2.0), (-0.5, 1.0), (0.25, -0.5)]:
            dark = change("stroke", page, stroke=[amount])[0, 0, 7].mean() / 255
            light = change("stroke", 255 - page, stroke=[amount])[0, 0, 7].mean() / 255
            assert 15 * (1 - dark) == pytest.approx(width + wider, abs=0.02)
            assert 15 * light == pytest.approx(width - wider, abs=0.02)


class TestAgainstTorchvision:
    """torchvision's operations in double precision on one image at a time, rounded at the end."""

    @pytest.mark.parametrize("channels", [1, 3, 5])
    @pytest.mark.parametrize("what", ["stroke", "jitter", "grey", "blur", "solarize", "everything"])
    def test_crops_differ_by_the_last_rounding_only(self, what, channels):
        names = ("stroke", "jitter", "grey", "blur", "solarize") if what == "everything" else (what,)
        view, images, keys = plain(24, **dict.fromkeys(names, 1.0)), noise(48, channels, 24, 24), keys_of(48)
        draws, allowed = drawn([view], keys), SOLARIZED if "solarize" in names else ROUNDING
        (augmented,) = DeviceViews(only(view)).photometric([images], keys)
        assert augmented.dtype == torch.uint8
        for n, image in enumerate(images):
            expected = photometric(image, view, {name: row(draw, n) for name, draw in draws.items()})
            assert (augmented[n] - expected).abs().max() <= allowed

    @pytest.mark.parametrize("channels", [1, 3, 5])
    @pytest.mark.parametrize("settings", [{}, {"stroke": 0.5}, {"local_size": 24}, {"local_crops": 0}])
    def test_whole_views_of_the_same_keys(self, settings, channels):
        for name in ("dino", "dinov2"):
            spec, keys, images = preset(name, **settings), keys_of(12), noise(12, channels, 48, 36)
            theirs = [oracle_views(spec, image, int(key)) for image, key in zip(images, keys, strict=True)]
            for ours, group in zip(views_of(spec, images, keys), spec.groups, strict=True):
                expected = torch.stack([views[index] for index in group.indices for views in theirs])
                assert (ours - expected).abs().max() <= SOLARIZED


class TestBatches:
    @pytest.mark.parametrize("channels", [1, 3, 5])
    def test_crops_are_augmented_alike_alone_and_among_others(self, channels):
        ours, keys = DeviceViews(preset("dino", stroke=0.5)), keys_of(16)
        crops = [noise(2 * 16, channels, 24, 24), noise(3 * 16, channels, 12, 12)]
        together = ours.photometric(crops, keys)
        for image in range(16):
            alone = ours.photometric([group[image::16] for group in crops], keys[image : image + 1])
            for one, other in zip(alone, together, strict=True):
                assert (one.int() - other[image::16].int()).abs().max() <= 1  # sums in another order round otherwise
                assert (one != other[image::16]).float().mean() < 1e-3

    @pytest.mark.parametrize("settings", [{}, {"affine": 1.0, "stroke": 0.5}])
    def test_views_are_a_function_of_keys_and_leave_what_they_are_given_alone(self, settings):
        spec, keys, canvas = preset("dino", **settings), keys_of(4), canvas_of(RAGGED[:4])
        ours, pixels = DeviceViews(spec), canvas.pixels.clone()
        crops = ours.crop(canvas, keys)
        before = [group.clone() for group in crops]
        first = ours.photometric(crops, keys)
        assert equal(crops, before)
        torch.manual_seed(7)
        state = torch.get_rng_state()
        assert equal(views_of(spec, RAGGED[:4], keys), first)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(canvas.pixels, pixels)
        for one, other in zip(views_of(spec, RAGGED[:4], keys + np.uint64(1)), first, strict=True):
            assert not torch.equal(one, other)

    @pytest.mark.parametrize("name", PRESETS)
    def test_views_of_one_image_differ_from_each_other(self, name):
        globals_, locals_ = views_of(preset(name), [Pool().read(0)], keys_of(1))
        assert not torch.equal(globals_[0], globals_[1])
        assert not torch.equal(locals_[0], locals_[1])

    @pytest.mark.parametrize("name", PRESETS)
    def test_five_equal_channels_stay_equal(self, name):
        """However many channels, all share one draw."""
        for views in views_of(preset(name), list(noise(20, 1, 20, 20).expand(-1, 5, -1, -1)), keys_of(20)):
            assert (views == views[:, :1]).all()

    def test_line_art_keeps_colours_and_flips_nothing(self):
        left, right = torch.tensor([200, 30, 90]), torch.tensor([20, 180, 140])
        halves = [colour.view(3, 1, 1).expand(3, 40, 20) for colour in (left, right)]
        image, spec = torch.cat(halves, dim=2).to(torch.uint8), preset("line_art", global_scale=[0.8, 1.0])
        views = views_of(spec, [image] * 30, keys_of(30))[0]
        assert (views[:, :, 12, 5] - left).abs().max() <= 2
        assert (views[:, :, 12, -6] - right).abs().max() <= 2


CHECKERBOARD = (torch.arange(9)[:, None] + torch.arange(9)).remainder(2).mul(255).to(torch.uint8).expand(3, 9, 9)


class TestMeasuredFrequencies:
    """DINOv2's own transform took p for 1 − p; so what happens is counted, not what is asked for."""

    def frequency(self, view: View, image: Tensor, count: int = 1000) -> float:
        """Of a square image changed by a view of all of it."""
        (views,) = views_of(MultiCrop((view,), ()), [image] * count, keys_of(count))
        return float((views != image).flatten(1).any(dim=1).float().mean())

    @pytest.mark.parametrize("name", ["dino", "dinov2"])
    @pytest.mark.parametrize(("inverted", "expected"), [(False, (1.0, 0.1, 0.5)), (True, (0.0, 0.9, 0.5))])
    def test_blur(self, name, inverted, expected, monkeypatch):
        monkeypatch.setattr(Blur, "sigma", (2.0, 2.0))  # always wide enough to be seen
        spec = preset(name, inverted_blur=inverted)
        for view, probability in zip((*spec.globals_, spec.locals_[0]), expected, strict=True):
            blurred = View(9, (1.0, 1.0), {"blur": view.amounts["blur"]}, view.blur_kernel)
            within = 0 if probability in (0, 1) else 0.05
            assert self.frequency(blurred, CHECKERBOARD) == pytest.approx(probability, abs=within)

    @pytest.mark.parametrize(
        ("what", "probability"), [("flip", 0.5), ("jitter", 0.8), ("grey", 0.2), ("solarize", 0.2)]
    )
    def test_everything_else(self, what, probability):
        assert preset("dino").globals_[1].amounts[what] == probability
        view = plain(8, **{what: probability})
        assert self.frequency(view, noise(3, 8, 8)) == pytest.approx(probability, abs=0.05)


class Invert(Augmentation):
    """The negative. Amount: probability."""

    name = "invert"

    def apply(self, pixels: Tensor, draw: dict, view: View) -> Tensor:
        return 255 - pixels


class TestANewAugmentation:
    """A file and a line in the registry are all that it takes."""

    @pytest.fixture(autouse=True)
    def registered(self, monkeypatch):
        monkeypatch.setitem(AUGMENTATIONS, "invert", Invert())

    def test_a_setting_switches_it_on_and_nothing_else_changes(self):
        images, keys = list(noise(400, 3, 8, 8)), keys_of(400)
        sizes = ["views.global_size=8", "views.local_size=4", "views.local_crops=2", "model.patch_size=4"]
        without = view_spec(load(None, sizes).views)
        spec = view_spec(load(None, [*sizes, "views.augment={invert: 0.3}"]).views)
        for before, after in zip(views_of(without, images, keys), views_of(spec, images, keys), strict=True):
            negative = 255 - before.int()  # but for halves, which are rounded to the even level
            inverted = ((after - negative).abs() <= 1).flatten(1).all(dim=1)
            unchanged = (after == before).flatten(1).all(dim=1)
            assert (inverted | unchanged).all()
            assert inverted.float().mean() == pytest.approx(0.3, abs=0.05)

    def test_it_draws_by_itself_and_leaves_all_other_draws_as_they_were(self, monkeypatch):
        keys = keys_of(5000)
        both = drawn([plain(8, **EVERYTHING, invert=0.5)] * 2, keys)
        inverted = both.pop("invert")["applied"]
        before = drawn([plain(8, **EVERYTHING)] * 2, keys)
        for name, draw in both.items():
            assert draw.keys() == before[name].keys()
            for what, values in draw.items():
                assert np.array_equal(values, before[name][what]), what
                for column in values.reshape(len(inverted), -1).T.astype(float):
                    assert column.std() == 0 or abs(np.corrcoef(inverted, column)[0, 1]) < 0.05, what
        another = Invert()
        another.name = "negative"
        monkeypatch.setattr("dino.views.device.AUGMENTATIONS", {"negative": another, **AUGMENTATIONS})
        assert np.array_equal(drawn([plain(8, invert=0.5, negative=0.1)] * 2, keys)["invert"]["applied"], inverted)

    def test_workers_leave_it_to_the_device(self):
        pool, spec = Pool(), preset("dino")
        with_it = preset("dino", augment={"invert": 1.0})
        assert equal(ViewsDataset(pool, spec, 0)[0, 1].crops, ViewsDataset(pool, with_it, 0)[0, 1].crops)
