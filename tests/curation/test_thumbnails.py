"""Thumbnails: copies of real pictures are told from other pictures."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dino.curation import thumbnails as wholes
from dino.curation.thumbnails import MIDDLE, SIDE, smaller, thumbnail
from tests.curation.pictures import COPIES, digits, photographs, small, thumbnails

LEAST = 0.9  # above what pictures of different things have in common


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Of thumbnails, or of such as it takes."""
    return wholes.similarity(*(smaller(one, MIDDLE) if one.shape[-1] == SIDE else one for one in (first, second)))[0]


class TestThumbnail:
    def test_of_one_colour(self):
        """The mean of the channels, rounded."""
        image = torch.tensor([10, 20, 31], dtype=torch.uint8)[:, None, None].expand(3, 50, 70)
        found = thumbnail(image)
        assert (found.shape, found.dtype) == ((64, 64), torch.uint8)
        assert (found == 20).all()

    def test_equals_pillow(self):
        for image in photographs():
            grey = Image.fromarray(np.asarray(image).astype(np.float32).mean(axis=2))
            peer = np.asarray(grey.resize((64, 64), Image.Resampling.BILINEAR))
            np.testing.assert_allclose(small(image).numpy(), peer, rtol=0, atol=0.51)

    @pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (7, 7), (32, 32), (1000, 33)])
    def test_any_size(self, height, width):
        found = thumbnail(torch.full((3, height, width), 200, dtype=torch.uint8))
        assert found.shape == (64, 64)
        assert (found == 200).all()


def greatest_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """NumPy's, over all whole shifts, of what the two then have in common."""
    padded = np.pad(other.astype(float), 3, constant_values=np.nan)
    shifted = [padded[y : y + 32, x : x + 32] for y in range(7) for x in range(7)]
    return max(np.corrcoef(one[~np.isnan(part)], part[~np.isnan(part)])[0, 1] for part in shifted)


class TestSimilarity:
    @pytest.mark.parametrize(
        ("copy", "drawings"),
        [
            *((copy, False) for copy in COPIES),
            *((copy, True) for copy in ("JPEG of quality 90", "half as large", "darker", "without its left 3 %")),
        ],
    )
    def test_copies_are_similar(self, copy, drawings):
        images = digits()[0] if drawings else photographs()
        first, second = thumbnails(images), thumbnails([COPIES[copy](image) for image in images])
        assert similarity(first, second).min() >= LEAST
        assert similarity(second, first).min() >= LEAST

    def test_other_photographs_are_not(self):
        images = thumbnails(photographs())
        for number, image in enumerate(images):
            found = similarity(image.expand_as(images), images)
            assert found[number] == pytest.approx(1, abs=1e-5)
            found[number] = 0
            assert found.max() < 0.8

    def test_other_digits_are_not(self):
        """Only of the same class do some come near."""
        images, classes = digits()
        images = thumbnails(images)
        for image, own in zip(images, classes, strict=True):
            found = similarity(image.expand_as(images), images)
            assert found[torch.from_numpy(classes != own)].max() < LEAST

    @pytest.mark.parametrize("down", [-4, -3, 0, 1, 3, 4])
    @pytest.mark.parametrize("right", [-4, -3, 0, 2, 3])
    def test_shifts_of_up_to_three_pixels_are_undone(self, down, right):
        noise = torch.randint(256, (40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        first, second = noise[4:36, 4:36], noise[4 + down : 36 + down, 4 + right : 36 + right]
        found = float(similarity(first[None], second[None]))
        if max(abs(down), abs(right)) <= 3:
            assert found == pytest.approx(1, abs=1e-5)
        else:
            assert found < 0.2

    def test_is_the_greatest_correlation(self):
        """Over whole shifts; between them it may be a little greater."""
        pixels = np.random.default_rng(0).integers(256, size=(2, 10, 32, 32), dtype=np.uint8)
        pixels[1] = 0.5 * pixels[0] + 0.5 * pixels[1]
        expected = np.array([greatest_correlation(one, other) for one, other in zip(*pixels, strict=True)])
        found = similarity(*torch.from_numpy(pixels)).numpy()
        assert (found >= expected - 1e-5).all()
        assert (found <= expected + 0.05).all()
        assert 0.5 < found.min() < found.max() < 0.9

    @pytest.mark.parametrize("shift", range(11))
    def test_thin_strokes_between_whole_shifts(self, shift):
        """Lines one pixel of a thumbnail wide, apart by quarters of one: at halves they correlate least."""
        ink = np.full((128 + shift, 128 + shift), 255, dtype=np.uint8)
        for start, end in ((20, 30), (50, 54), (90, 94)):
            ink[start : start + 4, 20:100] = 0
            ink[20:100, end : end + 4] = 0
        parts = [Image.fromarray(part) for part in (ink[:128, :128], ink[shift:, shift:])]
        first, second = smaller(thumbnails(parts), MIDDLE)
        whole, found = greatest_correlation(first.numpy(), second.numpy()), float(similarity(first[None], second[None]))
        assert whole - 1e-5 <= found <= 1
        assert found > 0.85
        if shift % 4 == 2:
            assert found > whole + 0.05

    def test_negatives_are_unlike(self):
        image = thumbnails(photographs()[:2])
        assert similarity(image, 255 - image).max() < 0.5

    def test_images_of_one_grey(self):
        """Are alike, and like nothing else."""
        flat, picture = torch.full((1, 64, 64), 77, dtype=torch.uint8), thumbnails(photographs()[:1])
        first, second = torch.cat([flat, flat, picture, picture]), torch.cat([flat, picture, flat, picture])
        torch.testing.assert_close(similarity(first, second), torch.tensor([1.0, 0, 0, 1]), rtol=0, atol=1e-6)
        assert similarity(flat, 255 - flat).tolist() == [0]

    def test_all_but_one_grey(self):
        """The noise of a JPEG of a blank page says nothing, not even where it is that of another picture."""
        generator = torch.Generator().manual_seed(0)
        noise = [(torch.rand(1, 32, 32, generator=generator) < 0.02).byte() + 254 for _ in range(2)]
        assert similarity(*noise).tolist() == [1]
        ink = (noise[0] - 254) * 255
        assert similarity(noise[0], ink).tolist() == similarity(ink, noise[0]).tolist() == [0]

    def test_what_is_drawn_at_the_border_counts(self):
        """A page that is blank but for its margin is like itself."""
        page = torch.full((1, 32, 32), 255, dtype=torch.uint8)
        page[:, 1, 2:30:3] = 0
        assert similarity(page, page).item() == pytest.approx(1, abs=1e-4)

    def test_none(self):
        none = torch.empty(0, 32, 32, dtype=torch.uint8)
        assert similarity(none, none).shape == (0,)
