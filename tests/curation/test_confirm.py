"""Confirming copies: real ones pass, pictures of different things do not, in one frame or not."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dino.curation import confirm
from dino.curation.confirm import confirmed
from dino.curation.duplicates import groups, originals, same_pixels
from dino.curation.settings import Duplicates
from dino.curation.thumbnails import MIDDLE, similarity, smaller
from tests.curation.pictures import COPIES, cut, encoded, photographs, thumbnails

WHOLE, DETAILS = Duplicates().similarity, Duplicates().details


class TestConfirmed:
    @pytest.mark.parametrize("chunk", [1, 3, 4, 4096])
    def test_pairs_that_are_alike(self, chunk, monkeypatch):
        monkeypatch.setattr(confirm, "CHUNK", chunk)
        monkeypatch.setattr(confirm, "CACHED", max(1, chunk // 2))
        images = photographs()
        first = thumbnails(images).numpy()
        second = thumbnails([encoded(image, quality=50) for image in reversed(images)]).numpy()
        pairs = np.array([(one, other) for one in range(4) for other in range(len(images))])
        expected = [one + other == len(images) - 1 for one, other in pairs]
        found = confirmed(pairs, first, second, WHOLE, DETAILS)
        assert found.dtype == bool
        assert found.tolist() == expected
        assert confirmed(pairs, first, second, -1.0).all()
        assert not confirmed(pairs, first, second, 1.01).any()

    def test_no_pairs(self):
        found = confirmed(np.empty((0, 2), dtype=np.int64), *np.zeros((2, 3, 64, 64), np.uint8), WHOLE)
        assert (found.shape, found.dtype) == ((0,), bool)


CUT = {  # more than a shift undoes
    "without a frame of 2.5 %": lambda image: cut(image, 0.025, 0.025, 0.025, 0.025),
    "without a frame of 5 %, encoded": lambda image: encoded(cut(image, 0.05, 0.05, 0.05, 0.05), quality=60),
    "without its upper 7 %": lambda image: cut(image, 0, 0.07),
    "without its left 4 % and lower 3 %": lambda image: cut(image, 0.04, 0, 0, 0.03),
}


class TestDetails:
    """Tell different things in one frame apart, and pass copies; not those in a new frame."""

    @pytest.mark.parametrize("copy", [name for name in [*COPIES, *CUT] if name != "in a frame of 1 %"])
    def test_copies_of_photographs_pass(self, copy):
        images = photographs()[:2]
        both = thumbnails(images).numpy(), thumbnails([(COPIES | CUT)[copy](image) for image in images]).numpy()
        assert confirmed(np.array([(0, 0), (1, 1)]), *both, WHOLE, DETAILS).all()

    def test_other_things_in_one_frame_do_not(self):
        """A disc in a frame, each time with another photograph on it: as wholes they correlate above 0.9."""
        pieces = [image.convert("L").resize((120, 120)) for image in photographs()[2:10]]
        disc = Image.new("L", (120, 120), 0)
        ImageDraw.Draw(disc).ellipse((20, 20, 100, 100), fill=255)
        scenes = []
        for piece in pieces:
            texture = piece.point(lambda value: 20 + value // 2)
            scenes.append(Image.composite(texture, Image.new("L", (120, 120), 250), disc))
        images = thumbnails(scenes)
        pairs = np.array([(one, other) for one in range(8) for other in range(one)])
        assert similarity(*(smaller(images[pairs[:, side]], MIDDLE) for side in (0, 1)))[0].min() > 0.9
        assert confirmed(pairs, images.numpy(), images.numpy(), WHOLE).all()
        assert (
            confirmed(pairs, images.numpy(), images.numpy(), WHOLE, DETAILS).mean() < 0.15
        )  # the frame itself is alike
        itself = np.stack([np.arange(8)] * 2, axis=1)
        assert confirmed(itself, images.numpy(), images.numpy(), WHOLE, DETAILS).all()

    @pytest.mark.parametrize("degrees", [0.5, 1, 1.5])
    def test_a_scan_that_lies_askew_passes(self, degrees):
        images = photographs()[:2]
        turned = [cut(image.rotate(degrees, Image.Resampling.BICUBIC), 0.03, 0.03, 0.03, 0.03) for image in images]
        both = thumbnails(images).numpy(), thumbnails(turned).numpy()
        assert confirmed(np.array([(0, 0), (1, 1)]), *both, WHOLE, DETAILS).all()

    def test_a_mark_in_a_corner_passes(self):
        images = photographs()[:2]
        marked = [image.copy() for image in images]
        for image in marked:
            draw = ImageDraw.Draw(image)
            draw.rectangle(
                [image.width * 0.86, image.height * 0.92, image.width * 0.98, image.height * 0.97], fill="grey"
            )
        both = thumbnails(images).numpy(), thumbnails(marked).numpy()
        assert confirmed(np.array([(0, 0), (1, 1)]), *both, WHOLE, DETAILS).all()

    def test_pages_with_nothing_on_them(self):
        """Where no part shows anything there is nothing to differ in: the wholes decide."""
        blank, other = np.full((1, 64, 64), 250, np.uint8), np.full((1, 64, 64), 20, np.uint8)
        pair = np.array([(0, 0)])
        assert confirmed(pair, blank, blank, WHOLE, DETAILS).all()
        assert not confirmed(pair, blank, other, WHOLE, DETAILS).any()


def test_copies_of_photographs_are_found_and_the_best_is_kept():
    """All of it on real pictures: small copies and re-encoded ones give way to the largest."""
    images = photographs()[2:]
    pool = [encoded(image.resize((120, 120)), quality=60) for image in images] + images + [images[3]]
    hashes = np.array([str(hash(image.tobytes())) for image in pool])
    pairs = np.array([(one, other) for one in range(len(pool)) for other in range(one)])
    small_ones = thumbnails(pool).numpy()
    near = pairs[confirmed(pairs, small_ones, small_ones, WHOLE, DETAILS)]
    group = groups(len(pool), np.concatenate([same_pixels(hashes), near]))
    pixels = np.array([image.width * image.height for image in pool])
    found = originals(group, pixels, np.array([f"{index:02}" for index in range(len(pool))]))
    assert found.tolist() == [*range(12, 24), *range(12, 24), 15]
