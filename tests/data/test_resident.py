"""A pool kept on the device gives the images that reading gives, and those that workers would take for broken ones."""

import io
import os
import threading
import warnings
import zipfile
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dino.data import ResidentImages, UnreadableImage, estimated_bytes, open_images
from dino.errors import UserError
from dino.views import MultiCrop, View, ViewsDataset

CPU = torch.device("cpu")
UNIFORM = [(12, 9)] * 7
RAGGED = [(12, 9), (4, 30), (25, 6), (12, 9), (5, 5), (31, 17), (4, 4)]


class Pool:
    """Images of noise of the sizes asked for; those in `unreadable` cannot be read. `reads` lists what was asked."""

    def __init__(self, sizes: Sequence[tuple[int, int]], channels: int = 3, unreadable: tuple[int, ...] = ()):
        generator = torch.Generator().manual_seed(0)
        shapes = [(channels, *size) for size in sizes]
        self.pixels = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]
        self.names = [str(index) for index in range(len(sizes))]
        self.unreadable, self.reads = unreadable, []

    def read(self, index: int) -> Tensor:
        self.reads.append(index)
        if index in self.unreadable:
            raise UnreadableImage(f"{index} is broken")
        return self.pixels[index]


def resident(images) -> ResidentImages:
    return ResidentImages(images, CPU, show_progress=False)


