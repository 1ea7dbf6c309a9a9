"""Crops and affine changes of whole batches are those of torch and torchvision."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from material import PRESETS, RAGGED, canvas_of, drawn, keys_of, move, noise, only, preset
from oracle import moved, oracle_crops, row

from dino.views import DeviceViews, MultiCrop, View
from dino.views.crop import crop_batch, crop_singly, draw_boxes, line_weights, resampling_of, taps_of
from dino.views.draws import Numbers
from dino.views.plan import to_levels

SHAPES = [(3, 20, 24), (1, 64, 80), (5, 100, 75), (3, 4, 4), (3, 8, 90), (2, 333, 61)]


def boxes_of(shape: tuple[int, ...], images: int, views: int = 3) -> np.ndarray:
    """Some crops of each of some images of one shape, (V·B, 4)."""
    numbers = Numbers(keys_of(images), range(views))
    return draw_boxes(numbers, [View(8, (0.05, 1.0))] * views, np.array([shape[1:]] * images)).reshape(-1, 4)


def by_products(pixels: torch.Tensor, boxes: np.ndarray, size: int) -> torch.Tensor:
    return crop_batch(
        pixels, resampling_of(torch.from_numpy(boxes).float(), size, taps_of(boxes, size), *pixels.shape[2:])
    )


class TestCrops:
    @pytest.mark.parametrize("size", [1, 7, 24, 96])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_matrix_products_are_torchs_bicubic_with_antialiasing(self, shape, size):
        """Of the crop by itself: nothing around it shows; enlarged and reduced; of 255 levels."""
        images, boxes = noise(4, *shape).float(), boxes_of(shape, 4)
        crops = by_products(images, boxes, size)
        assert crops.shape == (12, shape[0], size, size)
        for n, (top, left, height, width) in enumerate(boxes):
            part = images[n % 4, :, top : top + height, left : left + width][None]
            expected = F.interpolate(part, (size, size), mode="bicubic", antialias=True)[0]
            torch.testing.assert_close(crops[n], expected, atol=0.01, rtol=0)

    def test_a_line_is_resampled_for_each_length_and_start(self):
        """Every start and length of a short line, to every size: rows of weights are torch's, and 0 outside."""
        pixels = 12
        parts = [(start, length) for length in range(1, pixels + 1) for start in range(pixels - length + 1)]
        start, length = torch.tensor(parts).float().mT
        for size in range(1, 16):
            matrices = line_weights(start, length, size, pixels, taps=4 * pixels + 1)
            for (first, extent), matrix in zip(parts, matrices, strict=True):
                # One bright pixel at each place, in rows: of images one pixel wide torch 2.14 gets columns wrong.
                line = torch.eye(extent)[:, None, None, :]
                expected = torch.zeros(size, pixels)
                scaled = F.interpolate(line, (1, size), mode="bicubic", antialias=True)[:, 0, 0]
                expected[:, first : first + extent] = scaled.mT
                torch.testing.assert_close(matrix, expected, atol=2e-5, rtol=0)

    @pytest.mark.parametrize(
        ("low", "high", "largest", "mean"),
        [
            (64, 192, 1, 0.3),  # bicubic weights overshoot by less than these levels leave
            (0, 256, 32, 0.4),  # where black and white meet, the kernel clamps between its two passes
        ],
    )
    @pytest.mark.parametrize("shape", SHAPES)
    def test_matrix_products_are_the_kernel_for_bytes_up_to_rounding(self, shape, low, high, largest, mean):
        images, boxes = noise(20, *shape, low=low, high=high), boxes_of(shape, 20)
        for size in (12, 24, 96):
            products = to_levels(by_products(images.float(), boxes, size), torch.uint8).float()
            difference = (products - crop_singly(images, boxes, size).float()).abs()
            assert difference.max() <= largest
            assert difference.mean() < mean

    def test_matrix_products_see_nothing_of_the_canvas_around_an_image(self):
        canvas, views = canvas_of(RAGGED), preset("dino").globals_
        boxes = draw_boxes(Numbers(keys_of(len(RAGGED)), range(2)), views, canvas.sizes).reshape(-1, 4)
        inside = torch.stack([F.pad(torch.ones(1, h, w), (0, 60 - w, 0, 60 - h)) for h, w in canvas.sizes]).bool()
        dark, bright = (torch.where(inside, canvas.pixels.float(), level) for level in (0.0, 1e4))
        assert torch.equal(by_products(dark, boxes, 24), by_products(bright, boxes, 24))


