"""A pool kept on the device gives the images that reading gives, and the next readable one for those that it cannot."""

import os
import threading
import warnings
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from pools import NoiseSource, archive, fill, noise_pool
from torch import Tensor

from dino.data import Pool, ResidentImages, decoded, open_images
from dino.data.resident import _read_all
from dino.distributed import cores
from dino.errors import UserError

UNIFORM = [(12, 9)] * 7
RAGGED = [(12, 9), (4, 30), (25, 6), (12, 9), (5, 5), (31, 17), (4, 4)]


def resident(images: Pool) -> ResidentImages:
    return ResidentImages(images, torch.device("cpu"), show_progress=False)


def border_median(image: Tensor) -> list[int]:
    """The lower median of each channel's border, a corner counted for both of its sides."""
    sides = [np.concatenate([side[0], side[-1], side[:, 0], side[:, -1]]) for side in image.numpy()]
    return [sorted(side)[(len(side) - 1) // 2] for side in sides]


def assert_holds(canvas, images: list[Tensor]) -> None:
    """Each image in the top left corner of a canvas as large as the largest, surrounded by its border's median."""
    largest = np.max([image.shape[1:] for image in images], axis=0)
    assert canvas.pixels.dtype == canvas.background.dtype == torch.uint8
    assert tuple(canvas.pixels.shape) == (len(images), images[0].shape[0], *largest)
    for pixels, colour, size, image in zip(*canvas, images, strict=True):
        height, width = image.shape[1:]
        assert size.tolist() == [height, width]
        assert colour.tolist() == border_median(image)
        assert torch.equal(pixels[:, :height, :width], image)
        for beyond in (pixels[:, height:], pixels[:, :, width:]):
            assert (beyond == colour[:, None, None]).all()


@pytest.mark.parametrize("sizes", [UNIFORM, RAGGED], ids=["one size", "many sizes"])
class TestGather:
    @pytest.mark.parametrize("channels", [1, 3, 5])
    def test_images_are_those_that_reading_gives(self, sizes, channels):
        """In any order, also repeated, and of any part of the pool."""
        pool = noise_pool(sizes, channels)
        images = resident(pool)
        for indices in ([0], [6, 0, 3], [3, 3, 1], [5, 4], list(range(7)), [6, 6]):
            assert_holds(images.gather(indices), [pool.source.pixels[index] for index in indices])

    def test_a_canvas_is_no_part_of_the_pool(self, sizes):
        pool = noise_pool(sizes)
        images = resident(pool)
        canvas = images.gather([0, 1, 2])
        canvas.pixels.zero_()
        canvas.background.zero_()
        assert_holds(images.gather([0, 1, 2]), pool.source.pixels[:3])

    @pytest.mark.parametrize("unreadable", [(2,), (0, 1), (2, 3, 6), (5, 6), (0, 6), (0, 1, 2, 3, 4, 5)])
    def test_the_next_readable_image_replaces_an_unreadable_one(self, sizes, unreadable):
        """After the last comes the first: as in `dino.views.workers`."""
        pool = noise_pool(sizes, unreadable=unreadable)
        images = resident(pool)
        assert images.unreadable == [(index, f"{index} is broken") for index in unreadable]
        expected = []
        for index in range(7):
            while index % 7 in unreadable:
                index += 1
            expected.append(pool.source.pixels[index % 7])
        assert_holds(images.gather(range(7)), expected)


def test_a_folder_and_an_archive_decoded_by_threads_are_in_their_own_order(tmp_path):
    root = fill(tmp_path / "pool", [f"{number}.png" for number in range(60)])
    for number in (0, 20, 40):
        (root / f"{number}.png").write_bytes(b"no image")
    members = {file.name: file.read_bytes() for file in root.iterdir()}
    for pool in (open_images(root), open_images(archive(tmp_path / "pool.zip", members))):
        images = resident(pool)
        broken = sorted(pool.names.index(f"{number}.png") for number in (0, 20, 40))
        assert [index for index, _ in images.unreadable] == broken
        readable = [index for index in range(60) if index not in broken]
        assert_holds(images.gather(readable), [pool.read(index) for index in readable])


def test_a_pool_without_a_readable_image_or_too_large_for_the_device_is_told(monkeypatch):
    with pytest.raises(UserError, match=r"no image of 3 can be read; the first: 0 is broken"):
        resident(noise_pool(UNIFORM[:3], unreadable=(0, 1, 2)))
    monkeypatch.setattr(Tensor, "to", Mock(side_effect=torch.OutOfMemoryError))
    with pytest.raises(UserError, match=r"data\.cache=none"):
        resident(noise_pool(UNIFORM))


class TestSize:
    @pytest.mark.parametrize("count", [1, 7, 16, 17, 100])
    def test_broken_images_count_as_the_others_do(self, count):
        for unreadable in ((), range(1, count, 5)):
            assert decoded(noise_pool([(12, 9)] * count, unreadable=unreadable)) == (count * 3 * 12 * 9, 3 * 12 * 9)
        assert decoded(noise_pool([(12, 9)] * count, unreadable=range(count))) == (0, 0)

    def test_a_few_large_images_are_counted_by_their_headers(self, tmp_path):
        """As viewers show them: of one the long side lies in EXIF data only."""
        small, exif = fill(tmp_path, [f"a/{number:03d}.png" for number in range(200)]), Image.Exif()
        exif[0x0112] = 6
        (small / "b").mkdir()
        Image.new("L", (500, 300)).save(small / "b" / "turned.jpg", exif=exif)
        np.save(small / "b" / "x.npy", np.zeros((400, 100, 3), np.uint8))
        pool = open_images(small)
        pixels = [pool.read(index) for index in range(len(pool.names))]
        assert decoded(pool) == (sum(image.numel() for image in pixels), 3 * 500 * 300)

    def test_a_pool_far_too_large_is_told_by_a_few(self):
        pool = noise_pool([(12, 9)] * 1000)
        assert decoded(pool, room=100) == (1000 * 3 * 12 * 9, 3 * 12 * 9)
        assert len(pool.source.reads) <= 16

    def test_images_are_not_twice_in_memory(self, monkeypatch):
        """Beside the buffer there are at most a few images that wait for being put into it."""
        pool, waiting = noise_pool([(64, 64)] * 500), []
        count = len(pool.source.reads)
        for index, _ in enumerate(_read_all(pool, False)):
            waiting.append(len(pool.source.reads) - count - index)
        assert max(waiting) <= 2 * cores() + 1


class TestWarnings:
    def test_filters_are_put_back_though_threads_mix_theirs_up(self, monkeypatch):
        """Two reads that overlap put back each other's filters; `decode` sets some for the whole process."""

        entered, is_done = (threading.Event(), threading.Event()), threading.Event()

        class Overlapping(NoiseSource):
            def read(self, index: int) -> Tensor:
                if index == 1:
                    assert entered[0].wait(30)
                with warnings.catch_warnings():
                    warnings.simplefilter("always")
                    entered[index].set()
                    assert (is_done if index == 1 else entered[1]).wait(30)
                is_done.set()
                return super().read(index)

        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
        before = list(warnings.filters)
        resident(Pool(Overlapping(UNIFORM[:2]), "noise", 3))
        assert list(warnings.filters) == before

    def test_broken_metadata_of_readable_images_is_not_worth_a_warning(self, recwarn):
        class Loud(NoiseSource):
            def read(self, index: int) -> Tensor:
                warnings.warn("corrupt EXIF", UserWarning, stacklevel=1)
                return super().read(index)

        resident(Pool(Loud(UNIFORM), "noise", 3))
        assert len(recwarn) == 0
