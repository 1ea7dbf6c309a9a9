"""Duplicates: copies of real pictures are told from other pictures; groups and originals against plain definitions."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

from dino.curation.duplicates import confirmed, groups, likeness, originals, same_pixels, thumbnail

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
        assert (found.shape, found.dtype) == ((32, 32), torch.uint8)
        assert (found == 20).all()

    @pytest.mark.parametrize("channels", [1, 3, 5])
    def test_is_the_mean_of_blocks(self, channels):
        """Of a picture of blocks as large as a thumbnail's pixels: away from their borders each keeps its value."""
        blocks = torch.randint(256, (4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        image = blocks.repeat_interleave(64, 0).repeat_interleave(64, 1).expand(channels, 256, 256)
        assert torch.equal(thumbnail(image)[4::8, 4::8], blocks)

    def test_equals_pillow(self):
        for image in photographs():
            grey = Image.fromarray(np.asarray(image).astype(np.float32).mean(axis=2))
            peer = np.asarray(grey.resize((32, 32), Image.Resampling.BILINEAR))
            np.testing.assert_allclose(small(image).numpy(), peer, rtol=0, atol=0.51)

    @pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (7, 7), (32, 32), (1000, 33)])
    def test_any_size(self, height, width):
        found = thumbnail(torch.full((3, height, width), 200, dtype=torch.uint8))
        assert found.shape == (32, 32)
        assert (found == 200).all()

    def test_of_its_own_size_is_the_image(self):
        image = torch.randint(256, (1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        assert torch.equal(thumbnail(image), image[0])


def greatest_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """NumPy's, over all whole shifts, of what the two then have in common."""
    padded = np.pad(other.astype(float), 3, constant_values=np.nan)
    shifted = [padded[y : y + 32, x : x + 32] for y in range(7) for x in range(7)]
    return max(np.corrcoef(one[~np.isnan(part)], part[~np.isnan(part)])[0, 1] for part in shifted)


class TestLikeness:
    @pytest.mark.parametrize("copy", COPIES)
    def test_copies_of_photographs_are_alike(self, copy):
        images = photographs()
        first, second = thumbnails(images), thumbnails([COPIES[copy](image) for image in images])
        assert likeness(first, second).min() >= LEAST
        assert likeness(second, first).min() >= LEAST

    @pytest.mark.parametrize("copy", ["JPEG of quality 90", "half as large", "darker", "without its left 3 %"])
    def test_copies_of_drawings_are_alike(self, copy):
        images, _ = digits()
        first, second = thumbnails(images), thumbnails([COPIES[copy](image) for image in images])
        assert likeness(first, second).min() >= LEAST

    def test_other_photographs_are_not(self):
        images = thumbnails(photographs())
        for number, image in enumerate(images):
            found = likeness(image.expand_as(images), images)
            assert found[number] == pytest.approx(1, abs=1e-5)
            found[number] = 0
            assert found.max() < 0.8

    def test_other_digits_are_not(self):
        """Only of the same class do some come near."""
        images, classes = digits()
        images = thumbnails(images)
        for image, own in zip(images, classes, strict=True):
            found = likeness(image.expand_as(images), images)
            assert found[torch.from_numpy(classes != own)].max() < LEAST

    @pytest.mark.parametrize("down", [-4, -3, 0, 1, 3, 4])
    @pytest.mark.parametrize("right", [-4, -3, 0, 2, 3])
    def test_shifts_of_up_to_three_pixels_are_undone(self, down, right):
        noise = torch.randint(256, (40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        first, second = noise[4:36, 4:36], noise[4 + down : 36 + down, 4 + right : 36 + right]
        found = float(likeness(first[None], second[None]))
        if max(abs(down), abs(right)) <= 3:
            assert found == pytest.approx(1, abs=1e-5)
        else:
            assert found < 0.2

    def test_is_the_greatest_correlation(self):
        """Over whole shifts; between them it may be a little greater."""
        pixels = np.random.default_rng(0).integers(256, size=(2, 10, 32, 32), dtype=np.uint8)
        pixels[1] = 0.5 * pixels[0] + 0.5 * pixels[1]
        expected = np.array([greatest_correlation(one, other) for one, other in zip(*pixels, strict=True)])
        found = likeness(*torch.from_numpy(pixels)).numpy()
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
        first, second = (small(Image.fromarray(part)) for part in (ink[:128, :128], ink[shift:, shift:]))
        whole, found = greatest_correlation(first.numpy(), second.numpy()), float(likeness(first[None], second[None]))
        assert whole - 1e-5 <= found <= 1
        assert found > 0.85
        if shift % 4 == 2:
            assert found > whole + 0.05

    def test_negatives_are_unlike(self):
        image = thumbnails(photographs()[:2])
        assert likeness(image, 255 - image).max() < 0.5

    def test_images_of_one_grey(self):
        """Are alike, and like nothing else."""
        flat, picture = torch.full((1, 32, 32), 77, dtype=torch.uint8), thumbnails(photographs()[:1])
        first, second = torch.cat([flat, flat, picture, picture]), torch.cat([flat, picture, flat, picture])
        torch.testing.assert_close(likeness(first, second), torch.tensor([1.0, 0, 0, 1]), rtol=0, atol=1e-6)
        assert likeness(flat, 255 - flat).tolist() == [0]

    def test_all_but_one_grey(self):
        """The noise of a JPEG of a blank page says nothing, not even where it is that of another picture."""
        generator = torch.Generator().manual_seed(0)
        noise = [(torch.rand(1, 32, 32, generator=generator) < 0.02).byte() + 254 for _ in range(2)]
        assert likeness(*noise).tolist() == [1]
        ink = (noise[0] - 254) * 255
        assert likeness(noise[0], ink).tolist() == likeness(ink, noise[0]).tolist() == [0]

    def test_what_is_drawn_at_the_border_counts(self):
        """A page that is blank but for its margin is like itself."""
        page = torch.full((1, 32, 32), 255, dtype=torch.uint8)
        page[:, 1, 2:30:3] = 0
        assert likeness(page, page).item() == pytest.approx(1, abs=1e-5)

    def test_none(self):
        none = torch.empty(0, 32, 32, dtype=torch.uint8)
        assert likeness(none, none).shape == (0,)


class TestConfirmed:
    @pytest.mark.parametrize("chunk", [1, 3, 4, 4096])
    def test_pairs_that_are_alike(self, chunk):
        images = photographs()
        first = thumbnails(images).numpy()
        second = thumbnails([encoded(image, quality=50) for image in reversed(images)]).numpy()
        pairs = np.array([(one, other) for one in range(4) for other in range(len(images))])
        expected = [one + other == len(images) - 1 for one, other in pairs]
        found = confirmed(pairs, first, second, LEAST, chunk)
        assert found.dtype == bool
        assert found.tolist() == expected
        assert confirmed(pairs, first, second, -1.0, chunk).all()
        assert not confirmed(pairs, first, second, 1.01, chunk).any()

    def test_no_pairs(self):
        found = confirmed(np.empty((0, 2), dtype=np.int64), *np.zeros((2, 3, 32, 32), np.uint8), LEAST)
        assert (found.shape, found.dtype) == ((0,), bool)


def joined(count: int, pairs: np.ndarray) -> list[set[int]]:
    """Groups, by giving all of one the number of the other, pair by pair."""
    number = list(range(count))
    for one, other in pairs.tolist():
        number = [number[one] if own == number[other] else own for own in number]
    return [{place for place, own in enumerate(number) if own == number[image]} for image in range(count)]


class TestGroups:
    @pytest.mark.parametrize("pairs", [0, 1, 10, 40, 200])
    @pytest.mark.parametrize("seed", range(4))
    def test_equal_joining_pair_by_pair(self, seed, pairs):
        drawn = np.random.default_rng((seed, pairs)).integers(60, size=(pairs, 2))
        found = groups(60, drawn)
        assert [set(np.flatnonzero(found == own).tolist()) for own in found] == joined(60, drawn)

    def test_chain_worked_by_hand(self):
        """0–3, 3–5 and 4–1 twice: {0, 3, 5}, {1, 4}, {2}."""
        found = groups(6, np.array([[0, 3], [5, 3], [4, 1], [1, 4]])).tolist()
        assert found[0] == found[3] == found[5]
        assert found[1] == found[4]
        assert len({found[0], found[1], found[2]}) == 3

    def test_no_images(self):
        assert groups(0, np.empty((0, 2), dtype=np.int64)).shape == (0,)


class TestOriginals:
    def test_most_pixels_then_name(self):
        """Worked by hand: group 0 by its pixels, group 1 by name, group 2 alone."""
        group = np.array([0, 1, 0, 2, 1, 0, 1])
        pixels = np.array([100, 50, 900, 1, 50, 400, 49])
        names = np.array(["a", "d", "z", "x", "b", "c", "a"])
        assert originals(group, pixels, names).tolist() == [2, 4, 2, 3, 4, 2, 4]

    @pytest.mark.parametrize("seed", range(5))
    def test_equal_brute_force(self, seed):
        generator = np.random.default_rng(seed)
        group = groups(80, generator.integers(80, size=(50, 2)))
        pixels = generator.integers(1, 4, size=80) * 10**9
        names = np.array([f"{number}.jpg" for number in generator.permutation(80)])  # 10 is before 9
        expected = [
            min(np.flatnonzero(group == own).tolist(), key=lambda place: (-pixels[place], str(names[place])))
            for own in group
        ]
        assert originals(group, pixels, names).tolist() == expected

    def test_order_of_images_does_not_matter(self):
        generator = np.random.default_rng(0)
        group, pixels = generator.integers(9, size=60), generator.integers(3, size=60)
        group = np.unique(group, return_inverse=True)[1]
        names, order = np.array([f"{number:03}" for number in range(60)]), generator.permutation(60)
        one = names[originals(group, pixels, names)]
        other = names[order][originals(group[order], pixels[order], names[order])]
        assert one[order].tolist() == other.tolist()

    def test_no_images(self):
        none = np.empty(0, dtype=np.int64)
        assert originals(none, none, np.empty(0, dtype=str)).shape == (0,)


class TestSamePixels:
    @pytest.mark.parametrize("seed", range(5))
    def test_join_images_of_equal_hash(self, seed):
        generator = np.random.default_rng(seed)
        hashes = np.array(["", "aa", "ab", "b", *(f"{n}" for n in range(9))])[generator.integers(13, size=50)]
        pairs = same_pixels(hashes)
        assert (hashes[pairs[:, 0]] == hashes[pairs[:, 1]]).all()
        expected = [
            {place} if own == "" else set(np.flatnonzero(hashes == own).tolist()) for place, own in enumerate(hashes)
        ]
        assert joined(50, pairs) == expected

    def test_unreadable_ones_are_no_copies(self):
        assert same_pixels(np.array(["", "", ""])).shape == (0, 2)

    @pytest.mark.parametrize("hashes", [[], ["a"], ["a", "b", "c"]])
    def test_none(self, hashes):
        assert same_pixels(np.array(hashes, dtype=str)).shape == (0, 2)


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
    found = originals(group, pixels, np.array([f"{place:02}" for place in range(len(pool))]))
    assert found.tolist() == [*range(12, 24), *range(12, 24), 15]