class TestAgainstTorchvision:
    def difference(self, spec: MultiCrop, images: list[torch.Tensor]) -> torch.Tensor:
        """Levels by which crops differ from the oracle's, flat."""
        keys = keys_of(len(images))
        ours = DeviceViews(spec).crop(canvas_of(images), keys)
        theirs = [oracle_crops(spec, image, key) for image, key in zip(images, keys.tolist(), strict=True)]
        differences = []
        for crops, group in zip(ours, spec.groups, strict=True):
            expected = torch.stack([views[index] for index in group.indices for views in theirs])
            differences.append((crops.float() - expected.float()).abs().flatten())
        return torch.cat(differences)

    @pytest.mark.parametrize("settings", [{}, {"local_size": 24}, {"local_crops": 0}])
    def test_crops_are_those_of_torchvision(self, settings):
        """Pixel for pixel on a CPU, flips too, of images of any size."""
        for name in ("dino", "dinov2"):
            for shape in SHAPES:
                assert not self.difference(preset(name, **settings), list(noise(4, *shape))).any()
            assert not self.difference(preset(name, **settings), RAGGED).any()

    @pytest.mark.parametrize("settings", [{"rotate": 0.75}, {"rotate": 1.0, "vertical_flip": 0.5, "flip": 1.0}])
    def test_crops_are_turned_as_by_torchvision(self, settings):
        for images in (list(noise(8, 3, 30, 40)), RAGGED):
            assert not self.difference(preset("dino", **settings), images).any()

    @pytest.mark.parametrize("name", ["dino", "line_art"])
    @pytest.mark.parametrize("channels", [1, 3, 5])
    def test_crops_of_moved_images_are_those_of_torchvision(self, name, channels):
        """Of one size and of many: the kernel for bytes rounds between its passes, and clamps."""
        for images in ([image[:1].expand(channels, -1, -1) for image in RAGGED], list(noise(8, channels, 40, 50))):
            difference = self.difference(preset(name, affine=1.0), images)
            assert difference.mean() < 0.3
            assert difference.max() <= 32

    def test_views_of_one_size_may_differ_in_strength(self):
        """A view without affine changes is cropped from the image as it is."""
        views = (View(24, (0.3, 1.0), {"flip": 0.5, "affine": 1.0}), View(24, (0.3, 1.0), {"flip": 0.5}))
        assert self.difference(MultiCrop(views, ()), list(noise(8, 3, 40, 50, low=64, high=192))).max() <= 1