def border_median(image: Tensor) -> np.ndarray:
    """The lower median of each channel's border, a corner counted for both of its sides."""
    sides = [np.concatenate([side[0], side[-1], side[:, 0], side[:, -1]]) for side in image.numpy()]
    return np.array([sorted(side)[(len(side) - 1) // 2] for side in sides])


def assert_holds(canvas, images: list[Tensor]) -> None:
    """Each image in the top left corner of a canvas as large as the largest, surrounded by its border's median."""
    largest = np.max([image.shape[1:] for image in images], axis=0)
    assert canvas.pixels.dtype == canvas.background.dtype == torch.uint8
    assert tuple(canvas.pixels.shape) == (len(images), images[0].shape[0], *largest)
    for found, colour, size, image in zip(*canvas, images, strict=True):
        height, width = image.shape[1:]
        assert size.tolist() == [height, width]
        assert colour.tolist() == border_median(image).tolist()
        assert torch.equal(found[:, :height, :width], image)
        for beyond in (found[:, height:], found[:, :, width:]):
            assert (beyond == colour[:, None, None]).all()


class TestGather:
    @pytest.mark.parametrize("channels", [1, 3, 5])
    @pytest.mark.parametrize("sizes", [UNIFORM, RAGGED], ids=["one size", "many sizes"])
    def test_images_are_those_that_reading_gives(self, sizes, channels):
        """In any order, also repeated, and of any part of the pool."""
        pool = Pool(sizes, channels)
        images = resident(pool)
        for indices in ([0], [6, 0, 3], [3, 3, 1], [5, 4], list(range(7)), [6, 6]):
            assert_holds(images.gather(indices), [pool.pixels[index] for index in indices])

    def test_a_canvas_is_no_part_of_the_pool(self):
        """What is done to a batch is not done to the images."""
        for sizes in (UNIFORM, RAGGED):
            pool = Pool(sizes)
            images = resident(pool)
            canvas = images.gather([0, 1, 2])
            canvas.pixels.zero_()
            canvas.background.zero_()
            assert_holds(images.gather([0, 1, 2]), pool.pixels[:3])

    def test_a_folder_and_an_archive_decoded_by_threads_are_in_their_own_order(self, tmp_path):
        archive, generator = tmp_path / "pool.zip", np.random.default_rng(0)
        with zipfile.ZipFile(archive, "w") as file:
            for number in range(60):
                pixels = generator.integers(0, 256, (*generator.integers(4, 40, 2), 3), dtype=np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                file.writestr(f"{number}.png", buffer.getvalue() if number % 20 else b"no image")
            file.extractall(tmp_path / "pool")
        for root in (tmp_path / "pool", archive):
            pool = open_images(str(root))
            images = resident(pool)
            broken = [pool.names.index(f"{number}.png") for number in (0, 20, 40)]
            assert sorted(index for index, _ in images.unreadable) == sorted(broken)
            readable = [index for index in range(60) if index not in broken]
            assert_holds(images.gather(readable), [pool.read(index) for index in readable])


class TestUnreadable:
    @pytest.mark.parametrize("unreadable", [(2,), (0, 1), (2, 3, 6), (5, 6), (0, 6), (0, 1, 2, 3, 4, 5)])
    @pytest.mark.parametrize("sizes", [UNIFORM, RAGGED], ids=["one size", "many sizes"])
    def test_the_image_that_workers_take_takes_its_place(self, sizes, unreadable):
        """The next readable one; after the last comes the first."""
        pool = Pool(sizes, unreadable=unreadable)
        images = resident(pool)
        assert images.unreadable == [(index, f"{index} is broken") for index in unreadable]
        dataset, taken, skipped = ViewsDataset(pool, MultiCrop((View(4, (1.0, 1.0)),), ()), seed=0), [], set()
        for index in range(len(sizes)):
            skipped.update(dataset[0, index].skipped)
            taken.append(pool.reads[-1])
        assert skipped == set(images.unreadable)
        assert_holds(images.gather(range(len(sizes))), [pool.pixels[index] for index in taken])

    def test_a_reason_may_be_empty(self):
        class Silent(Pool):
            def read(self, index: int) -> Tensor:
                if index == 1:
                    raise UnreadableImage
                return super().read(index)

        pool = Silent(UNIFORM)
        images = resident(pool)
        assert [index for index, _ in images.unreadable] == [1]
        assert all(reason for _, reason in images.unreadable)
        assert_holds(images.gather([1]), [pool.pixels[2]])

    def test_no_readable_image_at_all(self):
        with pytest.raises(UserError, match=r"no image of 3 can be read; the first: 0 is broken"):
            resident(Pool(UNIFORM[:3], unreadable=(0, 1, 2)))

    def test_other_errors_are_not_taken_for_broken_images(self):
        class Faulty(Pool):
            def read(self, index: int) -> Tensor:
                raise MemoryError if index == 3 else UnreadableImage

        with pytest.raises(MemoryError):
            resident(Faulty(UNIFORM))

    def test_a_pool_too_large_for_the_device_is_the_users_to_mend(self, monkeypatch):
        def full(*_: object) -> None:
            raise torch.OutOfMemoryError

        monkeypatch.setattr(Tensor, "to", full)
        with pytest.raises(UserError, match=r"data\.cache=none"):
            resident(Pool(UNIFORM))


class TestEstimate:
    def test_it_is_exact_for_images_of_one_size(self):
        for count in (1, 7, 16, 17, 100):
            assert estimated_bytes(Pool([(12, 9)] * count)) == count * 3 * 12 * 9

    def test_it_is_near_the_truth_for_many_sizes_and_reads_few(self):
        sides = np.random.default_rng(0).integers(20, 40, (1000, 2))
        pool = Pool([(int(height), int(width)) for height, width in sides])
        truth = sum(image.numel() for image in pool.pixels)
        assert estimated_bytes(pool) == pytest.approx(truth, rel=0.15)
        assert len(pool.reads) <= 16

    def test_sizes_that_change_along_the_pool_are_seen(self):
        """Classes come one after the other, in a folder of folders."""
        pool = Pool([(10, 10)] * 300 + [(40, 40)] * 100)
        truth = sum(image.numel() for image in pool.pixels)
        assert estimated_bytes(pool) == pytest.approx(truth, rel=0.15)

    def test_broken_images_are_taken_to_be_as_large_as_others(self):
        assert estimated_bytes(Pool([(12, 9)] * 40, unreadable=tuple(range(0, 40, 6)))) == 40 * 3 * 12 * 9
        assert estimated_bytes(Pool([(12, 9)] * 3, unreadable=(0, 1, 2))) == 0


class TestWarnings:
    def test_filters_are_put_back_though_threads_mix_theirs_up(self, monkeypatch):
        """Two reads that overlap put back each other's filters; `decode` sets some for the whole process."""

        class Overlapping(Pool):
            def __init__(self) -> None:
                super().__init__(UNIFORM[:2])
                self.entered, self.left = (tuple(threading.Event() for _ in range(2)) for _ in range(2))

            def read(self, index: int) -> Tensor:
                if index == 1:
                    assert self.entered[0].wait(30)
                with warnings.catch_warnings():
                    warnings.simplefilter("always")
                    self.entered[index].set()
                    assert (self.left[0] if index == 1 else self.entered[1]).wait(30)
                self.left[index].set()
                return super().read(index)

        monkeypatch.setattr(os, "cpu_count", lambda: 2)
        before = list(warnings.filters)
        resident(Overlapping())
        assert list(warnings.filters) == before

    def test_broken_metadata_of_readable_images_is_not_worth_a_warning(self, recwarn):
        class Loud(Pool):
            def read(self, index: int) -> Tensor:
                warnings.warn("corrupt EXIF", UserWarning, stacklevel=1)
                return super().read(index)

        resident(Loud(UNIFORM))
        assert len(recwarn) == 0
