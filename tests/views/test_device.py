"""Crops and small affine changes of whole batches: those of torch and torchvision, and those that workers make."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from material import canvas_of, keys_of, noise, preset, still
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from dino.data import Canvas
from dino.views import DeviceViews, MultiCrop, View, collate
from dino.views.dataset import Sample
from dino.views.device import crop_resize, crop_resize_singly, resampling
from dino.views.draws import Geometry, draw_geometry
from dino.views.operations import small_affine
from dino.views.pipeline import cut_views, to_bytes

SHAPES = [(3, 20, 24), (1, 64, 80), (5, 200, 150), (3, 4, 4), (3, 8, 90), (2, 333, 61)]
RAGGED = [noise(3, height, width, seed=height) for height, width in [(20, 24), (33, 12), (4, 5), (60, 60), (9, 41)]]


def by_workers(images: list[Tensor] | Tensor, spec: MultiCrop, keys: np.ndarray) -> list[Tensor]:
    cut = [cut_views(image, spec, key) for image, key in zip(images, keys.tolist(), strict=True)]
    return collate([Sample(views, 0, []) for views in cut]).crops


def drawn(shape: tuple[int, ...], images: int, view: View) -> Geometry:
    """Three views of each of some images of one shape."""
    return draw_geometry([view] * 3, keys_of(images), np.array([shape[1:]] * images)).flat(slice(0, 3))


class TestCrops:
    @pytest.mark.parametrize("size", [1, 7, 24, 96])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_matrix_products_are_torchs_bicubic_with_antialiasing(self, shape, size):
        """Of the crop by itself: nothing around it shows; enlarged, reduced, mirrored; of 255 levels."""
        images = noise(4, *shape).float()
        chosen = drawn(shape, 4, View(size, (0.05, 1.0), flip=0.5))
        assert 0 < chosen.flip.sum() < len(chosen.flip)
        found = crop_resize(images, chosen.box, chosen.flip, size)
        assert found.shape == (12, shape[0], size, size)
        for n, (top, left, height, width) in enumerate(chosen.box):
            crop = images[n % 4, :, top : top + height, left : left + width][None]
            expected = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]
            expected = expected.flip(-1) if chosen.flip[n] else expected
            torch.testing.assert_close(found[n], expected, atol=0.01, rtol=0)

    def test_a_line_is_resampled_for_each_length_and_place(self):
        """Every start and length of a short line, to every size: rows of weights are torch's, and 0 outside."""
        pixels = 12
        places = [(start, length) for length in range(1, pixels + 1) for start in range(pixels - length + 1)]
        start, length = np.array(places).T
        for size in range(1, 16):
            found = resampling(start, length, size, pixels, torch.device("cpu"))
            for (first, extent), matrix in zip(places, found, strict=True):
                # One bright pixel at each place, in rows: of images one pixel wide torch 2.14 gets columns wrong.
                line = torch.eye(extent)[:, None, None, :]
                expected = torch.zeros(size, pixels)
                scaled = F.interpolate(line, (1, size), mode="bicubic", antialias=True)[:, 0, 0]
                expected[:, first : first + extent] = scaled.mT
                torch.testing.assert_close(matrix, expected, atol=2e-5, rtol=0)

    @pytest.mark.parametrize("size", [12, 24, 96])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_matrix_products_are_the_kernel_for_bytes_up_to_rounding(self, shape, size):
        """Bicubic weights overshoot by less than these levels leave; the kernel rounds between its two passes."""
        images, chosen = noise(20, *shape, low=64, high=192), drawn(shape, 20, View(size, (0.05, 1.0), flip=0.5))
        one = to_bytes(crop_resize(images.float(), chosen.box, chosen.flip, size)).float()
        other = crop_resize_singly(images, chosen.box, chosen.flip, size).float()
        assert (one - other).abs().max() <= 1
        assert (one - other).abs().mean() < 0.3

    @pytest.mark.parametrize("shape", SHAPES)
    def test_where_black_and_white_meet_the_kernel_clamps_between_its_passes(self, shape):
        images, chosen = noise(20, *shape), drawn(shape, 20, View(24, (0.05, 1.0), flip=0.5))
        one = to_bytes(crop_resize(images.float(), chosen.box, chosen.flip, 24)).float()
        other = crop_resize_singly(images, chosen.box, chosen.flip, 24).float()
        assert (one - other).abs().max() <= 32
        assert (one - other).abs().mean() < 0.4

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("options", [{}, {"local_size": 24}, {"local_crops": 0}])
    def test_crops_are_those_of_workers(self, shape, options):
        """On a CPU, pixel for pixel: there both use one kernel."""
        images, keys = noise(8, *shape), keys_of(8)
        for name in ("dino", "dinov2"):
            found = DeviceViews(preset(name, **options)).cut(canvas_of(images), keys)
            for one, other in zip(found, by_workers(images, preset(name, **options), keys), strict=True):
                assert torch.equal(one, other)

    def test_crops_of_images_of_different_sizes_are_those_of_workers(self):
        keys = keys_of(len(RAGGED))
        found = DeviceViews(preset("dino")).cut(canvas_of(RAGGED), keys)
        for one, other in zip(found, by_workers(RAGGED, preset("dino"), keys), strict=True):
            assert torch.equal(one, other)

    def test_matrix_products_see_nothing_of_the_canvas_around_an_image(self):
        sizes = np.array([image.shape[1:] for image in RAGGED])
        chosen = draw_geometry(preset("dino").globals_, keys_of(len(RAGGED)), sizes).flat(slice(0, 2))
        canvas = canvas_of(RAGGED).pixels.float()
        inside = torch.stack([F.pad(torch.ones(1, h, w), (0, 60 - w, 0, 60 - h)) for h, w in sizes]).bool()
        found = [crop_resize(torch.where(inside, canvas, level), chosen.box, chosen.flip, 24) for level in (0.0, 1e4)]
        assert torch.equal(*found)