class TestAffine:
    LEVELS = 0.02  # by which fp32 coordinates move noise of 255 levels

    def draw(self, images: int) -> dict[str, np.ndarray]:
        return drawn([View(8, (1.0, 1.0), {"affine": 1.0})], keys_of(images))["affine"]

    @pytest.mark.parametrize("shape", [(3, 20, 24), (1, 33, 40), (1, 105, 105), (5, 40, 9), (3, 4, 4)])
    def test_moves_are_torchvisions(self, shape):
        """Also at the edges, where what comes in is background; each image by its own draw."""
        images, draw = noise(12, *shape), self.draw(12)
        background = canvas_of(list(images)).background
        for n, ours in enumerate(move(list(images), **draw)):
            expected = moved(images[n], background[n], row(draw, n)).float()
            torch.testing.assert_close(ours, expected, atol=self.LEVELS, rtol=0)

    def test_one_change_at_a_time_goes_the_way_documented(self):
        """Down and right for a positive shift, larger for a zoom above 1, by hand."""
        point, square = torch.zeros(2, 1, 20, 20, dtype=torch.uint8)
        point[..., 10, 10], square[..., 6:14, 6:14] = 255, 255
        assert torch.equal(move([point], shift=[(0.1, 0.25)]).round()[0], point.float().roll((2, 5), dims=(1, 2)))
        assert move([square], zoom=[1.5]).sum() / square.sum() == pytest.approx(1.5**2, rel=0.01)

    def test_an_image_on_a_larger_canvas_moves_as_on_its_own(self):
        draw = self.draw(len(RAGGED))
        for n, (together, image) in enumerate(zip(move(RAGGED, **draw), RAGGED, strict=True)):
            (alone,) = move([image], **row(draw, n))
            height, width = image.shape[1:]
            torch.testing.assert_close(together[:, :height, :width], alone, atol=self.LEVELS, rtol=0)

    @pytest.mark.parametrize("level", [0, 255, 100])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_a_blank_page_stays_blank(self, level, channels):
        """White stays white and black black: no seam shows where the page ends and the background comes in."""
        blank = torch.full((40, channels, 21, 17), level, dtype=torch.uint8)
        for crops in DeviceViews(preset("line_art")).crop(canvas_of(list(blank)), keys_of(40)):
            assert crops.unique().tolist() == [level]


class TestBatches:
    @pytest.mark.parametrize("affine", [0.0, 1.0])
    def test_an_image_is_cropped_alike_alone_and_among_others(self, affine):
        ours, keys = DeviceViews(preset("dino", affine=affine)), keys_of(len(RAGGED))
        together = ours.crop(canvas_of(RAGGED), keys)
        for n, image in enumerate(RAGGED):
            alone = ours.crop(canvas_of([image]), keys[n : n + 1])
            for one, other in zip(alone, together, strict=True):
                assert (one.int() - other[n :: len(RAGGED)].int()).abs().max() <= 1  # other sums round otherwise
                assert (one != other[n :: len(RAGGED)]).float().mean() < 0.01

    def test_crops_come_view_by_view_in_the_order_of_images(self):
        """Image n is the constant 40 n; so every crop of it is."""
        images = [torch.full((1, 10 + n, 12), 40 * n, dtype=torch.uint8) for n in range(5)]
        for affine in (0.0, 1.0):
            globals_, locals_ = DeviceViews(preset("dino", affine=affine)).crop(canvas_of(images), keys_of(5))
            assert globals_.flatten(1).float().mean(dim=1).tolist() == [40.0 * n for n in range(5)] * 2
            assert locals_.flatten(1).float().mean(dim=1).tolist() == [40.0 * n for n in range(5)] * 3

    def test_a_spec_of_only_one_view(self):
        (crops,) = DeviceViews(only(preset("dino").globals_[0])).crop(canvas_of(RAGGED), keys_of(len(RAGGED)))
        assert crops.shape == (len(RAGGED), 3, 24, 24)

    @pytest.mark.parametrize("name", PRESETS)
    @pytest.mark.parametrize("channels", [1, 2, 3, 5])
    @pytest.mark.parametrize("size", [(30, 40), (5, 7), (4, 4), (8, 90)])
    def test_any_image_gives_every_view(self, name, channels, size):
        """Also images smaller than a crop, and far from square; crops of one pixel too."""
        for local_size in (12, 1):
            ours = DeviceViews(preset(name, affine=1.0, stroke=0.5, local_size=local_size))
            crops = ours.photometric(ours.crop(canvas_of(noise(5, channels, *size)), keys_of(5)), keys_of(5))
            assert [group.shape for group in crops] == [(10, channels, 24, 24), (15, channels, local_size, local_size)]
            assert {group.dtype for group in crops} == {torch.uint8}
