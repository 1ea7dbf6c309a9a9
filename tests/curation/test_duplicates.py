"""Groups of copies and who stands for them, against plain definitions; copies and test sets from features to groups."""

import numpy as np
import pyarrow as pa
import pytest

from dino.curation.duplicates import distinct, find_copies, groups, originals, same_pixels
from dino.curation.embed import Embedded
from dino.curation.settings import Duplicates
from dino.data.sources.source import packed


def joined(count: int, pairs: np.ndarray) -> list[set[int]]:
    """Groups, by giving all of one the number of the other, pair by pair."""
    number = list(range(count))
    for one, other in pairs.tolist():
        number = [number[one] if own == number[other] else own for own in number]
    return [{index for index, own in enumerate(number) if own == number[image]} for image in range(count)]


class TestGroups:
    @pytest.mark.parametrize("pairs", [0, 1, 10, 40, 200])
    @pytest.mark.parametrize("seed", range(4))
    def test_equal_joining_pair_by_pair(self, seed, pairs):
        pairs_of_images = np.random.default_rng((seed, pairs)).integers(60, size=(pairs, 2))
        found = groups(60, pairs_of_images)
        assert [set(np.flatnonzero(found == own).tolist()) for own in found] == joined(60, pairs_of_images)

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
            min(np.flatnonzero(group == own).tolist(), key=lambda index: (-pixels[index], str(names[index])))
            for own in group
        ]
        assert originals(group, pixels, names).tolist() == expected

    def test_no_images(self):
        none = np.empty(0, dtype=np.int64)
        assert originals(none, none, np.empty(0, dtype=str)).shape == (0,)


class TestSamePixels:
    @pytest.mark.parametrize("seed", range(5))
    def test_join_images_of_equal_hash(self, seed):
        generator = np.random.default_rng(seed)
        hashes = np.array(["", "aa", "ab", "b", *(f"{n}" for n in range(9))], "S32")[generator.integers(13, size=50)]
        pairs = same_pixels(hashes)
        assert (hashes[pairs[:, 0]] == hashes[pairs[:, 1]]).all()
        expected = [
            {index} if own == b"" else set(np.flatnonzero(hashes == own).tolist()) for index, own in enumerate(hashes)
        ]
        assert joined(50, pairs) == expected

    def test_unreadable_ones_are_no_copies(self):
        assert same_pixels(np.array(["", "", ""], "S32")).shape == (0, 2)

    @pytest.mark.parametrize("hashes", [[], ["a"], ["a", "b", "c"]])
    def test_none(self, hashes):
        assert same_pixels(np.array(hashes, "S32")).shape == (0, 2)


def embedded(directions: list[float], hashes: list[str], drawings: list[int]) -> Embedded:
    """Images by the angle of their features in degrees, their hash, and the seed of the noise on their thumbnail."""
    angles = np.radians(directions)
    noise = [np.random.default_rng(seed).integers(256, size=(64, 64), dtype=np.uint8) for seed in drawings]
    return Embedded(
        tokens=np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16),
        thumbnails=np.stack(noise),
        hashes=np.array(hashes, "S32"),
        sizes=np.full((len(hashes), 2), 10),
        reasons=pa.array(["" if digest else "torn" for digest in hashes]).dictionary_encode(),
        key=[],
    )


class TestFindCopies:
    """Worked by hand: 0 and 1 are near and look alike, 2 is near and looks otherwise, 3 equals 0, 4 is unreadable."""

    POOL = embedded([0, 5, 5, 0, 0, 90], ["a", "b", "c", "a", "", "d"], [1, 1, 2, 1, 1, 3])

    @pytest.mark.parametrize(
        ("settings", "original", "near", "candidates"),
        [
            ({}, [0, 0, 2, 0, -1, 5], [[0, 1]], 6),
            ({"similarity": 0.0}, [0, 0, 0, 0, -1, 5], [[0, 1], [0, 2], [1, 2]], 6),
            ({"near": 0.0}, [0, 1, 2, 0, -1, 5], [], 0),
            ({"near": 0.9999, "similarity": 0.0}, [0, 1, 1, 0, -1, 5], [[1, 2]], 2),
            ({"near": 0.9999}, [0, 0, 2, 0, -1, 5], [[0, 1]], 4),  # proposed by their thumbnails
        ],
    )
    def test_of_a_pool(self, settings, original, near, candidates):
        copies = find_copies(self.POOL, packed("uvwxyz"), [], Duplicates(**settings))
        assert copies.original.tolist() == original
        assert copies.near.tolist() == near
        assert copies.candidates == candidates
        assert copies.matches.tolist() == [0] * 6
        assert len(copies.cosines) == len(near)

    def test_of_test_sets(self):
        """By features and thumbnails as by hash; a copy of what matches matches, and the first test set is named."""
        near, equal = embedded([4], ["x"], [1]), embedded([200, 0], ["d", ""], [9, 9])
        copies = find_copies(self.POOL, packed("uvwxyz"), [near, equal, near], Duplicates())
        assert copies.matches.tolist() == [1, 1, 0, 1, 0, 2]


def test_distinct_images_are_the_first_of_each_hash():
    assert distinct(np.array(["b", "", "a", "b", "a", "c"], "S32")).tolist() == [0, 2, 5]