class TestAffine:
    LEVELS = 0.02  # by which fp32 coordinates move noise of 255 levels

    def expected(self, image: Tensor, background: Tensor, move: Geometry) -> Tensor:
        """torchvision's, in double precision, of an image in the middle of much background."""
        height, width = image.shape[1:]
        margin = max(height, width)
        page = background[:, None, None].repeat(1, height + 2 * margin, width + 2 * margin).double()
        page[:, margin:-margin, margin:-margin] = image
        (down, right), angle, shear = move.shift[0], np.degrees(move.angle[0]), np.degrees(move.shear[0])
        shift, zoom = [float(right * width), float(down * height)], float(move.zoom[0])
        moved = functional.affine(page, float(angle), shift, zoom, [float(shear), 0.0], InterpolationMode.BILINEAR)
        return moved[:, margin:-margin, margin:-margin].float()

    def moves(self, images: list[Tensor], views: int = 2) -> Geometry:
        sizes = np.array([image.shape[1:] for image in images])
        view = View(8, (1.0, 1.0), affine=1.0)
        return draw_geometry([view] * views, keys_of(len(images)), sizes).flat(slice(0, views))

    def moved(self, canvas: Canvas, moves: Geometry) -> Tensor:
        sizes = torch.from_numpy(canvas.sizes).float()
        return small_affine(canvas.pixels.float(), canvas.background.float(), moves, sizes)

    @pytest.mark.parametrize("shape", [(3, 20, 24), (1, 33, 40), (1, 105, 105), (5, 40, 9), (3, 4, 4)])
    def test_moves_are_torchvisions(self, shape):
        """Also at the edges, where what comes in is background; each view and image by its own draw."""
        images = list(noise(6, *shape))
        canvas, moves = canvas_of(images), self.moves(images)
        for n, found in enumerate(self.moved(canvas, moves)):
            move = Geometry(*(values[n : n + 1] for values in moves))
            expected = self.expected(images[n % 6], canvas.background[n % 6], move)
            torch.testing.assert_close(found, expected, atol=self.LEVELS, rtol=0)

    def test_one_change_at_a_time_goes_the_way_documented(self):
        """Down and right for a positive shift, larger for a zoom above 1, by hand."""
        image = torch.zeros(1, 1, 20, 20)
        image[..., 10, 10] = 255
        background, size = torch.zeros(1, 1), torch.tensor([[20.0, 20.0]])
        found = small_affine(image, background, still([(20, 20)], shift=[(0.1, 0.25)]), size)
        assert torch.equal(found.round(), image.roll((2, 5), dims=(2, 3)))
        square = torch.zeros(1, 1, 20, 20)
        square[..., 6:14, 6:14] = 255
        area = [
            float(small_affine(square, background, still([(20, 20)], zoom=[zoom]), size).sum()) for zoom in (1, 1.5)
        ]
        assert area[1] / area[0] == pytest.approx(1.5**2, rel=0.01)

    def test_an_image_on_a_larger_canvas_moves_as_on_its_own(self):
        canvas, moves = canvas_of(RAGGED), self.moves(RAGGED, views=1)
        together = self.moved(canvas, moves)
        for n, image in enumerate(RAGGED):
            alone = self.moved(canvas_of([image]), Geometry(*(values[n : n + 1] for values in moves)))[0]
            height, width = image.shape[1:]
            torch.testing.assert_close(together[n, :, :height, :width], alone, atol=self.LEVELS, rtol=0)

    @pytest.mark.parametrize("name", ["dino", "line_art"])
    @pytest.mark.parametrize("channels", [1, 3, 5])
    def test_crops_of_moved_images_are_those_of_workers(self, name, channels):
        """Of one size and of many: the kernel for bytes rounds between its passes, and clamps."""
        spec, ours = preset(name, affine=1.0), DeviceViews(preset(name, affine=1.0))
        ragged = [image[:1].expand(channels, -1, -1) for image in RAGGED]
        for images in (ragged, list(noise(8, channels, 40, 50))):
            keys = keys_of(len(images))
            for one, other in zip(ours.cut(canvas_of(images), keys), by_workers(images, spec, keys), strict=True):
                difference = (one.float() - other.float()).abs()
                assert difference.mean() < 0.3
                assert difference.max() <= 16

    def test_views_of_one_size_may_differ_in_strength(self):
        """A view without affine changes is cut from the image as it is."""
        moved, as_it_is = View(24, (0.3, 1.0), flip=0.5, affine=1.0), View(24, (0.3, 1.0), flip=0.5)
        images, keys, spec = noise(8, 3, 40, 50, low=64, high=192), keys_of(8), MultiCrop((moved, as_it_is), ())
        (found,) = DeviceViews(spec).cut(canvas_of(images), keys)
        (other,) = by_workers(images, spec, keys)
        assert (found.int() - other.int()).abs().max() <= 1

    def test_strength_0_moves_nothing(self):
        images = list(noise(4, 3, 20, 24))
        moves = draw_geometry([View(8, (1.0, 1.0))], keys_of(4), np.array([(20, 24)] * 4)).flat(slice(0, 1))
        assert torch.equal(self.moved(canvas_of(images), moves).round(), torch.stack(images).float())


