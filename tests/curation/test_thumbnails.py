"""Thumbnails: copies of real pictures are told from other pictures."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

from dino.curation import thumbnails as wholes
from dino.curation.duplicates import groups, originals, same_pixels
from dino.curation.thumbnails import MIDDLE, SIDE, confirmed, smaller, thumbnail

LEAST = 0.9  # what the entry point asks for unless told otherwise


def photographs() -> list[Image.Image]:
    """Two whole ones, and six cuts of each as other pictures."""
    whole = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    return whole + [one.crop((x, y, x + 213, y + 213)) for one in whole for y in (0, 213) for x in (0, 213, 426)]


def digits(count: int = 40) -> tuple[list[Image.Image], np.ndarray]:
    found = load_digits()
    pixels = (found.images[:count] * 15.9).astype(np.uint8)
    return [Image.fromarray(one).resize((96, 96), Image.Resampling.BICUBIC) for one in pixels], found.target[:count]


def small(image: Image.Image) -> Tensor:
    pixels = np.array(image)  # (H, W) or (H, W, 3)
    return thumbnail(torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1))


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Of thumbnails, or of such as it takes."""
    return wholes.similarity(*(smaller(one, MIDDLE) if one.shape[-1] == SIDE else one for one in (first, second)))[0]


def thumbnails(images: list[Image.Image]) -> Tensor:
    return torch.stack([small(image) for image in images])


def encoded(image: Image.Image, kind: str = "JPEG", **settings) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return Image.open(file)


def cut(image: Image.Image, left: float, top: float, right: float = 0, bottom: float = 0) -> Image.Image:
    """Without these parts of its width and height."""
    width, height = image.size
    return image.crop(
        (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
    )


COPIES = {
    "JPEG of quality 90": lambda image: encoded(image, quality=90),
    "JPEG of quality 30": lambda image: encoded(image, quality=30),
    "WebP": lambda image: encoded(image, "WEBP", quality=50),
    "half as large": lambda image: image.resize((image.width // 2, image.height // 2)),
    "twice as large": lambda image: image.resize((image.width * 2, image.height * 2)),
    "another shape": lambda image: image.resize((150, 220)),
    "darker": lambda image: image.point(lambda value: value * 0.7),
    "of less contrast": lambda image: image.point(lambda value: 60 + value * 0.5),
    "grey": lambda image: image.convert("L"),
    "without its left 3 %": lambda image: cut(image, 0.03, 0),
    "without its upper and right 2 %": lambda image: cut(image, 0, 0.02, 0.02),
    "without a frame of 1 %, encoded": lambda image: encoded(cut(image, 0.01, 0.01, 0.01, 0.01), quality=50),
    "without a frame of 2 %": lambda image: cut(image, 0.02, 0.02, 0.02, 0.02),
    "in a frame of 1 %": lambda image: ImageOps.expand(image, max(1, image.width // 100)),
}


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


class TestConfirmed:
    @pytest.mark.parametrize("chunk", [1, 3, 4, 4096])
    def test_pairs_that_are_alike(self, chunk, monkeypatch):
        monkeypatch.setattr(wholes, "CHUNK", chunk)
        monkeypatch.setattr(wholes, "CACHED", max(1, chunk // 2))
        images = photographs()
        first = thumbnails(images).numpy()
        second = thumbnails([encoded(image, quality=50) for image in reversed(images)]).numpy()
        pairs = np.array([(one, other) for one in range(4) for other in range(len(images))])
        expected = [one + other == len(images) - 1 for one, other in pairs]
        found = confirmed(pairs, first, second, LEAST)
        assert found.dtype == bool
        assert found.tolist() == expected
        assert confirmed(pairs, first, second, -1.0).all()
        assert not confirmed(pairs, first, second, 1.01).any()

    def test_no_pairs(self):
        found = confirmed(np.empty((0, 2), dtype=np.int64), *np.zeros((2, 3, 64, 64), np.uint8), LEAST)
        assert (found.shape, found.dtype) == ((0,), bool)


class TestParts:
    """Details tell different things in one frame apart, and pass copies; not those in a new frame."""

    @pytest.mark.parametrize("copy", [COPIES[name] for name in COPIES if name != "in a frame of 1 %"])
    def test_copies_of_photographs_pass(self, copy):
        images = photographs()[:2]
        both = thumbnails(images).numpy(), thumbnails([copy(image) for image in images]).numpy()
        assert confirmed(np.array([(0, 0), (1, 1)]), *both, LEAST, 0.9).all()

    def test_other_things_in_one_frame_do_not(self):
        """A disc in a frame, each time with another photograph on it: as wholes they correlate above 0.95."""
        pieces = [image.convert("L").resize((120, 120)) for image in photographs()[2:10]]
        disc = Image.new("L", (120, 120), 0)
        ImageDraw.Draw(disc).ellipse((20, 20, 100, 100), fill=255)
        scenes = []
        for piece in pieces:
            texture = piece.point(lambda value: 20 + value // 5)
            scenes.append(Image.composite(texture, Image.new("L", (120, 120), 250), disc))
        images = thumbnails(scenes)
        pairs = np.array([(one, other) for one in range(8) for other in range(one)])
        assert similarity(images[pairs[:, 0]], images[pairs[:, 1]]).min() > LEAST
        assert confirmed(pairs, images.numpy(), images.numpy(), LEAST).all()
        assert confirmed(pairs, images.numpy(), images.numpy(), LEAST, 0.9).mean() < 0.2  # the frame itself is alike
        itself = np.stack([np.arange(8)] * 2, axis=1)
        assert confirmed(itself, images.numpy(), images.numpy(), LEAST, 0.9).all()

    def test_a_mark_in_a_corner_passes(self):
        images = photographs()[:2]
        marked = [image.copy() for image in images]
        for image in marked:
            draw = ImageDraw.Draw(image)
            draw.rectangle(
                [image.width * 0.86, image.height * 0.92, image.width * 0.98, image.height * 0.97], fill="grey"
            )
        both = thumbnails(images).numpy(), thumbnails(marked).numpy()
        assert confirmed(np.array([(0, 0), (1, 1)]), *both, LEAST, 0.9).all()


def test_copies_of_photographs_are_found_and_the_best_is_kept():
    """All of it on real pictures: small copies and re-encoded ones give way to the largest."""
    images = photographs()[2:]
    pool = [encoded(image.resize((120, 120)), quality=60) for image in images] + images + [images[3]]
    hashes = np.array([str(hash(image.tobytes())) for image in pool])
    pairs = np.array([(one, other) for one in range(len(pool)) for other in range(one)])
    small_ones = thumbnails(pool).numpy()
    near = pairs[confirmed(pairs, small_ones, small_ones, LEAST)]
    group = groups(len(pool), np.concatenate([same_pixels(hashes), near]))
    pixels = np.array([image.width * image.height for image in pool])
    found = originals(group, pixels, np.array([f"{index:02}" for index in range(len(pool))]))
    assert found.tolist() == [*range(12, 24), *range(12, 24), 15]
