"""What both backends do to the pixels of crops: by definition, as torchvision does, and as often as published."""

import colorsys
from dataclasses import replace

import numpy as np
import pytest
import torch
from material import BACKENDS, canvas_of, keys_of, noise, plain, preset, retouched, untouched
from scipy import ndimage
from torch import Tensor
from torchvision.transforms.v2 import functional

from dino.views import DeviceViews, MultiCrop, View, collate
from dino.views.dataset import Sample
from dino.views.device import gaussian_blur, turn_hue
from dino.views.draws import Appearance, draw_appearance
from dino.views.pipeline import make_views

ROUNDING = {"workers": 1.5, "device": 0.51}  # in levels: torchvision cuts fractions off, twice for contrast
EVERYTHING = View(24, (1.0, 1.0), jitter=1, grey=1, blur=1, blur_kernel=13, solarize=1, stroke=1)


@pytest.mark.parametrize("backend", BACKENDS)
class TestDefinitions:
    def test_solarize_inverts_from_128_up(self, backend):
        values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
        expected = torch.where(values >= 128, 255 - values, values)
        assert torch.equal(retouched(backend, values, plain(16, solarize=1.0), untouched(1, solarize=[True])), expected)

    def test_grey_makes_all_channels_the_luminance(self, backend):
        image = noise(1, 3, 8, 8)
        luminance = torch.einsum("c,nchw->nhw", torch.tensor([0.299, 0.587, 0.114]), image.float())
        found = retouched(backend, image, plain(8, grey=1.0), untouched(1, grey=[True]))
        assert (found.float() - luminance[:, None]).abs().max() <= ROUNDING[backend]

    @pytest.mark.parametrize("channels", [1, 5])
    def test_what_is_about_colour_leaves_other_images_alone(self, backend, channels):
        image = noise(1, channels, 8, 8)
        drawn = untouched(1, jitter=[True], saturation=[0.8], hue=[0.1], grey=[True])
        assert torch.equal(retouched(backend, image, plain(8, jitter=1.0, grey=1.0), drawn), image)

    @pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
    def test_brightness_multiplies(self, backend, factor):
        image = noise(1, 3, 8, 8)
        found = retouched(backend, image, plain(8, jitter=1.0), untouched(1, jitter=[True], brightness=[factor]))
        assert (found - (factor * image.float()).clamp(max=255)).abs().max() <= ROUNDING[backend]

    @pytest.mark.parametrize("channels", [1, 3, 5])
    def test_contrast_pulls_towards_the_mean_grey_value(self, backend, channels):
        """Of all colours together in RGB; of each channel by itself where channels are no colours."""
        image = noise(1, channels, 8, 8, low=60, high=200)
        weights = torch.tensor([0.299, 0.587, 0.114]) if channels == 3 else torch.eye(channels)
        mean = (weights @ image.float().mean(dim=(0, 2, 3))).view(-1, 1, 1)
        found = retouched(backend, image, plain(8, jitter=1.0), untouched(1, jitter=[True], contrast=[0.7]))
        assert (found - (0.7 * image + 0.3 * mean)).abs().max() <= ROUNDING[backend]

    def test_saturation_pulls_towards_grey_of_the_same_luminance(self, backend):
        image = noise(1, 3, 8, 8, low=60, high=200)
        luminance = torch.einsum("c,nchw->nhw", torch.tensor([0.299, 0.587, 0.114]), image.float())[:, None]
        found = retouched(backend, image, plain(8, jitter=1.0), untouched(1, jitter=[True], saturation=[1.2]))
        assert (found - (1.2 * image - 0.2 * luminance)).abs().max() <= ROUNDING[backend]

    def test_hue_turns_red_to_what_lies_on_the_circle(self, backend):
        red = torch.tensor([200, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
        for shift, expected in [(0.1, (200, 120, 0)), (-0.1, (200, 0, 120)), (1 / 12, (200, 100, 0))]:
            found = retouched(backend, red, plain(4, jitter=1.0), untouched(1, jitter=[True], hue=[shift]))
            assert (found[0, :, 0, 0] - torch.tensor(expected)).abs().max() <= ROUNDING[backend]

    @pytest.mark.parametrize("sigma", [0.3, 1.5, 2.0])
    def test_blur_is_a_gaussian(self, backend, sigma):
        """One bright pixel becomes exp(−d²/2σ²), normalised over the kernel of 13."""
        image = torch.zeros(1, 1, 25, 25, dtype=torch.uint8)
        image[..., 12, 12] = 255
        offsets = torch.arange(25) - 12.0
        line = torch.exp(-(offsets**2) / (2 * sigma**2)) * (offsets.abs() <= 6)
        expected = 255 * torch.outer(line, line) / line.sum() ** 2
        found = retouched(backend, image, plain(25, blur=1.0, blur_kernel=13), untouched(1, sigma=[sigma]))
        assert (found.float() - expected).abs().max() <= ROUNDING[backend]

    def test_strokes_are_blended_with_the_brightest_or_darkest_neighbour(self, backend):
        images = noise(2, 3, 9, 9)
        drawn = untouched(2, stroke=[0.3, -0.7])
        brightest, darkest = (torch.from_numpy(most(images.numpy(), (1, 1, 3, 3), mode="nearest")) for most in MOST)
        expected = torch.stack([0.7 * images[0] + 0.3 * brightest[0], 0.3 * images[1] + 0.7 * darkest[1]])
        assert (retouched(backend, images, plain(9, stroke=1.0), drawn) - expected).abs().max() <= ROUNDING[backend]

    def test_colours_are_changed_in_the_order_drawn(self, backend):
        """Twice as bright saturates at white before the contrast is halved, and does not after it."""
        image = torch.tensor([[100.0, 200.0]]).repeat(1, 4, 2).to(torch.uint8).expand(2, 3, 4, 4)
        drawn = untouched(
            2, jitter=[True] * 2, brightness=[2.0] * 2, contrast=[0.5] * 2, order=[[0, 1, 2, 3], [1, 0, 2, 3]]
        )
        first, second = retouched(backend, image, plain(4, jitter=1.0), drawn)[:, 0, 0, :2]
        assert (first - torch.tensor([213.75, 241.25])).abs().max() <= ROUNDING[backend]  # 200 and 255, mean 227.5
        assert (second - torch.tensor([250.0, 255.0])).abs().max() <= 2 * ROUNDING[backend]  # 125 and 175, doubled

    def test_pixels_of_images_not_chosen_stay_as_they_are(self, backend):
        images = noise(12, 3, 24, 24)
        drawn = draw_appearance([EVERYTHING], keys_of(12)).flat(slice(0, 1))
        chosen = np.arange(12) % 3 == 0
        some = drawn._replace(
            stroke=drawn.stroke * chosen,
            jitter=chosen,
            grey=chosen,
            sigma=drawn.sigma * chosen,
            solarize=chosen,
        )
        found = retouched(backend, images, EVERYTHING, some)
        changed = np.array([not torch.equal(one, other) for one, other in zip(found, images, strict=True)])
        assert np.array_equal(changed, chosen)


MOST = (ndimage.maximum_filter, ndimage.minimum_filter)


def by_torchvision(image: Tensor, kernel: int, drawn: Appearance) -> Tensor:
    """What is drawn done to one crop (C, size, size) uint8, in double precision, rounded nowhere: 0 … 255."""
    pixels = image.double() / 255
    if drawn.stroke[0]:
        most = MOST[int(drawn.stroke[0] < 0)](pixels.numpy(), (1, 3, 3), mode="nearest")
        pixels = torch.lerp(pixels, torch.from_numpy(most), abs(float(drawn.stroke[0])))
    if len(image) in (1, 3):
        return 255 * colours_by_torchvision(pixels, kernel, drawn)
    return 255 * torch.cat([colours_by_torchvision(channel[None], kernel, drawn) for channel in pixels])


def colours_by_torchvision(pixels: Tensor, kernel: int, drawn: Appearance) -> Tensor:
    changes = (functional.adjust_brightness, functional.adjust_contrast)
    changes += (functional.adjust_saturation, functional.adjust_hue)
    amounts = (drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue)
    for which in drawn.order[0] if drawn.jitter[0] else ():
        pixels = changes[which](pixels, float(amounts[which][0])).double()
    if drawn.grey[0] and len(pixels) == 3:
        pixels = functional.rgb_to_grayscale(pixels, num_output_channels=3)
    if drawn.sigma[0]:
        pixels = functional.gaussian_blur(pixels, [kernel] * 2, [float(drawn.sigma[0])] * 2)
    return functional.solarize(pixels, threshold=127.5 / 255) if drawn.solarize[0] else pixels


ONE_BY_ONE = {
    "stroke": {"stroke"},
    "brightness": {"jitter", "brightness"},
    "contrast": {"jitter", "contrast"},
    "saturation": {"jitter", "saturation"},
    "hue": {"jitter", "hue"},
    "all colours": {"jitter", "brightness", "contrast", "saturation", "hue", "order"},
    "grey": {"grey"},
    "blur": {"sigma"},
    "solarize": {"solarize"},
    "everything": set(Appearance._fields),
}


class TestAgainstTorchvision:
    """torchvision's operations in double precision on one image at a time, rounded at the end."""

    COUNT = 48

    def drawn(self, what: str) -> Appearance:
        """As chance has it for images, but for what is switched off."""
        appearance = draw_appearance([EVERYTHING], keys_of(self.COUNT)).flat(slice(0, 1))
        return untouched(self.COUNT, **{name: getattr(appearance, name) for name in ONE_BY_ONE[what]})

    def expected(self, images: Tensor, drawn: Appearance) -> Tensor:
        rows = [Appearance(*(values[place : place + 1] for values in drawn)) for place in range(len(images))]
        return torch.stack([by_torchvision(image, 13, row) for image, row in zip(images, rows, strict=True)])

    @pytest.mark.parametrize("channels", [1, 3, 5])
    @pytest.mark.parametrize("what", ONE_BY_ONE)
    def test_the_device_differs_by_the_last_rounding_only(self, what, channels):
        images, drawn = noise(self.COUNT, channels, 24, 24), self.drawn(what)
        found = retouched("device", images, EVERYTHING, drawn)
        assert found.dtype == torch.uint8
        # Just below or above 127.5, a pixel is inverted or not: the results are half a level apart each way.
        allowed = 0.51 + 0.5 * drawn.solarize.any()
        assert (found - self.expected(images, drawn)).abs().max() <= allowed

    @pytest.mark.parametrize("channels", [1, 3, 5])
    @pytest.mark.parametrize("what", ONE_BY_ONE)
    def test_workers_differ_by_about_a_level_for_each_operation(self, what, channels):
        """torchvision cuts off fractions after each operation on uint8; the next may blow a lost level up, by 1.4."""
        images, drawn = noise(self.COUNT, channels, 24, 24), self.drawn(what)
        difference = retouched("workers", images, EVERYTHING, drawn) - self.expected(images, drawn)
        steps = {"all colours": 4, "everything": 6}.get(what, 1)
        assert difference.abs().max() <= 1.4 * steps
        assert difference.abs().mean() <= 0.7 * steps

    def test_hue_is_that_of_the_colour_circle(self):
        """Also of greys, and of colours of which two components are equal."""
        levels = torch.tensor([0.0, 40.0, 127.0, 255.0])
        pixels = torch.cartesian_prod(levels, levels, levels).mT.reshape(1, 3, 8, 8)
        for shift in (-0.5, -0.1, 0.0, 0.03, 0.4):
            found = turn_hue(pixels, torch.tensor([shift]))
            for colour, turned in zip(pixels.flatten(2)[0].mT.tolist(), found.flatten(2)[0].mT.tolist(), strict=True):
                hue, saturation, value = colorsys.rgb_to_hsv(*colour)
                assert turned == pytest.approx(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value), abs=1e-3)

    @pytest.mark.parametrize(("size", "kernel"), [(24, 9), (24, 13), (13, 13), (7, 7), (2, 1), (1, 1)])
    def test_blur_also_at_the_edges_of_small_crops(self, size, kernel):
        images, sigmas = noise(5, 3, size, size).float(), torch.tensor([0.1, 0.5, 1.0, 1.7, 2.0])
        found = gaussian_blur(images, sigmas, kernel)
        for image, sigma, blurred in zip(images, sigmas.tolist(), found, strict=True):
            expected = functional.gaussian_blur(image, [kernel] * 2, [sigma] * 2)
            torch.testing.assert_close(blurred, expected, atol=1e-3, rtol=0)


class TestBackendsAgree:
    @pytest.mark.parametrize("channels", [1, 3, 5])
    @pytest.mark.parametrize("options", [{}, {"affine": 1.0, "stroke": 0.5}, {"local_size": 24}, {"local_crops": 0}])
    @pytest.mark.parametrize("name", ["dino", "dinov2", "line_art"])
    def test_whole_views_of_the_same_keys(self, name, options, channels):
        """Levels that torchvision cuts off add up; a wrong draw would differ by tens of levels."""
        spec, keys, images = preset(name, **options), keys_of(24), noise(24, channels, 64, 48)
        ours = DeviceViews(spec)
        found = ours.retouch(ours.cut(canvas_of(images), keys), keys)
        samples = [
            Sample(make_views(image, spec, int(key)), int(key), []) for image, key in zip(images, keys, strict=True)
        ]
        for one, other in zip(found, collate(samples).crops, strict=True):
            difference = (one.float() - other.float()).abs()
            assert difference.mean() <= 1.6
            assert difference.max() <= 12

    @pytest.mark.parametrize("channels", [1, 3, 5])
    def test_an_image_is_retouched_alike_alone_and_among_others(self, channels):
        ours, keys = DeviceViews(preset("dino", stroke=0.5)), keys_of(16)
        crops = [noise(2 * 16, channels, 24, 24), noise(3 * 16, channels, 12, 12)]
        together = ours.retouch(crops, keys)
        for image in range(16):
            alone = ours.retouch([group[image::16] for group in crops], keys[image : image + 1])
            for one, other in zip(alone, together, strict=True):
                assert (one.int() - other[image::16].int()).abs().max() <= 1  # sums in another order round otherwise
                assert (one != other[image::16]).float().mean() < 1e-3

    def test_crops_handed_over_are_left_alone(self):
        ours, crops = DeviceViews(preset("dino", stroke=0.5)), [noise(8, 3, 24, 24), noise(12, 3, 12, 12)]
        before = [group.clone() for group in crops]
        ours.retouch(crops, keys_of(4))
        assert all(torch.equal(one, other) for one, other in zip(crops, before, strict=True))


CHECKERBOARD = (torch.arange(9)[:, None] + torch.arange(9)).remainder(2).mul(255).to(torch.uint8).expand(3, 9, 9)


class TestMeasuredFrequencies:
    """DINOv2's own transform took p for 1 − p; so what happens is counted, not what is asked for."""

    COUNT = 1000

    def changed(self, backend: str, view: View, image: Tensor, seed: int = 0) -> np.ndarray:
        """Of which keys a square image is changed by a view of all of it."""
        keys, spec = keys_of(self.COUNT, seed), MultiCrop((view,), ())
        if backend == "device":
            ours = DeviceViews(spec)
            (views,) = ours.retouch(ours.cut(canvas_of([image] * self.COUNT), keys), keys)
        else:
            views = torch.cat([make_views(image, spec, key)[0][None] for key in keys.tolist()])
        return (views != image).flatten(1).any(dim=1).numpy()

    def frequency(self, view: View, image: Tensor) -> float:
        """Of changed views; both backends change those of the same keys."""
        by_workers, by_device = (self.changed(backend, view, image) for backend in BACKENDS)
        assert np.array_equal(by_workers, by_device)
        return float(by_workers.mean())

    @pytest.mark.parametrize("name", ["dino", "dinov2"])
    @pytest.mark.parametrize(("inverted", "expected"), [(False, (1.0, 0.1, 0.5)), (True, (0.0, 0.9, 0.5))])
    def test_blur(self, name, inverted, expected):
        spec = preset(name, inverted_blur=inverted)
        for view, share in zip((*spec.globals_, spec.locals_[0]), expected, strict=True):
            # Only the blur, and always wide enough to be seen.
            only = plain(9, blur=view.blur, blur_sigma=(2.0, 2.0), blur_kernel=view.blur_kernel)
            assert self.frequency(only, CHECKERBOARD) == pytest.approx(share, abs=0 if share in (0, 1) else 0.05)

    @pytest.mark.parametrize(("what", "share"), [("flip", 0.5), ("jitter", 0.8), ("grey", 0.2), ("solarize", 0.2)])
    def test_everything_else(self, what, share):
        second = preset("dino").globals_[1]
        assert getattr(second, what) == share
        assert self.frequency(replace(plain(8), **{what: share}), noise(3, 8, 8)) == pytest.approx(share, abs=0.05)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_jitter_keeps_within_its_strengths(self, backend):
        """Brightness and contrast of a grey constant: at most a factor of 1.4, at least 0.6."""
        constants = torch.full((300, 3, 8, 8), 100, dtype=torch.uint8)
        view = plain(8, jitter=1.0)
        drawn = draw_appearance([view], keys_of(300)).flat(slice(0, 1))
        levels = retouched(backend, constants, view, drawn).float().mean(dim=(1, 2, 3))
        assert 60 - 1 <= levels.min() < 65
        assert 135 < levels.max() <= 140 + 1