class TestBatches:
    @pytest.mark.parametrize("affine", [0.0, 1.0])
    def test_an_image_is_cut_alike_alone_and_among_others(self, affine):
        ours, keys = DeviceViews(preset("dino", affine=affine)), keys_of(len(RAGGED))
        together = ours.cut(canvas_of(RAGGED), keys)
        for n, image in enumerate(RAGGED):
            alone = ours.cut(canvas_of([image]), keys[n : n + 1])
            for one, other in zip(alone, together, strict=True):
                assert (one.int() - other[n :: len(RAGGED)].int()).abs().max() <= 1  # other sums round otherwise
                assert (one != other[n :: len(RAGGED)]).float().mean() < 0.01

    def test_crops_come_view_by_view_in_the_order_of_images(self):
        """Image n is the constant 40 n; so every crop of it is."""
        images = [torch.full((1, 10 + n, 12), 40 * n, dtype=torch.uint8) for n in range(5)]
        for affine in (0.0, 1.0):
            globals_, locals_ = DeviceViews(preset("dino", affine=affine)).cut(canvas_of(images), keys_of(5))
            assert globals_.flatten(1).float().mean(dim=1).tolist() == [40.0 * n for n in range(5)] * 2
            assert locals_.flatten(1).float().mean(dim=1).tolist() == [40.0 * n for n in range(5)] * 3

    @pytest.mark.parametrize("options", [{}, {"affine": 1.0, "stroke": 0.5}])
    def test_views_are_a_function_of_keys_and_leave_random_states_and_images_alone(self, options):
        ours, keys, canvas = DeviceViews(preset("dino", **options)), keys_of(4), canvas_of(RAGGED[:4])
        pixels = canvas.pixels.clone()
        first = ours.retouch(ours.cut(canvas, keys), keys)
        torch.manual_seed(7)
        state = torch.get_rng_state()
        again = ours.retouch(ours.cut(canvas, keys), keys)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(canvas.pixels, pixels)
        other = ours.retouch(ours.cut(canvas, keys + np.uint64(1)), keys + np.uint64(1))
        for one, two, three in zip(first, again, other, strict=True):
            assert torch.equal(one, two)
            assert not torch.equal(one, three)

    def test_a_spec_of_only_one_view(self):
        only = replace(preset("dino").globals_[0], flip=1.0)
        (found,) = DeviceViews(MultiCrop((only,), ())).cut(canvas_of(RAGGED), keys_of(len(RAGGED)))
        assert found.shape == (len(RAGGED), 3, 24, 24)
